"""Statistics of a privacy audit: lower bounds on ε.

An audit attacks the releases of a run. Its bounds are the ε that the outcome makes unlikely at a
given δ. Host-side NumPy and SciPy; higher scores mean "was in the training data" throughout.

A bound of 0 says that the attack found nothing, not that there is nothing to find.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from fedjax_med.audit.membership import bit_values, real_values
from fedjax_med.core.errors import require, require_whole

# Fewer guesses than this, all correct, show ε = 1.6 at 95%: not worth a share of the confidence.
MIN_GUESSES = 16


@dataclasses.dataclass(frozen=True)
class OneRunBound:
  """A lower bound on ε by guessing which canaries were in.

  Attributes:
    epsilon_lower: the run is (ε, δ)-DP for no ε under this; 0 where nothing can be said.
    correct: v, right guesses among ``guesses``.
    guesses: r, canaries that were not abstained from.
    canaries: m.
    confidence: probability that a bound made this way holds, over bits, run and attack.
  """

  epsilon_lower: float
  correct: int
  guesses: int
  canaries: int
  confidence: float


def one_run_p_value(
  canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
  """Bound on P[at least ``correct`` right guesses] if the run is (ε, δ)-DP in every canary's bit.

  Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), theorem 5.2 and appendix D: with f the upper
  tail of Binomial(r, e^ε / (1 + e^ε)), f(v) + 2mδ max_i (f(v - i) - f(v)) / i. The number of
  guesses is fixed beforehand; which canaries are guessed may follow from anything the run released.

  Raises:
    UserError: not 0 ≤ correct ≤ guesses ≤ canaries, ε under 0, or δ outside [0, 1).
  """
  require_whole("canaries", canaries, 1, "audit with canaries")
  require(
    0 <= correct <= guesses <= canaries,
    f"correct={correct}, guesses={guesses}, canaries={canaries} must not rise",
    "count right guesses among all guesses",
  )
  require(epsilon >= 0, f"epsilon={epsilon} must be at least 0", "test a claim that can be made")
  _check_delta(delta)
  rate = float(special.expit(epsilon))
  tail = float(stats.binom.sf(correct - 1, guesses, rate))
  if delta == 0 or correct == 0:
    return tail
  # Under this count Binomial(r, rate) has no mass (under 1e-17): f is 1 there and a larger i only
  # divides the same by more.
  spread = 10 * math.sqrt(guesses * rate * (1 - rate)) + 10
  lowest = max(0, min(correct - 1, math.floor(guesses * rate - spread)))
  below = np.arange(correct - 1, lowest - 1, -1)
  sums = np.cumsum(stats.binom.pmf(below, guesses, rate))
  steepest = float(np.max(sums / np.arange(1, len(sums) + 1)))
  return min(1.0, tail + 2 * canaries * delta * steepest)


def guess_ladder(canaries: int) -> tuple[int, ...]:
  """Numbers of guesses ``one_run_epsilon`` tries: m divided by √2 again and again, even, to 16.

  Even, for as many "in" as "out"; all m, odd or not, where m is under 16.
  """
  require_whole("canaries", canaries, 1, "audit with canaries")
  halvings = max(0.0, 2 * math.log2(canaries / MIN_GUESSES))
  counts = (2 * int(canaries / 2 * 2 ** (-j / 2)) for j in range(int(halvings) + 2))
  return tuple(count for count in counts if count >= MIN_GUESSES) or (canaries,)


def one_run_epsilon(
  scores: npt.ArrayLike,
  included: npt.ArrayLike,
  delta: float,
  confidence: float = 0.95,
  num_guesses: int | None = None,
) -> OneRunBound:
  """Lower bound on ε of a run whose canaries were each included with probability 1/2.

  "In" is guessed for the highest scores and "out" for as many of the lowest (one fewer if the
  number of guesses is odd). The number of guesses is not chosen for free: those of ``guess_ladder``
  are all tried, each at an equal share of 1 - confidence (Bonferroni). Among equal scores the order
  is the one with the most wrong guesses; that is never more right ones than an order that does not
  know the bits, so the bound holds, whatever the order of the canaries.

  Assumptions: the bits are independent fair coins, and scores depend on them through what the
  run released alone. The adjacency then is that of this package: a canary that is not in is a
  record replaced by nothing, while the hospital's size n, absent canaries counted, is public.

  Canaries of several runs, each with bits and noise of its own, may be joined in one array. A bit
  enters one of the runs, and the others do not depend on it, so the joint release is as (ε, δ)-DP
  in this bit as that run alone. So may canaries of several hospitals of a run: to a bit of one
  hospital, what the others do is post-processing. With different (ε, δ) the claim tested is their
  maximum.

  Args:
    scores: [m] attack scores, finite or infinite.
    included: [m] bool, the bits.
    delta: δ of the claim, in [0, 1).
    confidence: in [0.5, 1).
    num_guesses: one number of guesses, fixed before the scores were seen, instead of the ladder.

  Raises:
    UserError: shapes that differ, bits that are not bool, NaN, or a value that breaks its rule.
  """
  values = real_values("scores", scores)
  bits = bit_values("included", included, values.shape)
  require(values.ndim == 1, f"scores has shape {values.shape}, not [m]", "join runs in one array")
  canaries = len(values)
  require_whole("canaries", canaries, 1, "audit with canaries")
  _check_delta(delta)
  _check_confidence(confidence)
  if num_guesses is None:
    ladder = guess_ladder(canaries)
  else:
    require_whole("num_guesses", num_guesses, 1, "guess at least one canary")
    rule = f"num_guesses={num_guesses} must be at most the {canaries} canaries"
    require(num_guesses <= canaries, rule, "lower it")
    ladder = (int(num_guesses),)
  # Equal scores: members first, where "out" is guessed, and the others last, where "in" is.
  ranked = bits[np.lexsort((~bits, values))]
  right_high = np.cumsum(ranked[::-1])
  right_low = np.cumsum(~ranked)
  level = (1 - confidence) / len(ladder)
  bounds = []
  for guesses in ladder:
    num_out = guesses // 2
    correct = int(right_high[guesses - num_out - 1])
    correct += int(right_low[num_out - 1]) if num_out else 0
    lower = _largest_refuted(canaries, guesses, correct, delta, level)
    bounds.append(
      OneRunBound(
        epsilon_lower=lower,
        correct=correct,
        guesses=guesses,
        canaries=canaries,
        confidence=confidence,
      )
    )
  return max(bounds, key=lambda bound: bound.epsilon_lower)


def threshold_epsilon(
  scores_in: npt.ArrayLike,
  scores_out: npt.ArrayLike,
  threshold: float,
  delta: float,
  confidence: float = 0.95,
) -> float:
  """Lower bound on ε from independent trials with and without one record; 0 if nothing is shown.

  (ε, δ)-DP has TPR ≤ e^ε FPR + δ, and 1 - FPR ≤ e^ε (1 - TPR) + δ. The bound is the larger of the
  two ε at the Clopper-Pearson limits of TPR (lower) and FPR (upper), each with half of
  1 - confidence (Jagielski, Ullman, Oprea 2020, arXiv 2006.07709).

  The trials must be independent: a run each, or noise each. Canaries of one run are not (their
  scores share its noise and each other's gradients); they need ``one_run_epsilon``.

  Args:
    scores_in: [a] scores of trials with the record.
    scores_out: [b] scores of trials without it.
    threshold: "in" is guessed from this score on; fixed before any score was seen.
    delta: δ of the claim, in [0, 1).
    confidence: in [0.5, 1).

  Raises:
    UserError: no trial, NaN, or a value that breaks its rule.
  """
  _check_delta(delta)
  _check_confidence(confidence)
  inside, outside = real_values("scores_in", scores_in), real_values("scores_out", scores_out)
  require(
    inside.ndim == outside.ndim == 1 and len(inside) > 0 and len(outside) > 0,
    f"scores_in {inside.shape} and scores_out {outside.shape} must be [at least 1]",
    "give trials with and without the record",
  )
  cut = np.asarray(threshold)
  bounds = _epsilon_of_rates(
    _count_from(inside, cut),
    len(inside),
    _count_from(outside, cut),
    len(outside),
    delta,
    (1 - confidence) / 2,
  )
  return max(0.0, float(bounds))


def _largest_refuted(m: int, r: int, v: int, delta: float, level: float) -> float:
  """Largest ε with a p-value of at most ``level``; 0 if there is none.

  Any such ε may be reported: where the p-value is under 1/2 it falls as v rises, so the v that
  refute some ε' above the true ε start at the v that refutes one of them, and the true (ε, δ)
  implies (ε', δ).
  """
  # Without δ the tail alone is inverted, by the Clopper-Pearson limit of the rate.
  rate = float(_lower_limit(v, r, level))
  if rate <= 0.5:
    return 0.0
  high = float(special.logit(rate))
  if delta == 0:
    return high
  if one_run_p_value(m, r, v, 0.0, delta) > level:
    return 0.0
  low = 0.0
  while high - low > 1e-9 * max(1.0, high):
    middle = (low + high) / 2
    refuted = one_run_p_value(m, r, v, middle, delta) <= level
    low, high = (middle, high) if refuted else (low, middle)
  return low


def _lower_limit(hits: npt.ArrayLike, trials: int, level: float) -> np.ndarray:
  """Clopper-Pearson: the rate at which P[at least ``hits``] is ``level``; 0 without hits."""
  k = np.asarray(hits)
  return np.where(k > 0, stats.beta.ppf(level, np.maximum(k, 1), trials - k + 1), 0.0)


def _upper_limit(hits: npt.ArrayLike, trials: int, level: float) -> np.ndarray:
  """Clopper-Pearson: the rate at which P[at most ``hits``] is ``level``; 1 if all are hits."""
  k = np.asarray(hits)
  return np.where(k < trials, stats.beta.isf(level, k + 1, np.maximum(trials - k, 1)), 1.0)


def _epsilon_of_rates(
  true: np.ndarray, positives: int, false: np.ndarray, negatives: int, delta: float, level: float
) -> np.ndarray:
  """ε shown by counts of "in" guesses; -inf or negative where nothing is shown."""
  tpr = _lower_limit(true, positives, level)
  fpr = _upper_limit(false, negatives, level)
  with np.errstate(divide="ignore"):
    direct = np.log(np.maximum(tpr - delta, 0) / fpr)
    mirrored = np.log(np.maximum(1 - fpr - delta, 0) / (1 - tpr))
  return np.maximum(direct, mirrored)


def _count_from(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
  """Number of scores that are at least each threshold."""
  return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def _check_delta(delta: float) -> None:
  require(0 <= delta < 1, f"delta={delta} must be in [0, 1)", "use the run's δ")


def _check_confidence(confidence: float) -> None:
  require(0.5 <= confidence < 1, f"confidence={confidence} must be in [0.5, 1)", "use 0.95")
