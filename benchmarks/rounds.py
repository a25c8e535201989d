"""Whole federated rounds of three workloads, here and on the peers, taken in turns.

A peer runs in a process of its own under its own interpreter. It first proves its gradient against
an independent loop and against this side's, is warmed up, and then is measured in alternation with
this simulator; a ratio is the median over the turns of peer time ÷ our time. A peer that is not
installed, or fails, leaves null and the reason.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import common, specs

# name: (script, interpreter, variant); which workloads they run stands in ``systems``.
PLAIN = {
  f"{system}_{processes}{suffix}": (script, "peers", f"plain{mode}_{processes}")
  for system, script in (("pytorch", "torch_loop"), ("pfl_research", "pfl_research"))
  for mode, suffix in (("", ""), ("_channels_last", "_channels_last"))
  for processes in (1, 2)
} | {
  "flower": ("flower", "peers", "plain_2"),
  "fedjax": ("fedjax_peer", "fedjax", "jit"),
}
PRIVATE = {
  f"opacus_{mode}_{processes}": ("torch_loop", "peers", f"{mode}_{processes}")
  for mode in ("hooks", "ghost", "ew")
  for processes in (1, 2)
} | {"flower_opacus": ("flower", "peers", "hooks_2")}
# FedJAX runs native convolutions, whose grouped form takes most of a minute a round in W2; Flower
# in W2 is the two-process loop with 100 MB messages.
SKIPPED = {"W1": (), "W2": ("fedjax", "flower", "flower_opacus"), "W3": ()}


def systems(workload: str, private: bool) -> dict[str, tuple[str, str, str]]:
  """The peers of a workload: name to (script, interpreter, variant)."""
  table = PRIVATE if private else PLAIN
  return {name: how for name, how in table.items() if name not in SKIPPED[workload]}


class Peer:
  """A peer's process, asked for rounds over a pipe."""

  def __init__(self, script: str, python: str, variant: str, arguments: list[str]):
    command = [python, "-m", f"benchmarks.peers.{script}", "--serve", "--variant", variant]
    self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115, closed in close()
    self.started = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    self._process = subprocess.Popen(
      [*command, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._log,
      encoding="utf-8",
      env=environment,
    )
    try:
      self.about = self._answer()["ready"]
    except BaseException:
      self.close()
      raise

  def run(self, rounds: int) -> tuple[float, int]:
    """Seconds and examples of that many rounds."""
    assert self._process.stdin is not None
    self._process.stdin.write(f"{rounds}\n")
    self._process.stdin.flush()
    answer = self._answer()
    return answer["seconds"], answer["examples"]

  def _answer(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      self._process.wait()
      self._log.seek(0)
      lines = [line.strip() for line in self._log if line.strip()]
      errors = [line for line in lines if "Error" in line]
      raise RuntimeError((errors or lines or ["it ended without a word"])[-1][:300])
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(OSError):
      self._process.communicate(timeout=60)
    if self._process.poll() is None:
      self._process.kill()
    self._log.close()


def calibrated(run: Callable[[int], tuple[float, int]], block_s: float) -> int:
  """Rounds that fill about ``block_s`` seconds, after a warm-up."""
  run(1)
  took = run(1)[0]
  return max(1, round(block_s / took))


def measure(
  ours: Any, peer: Peer | None, workload: specs.Workload, repeats: int, block_s: float
) -> dict[str, list[float]]:
  """Seconds a round of both, in turns, as if every round had its nominal number of examples."""

  def time_ours(rounds: int) -> tuple[float, int]:
    start = time.perf_counter()
    examples = ours.run(rounds)
    return time.perf_counter() - start, examples

  def nominal(run: Callable[[int], tuple[float, int]]) -> Callable[[], float]:
    rounds = calibrated(run, block_s)

    def once() -> float:
      took, examples = run(rounds)
      return took / examples * workload.examples_per_round

    return once

  runs = {"ours": nominal(time_ours)}
  if peer is not None:
    runs["peer"] = nominal(peer.run)
  return common.alternate(runs, repeats, warm_up=0)


def compare(arguments: argparse.Namespace, private: bool, reference: str) -> dict[str, Any]:
  """All systems of one variant of a workload."""
  from benchmarks.workloads import Ours

  workload = specs.WORKLOADS[arguments.workload]
  common.say(f"{workload.name} {'private' if private else 'plain'}: compiling")
  start = time.perf_counter()
  ours = Ours(workload, private, arguments.layout, arguments.chunk)
  ours.run(1)
  first_round = {"ours": time.perf_counter() - start}
  about: dict[str, Any] = {"ours": {"settings": ours.settings}}
  mine, theirs, ratios, absent = [], {}, {}, {}
  pythons = {"peers": arguments.peers_python, "fedjax": arguments.fedjax_python}
  wanted = systems(workload.name, private)
  if arguments.systems is not None:
    wanted = {name: how for name, how in wanted.items() if name in arguments.systems}
  for name, (script, python, variant) in wanted.items():
    options = ["--workload", workload.name, "--reference", reference]
    options += ["--private"] if private else []
    peer = None
    try:
      peer = Peer(script, pythons[python], variant, options)
      peer.run(1)
      first_round[name] = time.perf_counter() - peer.started
      times = measure(ours, peer, workload, arguments.repeats, arguments.block_s)
      about[name] = peer.about
      mine += times["ours"]
      theirs[name] = statistics.median(times["peer"])
      ratios[name] = common.ratio(times["peer"], times["ours"])
      common.say(f"  {name}: {theirs[name]:.3f} s a round, {ratios[name]:.2f} x ours")
    except (OSError, RuntimeError, json.JSONDecodeError) as error:
      absent[name] = str(error)
      common.say(f"  {name}: none, {error}")
    finally:
      if peer is not None:
        peer.close()
  mine = mine or measure(ours, None, workload, arguments.repeats, arguments.block_s)["ours"]
  per_round = {"ours": statistics.median(mine), **theirs, **dict.fromkeys(absent)}
  examples = workload.examples_per_round
  best = min(ratios, key=lambda name: ratios[name]) if ratios else None
  return {
    "seconds_per_round": per_round,
    "examples_per_second": {name: s and examples / s for name, s in per_round.items()},
    "peer_over_ours": {**ratios, **dict.fromkeys(absent)},
    "best_peer": best,
    "best_peer_over_ours": best and ratios[best],
    "first_round_s": first_round,
    "compile_s": ours.compile_s,
    "absent": absent,
    "about": about,
  }


def main() -> None:
  """Prints one object; see the module's docstring and README.md."""
  parser = common.parser(__doc__ or "")
  parser.add_argument("--workload", choices=tuple(specs.WORKLOADS), required=True)
  parser.add_argument("--private", action="store_true", help="only the private variant")
  parser.add_argument("--plain", action="store_true", help="only the plain variant")
  parser.add_argument("--systems", nargs="*", help="only these peers; none named, none run")
  parser.add_argument("--layout", default="auto", help="auto, scan, chunk or vmap on our side")
  parser.add_argument("--chunk", type=int, default=1, help="clients at once under layout=chunk")
  parser.add_argument("--block_s", type=float, default=3.0, help="seconds a measurement")
  python = os.environ.get("FEDJAX_MED_PEERS_PYTHON", sys.executable)
  fedjax = os.environ.get("FEDJAX_MED_FEDJAX_PYTHON", sys.executable)
  parser.add_argument("--peers_python", default=python, help="interpreter with the PyTorch peers")
  parser.add_argument("--fedjax_python", default=fedjax, help="interpreter with FedJAX")
  arguments = parser.parse_args()
  workload = specs.WORKLOADS[arguments.workload]
  if arguments.private and not workload.private:
    parser.error(f"{workload.name} has no private variant; leave --private out")
  variants = {"plain": False} if arguments.plain or not arguments.private else {}
  if workload.private and not arguments.plain:
    variants["private"] = True
  from benchmarks.workloads import write_reference

  result = common.envelope("rounds") | {"workload": workload.name}
  with tempfile.TemporaryDirectory() as folder:
    reference = os.path.join(folder, "reference.npz")
    write_reference(workload, reference)
    results = {name: compare(arguments, private, reference) for name, private in variants.items()}
  for key in next(iter(results.values())):
    result[key] = {name: values[key] for name, values in results.items()}
  common.finish(result, arguments)


if __name__ == "__main__":
  main()
