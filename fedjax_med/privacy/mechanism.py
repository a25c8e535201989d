"""The private mechanism: one object gives the sampler and the accounted event.

Everything a release does that matters to privacy stands in ``PoissonGaussian``, or where hospitals
add the noise in ``distributed.DistributedGaussian``: the device sampler is called with its numbers,
and the accountant sees nothing but its ``event``.
"""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from fedjax_med.core.errors import require, require_whole
from fedjax_med.core.rounding import MIN_CLIP_NORM, NORM_SLACK
from fedjax_med.privacy.distributed import DistributedGaussian

if TYPE_CHECKING:
  import dp_accounting

# Of the expected batch size. Sums are in grains of 2^-27 of it, times C (``privacy.noise``).
LEAST_NOISE = 2.0**-22
# jax.random.uniform in float32 returns whole multiples of this.
UNIFORM_STEP = 2.0**-23


@dataclasses.dataclass(frozen=True)
class PoissonGaussian:
  """One release: a truncated Poisson draw of units, their clipped sum, Gaussian noise on it.

  A local step of DP-SGD draws records or patients of a hospital; a round of DP-FedAvg draws
  hospitals. With several ``coefficients`` noise is correlated over as many steps b, and each step
  draws from one of b subsets, in turn; privacy.banded has the proof.

  Attributes:
    num_units: n, units of the hospital (public), at least one a band; a unit is a record or a
      patient.
    sampling_probability: q, probability that a unit enters the batch (of a step of its subset),
      above 0 and at most 1.
    batch_cap: units a batch holds at most; a larger draw is cut to a uniform subset. It must be
      at least ``places``, or the expected size plus 2 standard deviations.
    noise_multiplier: σ, noise standard deviation on the sum over ``clip_norm``; 0 is no noise. With
      ``count_noise`` that of both releases together.
    clip_norm: C, largest l2 norm of one unit's contribution, at least 1e-12; the first round's
      where it is adaptive (every round's noise follows it).
    coefficients: [b] first column of the strategy matrix: positive, not rising (then the recursion
      is stable, Eneström-Kakeya), of norm 1 to a millionth; (1.0,) is independent noise.
    count_noise: σ_b, noise standard deviation on the sum of (bit - 1/2), where a unit's bit says
      whether it was within ``clip_norm`` (adaptive clipping); 0 releases no such count.

  Raises:
    UserError: a value breaks its rule.
  """

  num_units: int
  sampling_probability: float
  batch_cap: int
  noise_multiplier: float
  clip_norm: float
  coefficients: tuple[float, ...] = (1.0,)
  count_noise: float = 0.0

  def __post_init__(self) -> None:
    c = self.coefficients
    falling = all(later <= earlier for earlier, later in itertools.pairwise(c))
    require(
      len(c) > 0 and falling and c[-1] > 0 and abs(self.column_norm - 1) < 1e-6,
      f"coefficients={c} must be positive, not rising and of norm 1",
      "use strategy.toeplitz_strategy(steps, bands)",
    )
    remedy = "give the hospital at least one training example"
    if self.bands > 1:
      remedy = f"lower bands={self.bands} to the number of units"
    require_whole("num_units", self.num_units, self.bands, remedy)
    n, q, cap = self.places, self.sampling_probability, self.batch_cap
    require(
      0 < q <= 1, f"sampling_probability={q} must be above 0 and at most 1", "use batch_size / n"
    )
    require_whole("batch_cap", cap, 1, "use 0 in the configuration to let it be chosen")
    sigma, clip_norm = self.noise_multiplier, self.clip_norm
    require(
      0 <= sigma < math.inf, f"noise_multiplier={sigma} must be finite and at least 0", "use 1"
    )
    least = LEAST_NOISE * self.expected_batch_size
    require(
      sigma == 0 or sigma >= least,
      f"noise_multiplier={sigma:g} is under {least:.3g}, 32 grains of sums of"
      f" {self.expected_batch_size:g} units, in which it would be rounded away",
      "use 0 for no noise, or more of it",
    )
    require(
      MIN_CLIP_NORM <= clip_norm < math.inf,
      f"clip_norm={clip_norm} must be finite and at least {MIN_CLIP_NORM:g}",
      "use 1",
    )
    count_noise = self.count_noise
    require(
      count_noise == 0 or sigma / 2 < count_noise < math.inf,
      f"client_privacy.count_noise={count_noise:g} must be above half the noise multiplier"
      f" {sigma:g}, or the count alone would cost more than that allows",
      f"use {sigma:.3g} or more, or client_privacy.clipping=fixed",
    )
    lowest = smallest_cap(n, q)
    require(
      cap >= lowest,
      f"batch_cap={cap} is under {lowest}, the expected batch size {q * n:.6g} plus 2 standard"
      " deviations, where records pushed out of the batch raise ε by 4% to several times",
      f"raise it to {min(n, batch_size_bound(n, q, 5))} (5 standard deviations: under 2%)",
    )

  @property
  def bands(self) -> int:
    """b, steps that noise is correlated over, and subsets that take turns."""
    return len(self.coefficients)

  @property
  def places(self) -> int:
    """ceil(n / b), units of the largest subset."""
    return -(-self.num_units // self.bands)

  @property
  def column_norm(self) -> float:
    """Norm of the float32 coefficients that the device computes with."""
    return math.sqrt(float(np.sum(np.asarray(self.coefficients, np.float32).astype(float) ** 2)))

  @property
  def expected_batch_size(self) -> float:
    """q·n / b, the fixed denominator of every step, whatever the size of the batch drawn."""
    return self.sampling_probability * self.num_units / self.bands

  @property
  def sum_noise_multiplier(self) -> float:
    """z, noise on the sum over ``clip_norm`` on the device: σ, or more beside a noisy count.

    A sum with z·C and bits (a bit - 1/2 is at most 1/2) with σ_b are one Gaussian mechanism of
    1/σ² = 1/z² + 1/(2 σ_b)² (Andrew et al., arXiv 1905.03871, theorem 1).
    """
    if self.count_noise == 0 or self.noise_multiplier == 0:
      return self.noise_multiplier
    return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.count_noise) ** -2)

  @property
  def drawn_probability(self) -> float:
    """Probability that the device's ``uniform < float32(q)`` holds; at most 1.8e-7 from q."""
    return math.ceil(float(np.float32(self.sampling_probability)) / UNIFORM_STEP) * UNIFORM_STEP

  @property
  def accounted_noise_multiplier(self) -> float:
    """σ / (‖c‖ (1 + NORM_SLACK)): noise over the most that rounding lets one unit contribute.

    The slack is a bound for adversarial numbers; that the device rounds σ and σ·C to float32 (by
    1e-7 of it) is within it too.
    """
    return self.noise_multiplier / self.column_norm / (1 + NORM_SLACK)

  def event(self) -> "dp_accounting.TruncatedSubsampledGaussianDpEvent":
    """The accounted event of ``bands`` steps in a row (Ganesh, arXiv 2508.15089).

    With batch_cap ≥ places nothing is ever cut and this is the Poisson-sampled Gaussian; with q = 1
    as well, the plain Gaussian.
    """
    import dp_accounting

    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
      dataset_size=self.places,
      sampling_probability=self.drawn_probability,
      truncated_batch_size=self.batch_cap,
      noise_multiplier=self.accounted_noise_multiplier,
    )

  def untruncated_event(self) -> "dp_accounting.DpEvent":
    """The event if no unit is ever pushed out of a batch."""
    import dp_accounting

    noise = dp_accounting.GaussianDpEvent(self.accounted_noise_multiplier)
    return dp_accounting.PoissonSampledDpEvent(self.drawn_probability, noise)

  def compositions(self, steps: int) -> int:
    """Compositions of the event in ``steps`` steps: ceil(steps / b), the first subset's."""
    require_whole("steps", steps, 0, "count the steps executed")
    return -(-int(steps) // self.bands)


Mechanism = PoissonGaussian | DistributedGaussian


def smallest_cap(num_units: int, sampling_probability: float) -> int:
  """Smallest ``batch_cap`` that a mechanism accepts."""
  return min(num_units, batch_size_bound(num_units, sampling_probability, 2))


def batch_size_bound(num_units: int, sampling_probability: float, num_stds: float) -> int:
  """Expected Poisson batch size plus ``num_stds`` standard deviations, rounded up."""
  expected = num_units * sampling_probability
  std = math.sqrt(expected * (1 - sampling_probability))
  return math.ceil(expected + num_stds * std - 1e-9)
