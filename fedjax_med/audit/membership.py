"""Membership inference: confidences, likelihood-ratio scores, and the share of members found.

Host-side NumPy and SciPy. Higher scores mean "was in the training data" throughout.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from fedjax_med.core.errors import require, require_whole

# An example has a variance of its own from this many runs on: Carlini et al. find the one pooled
# over examples better under 64 runs, half of them with the example.
MIN_RUNS_FOR_OWN_VARIANCE = 32


def tpr_at_fpr(scores: npt.ArrayLike, member: npt.ArrayLike, fpr: float) -> float:
  """Largest share of members caught by a threshold with at most ``fpr`` of the others.

  Equal scores fall on one side together and nothing is interpolated: the points of
  ``sklearn.metrics.roc_curve``. With n others, no ``fpr`` under 1/n lets any of them pass.

  Args:
    scores: [n] scores.
    member: [n] bool, at least one of each.
    fpr: in [0, 1].

  Raises:
    UserError: shapes that differ, NaN, members or others only, or ``fpr`` outside [0, 1].
  """
  values = real_values("scores", scores)
  bits = bit_values("member", member, values.shape)
  require(0 <= fpr <= 1, f"fpr={fpr} must be in [0, 1]", "use 0.01")
  require(
    bool(bits.any() and not bits.all()), "all examples are on one side", "score members and others"
  )
  others = np.sort(values[~bits])[::-1]
  allowed = np.count_nonzero(np.arange(1, len(others) + 1) / len(others) <= fpr)
  if allowed == len(others):
    return 1.0
  return float(np.mean(values[bits] > others[allowed]))


def logit_confidence(
  probabilities: npt.ArrayLike, labels: npt.ArrayLike, *, log: bool = False
) -> np.ndarray:
  """log p_y - log Σ_{j≠y} p_j, about normal over runs (Carlini et al. 2022, arXiv 2112.03570).

  Args:
    probabilities: [..., classes]. With ``log`` their logarithms, or logits: a constant added to
      all classes cancels. Prefer those; rounded probabilities give infinities.
    labels: [...] whole numbers, y.
    log: whether ``probabilities`` are logarithms.

  Returns:
    [...] float64.

  Raises:
    UserError: shapes that do not fit, a label that is no class, negative probabilities, NaN, or
      none above 0.
  """
  values = real_values("probabilities", probabilities)
  wanted = np.asarray(labels)
  require(
    values.ndim >= 1 and values.shape[-1] >= 2 and wanted.shape == values.shape[:-1],
    f"probabilities {values.shape} and labels {wanted.shape} do not fit",
    "give [..., classes] for at least two classes, and [...]",
  )
  classes = values.shape[-1]
  require(
    np.issubdtype(wanted.dtype, np.integer) and bool(np.all((wanted >= 0) & (wanted < classes))),
    f"labels must be whole numbers from 0 to {classes - 1}",
    "use class numbers",
  )
  if not log:
    require(bool(np.all(values >= 0)), "a probability is negative", "set log=True for logits")
    with np.errstate(divide="ignore"):
      values = np.log(values)
  labelled = np.arange(classes) == wanted[..., None]
  chosen = np.max(values, axis=-1, where=labelled, initial=-np.inf)
  others = special.logsumexp(np.where(labelled, -np.inf, values), axis=-1)
  with np.errstate(invalid="ignore"):
    result = np.asarray(chosen - others)
  require(
    not np.isnan(result).any(), "an example's probabilities are all 0 or infinite", "use logits"
  )
  return result


def lira_scores(confidences: npt.ArrayLike, member: npt.ArrayLike, target_run: int) -> np.ndarray:
  """Online likelihood-ratio attack on one run, from runs that differ in their members.

  Carlini et al. 2022 (arXiv 2112.03570), algorithm 1: log N(x; in) - log N(x; out), where x is the
  target run's confidence and the two normals are fitted to the other runs with and without the
  example. A variance is the example's own from 32 runs on, and else the one within examples, pooled
  over them (their fixed variance).

  An example that is in none of the other runs gets their offline score -log P[out > x], and one
  that is in all of them log P[in < x]; neither is on the scale of the ratio.

  Args:
    confidences: [runs, examples] ``logit_confidence``, or minus losses; finite.
    member: [runs, examples] bool, whether the run trained on the example.
    target_run: the run attacked; its row of ``member`` is not used.

  Returns:
    [examples] float64, higher for members.

  Raises:
    UserError: shapes that differ, values that are not finite, no such run, or no spread among the
      other runs.
  """
  values = real_values("confidences", confidences)
  bits = bit_values("member", member, values.shape)
  require(
    values.ndim == 2 and bool(np.isfinite(values).all()),
    f"confidences, {values.shape}, must be [runs, examples] and finite",
    "use logit_confidence(..., log=True) on logits",
  )
  require_whole("target_run", target_run, 0, "number the runs from 0")
  require(target_run < len(values), f"target_run={target_run} of {len(values)} runs", "lower it")
  x, others = values[target_run], np.delete(values, target_run, 0)
  was_in = np.delete(bits, target_run, 0)
  inside, outside = _fit(others, was_in), _fit(others, ~was_in)
  var_in, var_out = _pooled_variance(inside), _pooled_variance(outside)
  require(
    max(var_in, var_out) > 0, "no example differs between other runs", "attack with more runs"
  )
  # A side with a single run of every example takes the other side's spread.
  std_in, std_out = _deviation(inside, var_in or var_out), _deviation(outside, var_out or var_in)
  ratio = stats.norm.logpdf(x, inside.mean, std_in) - stats.norm.logpdf(x, outside.mean, std_out)
  above_out = -stats.norm.logsf(x, outside.mean, std_out)
  below_in = stats.norm.logcdf(x, inside.mean, std_in)
  return np.where(inside.number == 0, above_out, np.where(outside.number == 0, below_in, ratio))


def real_values(name: str, values: npt.ArrayLike) -> np.ndarray:
  """``values`` in float64; raises UserError for NaN."""
  array = np.asarray(values, np.float64)
  require(not np.isnan(array).any(), f"{name} has NaN", "drop or repair what made it")
  return array


def finite_values(name: str, values: npt.ArrayLike) -> np.ndarray:
  """``values`` in float64; raises UserError for NaN and infinities."""
  array = real_values(name, values)
  require(bool(np.isfinite(array).all()), f"{name} has infinite values", "repair what made them")
  return array


def bit_values(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
  """``values`` as bool of ``shape``; numbers are refused, since -1 would be True; or UserError."""
  array = np.asarray(values)
  require(
    array.dtype == np.bool_ and array.shape == shape,
    f"{name} is {array.dtype} {array.shape}, not bool {shape}",
    "give one True or False for each score",
  )
  return array


class _Fit(NamedTuple):
  """Each example over the runs chosen for it: their number, mean and squares about it."""

  number: np.ndarray
  mean: np.ndarray
  squares: np.ndarray


def _fit(values: np.ndarray, chosen: np.ndarray) -> _Fit:
  """[runs, examples] -> the fit, [examples] each; all 0 for an example without a run."""
  count = chosen.sum(axis=0)
  mean = np.where(chosen, values, 0).sum(axis=0) / np.maximum(count, 1)
  return _Fit(
    number=count, mean=mean, squares=np.where(chosen, (values - mean) ** 2, 0).sum(axis=0)
  )


def _pooled_variance(fit: _Fit) -> float:
  """Variance within examples; 0 where no example has two runs."""
  freedom = np.maximum(fit.number - 1, 0).sum()
  return float(fit.squares.sum() / max(freedom, 1))


def _deviation(fit: _Fit, pooled: float) -> np.ndarray:
  """[examples] standard deviations, from the example's own runs where there are enough."""
  # One example's runs may agree to the last bit; its ratio must stay finite.
  variance = np.maximum(fit.squares / np.maximum(fit.number - 1, 1), 1e-6 * pooled)
  return np.sqrt(np.where(fit.number >= MIN_RUNS_FOR_OWN_VARIANCE, variance, pooled))
