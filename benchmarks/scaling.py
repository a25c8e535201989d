"""How cost and memory grow: clients from 1 to 1,024, rounds in a block, image size.

Example: python -m benchmarks.scaling --json > benchmarks/results/scaling.json
"""

import argparse
import datetime
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import (
  ClientConfig,
  Config,
  DataConfig,
  ExecutionConfig,
  ModelConfig,
  PrivacyConfig,
)
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import Dataset
from fedjax_med.experiment.build import make_program
from fedjax_med.federated.algorithm import Client, Hyper, Pool
from fedjax_med.simulation.mesh import choose_devices, replicate

POOL = 512  # images; clients share them, so that memory shows the program and not the data
EXAMPLES = 16  # of a client


class Measured(NamedTuple):
  """A compiled block, ready to be timed.

  Attributes:
    run: (number of rounds) -> seconds.
    chunk: clients at once on a device.
    compile_seconds: to trace and compile.
    temporary_bytes: working memory by the compiler's account, None where it does not say.
  """

  run: Callable[[int], float]
  chunk: int
  compile_seconds: float
  temporary_bytes: int | None


def prepare(options: argparse.Namespace, clients: int, chunk: int, image_size: int) -> Measured:
  """Compiles the block for that many clients; chunk 0 leaves the choice to the plan."""
  config = Config(
    data=DataConfig(image_size=image_size),
    model=ModelConfig(name=options.model),
    client=ClientConfig(batch_size=options.batch_size),
    privacy=PrivacyConfig(mechanism="dp_sgd" if options.private else "none"),
    execution=ExecutionConfig(layout="chunk" if chunk else "auto", chunk_size=chunk),
  )
  random = np.random.default_rng(0)
  inputs = random.integers(0, 256, (POOL, image_size, image_size, 1), np.uint8)
  labels = random.integers(0, 2, POOL).astype(np.int32)
  dataset = Dataset(inputs, labels, names=(), class_names=("a", "b"))
  devices = choose_devices(options.devices, clients)
  steps = np.full(clients, options.steps, np.int64)
  program = make_program(
    config,
    dataset,
    devices=devices,
    steps=steps,
    max_examples=EXAMPLES,
    shared_steps=options.steps,
    batch_cap=EXAMPLES,
  )
  q = min(1.0, options.batch_size / EXAMPLES)
  each = np.ones(clients, np.float32)
  data = (
    Client(
      number=jnp.arange(clients),
      indices=jnp.asarray(random.integers(0, POOL, (clients, EXAMPLES)), jnp.int32),
      num_examples=jnp.full((clients,), EXAMPLES, jnp.int32),
      weight=jnp.asarray(each / clients),
      num_steps=jnp.asarray(steps, jnp.int32),
      sampling_probability=jnp.asarray(each * q),
      expected_batch_size=jnp.asarray(each * q * EXAMPLES),
      noise_multiplier=jnp.asarray(each),
    ),
    Pool(jnp.asarray(inputs), jnp.asarray(labels)),
    # learning rates, no proximal term, C = 1, no average, everyone takes part
    Hyper(*(jnp.float32(value) for value in (0.01, 1, 0, 1, 0, 1))),
    base_key(0),
  )
  data = replicate(data, devices.mesh)
  state = program.initial()
  started = time.perf_counter()
  compiled = program.block.lower(state, *data, jnp.asarray(1)).compile()
  compile_seconds = time.perf_counter() - started
  analysis = compiled.memory_analysis()
  current = [state]

  def run(rounds: int) -> float:
    number = replicate(jnp.asarray(rounds), devices.mesh)
    started = time.perf_counter()
    current[0], _ = jax.block_until_ready(compiled(current[0], *data, number))
    return time.perf_counter() - started

  run(1)  # the first call also loads
  return Measured(
    run,
    program.plan.chunk,
    compile_seconds,
    None if analysis is None else analysis.temp_size_in_bytes,
  )


def line_of(measured: Measured) -> dict[str, Any]:
  size = measured.temporary_bytes
  return {
    "chunk": measured.chunk,
    "compile_s": round(measured.compile_seconds, 3),
    "working_memory_mib": None if size is None else round(size / 2**20, 3),
  }


