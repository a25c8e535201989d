"""The one loop of the host: runs advance to their next log points until each has ended.

The caller gives the function that advances runs: a run by itself has its compiled block, points of
a sweep have the program that they share, replicas have one program for all rounds.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.prepare.experiment import Experiment
from fedjax_med.run.budget import next_rounds, spent
from fedjax_med.run.measure import LogPoint, measure
from fedjax_med.simulation.rounds import NEVER, BlockMetrics, SimulationState

COMPLETED, BUDGET, DIVERGED = "completed", "budget", "diverged"


class Reached(NamedTuple):
  """Progress of one run after it was advanced, on the host.

  Attributes:
    rounds: finished rounds.
    steps: [K] local steps executed so far by each client.
    metrics: of the rounds that it was advanced by; None before the first one.
    probabilities: [n_test, classes] of the test examples, in the order of ``evaluation_rows``; None
      where nothing is measured.
    stopped: ``COMPLETED``, ``BUDGET`` where the next round would cross the ε budget, ``DIVERGED``
      where a weight or a prediction is not finite; "" while the run goes on. ``drive`` says so.
  """

  rounds: int
  steps: np.ndarray
  metrics: BlockMetrics | None
  probabilities: np.ndarray | None
  stopped: str = ""


class Outcome(NamedTuple):
  """Outcome of a run that has ended.

  Attributes:
    state: final state.
    stopped: as ``Reached`` has it.
    last: the last log point.
    seconds: wall time to compile and to train, in this process.
  """

  state: SimulationState
  stopped: str
  last: LogPoint
  seconds: dict[str, float]


# Takes rounds [S] int32 by which each run advances, 0 for those that have ended; returns where each
# of them stands.
Advance = Callable[[np.ndarray], Sequence[Reached]]
# Takes the number of a run, its log point and where it stands.
Log = Callable[[int, LogPoint, Reached], None]


def drive(
  runs: Sequence[Experiment],
  advance: Advance,
  log: Log | None = None,
  *,
  epsilon_at_end: bool = False,
) -> list[str]:
  """Advances runs until each of them has ended; returns ``Reached.stopped`` of every run.

  A run that diverged is not advanced again, and its log point has NaN for every prediction.

  Args:
    runs: the S runs.
    advance: advances all of them.
    log: called at every log point of a run, the start among them; an error that it raises ends all
      runs. None stops at no log point: every run takes all of its rounds, and nothing is measured.
    epsilon_at_end: whether ε is computed at a run's last log point alone. It costs more than the
      training of a small run.
  """
  stopped = [""] * len(runs)
  first = [0 if log else run.config.server.num_rounds for run in runs]
  lengths = np.array(first, np.int32)
  while not all(stopped):
    for k, (run, reached) in enumerate(zip(runs, advance(lengths), strict=True)):
      if stopped[k]:
        continue
      diverged = has_diverged(run, reached)
      lengths[k] = 0 if diverged else next_rounds(run, reached.steps, reached.rounds)
      if not lengths[k]:
        complete = reached.rounds == run.config.server.num_rounds
        stopped[k] = DIVERGED if diverged else COMPLETED if complete else BUDGET
      if log:
        told = bool(stopped[k]) or not epsilon_at_end
        log(k, _log_point(run, reached, diverged, told), reached._replace(stopped=stopped[k]))
  return stopped


def has_diverged(run: Experiment, reached: Reached) -> bool:
  """Whether a weight that a client sent, or a prediction, is not finite.

  Under DP-FedAvg, and where the aggregator leaves such an update out, the run goes on.
  """
  metrics, probabilities = reached.metrics, reached.probabilities
  sent = metrics is not None and not run.goes_on and (metrics.bad_round != NEVER).any()
  return bool(sent or (probabilities is not None and not np.isfinite(probabilities).all()))


def _log_point(run: Experiment, reached: Reached, diverged: bool, with_epsilon: bool) -> LogPoint:
  probabilities = reached.probabilities
  assert probabilities is not None
  if diverged:  # no prediction of such a model means anything, not even a finite one
    probabilities = np.full_like(probabilities, np.nan)
  epsilons = spent(run, reached.rounds, reached.steps) if with_epsilon else ((), None)
  return measure(run, reached.rounds, probabilities, *epsilons)
