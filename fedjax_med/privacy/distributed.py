"""Noise that hospitals add themselves: the record of it, the grid it lives on, and its ε.

Each of K hospitals clips its update to l2 norm C, takes ``scale`` whole numbers to 1, rounds by
chance, and adds discrete Gaussian noise of standard deviation σ·C·scale / sqrt(K - c). The server
sees the sum of all K modulo 2^bits and no more (secure aggregation). It and c hospitals, which know
their own noise, then face the noise of the K - c others: together σ·C·scale.

Why ε holds. Rounding moves each of P numbers by less than 1, so a hospital's whole numbers have
norm Δ·scale = C·scale + sqrt(P) at most, whatever is drawn. Let s = σ·C·scale.

- The sum of K - c shares is a discrete Gaussian of variance s² but for a factor between e^-τ and
  e^τ a number (Kairouz et al., arXiv 2102.06387, theorem 1).
- A discrete Gaussian is made from a Gaussian: draw g of variance s² - r² around x, then a whole
  number y with probability proportional to exp(-(y - g)² / 2r²). Its normaliser is the same for all
  g but for a factor of 1 ± 2.01 exp(-2 π² r²) (Poisson). Were it the same, y would be the discrete
  Gaussian around x; so it is, but for a factor whose logarithm is under 5 exp(-2 π² r²). What is
  made from g looks at no update: PLD counts a Gaussian of noise multiplier sqrt(s² - r²) /
  (Δ·scale), and what all factors of a release add, ``DistributedGaussian.distance``.
- By themselves the same shifts have Rényi divergence ξ + ρ·α with ρ = (Δ·scale)² / 2 s², ξ = τ·P
  (proposition 14): zCDP, the second bound, looser by about 7% of ε at δ = 1e-5 and 15% at 1e-2.

What is done to the sum, modulo and division included, looks at no update either: wrapping costs
utility and no ε.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.errors import require, require_whole
from fedjax_med.core.rounding import MIN_CLIP_NORM, NORM_SLACK
from fedjax_med.privacy.discrete_gaussian import (
  Sampler,
  draw_distance,
  levels_of,
  make_sampler,
  sum_distance,
)

if TYPE_CHECKING:
  import dp_accounting

# Standard deviations of noise that a sum has room for.
ROOM = 8.0
# Whole numbers of a clip norm over sqrt(P): so that rounding adds at most a 256th to it.
FINEST = 256.0
# r: of the part of the noise that makes whole numbers of a Gaussian; 5 exp(-2 π² r²) is 1e-33.
SMOOTHING = 2.0
# Least standard deviation of a share, in whole numbers: then the sum of shares is Gaussian (τ).
LEAST_SHARE = 4.0


@dataclasses.dataclass(frozen=True)
class DistributedGaussian:
  """One release: the sum of all hospitals' clipped updates, each with its share of the noise.

  It has the properties of ``mechanism.PoissonGaussian`` with which all hospitals take part.

  Attributes:
    num_units: K, hospitals, of which all take part in each release.
    colluders: c, hospitals that may tell the server their noise, under K - 1.
    noise_multiplier: σ, noise standard deviation of the K - c others together, over ``clip_norm``.
    clip_norm: C, largest l2 norm of an update before it is rounded.
    scale: whole numbers to 1.
    num_parameters: P, numbers of an update at most.

  Raises:
    UserError: a value breaks its rule.
  """

  num_units: int
  colluders: int
  noise_multiplier: float
  clip_norm: float
  scale: float
  num_parameters: int

  def __post_init__(self) -> None:
    require_whole("num_units", self.num_units, 2, "use at least two hospitals")
    require_whole("num_parameters", self.num_parameters, 1, "use a network with weights")
    require_honest(self.colluders, self.num_units)
    require(
      MIN_CLIP_NORM <= self.clip_norm < math.inf,
      f"clip_norm={self.clip_norm} must be finite and at least {MIN_CLIP_NORM:g}",
      "use 1",
    )
    require(0 < self.scale < math.inf, f"scale={self.scale} must be above 0", "use 2^20")
    sigma = self.noise_multiplier
    require(0 < sigma < math.inf, f"noise_multiplier={sigma} must be above 0 and finite", "use 1")
    require(
      self.share >= LEAST_SHARE,
      f"the noise of a hospital has a standard deviation of {self.share:.3g} steps of the grid,"
      f" under {LEAST_SHARE:g}, where a sum of shares is no discrete Gaussian",
      "use more noise, or a larger secure.scale or secure.bits",
    )

  # What PoissonGaussian says of a release in which everybody takes part.
  sampling_probability = 1.0
  drawn_probability = 1.0
  coefficients = (1.0,)
  bands = 1
  count_noise = 0.0

  @property
  def batch_cap(self) -> int:
    """K: nobody is left out."""
    return self.num_units

  @property
  def places(self) -> int:
    """K."""
    return self.num_units

  @property
  def expected_batch_size(self) -> float:
    """K, the fixed denominator."""
    return float(self.num_units)

  @property
  def sum_noise_multiplier(self) -> float:
    """σ."""
    return self.noise_multiplier

  @property
  def honest(self) -> int:
    """K - c."""
    return self.num_units - self.colluders

  @property
  def share(self) -> float:
    """Standard deviation of one hospital's noise, in whole numbers."""
    return self.noise_multiplier * self.clip_norm * self.scale / math.sqrt(self.honest)

  @property
  def sensitivity(self) -> float:
    """Δ, largest l2 norm of a hospital's whole numbers over ``scale``, rounding of floats counted.

    It is C (1 + NORM_SLACK) + sqrt(P) / scale.
    """
    return self.clip_norm * (1 + NORM_SLACK) + math.sqrt(self.num_parameters) / self.scale

  @property
  def rho(self) -> float:
    """ρ = Δ² / (2 σ² C²)."""
    return (self.sensitivity / (self.noise_multiplier * self.clip_norm)) ** 2 / 2

  @property
  def xi(self) -> float:
    """ξ = τ·P: sums of shares, and shares as they are drawn, are nearly discrete Gaussians.

    Far under 1e-50 from ``LEAST_SHARE`` on, so that no constant in its derivation matters.
    """
    drawn = 2 * self.honest * draw_distance(*levels_of(self.share))
    return self.num_parameters * (sum_distance(self.share, self.honest) + drawn)

  @property
  def distance(self) -> float:
    """Bound on |log| of the ratio of a release to what is made from a Gaussian."""
    return self.xi + self.num_parameters * 5 * math.exp(-2 * (math.pi * SMOOTHING) ** 2)

  @property
  def accounted_noise_multiplier(self) -> float:
    """Noise multiplier of the Gaussian that the noise is made from: sqrt(s² - r²) / (Δ·scale)."""
    together = self.honest * self.share**2
    return math.sqrt(together - SMOOTHING**2) / (self.sensitivity * self.scale)

  def event(self) -> "dp_accounting.TruncatedSubsampledGaussianDpEvent":
    """The accounted event of one release: the Gaussian that it is made from."""
    import dp_accounting

    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
      dataset_size=self.num_units,
      sampling_probability=1.0,
      truncated_batch_size=self.num_units,
      noise_multiplier=self.accounted_noise_multiplier,
    )

  def untruncated_event(self) -> "dp_accounting.ZCDpEvent":
    """The release as zCDP: Rényi divergence ξ + ρ·α of every order α."""
    import dp_accounting

    return dp_accounting.ZCDpEvent(rho=self.rho, xi=self.xi)

  def compositions(self, steps: int) -> int:
    """Compositions of the event in ``steps`` releases."""
    require_whole("steps", steps, 0, "count the releases executed")
    return int(steps)


