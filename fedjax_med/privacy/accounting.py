"""ε of each hospital: what its mechanism, its steps and its δ add up to, and σ for a target ε.

Adjacency is zero-out (``REPLACE_SPECIAL``): one record is replaced by nothing while the hospital's
size n stays, because q = batch_size / n and the denominator q·n make n public. Add-or-remove would
change n, which this analysis does not allow. Every figure is an upper bound.

Two accountants. ``pld`` composes dp-accounting's privacy loss distribution of the truncated
Poisson Gaussian (arXiv 2508.15089; connect-the-dots, arXiv 2207.04380). ``rdp`` is an independent
and looser bound, see ``_rdp_epsilon``.
"""

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_med.core.errors import UserError, require, require_choice
from fedjax_med.privacy.mechanism import PoissonGaussian, require_whole

if TYPE_CHECKING:
  from dp_accounting import TruncatedSubsampledGaussianDpEvent as Event
  from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

ADJACENCY = "zero-out (replace one record by nothing; hospital sizes are public)"
MECHANISM = (
  "DP-SGD: Poisson-sampled batches cut to batch_cap, each record's gradient clipped to clip_norm,"
  " Gaussian noise of noise_multiplier * clip_norm on the sum, fixed denominator"
)
NOT_COVERED = (
  "Losses, accuracies and gradient norms shown or stored during training are not noised.",
  "Normalisation statistics taken over more than one image are not noised.",
  "Stopping, or choosing a round, by a validation score uses data outside the guarantee.",
  "Tuning: the guarantee is of one run, not of the runs tried before it.",
  "The number of hospitals and how many images of each class each one holds are public.",
  "Whoever has the seed and the code can recompute the noise.",
  "A patient with several records is protected as single records, not as a patient.",
  "Simulation-grade randomness: float32 normals stop at 5.42 standard deviations and threefry is"
  " no certified cryptographic generator; the values hold for ideal randomness.",
)

# affordable_steps answers no more than this.
MAX_STEPS = 10_000_000
# FFT composition is exact to about 1e-12 in probability.
MIN_DELTA = 1e-10
# calibrate_noise looks for σ in this range.
NOISE_RANGE = (0.05, 1e5)
# Orders of rdp: integers, for which the moments of the Poisson-sampled Gaussian are a finite sum.
RDP_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)


def default_delta(num_examples: int) -> float:
  """1 / (10 n)."""
  require_whole("num_examples", num_examples, 1, "use a hospital with training examples")
  return 1 / (10 * int(num_examples))


def check_delta(delta: float, num_examples: int) -> None:
  """Raises UserError unless 1e-10 ≤ δ < 1/n; from 1/n on, publishing one record is 'private'."""
  require(
    MIN_DELTA <= delta < 1 / num_examples,
    f"delta={delta} must be at least {MIN_DELTA:g} and under 1/n={1 / num_examples:.3g}",
    f"use 1/(10 n)={default_delta(num_examples):.3g}, or 0 in the configuration to have it chosen",
  )


def resolve_deltas(counts: Sequence[int] | np.ndarray, delta: float) -> tuple[float, ...]:
  """δ of each hospital: ``delta``, or 1 / (10 n_i) where that is 0; each checked against n_i."""
  deltas = tuple(default_delta(count) if delta == 0 else float(delta) for count in counts)
  for count, hospital_delta in zip(counts, deltas, strict=True):
    check_delta(hospital_delta, count)
  return deltas


def epsilon(mechanism: PoissonGaussian, steps: int, delta: float, accountant: str = "pld") -> float:
  """ε of ``steps`` steps at ``delta``: 0 without steps, infinite without noise.

  The distribution of one step is built once a mechanism (50 to 700 ms) and kept, so other numbers
  of steps cost 20 to 300 ms.

  Raises:
    UserError: δ outside [1e-10, 1/n), steps not a whole number from 0, or an unknown accountant.
  """
  require_whole("steps", steps, 0, "count the steps executed")
  check_delta(delta, mechanism.num_examples)
  require_choice("accountant", accountant, ("pld", "rdp"))
  if steps == 0:
    return 0.0
  if mechanism.noise_multiplier == 0:
    return math.inf
  compute = _pld_epsilon if accountant == "pld" else _rdp_epsilon
  value = compute(mechanism.event(), int(steps), float(delta))
  if math.isnan(value) or value < 0:
    raise ArithmeticError(f"accountant '{accountant}' returned ε={value} for {mechanism}")
  return value


