"""Rounds between processes over throttled sockets, against the times that deployment.json says.

A server and its hospitals are processes on one machine. Whoever sends is held to a rate of bytes by
a token bucket, and each message waits for the latency. A hospital sleeps for its local steps.

Example: python -m benchmarks.deployment --json --out benchmarks/results/deployment-cpu.json
"""

import multiprocessing
import socket
import statistics
import time
from typing import Any

import numpy as np

from benchmarks import common
from fedjax_med.core.config import Config
from fedjax_med.prepare.deployment import client_seconds, deployment_record, links_of

CHUNK = 16_384  # bytes that a token bucket lets through at once
# Megabits a second up and down, milliseconds, speeds, seconds a step, bytes down and up, steps.
CASES: dict[str, dict[str, Any]] = {
  "20 Mbit/s, equal": {
    "up": "20", "down": "20", "latency": 10.0, "speed": "1", "step": 0.02,
    "message": (300_000, 300_000), "steps": [10, 10],
  },
  "20 and 50 Mbit/s, one slow computer": {
    "up": "20,50", "down": "50", "latency": 40.0, "speed": "1,0.25", "step": 0.02,
    "message": (300_000, 300_000), "steps": [10, 10],
  },
  "int8 up": {
    "up": "20", "down": "100", "latency": 40.0, "speed": "1", "step": 0.01,
    "message": (1_200_000, 301_200), "steps": [10, 20],
  },
}  # fmt: skip


def send(connection: socket.socket, size: int, rate: float, latency: float) -> None:
  """Sends ``size`` bytes at ``rate`` bytes a second at most, after ``latency`` seconds."""
  time.sleep(latency)
  started, sent, block = time.monotonic(), 0, bytes(CHUNK)
  while sent < size:
    part = min(CHUNK, size - sent)
    connection.sendall(block[:part])
    sent += part
    ahead = sent / rate - (time.monotonic() - started)
    if ahead > 0:
      time.sleep(ahead)


def receive(connection: socket.socket, size: int) -> None:
  """Receives ``size`` bytes."""
  while size:
    part = connection.recv(min(CHUNK, size))
    if not part:
      raise ConnectionError("the other side has left")
    size -= len(part)


def hospital(port: int, link: dict[str, Any], rounds: int) -> None:
  """One hospital: gets the model, sleeps for its steps, sends its update, in every round."""
  with socket.create_connection(("127.0.0.1", port)) as connection:
    connection.sendall(bytes([link["number"]]))
    for _ in range(rounds):
      receive(connection, link["bytes_down"])
      time.sleep(link["compute"])
      send(connection, link["bytes_up"], link["up"] / 8, link["latency"])


def serve(links: list[dict[str, Any]], rounds: int) -> list[float]:
  """Seconds of each synchronous round."""
  from concurrent.futures import ThreadPoolExecutor

  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    processes = [
      multiprocessing.get_context("spawn").Process(target=hospital, args=(port, link, rounds))
      for link in links
    ]
    for process in processes:
      process.start()
    found = [server.accept()[0] for _ in links]
    by_number = {connection.recv(1)[0]: connection for connection in found}

    def visit(link: dict[str, Any]) -> None:
      connection = by_number[link["number"]]
      send(connection, link["bytes_down"], link["down"] / 8, link["latency"])
      receive(connection, link["bytes_up"])

    seconds = []
    with ThreadPoolExecutor(len(links)) as threads:
      for _ in range(rounds):
        started = time.monotonic()
        list(threads.map(visit, links))
        seconds.append(time.monotonic() - started)
    for process in processes:
      process.join()
    for connection in found:
      connection.close()
  return seconds


def measure(case: dict[str, Any], rounds: int) -> dict[str, Any]:
  """Median seconds of a round over sockets beside the seconds that are said of it."""
  config, steps = Config(), np.array(case["steps"])
  cost = config.cost
  cost.uplink_mbps, cost.downlink_mbps = case["up"], case["down"]
  cost.latency_ms, cost.client_speed = case["latency"], case["speed"]
  links = links_of(config, len(steps))
  assert links is not None
  down, up = case["message"]
  told = client_seconds(links, case["message"], steps, case["step"])
  each = [
    {
      "number": k, "bytes_down": down, "bytes_up": up, "up": links.up[k], "down": links.down[k],
      "latency": links.latency, "compute": steps[k] * case["step"] / links.speed[k],
    }
    for k in range(len(steps))
  ]  # fmt: skip
  seconds = serve(each, rounds)
  names = [f"hospital {k}" for k in range(len(steps))]
  record = deployment_record(config, names, case["message"], steps, 1, case["step"], 0)
  assert record is not None
  assert record["round_seconds"] == told.max()
  measured = statistics.median(seconds)
  return {
    "told_seconds": round(float(told.max()), 4),
    "measured_seconds": round(measured, 4),
    "measured_over_told": round(measured / float(told.max()), 4),
  }


def main() -> None:
  options = common.parser(__doc__ or "").parse_args()
  found = {}
  for name, case in CASES.items():
    found[name] = measure(case, options.repeats)
    common.say(f"{name}: {found[name]}")
  common.finish(common.envelope("deployment") | {"cases": found}, options)


if __name__ == "__main__":
  main()
