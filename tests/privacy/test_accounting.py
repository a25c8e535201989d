"""ε against closed forms, integration, a second bound and the library; σ and steps for an ε."""

import dataclasses
import functools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from scipy import integrate, optimize, special, stats

from fedjax_med.core.errors import UserError
from fedjax_med.core.rounding import NORM_SLACK
from fedjax_med.privacy import accounting
from fedjax_med.privacy.accounting import (
  check_delta,
  default_delta,
  discretization_interval,
  epsilon,
  round_up,
)
from fedjax_med.privacy.calibration import affordable_steps, calibrate_noise
from fedjax_med.privacy.mechanism import PoissonGaussian, batch_size_bound

ZERO_OUT = dp_accounting.NeighboringRelation.REPLACE_SPECIAL


def mechanism(n=300, batch_size=30, sigma=2.0, num_stds=5.0, clip_norm=1.0):
  q = min(1.0, batch_size / n)
  return PoissonGaussian(n, q, min(n, batch_size_bound(n, q, num_stds)), sigma, clip_norm)


def gaussian_delta(eps, mu):
  """δ of μ-Gaussian DP at ε, Balle and Wang 2018, theorem 8."""
  return stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-eps / mu - mu / 2)


def gaussian_epsilon(mu, delta):
  return optimize.root_scalar(lambda eps: gaussian_delta(eps, mu) - delta, bracket=(0, 200)).root


@pytest.mark.parametrize(("sigma", "steps"), [(0.7, 1), (1.5, 1), (5.0, 1), (5.0, 25), (20.0, 400)])
def test_full_batches_match_the_analytic_gaussian_mechanism(sigma, steps):
  m = PoissonGaussian(50, 1.0, 50, sigma * (1 + NORM_SLACK), 1.0)
  exact = gaussian_epsilon(math.sqrt(steps) / sigma, 1e-3)
  assert exact <= epsilon(m, steps, 1e-3) <= 1.005 * exact


def full_batches(steps, mu):
  """A mechanism whose ``steps`` together are μ-Gaussian DP."""
  return PoissonGaussian(50, 1.0, 50, math.sqrt(steps) / mu * (1 + NORM_SLACK), 1.0)


@pytest.mark.parametrize(
  ("steps", "mu", "delta"),
  [
    (500_000, 1.0, 1e-10), (500_000, 2.0, 1e-10), (500_000, 2.0, 1e-9), (1_000_000, 0.3, 1e-10),
    (1_000_000, 0.3, 1e-9), (2_000_000, 2.0, 1e-10), (2_000_000, 2.0, 1e-9),
  ],
)  # fmt: skip
def test_very_many_steps_at_a_tiny_delta_cost_at_least_the_exact_epsilon(steps, mu, delta):
  exact = gaussian_epsilon(mu, delta)
  assert exact <= epsilon(full_batches(steps, mu), steps, delta) <= 1.07 * exact


@pytest.mark.slow
def test_random_gaussian_compositions_cost_at_least_the_exact_epsilon():
  generator = np.random.default_rng(0)
  for _ in range(30):
    steps, mu, delta = 10 ** generator.uniform((0, -1.3, -10), (6.3, 0.6, -4))
    m = full_batches(int(steps), mu)
    exact = gaussian_epsilon(mu, delta)
    assert exact <= epsilon(m, int(steps), delta) <= 1.15 * exact, (steps, mu, delta)


def test_epsilon_is_monotone_where_the_second_bound_takes_over():
  for mu in (0.1, 1.0):
    m = full_batches(50_000, mu)
    by_steps = [epsilon(m, steps, 1e-10) for steps in (90, 101, 10_000, 49_000, 50_001, 60_000)]
    assert all(np.diff(by_steps) > 0)
    by_delta = [epsilon(m, 50_000, delta) for delta in (1e-10, 1.01e-10, 1e-9, 4.9e-8, 5.1e-8)]
    assert all(np.diff(by_delta) < 0)