def discretization_interval(mechanism: PoissonGaussian) -> float:
  """Grid of the PLD: an eighth of one step's loss standard deviation, at most 2^-8, a power of 2.

  A grid only ever raises ε: by about 0.1% here, by 40% at q = 0.003, σ = 4 with the usual 1e-3. It
  is made coarser where it would take over 2^17 points (q under 1e-3 with σ under 1).
  """
  return _interval(mechanism.event())


@functools.lru_cache(maxsize=4096)
def calibrate_noise(
  num_examples: int,
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
  require(
    0 < target_epsilon < math.inf, f"target_epsilon={target_epsilon} must be above 0", "use 8"
  )
  require_whole("steps", steps, 1, "calibrate for at least one step")
  # The clip norm does not enter ε.
  template = PoissonGaussian(num_examples, sampling_probability, batch_cap, 1.0, 1.0)
  check_delta(delta, num_examples)

  def epsilon_at(inverse: float) -> float:
    return epsilon(dataclasses.replace(template, noise_multiplier=1 / inverse), steps, delta)

  # Solves μ = q sqrt(T (exp(1/σ²) - 1)) of the central limit (Bu et al., arXiv 1911.11607) for 1/σ.
  mu = _gaussian_mu(target_epsilon, delta)
  guess = math.sqrt(math.log1p(mu**2 / (sampling_probability**2 * steps)))
  lowest, highest = (1 / sigma for sigma in reversed(NOISE_RANGE))
  inverse = _largest_within(
    epsilon_at, target_epsilon, lowest, highest, guess, slope=1.0, slack=0.005
  )
  if inverse is None:
    raise UserError(
      f"target_epsilon={target_epsilon:g} cannot be reached in {steps} steps with n={num_examples}"
      f" and delta={delta:.3g}, even noise_multiplier={NOISE_RANGE[1]:g} exceeds it; raise"
      " target_epsilon, or lower the number of steps or batch_size"
    )
  return 1 / inverse


def affordable_steps(mechanism: PoissonGaussian, delta: float, budget: float) -> int:
  """Largest number of steps with PLD ε ≤ ``budget``, 0 to 10 million: stop before, not after.

  Raises:
    UserError: the budget is not above 0, or δ is refused.
  """
  require(0 < budget < math.inf, f"budget={budget} must be finite and above 0", "use 8")
  check_delta(delta, mechanism.num_examples)
  if mechanism.noise_multiplier == 0:
    return 0
  loss_variance = math.expm1(min(mechanism.noise_multiplier**-2, 100.0))
  guess = (_gaussian_mu(budget, delta) / mechanism.drawn_probability) ** 2 / loss_variance
  steps = _largest_within(
    lambda count: epsilon(mechanism, int(count), delta), budget, 1, MAX_STEPS, guess, slope=0.5
  )
  return int(steps or 0)


def privacy_report(
  names: Sequence[str],
  mechanisms: Sequence[PoissonGaussian],
  steps: Sequence[int] | np.ndarray,
  deltas: Sequence[float] | np.ndarray,
) -> dict[str, Any]:
  """What a run may claim: ε of every hospital and their maximum, and what is not covered.

  A record lies in one hospital, so hospitals compose in parallel: never a sum. No credit is taken
  for client sampling (steps are those executed) nor for aggregation over hospitals.

  Args:
    names: K hospital names.
    mechanisms: K mechanisms.
    steps: [K] private steps executed, resumed ones counted once, with empty batches counted.
    deltas: [K] δ of each hospital.

  Returns:
    Plain dictionary; ``epsilon`` is infinite for a hospital that trained without noise, and
    ``value_discretization_interval`` is the largest of the hospitals'.

  Raises:
    UserError: lengths differ, there is no hospital, or any number is not valid.
  """
  lengths = (len(names), len(mechanisms), len(steps), len(deltas))
  require(
    len(set(lengths)) == 1 and len(names) > 0,
    f"names, mechanisms, steps and deltas have lengths {lengths}",
    "give one of each for every hospital, at least one hospital",
  )
  spent = [epsilon(*each) for each in zip(mechanisms, steps, deltas, strict=True)]
  hospitals = [
    {
      "name": name,
      "n": mechanism.num_examples,
      "sampling_probability": mechanism.sampling_probability,
      "batch_cap": mechanism.batch_cap,
      "noise_multiplier": mechanism.noise_multiplier,
      "clip_norm": mechanism.clip_norm,
      "steps": int(count),
      "delta": float(delta),
      "epsilon": value,
    }
    for name, mechanism, count, delta, value in zip(
      names, mechanisms, steps, deltas, spent, strict=True
    )
  ]
  intervals = [discretization_interval(m) for m in mechanisms if m.noise_multiplier > 0]
  return {
    "unit": "record",
    "adjacency": ADJACENCY,
    "accountant": {
      "name": "PLD",
      "library": "dp-accounting",
      "version": importlib.metadata.version("dp-accounting"),
      "value_discretization_interval": max(intervals, default=0.0),
    },
    "mechanism": MECHANISM,
    "epsilon_max": max(spent),
    "hospitals": hospitals,
    "not_covered": list(NOT_COVERED),
  }


def _interval(event: "Event") -> float:
  q, sigma = event.sampling_probability, event.noise_multiplier
  std = min(1 / sigma, q * math.sqrt(math.expm1(min(sigma**-2, 100.0))))
  # Losses of either sign, sensitivity 2 (a cut batch), noise out to 10 standard deviations.
  span = 2 * float(np.logaddexp(0.0, math.log(q) + 20 / sigma + 2 / sigma**2))
  wanted = 2.0 ** math.floor(math.log2(min(std / 8, 2**-8)))
  return max(wanted, 2.0 ** math.ceil(math.log2(span / 2**17)))


@functools.lru_cache(maxsize=1024)
def _step_pld(event: "Event") -> "PrivacyLossDistribution":
  """Privacy loss distribution of one step, what ``PLDAccountant`` composes for this event."""
  import dp_accounting
  from dp_accounting.pld import privacy_loss_distribution

  return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
    dataset_size=event.dataset_size,
    sampling_probability=event.sampling_probability,
    truncated_batch_size=event.truncated_batch_size,
    noise_multiplier=event.noise_multiplier,
    value_discretization_interval=_interval(event),
    neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
  )


