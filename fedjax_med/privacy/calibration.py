"""The mechanism of each hospital: the noise, or the number of steps, that a target ε allows."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.core.errors import UserError, require, require_whole
from fedjax_med.privacy.accounting import MAX_STEPS, check_delta, epsilon, resolve_deltas
from fedjax_med.privacy.distributed import DistributedGaussian, coarsest, on_grid
from fedjax_med.privacy.mechanism import Mechanism, PoissonGaussian, batch_size_bound
from fedjax_med.privacy.strategy import toeplitz_strategy

# calibrate_noise looks for σ in this range.
NOISE_RANGE = (0.05, 1e5)


class PrivacyTarget(NamedTuple):
  """Privacy settings that all hospitals have in common.

  Attributes:
    clip_norm: C.
    batch_cap: one static cap for all hospitals; 0 means the expected size plus 5 standard
      deviations at the hospital where that is largest. Never more than the largest hospital.
    noise_multiplier: σ of every hospital; 0 means calibrate.
    target_epsilon: with ``noise_multiplier=0`` the ε that each hospital's σ is calibrated to.
    delta: δ; 0 means 1 / (10 n_i). Refused from 1/n_i on.
    bands: steps that noise is correlated over, at most n_i and the steps of a hospital.
  """

  clip_norm: float
  batch_cap: int = 0
  noise_multiplier: float = 0.0
  target_epsilon: float = 0.0
  delta: float = 0.0
  bands: int = 1


def plan_mechanisms(
  counts: Sequence[int] | np.ndarray,
  batch_size: int,
  steps: Sequence[int] | np.ndarray,
  target: PrivacyTarget,
) -> tuple[PoissonGaussian, ...]:
  """The mechanism of each hospital.

  Args:
    counts: [K] units of each hospital.
    batch_size: expected batch size; q_i = min(1, bands · batch_size / n_i).
    steps: [K] local steps each hospital will take in all; σ is calibrated to them, and the noise's
      correlation made for them.
    target: settings of all hospitals.

  Raises:
    UserError: a value breaks its rule, or the target cannot be reached.
  """
  require_whole("batch_size", batch_size, 1, "use 32")
  require(len(counts) > 0, "there is no hospital", "use at least one")
  require(
    len(steps) == len(counts),
    f"steps has {len(steps)} entries for {len(counts)} hospitals",
    "give one number of steps for each hospital",
  )
  require(
    target.noise_multiplier != 0 or target.target_epsilon > 0,
    f"noise_multiplier={target.noise_multiplier} and target_epsilon={target.target_epsilon} leave σ"
    " open",
    "set one of them above 0",
  )
  for count in counts:
    require_whole("num_units", count, 1, "give every hospital at least one training example")
  sizes = [int(count) for count in counts]
  deltas = resolve_deltas(sizes, target.delta)
  bands = target.bands
  rates = [min(1.0, bands * batch_size / n) for n in sizes]
  places = [-(-n // bands) for n in sizes]
  largest = max(min(n, batch_size_bound(n, q, 5)) for n, q in zip(places, rates, strict=True))
  cap = min(target.batch_cap or largest, max(places))
  mechanisms = []
  for n, q, num_steps, hospital_delta in zip(sizes, rates, steps, deltas, strict=True):
    strategy = toeplitz_strategy(int(num_steps), bands)
    unit = PoissonGaussian(
      num_units=n,
      sampling_probability=q,
      batch_cap=cap,
      noise_multiplier=1.0,
      clip_norm=target.clip_norm,
      coefficients=tuple(map(float, strategy)),
    )
    sigma = float(target.noise_multiplier) or unit.column_norm * calibrate_noise(
      unit.places, q, cap, unit.compositions(num_steps), hospital_delta, target.target_epsilon
    )
    mechanisms.append(dataclasses.replace(unit, noise_multiplier=sigma))
  return tuple(mechanisms)


@functools.lru_cache(maxsize=4096)
def calibrate_noise(
  num_units: int,
  sampling_probability: float,
  batch_cap: int,
  steps: int,
  delta: float,
  target_epsilon: float,
) -> float:
  """A σ whose PLD ε lies in [0.995, 1] of ``target_epsilon``, never above it.

  Starts from the central limit and follows the slope of log ε over log σ. A target that σ = 0.05
  already meets gets σ = 0.05.

  Raises:
    UserError: the target is not above 0, or no σ up to 1e5 reaches it.
  """
  # The clip norm does not enter ε.
  template = PoissonGaussian(
    num_units=num_units,
    sampling_probability=sampling_probability,
    batch_cap=batch_cap,
    noise_multiplier=1.0,
    clip_norm=1.0,
  )
  return noise_of(template, steps, delta, target_epsilon)


def noise_of(template: Mechanism, steps: int, delta: float, target_epsilon: float) -> float:
  """As ``calibrate_noise``, for mechanisms that differ from ``template`` in σ alone."""
  require(
    0 < target_epsilon < math.inf, f"target_epsilon={target_epsilon} must be above 0", "use 8"
  )
  require_whole("steps", steps, 1, "calibrate for at least one step")
  num_units, sampling_probability = template.num_units, template.sampling_probability
  check_delta(delta, num_units)

  def epsilon_at(inverse: float) -> float:
    return epsilon(dataclasses.replace(template, noise_multiplier=1 / inverse), steps, delta)

  # Solves μ = q sqrt(T (exp(1/σ²) - 1)) of the central limit (Bu et al., arXiv 1911.11607) for 1/σ.
  mu = gaussian_mu(target_epsilon, delta)
  guess = math.sqrt(math.log1p(mu**2 / (sampling_probability**2 * steps)))
  lowest, highest = (1 / sigma for sigma in reversed(NOISE_RANGE))
  inverse = _largest_within(
    epsilon_at, target_epsilon, lowest, highest, guess, slope=1.0, slack=0.005
  )
  if inverse is None:
    raise UserError(
      f"target_epsilon={target_epsilon:g} cannot be reached in {steps} steps with n={num_units}"
      f" and delta={delta:.3g}, even noise_multiplier={NOISE_RANGE[1]:g} exceeds it; raise"
      " target_epsilon, or lower the number of steps or batch_size"
    )
  return 1 / inverse


def calibrate_shares(
  template: DistributedGaussian,
  bits: int,
  scale: float,
  steps: int,
  delta: float,
  target_epsilon: float,
) -> DistributedGaussian:
  """The mechanism of hospitals' own noise whose ε is 0.995 to 1 of a target.

  The grid follows from σ, and ε from the grid: σ is found on the coarsest grid that is allowed, and
  once more on the grid of that σ, whose noise is no larger and can wrap no more.

  Args:
    template: numbers of hospitals, clip norm and size of an update; its σ and scale are not read.
    bits: of the modulus of sums.
    scale: whole numbers to 1; 0 takes the largest at which no sum can wrap.
    steps: rounds.
    delta: δ.
    target_epsilon: the target.
  """
  size, colluders, bound = template.num_units, template.colluders, template.clip_norm
  sigma = noise_of(coarsest(size, colluders, bound), steps, delta, target_epsilon)
  chosen = on_grid(template, sigma, bits, scale)
  sigma = noise_of(chosen, steps, delta, target_epsilon)
  return dataclasses.replace(chosen, noise_multiplier=sigma)


@functools.lru_cache(maxsize=4096)
def affordable_steps(mechanism: Mechanism, delta: float, budget: float) -> int:
  """Largest number of steps with PLD ε ≤ ``budget``, from 0 to 10 million.

  Raises:
    UserError: the budget is not above 0, or δ is refused.
  """
  require(0 < budget < math.inf, f"budget={budget} must be finite and above 0", "use 8")
  check_delta(delta, mechanism.num_units)
  if mechanism.noise_multiplier == 0:
    return 0
  loss_variance = math.expm1(min(mechanism.noise_multiplier**-2, 100.0))
  guess = (gaussian_mu(budget, delta) / mechanism.drawn_probability) ** 2 / loss_variance
  bands = mechanism.bands

  def spent(compositions: float) -> float:
    return epsilon(mechanism, int(compositions) * bands, delta)

  return bands * int(_largest_within(spent, budget, 1, MAX_STEPS // bands, guess, slope=0.5) or 0)


def gaussian_mu(target_epsilon: float, delta: float) -> float:
  """μ with which μ-Gaussian DP is (ε, δ)-DP (Balle and Wang, arXiv 1805.06530, theorem 8)."""
  from scipy import optimize, special

  def excess(log_mu: float) -> float:
    mu = math.exp(log_mu)
    below = special.log_ndtr(-target_epsilon / mu - mu / 2) + target_epsilon
    return float(special.ndtr(mu / 2 - target_epsilon / mu) - math.exp(min(below, 0.0))) - delta

  return math.exp(float(optimize.brentq(excess, -30.0, 15.0)))  # pyright: ignore[reportArgumentType]


def _largest_within(
  value: Callable[[float], float],
  target: float,
  low: float,
  high: float,
  guess: float,
  *,
  slope: float,
  slack: float = 0.0,
) -> float | None:
  """Largest x in [low, high] with value(x) ≤ target; None where even ``low`` exceeds it.

  ``value`` rises with x, about like x**slope. With ``slack`` any x with value(x) of at least
  (1 - slack)·target will do; without it x is whole and x + 1 exceeds the target. Secant steps in
  log x, log value, inside the bracket known so far; plain bisection after 15 of them.
  """
  aim = math.log(target) + math.log1p(-slack / 2)
  inside, outside = 0.0, math.inf  # x known to be within, x known to exceed
  last: tuple[float, float] | None = None
  x = guess
  for trial in range(200):
    if outside < math.inf and inside > 0 and (trial > 15 or not inside < x < outside):
      x = math.sqrt(inside * outside)
    x = min(max(x, low), high)
    if slack == 0:
      x = float(min(max(round(x - 0.5), inside + 1), outside - 1))
    reached = value(x)
    if reached <= target:
      inside = x
    else:
      outside = x
    if inside >= high or (inside == x and slack > 0 and reached >= (1 - slack) * target):
      return inside
    if outside <= low:
      return None
    if slack == 0 and outside - inside == 1:
      return inside
    point = (math.log(x), math.log(min(max(reached, 1e-12), 1e12)))
    if last is not None and last[0] != point[0]:
      slope = min(max((point[1] - last[1]) / (point[0] - last[0]), slope / 2), slope * 2)
    last = point
    x = math.exp(point[0] + min(max((aim - point[1]) / slope, -3.0), 3.0))
  raise ArithmeticError(f"no x found with value(x) <= {target}")