class Shares(NamedTuple):
  """What hospitals draw their noise with, on the device.

  Attributes:
    scale: [] float32 whole numbers to 1.
    sampler: of one hospital's noise.
  """

  scale: jax.Array
  sampler: Sampler


def make_shares(mechanism: DistributedGaussian) -> Shares:
  """The Shares of a mechanism."""
  return Shares(
    scale=jnp.asarray(mechanism.scale, jnp.float32), sampler=make_sampler(mechanism.share)
  )


def share_shapes() -> Shares:
  """Shapes of the Shares of any mechanism."""
  some = coarsest(2, 0, 1.0)
  return jax.eval_shape(lambda: make_shares(some))


def require_honest(colluders: int, num_clients: int) -> None:
  """Raises UserError unless two hospitals are honest: the noise of one alone hides no sum."""
  require_whole("client_privacy.colluders", colluders, 0, "use 1")
  require(
    colluders < num_clients - 1,
    f"client_privacy.colluders={colluders} of {num_clients} hospitals leave fewer than two whose"
    " noise nobody knows, and a sum of one update hides nothing",
    f"use at most {num_clients - 2}" if num_clients > 2 else "use client_privacy.noise=server",
  )


def largest_scale(
  bits: int, clip_norm: float, num_clients: int, colluders: int, noise_multiplier: float
) -> float:
  """The largest power of two at which a sum with 8 σ of noise cannot wrap modulo 2^bits.

  A number of the sum is at most K (C·scale + 1), and the noise of all K shares has the standard
  deviation σ·C·scale·sqrt(K / (K - c)).
  """
  noise = noise_multiplier * math.sqrt(num_clients / (num_clients - colluders))
  room = 2.0 ** (bits - 1) - 1 - num_clients
  if room <= 0:
    return 0.0
  return 2.0 ** math.floor(math.log2(room / (clip_norm * (num_clients + ROOM * noise))))


