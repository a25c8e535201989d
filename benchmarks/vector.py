"""What one vector costs and gains: compile time, step time and memory before and after it.

Checkouts are compared: those given by --against, the first of which the ratios are over, and this
one. Every figure is from a process of its own, pinned to one core, without a compilation cache, and
in seconds of the processor; checkouts take turns.

Example: git worktree add /tmp/arrays 4553602 && git worktree add /tmp/inside 428a0b4
  python -m benchmarks.vector --against before=/tmp/arrays --against vector_inside=/tmp/inside \
    --repeats 3 --json
"""

import json
import os
import pathlib
import statistics
from typing import Any

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = [("W2", True), ("W2", False), ("W3", True), ("W3", False), ("W1", False)]
# Rounds that are timed together; a round of W2 is two local steps of each of four clients.
ROUNDS = {"W1": 2, "W2": 1, "W3": 4}

ONE = """
import json, sys, time
time.perf_counter = time.process_time  # other work on the machine does not count
import jax
from benchmarks import specs
from benchmarks.workloads import Ours
workload, private, rounds = json.loads(sys.argv[1])
ours = Ours(specs.WORKLOADS[workload], private, "scan", 1)
ours.run(rounds)
times = []
for _ in range(3):
  begun = time.perf_counter()
  ours.run(rounds)
  times.append(time.perf_counter() - begun)
memory = ours._block.memory_analysis().temp_size_in_bytes
print(json.dumps({"compile_s": ours.compile_s, "round_s": min(times) / rounds,
                  "working_mib": memory / 2**20}))
"""


def measure(checkout: pathlib.Path, case: tuple[str, bool]) -> dict[str, float]:
  """Compile seconds, seconds of a round and working memory, in a process of its own."""
  workload, private = case
  arguments = json.dumps([workload, private, ROUNDS[workload]])
  core = str(max(os.sched_getaffinity(0)))
  return common.in_checkout(checkout, ONE, [arguments], ["taskset", "-c", core])


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument(
    "--against", required=True, action="append", metavar="NAME=FOLDER", help="An earlier checkout."
  )
  options = parser.parse_args()
  checkouts = common.checkouts(options.against, ROOT)
  base = next(iter(checkouts))
  result: dict[str, Any] = common.envelope("vector") | {"over": base, "cases": {}}
  for case in CASES:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(options.repeats):
      for name, checkout in checkouts.items():
        found[name].append(measure(checkout, case))
        common.say(f"{case} {name} {found[name][-1]}")
    label = f"{case[0]} {'private' if case[1] else 'plain'}"
    result["cases"][label] = _summary(found, base)
  common.finish(result, options)


def _summary(found: dict[str, list[dict[str, float]]], base: str) -> dict[str, Any]:
  """Least figures of each checkout, their ratios to the base's, and their spread."""
  keys = found[base][0].keys()
  best = {
    name: {key: min(run[key] for run in runs) for key in keys} for name, runs in found.items()
  }
  return {
    "best": best,
    "ratio": {
      name: {key: round(best[name][key] / best[base][key], 3) for key in keys} for name in best
    },
    "deviation": {
      name: {key: statistics.pstdev(run[key] for run in runs) for key in keys}
      for name, runs in found.items()
    },
  }


if __name__ == "__main__":
  main()
