"""What one vector costs and gains: compile time, step time and memory before and after it.

Two checkouts are compared, one with weights as trees (--before) and this one, and in this one local
steps on the network's arrays and on the vector. Every figure is from a process of its own, pinned
to one core, without a compilation cache; checkouts take turns. Prints one JSON object on stdout.

Example: git worktree add /tmp/before 4553602
  python -m benchmarks.vector --before=/tmp/before --json
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = [("W2", True), ("W2", False), ("W3", True), ("W3", False), ("W1", False)]
# Rounds that are timed together; a round of W2 is two local steps of each of four clients.
ROUNDS = {"W1": 2, "W2": 1, "W3": 4}

ONE = """
import json, sys, time
import jax
from benchmarks import specs
from benchmarks.workloads import Ours
workload, private, rounds, vector = json.loads(sys.argv[1])
options = {} if vector is None else {"steps_on_vector": vector}
ours = Ours(specs.WORKLOADS[workload], private, "scan", 1, **options)
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


def measure(
  checkout: pathlib.Path, case: tuple[str, bool], vector: bool | None
) -> dict[str, float]:
  """Compile seconds, seconds of a round and working memory, in a process of its own."""
  workload, private = case
  arguments = json.dumps([workload, private, ROUNDS[workload], vector])
  core = str(max(os.sched_getaffinity(0)))
  done = subprocess.run(
    ["taskset", "-c", core, sys.executable, "-c", ONE, arguments],
    cwd=checkout,
    env={**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    encoding="utf-8",
    check=False,
  )
  if done.returncode:
    raise RuntimeError(done.stderr[-2000:])
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("--before", required=True, help="Checkout of the commit before the vector.")
  options = parser.parse_args()
  before = pathlib.Path(options.before).resolve()
  systems = {"before": (before, None), "arrays": (ROOT, False), "vector": (ROOT, True)}
  result: dict[str, Any] = common.envelope("vector") | {"cases": {}}
  for case in CASES:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for _ in range(options.repeats):
      for name, (checkout, vector) in systems.items():
        found[name].append(measure(checkout, case, vector))
        common.say(f"{case} {name} {found[name][-1]}")
    best = {
      name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    ratios = {
      name: {key: round(best[name][key] / best["before"][key], 3) for key in best[name]}
      for name in ("arrays", "vector")
    }
    spread = {
      name: {key: statistics.pstdev(run[key] for run in runs) for key in runs[0]}
      for name, runs in found.items()
    }
    label = f"{case[0]} {'private' if case[1] else 'plain'}"
    result["cases"][label] = {"best": best, "over_before": ratios, "deviation": spread}
  common.finish(result, options)


if __name__ == "__main__":
  main()