def on_grid(
  template: DistributedGaussian, sigma: float, bits: int, scale: float
) -> DistributedGaussian:
  """The mechanism of noise σ on the grid of this scale, or on the finest one where that is 0.

  Args:
    template: numbers of hospitals, clip norm and size of an update; its σ and scale are not read.
    sigma: σ.
    bits: of the modulus of sums.
    scale: whole numbers to 1, or 0.

  Raises:
    UserError: a sum could wrap, or rounding would add more than a 256th to the sensitivity.
  """
  size, bound = template.num_units, template.clip_norm
  largest = largest_scale(bits, bound, size, template.colluders, sigma)
  require(
    scale <= largest and largest > 0,
    f"secure.scale={scale:g}: the sum of {size} hospitals and its noise could wrap modulo 2^{bits}"
    f" above {largest:g}",
    "use 0 or at most that" if largest else "use secure.bits=32",
  )
  chosen = scale or largest
  steps, least = chosen * bound, FINEST * math.sqrt(template.num_parameters)
  require(
    steps >= least,
    f"client_privacy.noise='distributed' with secure.bits={bits}: the clip norm has {steps:.4g}"
    f" steps of the grid, under {least:.4g} = 256 sqrt(P) for the P = {template.num_parameters:,}"
    " numbers of an update, and rounding would cost ε",
    "use secure.bits=32 and secure.scale=0, or a smaller network",
  )
  return dataclasses.replace(template, noise_multiplier=sigma, scale=chosen)


def coarsest(
  num_units: int, colluders: int, clip_norm: float, num_parameters: int = 2**24
) -> DistributedGaussian:
  """The mechanism of σ = 1 on a grid of 2^20 steps to the clip norm.

  For 2^24 numbers no grid that ``on_grid`` allows is coarser.
  """
  return DistributedGaussian(
    num_units=num_units,
    colluders=colluders,
    noise_multiplier=1.0,
    clip_norm=clip_norm,
    scale=2.0**20 / clip_norm,
    num_parameters=num_parameters,
  )
