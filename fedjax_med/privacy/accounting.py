"""ε of a mechanism, computed from its releases and its δ.

Adjacency is zero-out (``REPLACE_SPECIAL``): one unit (record, patient or hospital) is replaced by
nothing while the number of units n stays, because q = batch_size / n and the denominator q·n make n
public. Add-or-remove would change n, which this analysis does not allow. Every figure is an upper
bound, up to the rounding of its floats: that of composing distributions is measured and subtracted
from δ, see ``STEP_ERROR``.

Two accountants. ``pld`` composes dp-accounting's privacy loss distribution of the truncated
Poisson Gaussian (arXiv 2508.15089; connect-the-dots, arXiv 2207.04380); where its rounding would
take much of δ it is the smaller of what is left of it and ``rdp``, an independent and looser bound,
see ``_rdp_epsilon``. Noise that hospitals add themselves (``DistributedGaussian``) has both too:
that of the Gaussian it is made from, and zCDP.
"""

import decimal
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedjax_med.core.errors import require, require_choice, require_whole
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.privacy.mechanism import Mechanism

if TYPE_CHECKING:
  from dp_accounting import TruncatedSubsampledGaussianDpEvent as Event
  from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

MIN_DELTA = 1e-10
# What composing a distribution may lose of δ in each step. The spectrum, off by some 2^-53 a step,
# is raised to the power of the steps: benchmarks/accounting_error.py finds a quarter of it at most.
STEP_ERROR = 1e-15
# Steps up to which that was measured; for more the Rényi bound serves, which has no such error.
MEASURED_STEPS = 2_000_000
MAX_STEPS = 10_000_000
# Orders of rdp: integers, for which the moments of the Poisson-sampled Gaussian are a finite sum.
RDP_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)
# Orders for noise of hospitals together, 1.25 to 131,073: neighbours cost ε under 0.1%.
SHARED_ORDERS = tuple(1 + 2 ** (k / 16) for k in range(-32, 273))


def default_delta(num_units: int) -> float:
  """1 / (10 n)."""
  require_whole("num_units", num_units, 1, "use a hospital with training examples")
  return 1 / (10 * int(num_units))


def check_delta(delta: float, num_units: int) -> None:
  """Raises UserError unless 1e-10 ≤ δ < 1/n; from 1/n on, publishing one record is 'private'."""
  require(
    MIN_DELTA <= delta < 1 / num_units,
    f"delta={delta} must be at least {MIN_DELTA:g} and under 1/n={1 / num_units:.3g}",
    f"use 1/(10 n)={default_delta(num_units):.3g}, or 0 in the configuration to have it chosen",
  )


def resolve_deltas(counts: Sequence[int] | np.ndarray, delta: float) -> tuple[float, ...]:
  """δ of each hospital: ``delta``, or 1 / (10 n_i) where that is 0; each checked against n_i."""
  deltas = tuple(default_delta(count) if delta == 0 else float(delta) for count in counts)
  for count, hospital_delta in zip(counts, deltas, strict=True):
    check_delta(hospital_delta, count)
  return deltas


def round_up(epsilon: float | None) -> str:
  """ε to two decimals, rounded up so that it is never understated; 'none' without a guarantee."""
  if epsilon is None or math.isnan(epsilon):
    return "none"
  if math.isinf(epsilon):
    return "∞"
  step = decimal.Decimal("0.01")
  return str(decimal.Decimal(repr(float(epsilon))).quantize(step, rounding=decimal.ROUND_CEILING))


def ceil_digits(value: float, digits: int = 2) -> str:
  """A δ or a factor for people: so many significant digits, rounded up."""
  context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
  return f"{float(context.create_decimal(repr(float(value)))):g}"