def test_more_steps_than_the_error_is_known_for_are_refused():
  m = mechanism(sigma=1e4)
  assert epsilon(m, 10_000_000, 1e-9) > 0
  with pytest.raises(UserError, match=r"over the 10000000 up to .* is known; take fewer"):
    epsilon(m, 10_000_001, 1e-9)


def poisson_deltas(eps, q, sigma):
  """Hockey-stick divergences at ε of a Poisson-sampled Gaussian step: a record leaves, or comes.

  P = (1 - q) N(0, σ²) + q N(1, σ²) with the record, N(0, σ²) without it; P over N(0, σ²) rises, so
  one divergence is an integral above, the other below a point.
  """

  def point(ratio):  # where P is ``ratio`` times N(0, σ²)
    return math.log((ratio - 1 + q) / q) * sigma**2 + 0.5 if ratio > 1 - q else -math.inf

  def above(point, mean):
    return special.ndtr((mean - point) / sigma)

  up, down, scale = point(math.exp(eps)), point(math.exp(-eps)), math.exp(eps)
  leaves = (1 - q - scale) * above(up, 0) + q * above(up, 1)
  comes = (1 - scale * (1 - q)) * (1 - above(down, 0)) - scale * q * (1 - above(down, 1))
  return leaves, comes


def two_step_deltas(eps, q, sigma):
  """The same after two steps: the second may take what the loss of the first leaves of ε."""

  def density(x, mean):
    return math.exp(-0.5 * ((x - mean) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))

  def integrand(x, way):
    without, with_record = density(x, 0), (1 - q) * density(x, 0) + q * density(x, 1)
    loss = math.log(1 - q + q * math.exp((x - 0.5) / sigma**2))
    left = eps + (loss if way else -loss)
    return (without if way else with_record) * poisson_deltas(left, q, sigma)[way]

  def total(way):
    ends = (-12 * sigma, 1 + 12 * sigma)
    return integrate.quad(integrand, *ends, args=(way,), limit=500, epsabs=1e-13, epsrel=1e-9)[0]

  return total(0), total(1)


@pytest.mark.parametrize("deltas", [poisson_deltas, two_step_deltas])
@pytest.mark.parametrize(("q", "sigma"), [(2**-8, 0.6), (2**-3, 1.0), (2**-1, 2.0), (7 / 8, 0.8)])
def test_poisson_sampled_steps_match_the_integral_of_their_divergence(q, sigma, deltas):
  m = PoissonGaussian(50, q, 50, sigma * (1 + NORM_SLACK), 1.0)
  assert m.drawn_probability == q
  steps = 1 + (deltas is two_step_deltas)
  for delta in (1e-3, 1e-5):
    excess = functools.partial(lambda d, eps: max(deltas(eps, q, sigma)) - d, delta)
    exact = optimize.root_scalar(excess, bracket=(1e-6, 30), xtol=1e-10).root
    leaves, comes = deltas(exact, q, sigma)
    assert leaves >= comes
    # The grid moves a step's loss up by less than its interval.
    highest = exact + steps * discretization_interval(m)
    assert exact - 1e-8 <= epsilon(m, steps, delta) <= highest


def mixture(parts, grid, sigma):
  return sum(weight * stats.norm.pdf(grid, mean, sigma) for mean, weight in parts.items())


def outcome(n, q, cap, value, *, keeps_slot):
  """{sum: probability} of a batch where one record is ``value`` and the other n - 1 are -1.

  ``keeps_slot``: the record is drawn and pushes others out even if its value is 0; otherwise it is
  not there at all.
  """
  parts = {}

  def add(total, weight):
    parts[total] = parts.get(total, 0.0) + weight

  for k in range(n):
    weight = stats.binom.pmf(k, n - 1, q)
    if not keeps_slot:
      add(-min(k, cap), weight)
      continue
    kept = q * min(1.0, cap / (k + 1))
    add(value - min(k, cap - 1), weight * kept)
    add(-min(k, cap), weight * (1 - kept))
  return parts


