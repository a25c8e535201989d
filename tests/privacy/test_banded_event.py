"""The event of correlated noise against simulated likelihoods and the library, and its plans.

Statistical bounds are 4.5 standard errors, seeds fixed.
"""

import dataclasses
import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld

from fedjax_med.core.errors import UserError
from fedjax_med.privacy.accounting import default_delta, discretization_interval, epsilon
from fedjax_med.privacy.calibration import PrivacyTarget, plan_mechanisms
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.strategy import toeplitz_strategy
from fedjax_med.privacy.tuning import tuned_epsilon
from tests.privacy.banded_cases import dense, mechanism, plan_banded


def test_the_event_is_that_of_the_largest_subset():
  m = mechanism()
  event = m.event()
  assert isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent)
  assert (event.dataset_size, event.truncated_batch_size) == (23, 23)
  assert event.sampling_probability == pytest.approx(0.4, abs=2e-7)
  norm = np.linalg.norm(np.asarray(m.coefficients, np.float32).astype(float))
  assert event.noise_multiplier == pytest.approx(1.5 / norm / 1.001, rel=1e-12)
  assert m.expected_batch_size == pytest.approx(9.0)


def test_one_band_has_the_event_and_the_epsilon_of_dp_sgd():
  banded = PoissonGaussian(300, 0.1, 57, 2.0, 1.0, (1.0,))
  plain = PoissonGaussian(300, 0.1, 57, 2.0, 1.0)
  assert banded.event() == plain.event()
  assert banded.expected_batch_size == plain.expected_batch_size
  for accountant in ("pld", "rdp"):
    expected = epsilon(plain, 100, 1e-4, accountant)
    assert epsilon(banded, 100, 1e-4, accountant) == expected
  planned = plan_banded(300, 30, 1, steps=100, clip_norm=1.0, target_epsilon=2.0)
  target = PrivacyTarget(clip_norm=1.0, target_epsilon=2.0)
  (independent,) = plan_mechanisms([300], 30, [100], target)
  assert planned.event() == independent.event()


def test_epsilon_is_that_of_the_composition_written_out():
  m = mechanism(batch_cap=14)
  accountant = pld.PLDAccountant(
    dp_accounting.NeighboringRelation.REPLACE_SPECIAL, discretization_interval(m)
  )
  for _ in range(6):  # steps 0, 4, .., 20 of 21 are those of slot 0
    accountant.compose(
      dp_accounting.TruncatedSubsampledGaussianDpEvent(
        23, m.drawn_probability, 14, 1.5 / m.column_norm / 1.001
      )
    )
  expected = accountant.get_epsilon(1e-3)
  assert epsilon(m, 21, 1e-3) == pytest.approx(expected, rel=1e-6)