def epsilon(mechanism: Mechanism, steps: int, delta: float, accountant: str = "pld") -> float:
  """ε of ``steps`` steps at ``delta``: 0 without steps, infinite without noise.

  The distribution of one step is built once a mechanism (50 to 700 ms) and kept, so other numbers
  of steps cost 20 to 300 ms.

  Raises:
    UserError: δ outside [1e-10, 1/n), steps not a whole number from 0 to 10 million, or an unknown
      accountant.
  """
  compositions = mechanism.compositions(steps)
  require(
    compositions <= MAX_STEPS,
    f"steps={steps} are {compositions} releases, over the {MAX_STEPS} up to which the error of"
    " computing ε is known",
    "take fewer, of larger batches",
  )
  check_delta(delta, mechanism.num_units)
  require_choice("accountant", accountant, ("pld", "rdp"))
  if steps == 0:
    return 0.0
  if mechanism.noise_multiplier == 0:
    return math.inf
  if isinstance(mechanism, DistributedGaussian):
    compute = _made_from_gaussian if accountant == "pld" else _zcdp_epsilon
    value = compute(mechanism, compositions, float(delta))
  else:
    compute = _pld_epsilon if accountant == "pld" else _rdp_epsilon
    value = compute(mechanism.event(), compositions, float(delta))
  if math.isnan(value) or value < 0:
    raise ArithmeticError(f"accountant '{accountant}' returned ε={value} for {mechanism}")
  return value


def discretization_interval(mechanism: Mechanism) -> float:
  """Grid of the PLD: an eighth of one step's loss standard deviation, at most 2^-8, a power of 2.

  A grid only ever raises ε: by about 0.1% here, by 40% at q = 0.003, σ = 4 with the usual 1e-3. It
  is made coarser where it would take over 2^17 points (q under 1e-3 with σ under 1).
  """
  return _interval(mechanism.event())


def cut_probability(mechanism: Mechanism) -> float:
  """Probability that a given unit is drawn and kept in a batch that overflows, in one event."""
  return _cut_probability(mechanism.places, mechanism.drawn_probability, mechanism.batch_cap)


def _cut_probability(n: int, q: float, cap: int) -> float:
  """Of k > cap units drawn each is kept with probability cap / k: P(k > cap) · cap / n."""
  from scipy import stats

  return float(stats.binom.sf(cap, n, q)) * min(cap / n, 1.0)


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
  """ε at what rounding leaves of δ; no more than the Rényi bound where that is under 99.9%."""
  lost, bounds = steps * STEP_ERROR, []
  if steps > MEASURED_STEPS:
    return _rdp_epsilon(event, steps, delta)
  if lost <= delta / 2:
    composed = _step_pld(event).self_compose(steps)
    bounds.append(float(composed.get_epsilon_for_delta(delta - lost)))
  if lost > delta / 1000:
    bounds.append(_rdp_epsilon(event, steps, delta))
  return min(bounds)


def _made_from_gaussian(mechanism: DistributedGaussian, releases: int, delta: float) -> float:
  """ε of the Gaussian that the noise is made from, and what their distance adds.

  Where densities differ by a factor of e^t at most, (ε, δ) becomes (ε + 2t, e^t δ).
  """
  distance = releases * mechanism.distance
  event = mechanism.event()
  return _pld_epsilon(event, releases, delta * math.exp(-distance)) + 2 * distance


@functools.lru_cache(maxsize=65536)
def _zcdp_epsilon(mechanism: DistributedGaussian, releases: int, delta: float) -> float:
  """ε of releases of Rényi divergence ξ + ρ·α, by dp-accounting."""
  import dp_accounting
  from dp_accounting import rdp

  relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
  accountant = rdp.RdpAccountant(SHARED_ORDERS, relation)
  accountant.compose(mechanism.untruncated_event(), releases)
  return float(accountant.get_epsilon(delta))


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
  cut = _cut_probability(n, q, cap)
  most = int(stats.binom.isf(delta / 1e4, steps, cut))
  while stats.binom.sf(most, steps, cut) > delta / 1e3:  # the inverse may stop too early
    most = 2 * most + 1
  num_cut = np.arange(most + 1)
  weights = stats.binom.pmf(num_cut, steps, cut)
  rest = float(stats.binom.sf(num_cut[-1], steps, cut))
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