@functools.lru_cache(maxsize=65536)
def _pld_epsilon(event: "Event", steps: int, delta: float) -> float:
  return float(_step_pld(event).self_compose(steps).get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=65536)
def _rdp_epsilon(event: "Event", steps: int, delta: float) -> float:
  """Rényi bound of the truncated Poisson Gaussian, without dp-accounting's mixture argument.

  Call a step cut if the record is drawn and kept in a batch that overflows. Draws do not depend on
  the record's value and with nothing in its place they can be made as well, so the number J of cut
  steps, Binomial, may be revealed: δ(ε) ≤ Σ_j P(J = j) δ_j(ε). In a cut step the record stands in
  another one's place: a Gaussian of sensitivity 2C. In any other step let the batch drawn without
  the record be known: if it has room, the record joins it with probability q, if it is full, never;
  so no worse than a Poisson-sampled Gaussian (Mironov et al., arXiv 1908.10530). δ_j by Canonne et
  al., arXiv 2004.00010, proposition 12.
  """
  import dp_accounting
  from dp_accounting import rdp
  from scipy import stats

  n, q = event.dataset_size, event.sampling_probability
  cap, sigma = event.truncated_batch_size, event.noise_multiplier
  relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
  step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
  uncut = rdp.RdpAccountant(RDP_ORDERS, relation).compose(step).rdp
  orders = np.array(RDP_ORDERS, float)
  # Of k > cap records drawn each is kept with probability cap / k: P(cut) = P(k > cap) cap / n.
  cut_probability = float(stats.binom.sf(cap, n, q)) * min(cap / n, 1.0)
  num_cut = np.arange(int(stats.binom.isf(delta / 1e4, steps, cut_probability)) + 1)
  weights = stats.binom.pmf(num_cut, steps, cut_probability)
  rest = float(stats.binom.sf(num_cut[-1], steps, cut_probability))
  moments = (steps - num_cut)[:, None] * uncut + num_cut[:, None] * (2 * orders / sigma**2)

  def delta_at(value: float) -> float:
    log_deltas = (orders - 1) * (moments - value + np.log1p(-1 / orders)) - np.log(orders)
    return float(weights @ np.exp(np.minimum(log_deltas.min(axis=1), 0.0))) + rest

  high = 1.0
  while delta_at(high) > delta:
    high *= 2
  low = 0.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (low, middle) if delta_at(middle) <= delta else (middle, high)
  return high


def _gaussian_mu(target_epsilon: float, delta: float) -> float:
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
    found = value(x)
    if found <= target:
      inside = x
    else:
      outside = x
    if inside >= high or (inside == x and slack > 0 and found >= (1 - slack) * target):
      return inside
    if outside <= low:
      return None
    if slack == 0 and outside - inside == 1:
      return inside
    point = (math.log(x), math.log(min(max(found, 1e-12), 1e12)))
    if last is not None and last[0] != point[0]:
      slope = min(max((point[1] - last[1]) / (point[0] - last[0]), slope / 2), slope * 2)
    last = point
    x = math.exp(point[0] + min(max((aim - point[1]) / slope, -3.0), 3.0))
  raise ArithmeticError(f"no x found with value(x) <= {target}")
