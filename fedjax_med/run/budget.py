"""Privacy budgets of a run: rounds that they allow, local steps that count, and ε of both."""

import math

import numpy as np

from fedjax_med.prepare.experiment import Experiment
from fedjax_med.privacy.calibration import affordable_steps
from fedjax_med.privacy.guarantees import Guarantee
from fedjax_med.privacy.guarantees import spent as epsilons_of


def hides_who_takes_part(experiment: Experiment) -> bool:
  """Whether ε of whole hospitals rests on nobody knowing who took part in a round."""
  central = experiment.central
  return central is not None and central.mechanisms[0].sampling_probability < 1


def counted_steps(experiment: Experiment, rounds: int, steps: np.ndarray) -> np.ndarray:
  """[K] local steps that ε of records is computed from: the executed ``steps`` [K], or more.

  Where participation is to stay secret, it is as many as ``rounds`` can hold: any other count, and
  any ε of it, the largest over the hospitals too, would tell how often a hospital took part.
  """
  return experiment.steps * rounds if hides_who_takes_part(experiment) else np.asarray(steps)


def releases(experiment: Experiment, rounds: int, steps: np.ndarray) -> list[list[int]]:
  """Releases of each party of each guarantee after ``rounds`` and ``steps`` [K]."""
  counted = counted_steps(experiment, rounds, steps)
  return [
    [rounds] if guarantee is experiment.central else [int(count) for count in counted]
    for guarantee in experiment.guarantees
  ]


def spent(
  experiment: Experiment, rounds: int, steps: np.ndarray
) -> tuple[tuple[float, ...], float | None]:
  """ε of each training client after ``steps`` local steps (empty without), and of whole clients."""
  local, central = experiment.local, experiment.central
  return (
    epsilons_of(local, counted_steps(experiment, rounds, steps)) if local else (),
    epsilons_of(central, [rounds])[0] if central else None,
  )


def affordable_rounds(experiment: Experiment, steps: np.ndarray, done: int) -> float:
  """Rounds still allowed by the ε budgets after ``steps`` [K]; infinite where there is none.

  A calibrated run has its budget built into σ; a given σ with a target ε is a budget.
  """
  left = [math.inf]
  config = experiment.config
  if experiment.local and config.privacy.noise_multiplier and config.privacy.target_epsilon:
    allowed = _affordable(experiment.local, config.privacy.target_epsilon)
    counted = counted_steps(experiment, done, steps)
    left.append(int(((allowed - counted) // experiment.steps).min()))
  client = config.client_privacy
  if experiment.central and client.noise_multiplier and client.target_epsilon:
    left.append(int(_affordable(experiment.central, client.target_epsilon)[0]) - done)
  return min(left)


def planned_rounds(experiment: Experiment) -> int:
  """Rounds of a whole run: as configured, or as many as the budgets allow."""
  allowed = affordable_rounds(experiment, np.zeros_like(experiment.steps), 0)
  return int(min(experiment.config.server.num_rounds, allowed))


def planned(experiment: Experiment) -> tuple[int, tuple[float, ...], float | None]:
  """Rounds that the budgets allow, and after them each hospital's ε and that of whole hospitals."""
  rounds = planned_rounds(experiment)
  return rounds, *spent(experiment, rounds, experiment.steps * rounds)


def next_rounds(experiment: Experiment, steps: np.ndarray, done: int) -> int:
  """Rounds up to the next log point; 0 at the end, or where a budget ends the run before."""
  every, total = experiment.config.eval.every, experiment.config.server.num_rounds
  length = min(every - done % every, total - done)
  return int(max(0, min(length, affordable_rounds(experiment, steps, done)))) if length else 0


def _affordable(guarantee: Guarantee, budget: float) -> np.ndarray:
  rows = zip(guarantee.mechanisms, guarantee.deltas, strict=True)
  return np.array([affordable_steps(mechanism, delta, budget) for mechanism, delta in rows])
