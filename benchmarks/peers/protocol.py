"""How a peer is asked for rounds: alone from the command line, or in turns with another system.

A peer script builds its system, opens a ``Session`` and repeats: ``session.next()`` says how many
rounds to run (None: stop), ``session.report(seconds, examples)`` says how long they took. With
--serve the numbers of rounds come in on stdin, one a line, and the answers leave on stdout, one
JSON object a line; the first line is what the peer has to say about itself. Without it the peer
warms up, measures --repeats times and prints one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def parse(description: str, *names: str, argv: list[str] | None = None) -> argparse.Namespace:
  """Arguments of a peer script; ``names`` are the variants it has, the first one the default."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument("--workload", choices=("W1", "W2", "W3"), required=True)
  parser.add_argument("--private", action="store_true", help="DP-SGD at every client")
  parser.add_argument("--variant", choices=names, default=names[0])
  parser.add_argument("--reference", help="npz of weights and gradients to be compared with")
  parser.add_argument("--serve", action="store_true", help="numbers of rounds come from stdin")
  parser.add_argument("--rounds", type=int, default=1, help="rounds a measurement")
  parser.add_argument("--repeats", type=int, default=3, help="measurements")
  return parser.parse_args(argv)


def claim_stdout() -> Any:
  """A stream on the real stdout; what anyone else prints goes to stderr from now on."""
  stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  return stream


def versions(*packages: str) -> dict[str, str]:
  """Installed versions of the packages."""
  return {package: importlib.metadata.version(package) for package in packages}


class Session:
  """The conversation with whoever wants the times."""

  def __init__(self, arguments: argparse.Namespace, stream: Any, about: dict[str, Any]):
    self._arguments, self._stream, self._about = arguments, stream, about
    self._plan = iter([1, *[arguments.rounds] * arguments.repeats])
    self._rounds, self._times, self._examples = 0, [], 0
    if arguments.serve:
      self._emit({"ready": about})

  def next(self) -> int | None:
    """Rounds to run now, or None when there is nothing more to do."""
    if self._arguments.serve:
      line = sys.stdin.readline().strip()
      self._rounds = int(line) if line else 0
      return self._rounds or None
    rounds = next(self._plan, None)
    if rounds is None:
      times = self._times[1:]
      self._emit(
        {
          **self._about,
          "warm_up_s": self._times[0],
          "seconds_per_round": statistics.median(times),
          "repeats": times,
          "examples_per_second": self._examples / sum(times) / self._arguments.rounds,
        }
      )
    self._rounds = rounds or 0
    return rounds

  def report(self, seconds: float, examples: int) -> None:
    """What the rounds just asked for took, and how many examples they trained on."""
    if self._arguments.serve:
      self._emit({"seconds": seconds, "examples": examples})
    elif self._times:  # the first one was the warm-up
      self._examples += examples
    self._times.append(seconds / self._rounds)

  def serve(self, run: Callable[[int], int]) -> None:
    """Answers every request with ``run(rounds)``, which returns the examples trained on."""
    while rounds := self.next():
      start = time.perf_counter()
      examples = run(rounds)
      self.report(time.perf_counter() - start, examples)

  def _emit(self, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=self._stream, flush=True)