def by_clients(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Seconds a client-step for each number of clients, under the plan's chunk and under others."""
  lines = []
  for clients in options.clients:
    chunks = [0, *(chunk for chunk in options.chunks if chunk <= clients)]
    prepared = {chunk: prepare(options, clients, chunk, options.image_size) for chunk in chunks}
    rounds = max(1, options.client_steps // (clients * options.steps))
    seconds: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    for _ in range(options.repeats):  # in alternation, so that a busy machine slows all alike
      for chunk, measured in prepared.items():
        seconds[chunk].append(measured.run(rounds) / (rounds * clients * options.steps))
    for chunk, measured in prepared.items():
      lines.append(
        {
          "clients": clients,
          "layout": f"chunk({chunk})" if chunk else "auto",
          **line_of(measured),
          "seconds_per_client_step": statistics.median(seconds[chunk]),
        }
      )
      say(lines[-1])
  return lines


def by_rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Seconds a round for blocks of more and more rounds, one compiled program for all."""
  clients = 16
  measured = prepare(options, clients, 0, options.image_size)
  lines = []
  for rounds in options.rounds:
    seconds = [measured.run(rounds) / rounds for _ in range(options.repeats)]
    lines.append(
      {"rounds": rounds, "clients": clients, "seconds_per_round": statistics.median(seconds)}
    )
    say(lines[-1])
  return lines


def by_image_size(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Seconds a training image and per thousand of its pixels, for larger and larger images."""
  lines = []
  for size in options.image_sizes:
    measured = prepare(options, 4, 0, size)
    images = 4 * options.steps * options.batch_size
    rounds = max(1, options.client_steps // (8 * 4 * options.steps))
    seconds = [measured.run(rounds) / (rounds * images) for _ in range(options.repeats)]
    cost = statistics.median(seconds)
    lines.append(
      {
        "image_size": size,
        **line_of(measured),
        "seconds_per_image": cost,
        "seconds_per_thousand_pixels": cost / size**2 * 1000,
      }
    )
    say(lines[-1])
  return lines


def summary(clients: list[dict[str, Any]]) -> dict[str, Any]:
  """Ratios that a reader looks for: cost over the best chunk's, memory and cost over clients."""
  auto = {line["clients"]: line for line in clients if line["layout"] == "auto"}

  def best(number: int) -> float:
    return min(line["seconds_per_client_step"] for line in clients if line["clients"] == number)

  overall = min(line["seconds_per_client_step"] for line in clients)
  costs = {number: line["seconds_per_client_step"] for number, line in auto.items()}
  memory = [line["working_memory_mib"] for line in auto.values()]
  return {
    "auto_over_best_chunk": {
      number: round(cost / best(number), 3) for number, cost in costs.items()
    },
    "auto_over_best_of_all": {number: round(cost / overall, 3) for number, cost in costs.items()},
    "memory_largest_over_smallest": None if None in memory else round(max(memory) / min(memory), 3),
  }


def header() -> dict[str, Any]:
  """Where and when a result comes from."""
  commit = subprocess.run(
    ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
  )
  return {
    "benchmark": "scaling",
    "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit.stdout.strip() or None,
    "command": shlex.join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]]),
    "jax": jax.__version__,
  }


def say(value: Any) -> None:
  print(value, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)

  def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]

  parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
  parser.add_argument("--model", default="cnn_small", help="a name of the model registry")
  parser.add_argument("--private", action="store_true", help="with clipping and noise")
  parser.add_argument("--image_size", type=int, default=16, help="of the sweeps over others")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--steps", type=int, default=2, help="local steps a round")
  parser.add_argument("--devices", type=int, default=0, help="as execution.devices")
  parser.add_argument("--repeats", type=int, default=5, help="the median counts")
  parser.add_argument("--client_steps", type=int, default=512, help="in a repeat, about")
  parser.add_argument("--clients", type=numbers, default=[1, 4, 16, 64, 256, 1024])
  parser.add_argument("--chunks", type=numbers, default=[1, 4, 16], help="compared with the plan's")
  parser.add_argument("--rounds", type=numbers, default=[1, 4, 16, 64])
  parser.add_argument("--image_sizes", type=numbers, default=[16, 32, 64, 128])
  return parser.parse_args(arguments)


def main() -> None:
  options = parse(sys.argv[1:])
  result = header() | {"options": {k: v for k, v in vars(options).items() if k != "json"}}
  clients = by_clients(options)
  result |= {
    "clients": clients,
    **(summary(clients) if clients else {}),
    "rounds": by_rounds(options) if options.rounds else [],
    "images": by_image_size(options),
  }
  if options.json:
    print(json.dumps(result, indent=2))
  else:
    say({key: value for key, value in result.items() if key not in ("clients", "rounds", "images")})


if __name__ == "__main__":
  main()