def divergence(p, r, width, eps, steps):
  """Hockey-stick divergence of one or two steps of densities p over r, by integration."""
  loss = np.log(p) - np.log(r)
  order = np.argsort(loss)
  left = np.array([eps]) if steps == 1 else eps - loss
  above = np.searchsorted(loss[order], left)  # the points whose loss exceeds what is left of ε
  upper, lower = (np.append(np.cumsum(v[order][::-1])[::-1], 0.0) * width for v in (p, r))
  deltas = upper[above] - np.exp(left) * lower[above]
  return deltas[0] if steps == 1 else (p * deltas).sum() * width


def exact_delta(n, q, cap, sigma, eps, steps=1):
  """Largest hockey-stick divergence of the steps on the data of ``outcome``."""
  grid = np.linspace(-cap - 9 * sigma, 9 * sigma + 1, 40_001)
  present = mixture(outcome(n, q, cap, 1, keeps_slot=True), grid, sigma)
  deltas = []
  for keeps_slot in (True, False):
    nothing = mixture(outcome(n, q, cap, 0, keeps_slot=keeps_slot), grid, sigma)
    for p, r in ((present, nothing), (nothing, present)):
      deltas.append(divergence(p, r, grid[1] - grid[0], eps, steps))
  return max(deltas)


def event_of(n, q, cap):
  return dp_accounting.TruncatedSubsampledGaussianDpEvent(n, q, cap, 0.7)


@pytest.mark.parametrize("compute", [accounting._pld_epsilon, accounting._rdp_epsilon])
@pytest.mark.parametrize(("q", "cap"), [(0.5, 29), (0.5, 23), (0.5, 21), (0.5, 16), (0.9, 5)])
@pytest.mark.parametrize("steps", [1, 2])
def test_epsilon_bounds_the_exact_divergence_of_truncated_steps(compute, q, cap, steps):
  for delta in (1e-2, 1e-3, 1e-5):
    eps = compute(event_of(30, q, cap), steps, delta)
    assert exact_delta(30, q, cap, 0.7, eps, steps) <= delta


def test_accounting_for_plain_poisson_sampling_would_not_bound_a_tight_cap():
  eps = accounting._pld_epsilon(event_of(30, 0.9, 30), 1, 1e-5)
  assert exact_delta(30, 0.9, 30, 0.7, eps) <= 1e-5
  assert exact_delta(30, 0.9, 5, 0.7, eps) > 1e-5


def test_epsilon_is_the_librarys_for_the_self_composed_event():
  m = mechanism()
  accountant = pld.PLDAccountant(ZERO_OUT, discretization_interval(m))
  accountant.compose(dp_accounting.SelfComposedDpEvent(m.event(), 200))
  assert epsilon(m, 200, 1e-4) == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-6)


@pytest.mark.parametrize("adjacency", ["REPLACE_SPECIAL", "ADD_OR_REMOVE_ONE"])
def test_without_truncation_epsilon_is_that_of_poisson_sampling(adjacency):
  m = mechanism(num_stds=100)
  assert m.batch_cap == m.num_units
  event = dp_accounting.PoissonSampledDpEvent(
    m.drawn_probability, dp_accounting.GaussianDpEvent(2.0 / (1 + NORM_SLACK))
  )
  relation = dp_accounting.NeighboringRelation[adjacency]
  accountant = pld.PLDAccountant(relation, discretization_interval(m)).compose(event, 300)
  assert epsilon(m, 300, 1e-4) == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-6)
  renyi = rdp.RdpAccountant(accounting.RDP_ORDERS, relation).compose(event, 300)
  assert epsilon(m, 300, 1e-4, "rdp") == pytest.approx(renyi.get_epsilon(1e-4), rel=1e-3)


