"""Likelihood-ratio attacks on a mechanism: scores of trials, and the bound on ε they give."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.audit.epsilon_bounds import threshold_epsilon
from fedjax_med.privacy.calibration import gaussian_mu

# All bounds of a unit hold together with this probability.
CONFIDENCE = 0.95
# The attacker's likelihood ratios are made for the claimed noise, and for less than that: share of
# σ, and thresholds as ``thresholds_of`` reads them.
ATTACKS = ((1.0, (1.5, 2.3, 3.0)), (0.5, (1.5, 3.0)), (0.1, (0.0,)))
TRIALS_AT_ONCE = 512

# Share of σ -> (scores of trials with the record or hospital, scores of trials without it).
Scores = dict[float, tuple[np.ndarray, np.ndarray]]


def ratio(projection: jax.Array, probability: Any, sigma: Any) -> jax.Array:
  """Log-likelihood ratio of a step's ``projection`` for noise of standard deviation ``sigma``.

  Drawn with ``probability`` q the record adds 1: log(1 - q + q exp((y - 1/2) / σ²)).
  """
  q = jnp.minimum(jnp.float32(probability), 1 - 1e-7)
  return jnp.logaddexp(jnp.log1p(-q), jnp.log(q) + (projection - 0.5) / jnp.square(sigma))


def attack_scores(run: Callable[[np.ndarray, np.ndarray], np.ndarray], number: int) -> Scores:
  """Scores of ``number`` trials without the record or hospital, and of a tenth as many with it.

  Args:
    run: (numbers [T] of the trials, present [T]) -> scores [T, attacks].
    number: number of trials without the record or hospital.
  """
  # A tenth with it: how seldom it is missed matters less than how seldom it is imagined.
  inside = max(number // 10, 200)
  numbers = np.arange(number + inside, dtype=np.int32)
  scores = run(numbers, numbers < inside)
  return {share: (scores[:inside, i], scores[inside:, i]) for i, (share, _) in enumerate(ATTACKS)}


def wanted_trials(epsilon: float, level: float, most: int) -> int:
  """Trials that refute ``epsilon`` if an attack never errs, with some to spare."""
  tests = sum(len(thresholds) for _, thresholds in ATTACKS)
  needed = math.log(2 * tests / level) * math.exp(min(epsilon, 50)) * 1.15
  return int(min(max(needed, 1000), most))


def thresholds_of(epsilon: float, delta: float) -> dict[float, tuple[float, ...]]:
  """Likelihood ratios from which the attacker says that the record was there, by share of σ.

  ATTACKS has them in standard deviations of a run without the record: under μ-Gaussian DP with
  σ times ``share`` the ratio is about normal(-m²/2, m²) there, m = μ / share.
  """
  mu = gaussian_mu(epsilon, delta)
  return {
    share: tuple(
      -((mu / share) ** 2) / 2 + place * mu / share if place else 0.0 for place in places
    )
    for share, places in ATTACKS
  }


def best_threshold(
  scores: Scores,
  thresholds: dict[float, tuple[float, ...]],
  delta: float,
  level: float,
) -> float:
  """Largest bound over thresholds fixed beforehand, each with an equal share of ``level``."""
  tests = sum(len(values) for values in thresholds.values())
  bounds = [
    threshold_epsilon(inside, outside, threshold, delta, 1 - level / tests)
    for share, (inside, outside) in scores.items()
    for threshold in thresholds[share]
  ]
  return max(0.0, *bounds)
