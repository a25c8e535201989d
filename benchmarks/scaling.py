"""Growth of cost and memory: clients from 1 to 1,024, rounds in a block, image size.

Example: python -m benchmarks.scaling --json --out benchmarks/results/scaling-cpu.json
"""

import argparse
import statistics
import sys
from typing import Any

from benchmarks import common
from benchmarks.programs import Measured, Setting, prepare

EXAMPLES = 16  # of a client


def at(options: argparse.Namespace, clients: int, chunk: int, image_size: int) -> Measured:
  """Compiles the block for that many clients; chunk 0 leaves the choice to the plan."""
  return prepare(
    Setting(
      model=options.model,
      image_size=image_size,
      clients=clients,
      batch_size=options.batch_size,
      examples=EXAMPLES,
      steps=options.steps,
      private=options.private,
      chunk=chunk,
      devices=options.devices,
    )
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
    prepared = {chunk: at(options, clients, chunk, options.image_size) for chunk in chunks}
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
      common.say(str(lines[-1]))
  return lines


def by_rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Seconds a round for blocks of more and more rounds, one compiled program for all."""
  clients = 16
  measured = at(options, clients, 0, options.image_size)
  lines = []
  for rounds in options.rounds:
    seconds = [measured.run(rounds) / rounds for _ in range(options.repeats)]
    lines.append(
      {"rounds": rounds, "clients": clients, "seconds_per_round": statistics.median(seconds)}
    )
    common.say(str(lines[-1]))
  return lines


def by_image_size(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Seconds a training image and per thousand of its pixels, for larger and larger images."""
  lines = []
  for size in options.image_sizes:
    measured = at(options, 4, 0, size)
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
    common.say(str(lines[-1]))
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


def parse(arguments: list[str]) -> argparse.Namespace:
  parser = common.parser(__doc__ or "")

  def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]

  parser.add_argument("--model", default="cnn_small", help="a name of the model registry")
  parser.add_argument("--private", action="store_true", help="with clipping and noise")
  parser.add_argument("--image_size", type=int, default=16, help="of the sweeps over others")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--steps", type=int, default=2, help="local steps a round")
  parser.add_argument("--devices", type=int, default=0, help="as execution.devices")
  parser.add_argument("--client_steps", type=int, default=512, help="in a repeat, about")
  parser.add_argument("--clients", type=numbers, default=[1, 4, 16, 64, 256, 1024])
  parser.add_argument("--chunks", type=numbers, default=[1, 4, 16], help="compared with the plan's")
  parser.add_argument("--rounds", type=numbers, default=[1, 4, 16, 64])
  parser.add_argument("--image_sizes", type=numbers, default=[16, 32, 64, 128])
  return parser.parse_args(arguments)


def main() -> None:
  options = parse(sys.argv[1:])
  settings = {k: v for k, v in vars(options).items() if k not in ("json", "out")}
  result = common.envelope("scaling") | {"options": settings}
  clients = by_clients(options)
  result |= {
    "clients": clients,
    **(summary(clients) if clients else {}),
    "rounds": by_rounds(options) if options.rounds else [],
    "images": by_image_size(options),
  }
  common.finish(result, options)


if __name__ == "__main__":
  main()
