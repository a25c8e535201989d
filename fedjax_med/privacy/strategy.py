"""Coefficients of correlated noise: the banded Toeplitz strategy, and the error that it leaves."""

import functools
import math

import numpy as np

from fedjax_med.core.errors import require_whole
from fedjax_med.privacy.mechanism import PoissonGaussian


def toeplitz_strategy(steps: int, bands: int) -> np.ndarray:
  """Coefficients of the strategy whose prefix sums have the (nearly) smallest mean squared error.

  Minimises mean(prefix_errors(c, steps)) · ‖c‖², the error at a given privacy (arXiv 2405.15913,
  section 4), over positive coefficients that do not rise. Toeplitz costs up to a few per cent of
  error over a general banded matrix.

  Args:
    steps: T, at least ``bands``.
    bands: b, at least 1, which gives independent noise.

  Returns:
    [bands] float64 of norm 1.

  Raises:
    UserError: a value breaks its rule.
  """
  require_whole("bands", bands, 1, "1 is independent noise")
  require_whole("steps", steps, bands, f"lower bands={bands} to the number of steps")
  return np.array(_strategy(int(steps), int(bands)))


def prefix_errors(coefficients: np.ndarray | tuple[float, ...], steps: int) -> np.ndarray:
  """[steps] float64 variance that x_0 + .. + x_t has, x = C⁻¹ z: row t of A C⁻¹, norm squared.

  A, of ones on and below the diagonal, sums up steps. Independent noise has 1, 2, .., ``steps``.
  """
  return np.cumsum(_partial_sums(np.asarray(coefficients, float), steps) ** 2)


def error_over_independent(
  independent: PoissonGaussian, banded: PoissonGaussian, steps: int
) -> float:
  """Error of independent over that of banded noise: above 1 banded noise harms SGD's weights less.

  Compared is the root mean square, over steps, of the noise in the sum of all mean gradients so far
  (a constant learning rate without momentum). Noise from the choice of batches is not counted.

  Args:
    independent: plain DP-SGD, Poisson batches of the whole hospital.
    banded: batches of subsets; calibrated to the same (ε, δ) and ``steps``.
    steps: T.
  """

  def error(mechanism: PoissonGaussian) -> float:
    spread = math.sqrt(prefix_errors(mechanism.coefficients, steps).mean())
    return mechanism.noise_multiplier / mechanism.expected_batch_size * spread

  return error(independent) / error(banded)


def _partial_sums(coefficients: np.ndarray, steps: int) -> np.ndarray:
  """[steps] first column of A C⁻¹, Toeplitz like its factors: the sums of C⁻¹'s first column."""
  from scipy import signal

  return np.asarray(signal.lfilter([1.0], coefficients, np.ones(steps)))


@functools.lru_cache(maxsize=1024)
def _strategy(steps: int, bands: int) -> tuple[float, ...]:
  from scipy import optimize, signal

  if bands == 1:
    return (1.0,)
  # Partial sum k stands in the rows of steps - k prefixes.
  weights = np.arange(steps, 0, -1) / steps

  def loss(ratios: np.ndarray) -> tuple[float, np.ndarray]:
    """Log of the error, and its slope by c_j / c_{j-1}: in [0, 1] every C⁻¹ is stable."""
    c = np.cumprod(np.concatenate([[1.0], ratios]))
    sums = _partial_sums(c, steps)
    # d sums / d c_j is -(C⁻¹ sums) shifted by j.
    shifted = signal.lfilter([1.0], c, sums)
    weighted = weights * sums
    error = float(weighted @ sums)
    inner = np.array([weighted[j:] @ shifted[: steps - j] for j in range(bands)])
    slope = 2 * c / (c @ c) - 2 * inner / error
    through = np.cumsum((slope * c)[:0:-1])[::-1]
    return math.log(error) + math.log(c @ c), through / ratios

  j = np.arange(1, bands)
  # The coefficients of (1 - z)^(-1/2), best for as many bands as steps (arXiv 2302.01463).
  found = optimize.minimize(
    loss, (2 * j - 1) / (2 * j), jac=True, method="L-BFGS-B", bounds=[(0.05, 1.0)] * (bands - 1)
  )
  # Five digits cost no error and forgive what machines round differently on the way.
  c = np.cumprod(np.concatenate([[1.0], np.round(found.x, 5)]))
  return tuple(c / np.linalg.norm(c))