@pytest.mark.parametrize(
  ("n", "batch_size", "sigma", "steps", "num_stds"),
  [(300, 30, 2.0, 1, 5), (300, 30, 2.0, 500, 5), (300, 30, 2.0, 500, 2), (60, 30, 3.0, 50, 3)],
)
def test_pld_is_at_most_rdp(n, batch_size, sigma, steps, num_stds):
  m = mechanism(n, batch_size, sigma, num_stds)
  tight, loose = epsilon(m, steps, 1e-4), epsilon(m, steps, 1e-4, "rdp")
  assert tight <= loose
  if num_stds == 5:
    assert loose <= 2 * tight


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_pays_for_the_rounding_of_clipped_contributions(accountant):
  m = mechanism()
  held = dataclasses.replace(m, noise_multiplier=m.noise_multiplier * (1 + NORM_SLACK))
  assert NORM_SLACK >= 1e-3
  assert held.event().noise_multiplier == pytest.approx(m.noise_multiplier, rel=1e-12)
  assert m.event().noise_multiplier < m.noise_multiplier
  assert epsilon(held, 100, 1e-4, accountant) < epsilon(m, 100, 1e-4, accountant)


def test_the_grid_costs_under_half_a_percent():
  for m, steps in ((mechanism(), 300), (mechanism(n=10_000, sigma=4.0), 1000)):
    fine = pld.PLDAccountant(ZERO_OUT, discretization_interval(m) / 8)
    fine.compose(m.event(), steps)
    exact = fine.get_epsilon(1e-5)
    assert exact <= epsilon(m, steps, 1e-5) <= 1.005 * exact


def test_epsilon_rises_with_steps_and_rate_and_falls_with_noise_and_delta():
  def rises(values):
    return all(np.diff(values) > 0)

  assert rises([epsilon(mechanism(), steps, 1e-4) for steps in (1, 2, 10, 100, 1000)])
  assert rises([epsilon(mechanism(batch_size=b), 50, 1e-4) for b in (5, 10, 30, 100, 300)])
  assert rises([epsilon(mechanism(sigma=s), 50, 1e-4) for s in (8.0, 4.0, 2.0, 1.0)])
  assert rises([epsilon(mechanism(), 50, delta) for delta in (1e-3, 1e-4, 1e-6, 1e-9)])


def test_a_cap_at_5_standard_deviations_is_nearly_free_and_at_2_is_not():
  free, five, three, two = (
    epsilon(mechanism(sigma=1.5, num_stds=k), 300, 1e-4) for k in (100, 5, 3, 2)
  )
  assert free <= five <= 1.005 * free
  assert three > 1.01 * free
  assert two > 1.1 * free


def test_epsilon_ignores_the_clip_norm():
  assert epsilon(mechanism(clip_norm=9.0), 7, 1e-4) == epsilon(mechanism(), 7, 1e-4)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_no_steps_cost_nothing_and_no_noise_costs_everything(accountant):
  assert epsilon(mechanism(), 0, 1e-4, accountant) == 0
  assert epsilon(mechanism(sigma=0.0), 0, 1e-4, accountant) == 0
  assert epsilon(mechanism(sigma=0.0), 1, 1e-4, accountant) == math.inf


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((-1, 1e-4), "steps=-1 must be a whole number of at least 0"),
    ((1.5, 1e-4), "steps=1.5 must be"),
    ((math.nan, 1e-4), "steps=nan must be"),
    ((1, 0.0), "delta=0.0 must be"),
    ((1, -1e-5), "delta=-1e-05 must be"),
    ((1, 1 / 300), "under 1/n=0.00333; use"),
    ((1, math.nan), "delta=nan must be"),
    ((1, 1e-4, "pdl"), "did you mean 'pld'"),
  ],
)
def test_epsilon_fails_closed(arguments, message):
  with pytest.raises(UserError, match=message):
    epsilon(mechanism(), *arguments)