def test_a_record_pays_once_in_as_many_steps_as_there_are_bands():
  m = mechanism()
  spent = [epsilon(m, steps, 1e-3) for steps in range(10)]
  assert spent[0] == 0
  assert spent[1] == spent[4] < spent[5] == spent[8] < spent[9]
  assert [m.compositions(steps) for steps in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("steps", [4, 41])
def test_the_renyi_bound_and_the_cost_of_choosing_are_above_the_epsilon_of_a_run(steps):
  m = mechanism(batch_cap=23)
  own = epsilon(m, steps, 1e-3)
  assert own < epsilon(m, steps, 1e-3, "rdp") < 2 * own
  tuned = tuned_epsilon(m, steps, 1e-3, 5)
  assert tuned is not None
  assert tuned[0] > own
  whole = dataclasses.replace(m, num_units=m.places, coefficients=(1.0,))
  again = tuned_epsilon(whole, m.compositions(steps), 1e-3, 5)
  assert again is not None
  assert tuned[0] == pytest.approx(again[0], rel=1e-6)  # the norm of c is 1 to 1e-7


def test_no_noise_costs_everything():
  assert epsilon(mechanism(noise_multiplier=0.0), 1, 1e-3) == math.inf
  assert epsilon(mechanism(noise_multiplier=0.0), 0, 1e-3) == 0


def adaptive_deltas(m, eps, *, steps, stride, outcomes, samples=400_000):
  """(δ of present over nothing, and of nothing over present), each with its standard error.

  The whole mechanism, simulated: gradients follow from the outputs before them, as an adversary
  would have it, and the likelihoods are those of the dense C, over all ways to be drawn.
  ``outcomes`` is [(what a step adds to the sum in units of the gradient, its probability with the
  record, without)], and the record may be drawn in every ``stride``-th step.
  """
  generator = np.random.default_rng(0)
  c, sigma = np.asarray(m.coefficients, np.float32).astype(float), m.noise_multiplier
  values, present, nothing = (np.array(each) for each in zip(*outcomes, strict=True))
  when = list(range(0, steps, stride))

  def simulate(weights):
    drawn = generator.choice(values, (samples, len(when)), p=weights)
    sums, outputs = np.zeros((samples, steps)), np.zeros((samples, steps))
    mine, others = np.zeros((samples, steps)), np.zeros((samples, steps))
    for t in range(steps):
      last = outputs[:, t - 1] if t else np.ones(samples)
      mine[:, t] = np.where(last > 0, 1.0, -1.0)
      others[:, t] = 3 * np.sin(2 * last) + 0.5 * t
      sums[:, t] = others[:, t]
      if t in when:
        sums[:, t] += drawn[:, when.index(t)] * mine[:, t]
      row = sum(c[j] * sums[:, t - j] for j in range(min(len(c), t + 1)))
      outputs[:, t] = row + sigma * generator.standard_normal(samples)
    return outputs, mine, others

  matrix = dense(c, steps)

  def log_densities(outputs, mine, others):
    """Log likelihoods with and without the record, up to the same constant."""
    terms = ([], [])
    for ways in itertools.product(range(len(values)), repeat=len(when)):
      sums = others.copy()
      for t, way in zip(when, ways, strict=True):
        sums[:, t] += values[way] * mine[:, t]
      exponent = -((outputs - sums @ matrix.T) ** 2).sum(axis=1) / (2 * sigma**2)
      for term, weights in zip(terms, (present, nothing), strict=True):
        weight = math.prod(weights[way] for way in ways)
        term.append(exponent + math.log(weight) if weight else np.full(samples, -np.inf))
    return [np.logaddexp.reduce(term) for term in terms]

  found = []
  for weights, sign in ((present, 1), (nothing, -1)):
    with_record, without = log_densities(*simulate(weights))
    loss = sign * (with_record - without)
    parts = np.maximum(-np.expm1(np.minimum(eps - loss, 0.0)), 0.0)
    found.append((parts.mean(), parts.std() / math.sqrt(samples)))
  return found


@pytest.mark.slow
def test_the_accounted_delta_is_that_of_the_simulated_adaptive_mechanism():
  q, delta = 0.4, 0.05
  m = PoissonGaussian(3, q, 1, 1.0, 1.0, tuple(toeplitz_strategy(7, 3)))
  eps = epsilon(m, 7, delta)
  outcomes = [(0, 1 - q, 1), (1, q, 0)]  # one record in the subset: it is drawn, or nobody is
  over, under = adaptive_deltas(m, eps, steps=9, stride=3, outcomes=outcomes)
  assert over[0] == pytest.approx(delta, abs=4.5 * over[1] + 0.005 * delta)
  assert under[0] <= delta + 4.5 * under[1]


@pytest.mark.slow
def test_records_drawn_in_every_step_would_exceed_the_accounted_delta():
  q, delta = 0.4, 0.05
  m = PoissonGaussian(3, q, 1, 1.0, 1.0, tuple(toeplitz_strategy(7, 3)))
  eps = epsilon(m, 7, delta)
  outcomes = [(0, 1 - q, 1), (1, q, 0)]
  over, _ = adaptive_deltas(m, eps, steps=7, stride=1, outcomes=outcomes, samples=50_000)
  assert over[0] > 2 * delta


@pytest.mark.slow
def test_the_accounted_delta_bounds_a_batch_that_is_cut():
  # Two records a subset, one place in the batch, the other record pulling the other way.
  q, delta = 0.09, 0.02
  m = PoissonGaussian(4, q, 1, 0.7, 1.0, tuple(toeplitz_strategy(5, 2)))
  assert m.event().dataset_size == 2
  eps = epsilon(m, 5, delta)
  alone, half = q * (1 - q), q**2 / 2
  outcomes = [
    (0, (1 - q) ** 2, (1 - q) ** 2 + alone + half),
    (1, alone + half, 0),
    (-1, alone + half, alone + half),
  ]
  over, under = adaptive_deltas(m, eps, steps=5, stride=2, outcomes=outcomes)
  assert 0 < over[0] <= delta + 4.5 * over[1]
  # Nothing over present is at most (1 - q)**-2 a draw, here less than ε.
  assert under[0] <= delta + 4.5 * under[1]


# Plans and comparisons.


def test_a_plan_spends_its_target_and_has_the_batches_it_was_asked_for():
  m = plan_banded(500, 32, 8, steps=100, clip_norm=1.0, target_epsilon=3.0)
  assert m.expected_batch_size == pytest.approx(32)
  assert m.event().dataset_size == 63
  assert m.batch_cap <= 63
  assert 0.995 * 3 <= epsilon(m, 100, default_delta(500)) <= 3
  np.testing.assert_array_equal(m.coefficients, toeplitz_strategy(100, 8))
  small = plan_banded(20, 32, 4, steps=8, clip_norm=1.0, noise_multiplier=1.0)
  assert (small.sampling_probability, small.expected_batch_size) == (1.0, 5.0)
  assert small.noise_multiplier == 1.0


def test_a_run_may_go_on_beyond_its_plan_with_the_same_coefficients():
  m = plan_banded(500, 32, 4, steps=40, clip_norm=1.0, target_epsilon=3.0)
  delta = default_delta(500)
  assert epsilon(m, 41, delta) > epsilon(m, 40, delta)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"coefficients": ()}, "must be positive, not rising and of norm 1"),
    ({"coefficients": (0.6, 0.8)}, "not rising"),
    ({"coefficients": (0.8, -0.6)}, "positive"),
    ({"coefficients": (0.9, 0.5)}, "of norm 1; use strategy.toeplitz_strategy"),
    ({"coefficients": (math.nan,)}, "of norm 1"),
    ({"num_units": 3}, "num_units=3 must be a whole number of at least 4; lower bands=4"),
    ({"num_units": 90.5}, "num_units=90.5 must be"),
    ({"sampling_probability": 0.0}, "sampling_probability=0.0 must be"),
    ({"batch_cap": 10}, "batch_cap=10 is under 14"),
    ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
    ({"clip_norm": math.nan}, "clip_norm=nan must be"),
  ],
)
def test_a_bad_value_is_refused_with_rule_and_remedy(changes, message):
  with pytest.raises(UserError, match=message) as caught:
    mechanism(**changes)
  assert "; " in str(caught.value)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((-1, 1e-4), "steps=-1 must be a whole number of at least 0"),
    ((1.5, 1e-4), "steps=1.5 must be"),
    ((1, 1 / 90), "must be at least 1e-10 and under 1/n=0.0111"),
    ((1, 1e-4, "pdl"), "did you mean 'pld'"),
  ],
)
def test_epsilon_fails_closed(arguments, message):
  with pytest.raises(UserError, match=message):
    epsilon(mechanism(), *arguments)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bands": 11}, "steps=10 must be a whole number of at least 11; lower bands=11"),
    ({"num_units": 3}, "num_units=3 must be a whole number of at least 4; lower bands=4"),
    ({"batch_size": 0}, "batch_size=0 must be"),
    ({"noise_multiplier": 0.0}, "leave σ open"),
    ({"delta": 0.01}, "delta=0.01 must be at least 1e-10 and under 1/n=0.01"),
    ({"batch_cap": 12}, "batch_cap=12 is under"),
  ],
)
def test_plan_refuses(changes, message):
  values = {"num_units": 100, "batch_size": 12, "bands": 4, "steps": 10, "clip_norm": 1.0}
  values |= {"noise_multiplier": 1.0} | changes
  with pytest.raises(UserError, match=message):
    plan_banded(values.pop("num_units"), values.pop("batch_size"), values.pop("bands"), **values)
