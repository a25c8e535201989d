"""Exact p-values of draws: of the noise and the sampling that a mechanism claims.

Host-side NumPy and SciPy. A small value says that the claim is wrong; a large one proves nothing.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedjax_med.audit.membership import finite_values
from fedjax_med.core.errors import require, require_whole


def noise_std_p_value(samples: npt.ArrayLike, std: float) -> float:
  """Two-sided p-value of ``samples`` being independent N(0, std²): exact, chi-square."""
  values = finite_values("samples", samples).ravel()
  require(len(values) > 0, "there is no noise sample", "give at least one")
  require(0 < std < math.inf, f"std={std} must be above 0", "give the standard deviation claimed")
  statistic = float(np.sum((values / std) ** 2))
  tails = (stats.chi2.cdf(statistic, len(values)), stats.chi2.sf(statistic, len(values)))
  return min(1.0, 2 * float(min(tails)))


def inclusion_p_value(count: int, trials: int, probability: float) -> float:
  """Two-sided p-value of ``count`` inclusions in ``trials`` draws of ``probability``: exact."""
  require_whole("trials", trials, 1, "draw at least once")
  require_whole("count", count, 0, "count inclusions")
  require(count <= trials, f"count={count} exceeds trials={trials}", "count each draw once")
  require(0 <= probability <= 1, f"probability={probability} must be in [0, 1]", "give q")
  return float(stats.binomtest(int(count), int(trials), float(probability)).pvalue)


def dispersion_p_value(counts: npt.ArrayLike, trials: int, probability: float) -> float:
  """Two-sided p-value of the spread of independent Binomial(trials, probability) counts: exact.

  The statistic is the sum of squared distances from the whole number next to the mean. Its law is
  convolved from that of a single count, since no normal limit holds where few draws vary.
  """
  values = finite_values("counts", counts).ravel()
  require(len(values) > 0, "there is no count", "give at least one")
  require_whole("trials", trials, 1, "draw at least once")
  require(0 <= probability <= 1, f"probability={probability} must be in [0, 1]", "give q")
  require(
    bool(np.all((values >= 0) & (values <= trials) & (values == np.round(values)))),
    f"a count is no whole number from 0 to trials={trials}",
    "count each draw once",
  )
  possible = np.arange(trials + 1)
  center = round(trials * probability)
  # Longer distances count as this one: under the claim they are next to impossible.
  reach = math.ceil(8 * math.sqrt(trials * probability * (1 - probability))) + 20
  mass = stats.binom.pmf(possible, trials, probability)
  single = np.bincount(_squares(possible, center, reach), weights=mass)
  size = len(values) * (len(single) - 1) + 1
  padded = 1 << size.bit_length()
  law = np.fft.irfft(np.fft.rfft(single, padded) ** len(values), padded)[:size]
  seen = int(_squares(values, center, reach).sum())
  return float(np.clip(2 * min(law[: seen + 1].sum(), law[seen:].sum()), 0, 1))


def uncorrelated_p_value(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
  """Two-sided p-value of two vectors being unrelated: exact if one is N(0, s² I), for any s.

  The direction of such a vector is uniform, so the squared cosine to any vector it is independent
  of is Beta(1/2, (n - 1)/2). Means are not removed: noise has mean 0.
  """
  a, b = finite_values("first", first).ravel(), finite_values("second", second).ravel()
  require(
    len(a) == len(b) >= 2, f"{len(a)} and {len(b)} values", "give two vectors of the same size"
  )
  norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
  require(norms > 0, "a vector is 0 throughout", "give noise that was drawn")
  squared_cosine = min(1.0, (float(a @ b) / norms) ** 2)
  return float(stats.beta.sf(squared_cosine, 0.5, (len(a) - 1) / 2))


def _squares(counts: np.ndarray, center: int, reach: int) -> np.ndarray:
  """Squared distances from ``center``, of at most ``reach``."""
  return np.minimum(np.abs(counts - center), reach).astype(np.int64) ** 2