def test_default_delta_is_a_tenth_of_one_over_n():
  assert default_delta(250) == 1 / 2500
  assert accounting.resolve_deltas([10, 1000], 0.0) == (0.01, 0.0001)
  assert accounting.resolve_deltas([10, 1000], 1e-5) == (1e-5, 1e-5)
  check_delta(default_delta(1), 1)
  with pytest.raises(UserError, match=r"under 1/n=0\.001"):
    accounting.resolve_deltas([10, 1000], 1e-3)


@pytest.mark.parametrize(
  ("n", "batch_size", "steps", "target"),
  [(300, 30, 500, 8.0), (300, 30, 500, 0.5), (20, 32, 50, 3.0), (500, 10, 1, 1.0)],
)
def test_calibrated_noise_spends_99_to_100_percent_of_the_target(n, batch_size, steps, target):
  m = mechanism(n, batch_size)
  delta = default_delta(n)
  sigma = calibrate_noise(n, m.sampling_probability, m.batch_cap, steps, delta, target)
  reached = epsilon(dataclasses.replace(m, noise_multiplier=sigma), steps, delta)
  assert 0.995 * target <= reached <= target


def test_a_target_out_of_reach_is_refused_with_the_remedy():
  with pytest.raises(UserError, match=r"target_epsilon=1e-08 cannot .*; raise target_epsilon"):
    calibrate_noise(20, 1.0, 20, 10_000, 1e-9, 1e-8)
  for target in (0.0, -1.0, math.nan, math.inf):
    with pytest.raises(UserError, match="target_epsilon="):
      calibrate_noise(20, 1.0, 20, 10, 1e-3, target)


@pytest.mark.parametrize(("sigma", "budget"), [(2.0, 3.0), (1.0, 1.5), (4.0, 0.5)])
def test_affordable_steps_stop_right_before_the_budget(sigma, budget):
  m = mechanism(sigma=sigma)
  steps = affordable_steps(m, 1e-4, budget)
  assert steps > 1
  assert epsilon(m, steps, 1e-4) <= budget < epsilon(m, steps + 1, 1e-4)


def test_affordable_steps_are_0_where_one_step_is_too_much():
  assert affordable_steps(mechanism(sigma=0.5), 1e-4, 0.1) == 0
  assert affordable_steps(mechanism(sigma=0.0), 1e-4, 1e6) == 0
  with pytest.raises(UserError, match="budget=nan must be"):
    affordable_steps(mechanism(), 1e-4, math.nan)


def test_a_calibrated_run_affords_the_steps_it_was_calibrated_for():
  m = mechanism()
  sigma = calibrate_noise(300, m.sampling_probability, m.batch_cap, 200, 1e-4, 2.0)
  steps = affordable_steps(dataclasses.replace(m, noise_multiplier=sigma), 1e-4, 2.0)
  assert 200 <= steps <= 204


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (8.0, "8.00"),
    (7.98, "7.98"),
    (8.001, "8.01"),
    (1.1, "1.10"),
    (np.float64(0.0001), "0.01"),
    (0.0, "0.00"),
    (None, "none"),
    (math.inf, "∞"),
  ],
)
def test_epsilon_is_never_rounded_down(value, shown):
  assert round_up(value) == shown


@pytest.mark.parametrize(
  ("value", "shown"),
  [(1 / 30, "0.034"), (1e-4, "0.0001"), (4.01e-5, "4.1e-05"), (np.float64(0.02), "0.02")],
)
def test_delta_is_never_rounded_down(value, shown):
  assert accounting.ceil_digits(value) == shown


def test_the_second_bound_ends_where_the_inverse_of_the_binomial_stops_too_early(monkeypatch):
  monkeypatch.setattr(stats.binom, "isf", lambda *_: 0.0)
  m = PoissonGaussian(200, 0.1, 29, 1.0, 1.0)  # cut in many of so many steps
  bound = epsilon(m, 5000, 1.3e-5, "rdp")
  monkeypatch.undo()
  assert bound == pytest.approx(epsilon(m, 5001, 1.3e-5, "rdp"), rel=1e-3)
