"""One object gives the sampler and the event; its rules are enforced."""

import dataclasses
import math

import dp_accounting
import jax
import numpy as np
import pytest
from scipy import stats

from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.privacy.accounting import default_delta, epsilon
from fedjax_med.privacy.calibration import PrivacyTarget, plan_mechanisms
from fedjax_med.privacy.mechanism import PoissonGaussian, batch_size_bound
from fedjax_med.privacy.sampling import poisson_batch


def mechanism(**changes):
  values = {
    "num_units": 100,
    "sampling_probability": 0.1,
    "batch_cap": 25,
    "noise_multiplier": 1.0,
    "clip_norm": 2.0,
  }
  return PoissonGaussian(**(values | changes))


def test_the_event_holds_what_the_sampler_does():
  event = mechanism().event()
  assert isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent)
  assert (event.dataset_size, event.truncated_batch_size) == (100, 25)
  assert event.noise_multiplier == 1.0 / 1.001  # the most that rounding lets one unit contribute
  assert event.sampling_probability == pytest.approx(0.1, abs=2e-7)


def test_a_sampler_called_with_the_mechanism_draws_batches_of_the_event():
  m = mechanism(batch_cap=16)
  event = m.event()
  keys = jax.random.split(base_key(0), 20_000)
  _, mask = jax.jit(
    jax.vmap(
      lambda key: poisson_batch(
        key, m.num_units, m.sampling_probability, max_examples=120, batch_cap=m.batch_cap
      )
    )
  )(keys)
  cap, n, q = event.truncated_batch_size, event.dataset_size, event.sampling_probability
  observed = np.bincount(np.asarray(mask).sum(axis=1), minlength=cap + 1)
  expected = stats.binom.pmf(np.arange(cap + 1), n, q) * len(keys)
  expected[cap] = stats.binom.sf(cap - 1, n, q) * len(keys)
  observed, expected = (np.append(v[2:], v[:2].sum()) for v in (observed, expected))
  assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.parametrize("q", [0.1, 0.5, 1 / 3, 32 / 2941, 0.999_999_99, 1.0, 1e-6])
def test_drawn_probability_is_exactly_that_of_the_device_comparison(q):
  grid = np.arange(2**23, dtype=np.float32) * np.float32(2.0**-23)
  m = PoissonGaussian(100, q, 100, 1.0, 1.0)
  assert np.count_nonzero(grid < np.float32(q)) / 2**23 == m.drawn_probability


def test_device_uniforms_are_whole_multiples_of_the_grid():
  u = np.asarray(jax.random.uniform(base_key(0), (10_000,), np.float32), float)
  assert np.all(u * 2**23 == np.round(u * 2**23))
  assert u.min() >= 0
  assert u.max() < 1


def test_the_denominator_is_q_times_n():
  assert mechanism().expected_batch_size == pytest.approx(10.0)


def test_a_mechanism_cannot_be_changed():
  with pytest.raises(dataclasses.FrozenInstanceError):
    mechanism().noise_multiplier = 0.1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_units": 0}, "num_units=0 must be a whole number of at least 1"),
    ({"num_units": 10.5}, "num_units=10.5 must be"),
    ({"sampling_probability": 0.0}, "sampling_probability=0.0 must be above 0 and at most 1"),
    ({"sampling_probability": 1.01}, "sampling_probability=1.01 must be"),
    ({"sampling_probability": math.nan}, "sampling_probability=nan must be"),
    ({"batch_cap": 0}, "batch_cap=0 must be a whole number of at least 1"),
    ({"batch_cap": 9}, "batch_cap=9 is under 16, the expected batch size 10 plus 2 standard"),
    ({"batch_cap": 15}, "raise it to 25 .5 standard deviations"),
    ({"noise_multiplier": -0.1}, "noise_multiplier=-0.1 must be finite and at least 0"),
    ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
    ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
    ({"clip_norm": 0.0}, "clip_norm=0.0 must be finite and at least 1e-12"),
    ({"clip_norm": 1e-13}, "clip_norm=1e-13 must be finite and at least 1e-12"),
    ({"clip_norm": math.nan}, "clip_norm=nan"),
  ],
)
def test_a_bad_value_is_refused_with_rule_and_remedy(changes, message):
  with pytest.raises(UserError, match=message) as caught:
    mechanism(**changes)
  assert "; " in str(caught.value)


def test_a_cap_of_the_whole_hospital_is_always_allowed():
  assert mechanism(sampling_probability=1.0, batch_cap=100).batch_cap == 100


def test_plan_gives_one_cap_and_the_expected_batch_size_everywhere():
  counts = [20, 200, 3000]
  planned = plan_mechanisms(
    np.array(counts, np.int32),
    32,
    np.ones(3, int),
    PrivacyTarget(clip_norm=1.0, noise_multiplier=1.2),
  )
  assert [m.num_units for m in planned] == counts
  assert [m.sampling_probability for m in planned] == [1.0, 0.16, 32 / 3000]
  assert [m.expected_batch_size for m in planned] == pytest.approx([20, 32, 32])
  assert {m.batch_cap for m in planned} == {batch_size_bound(3000, 32 / 3000, 5)}
  assert {(m.noise_multiplier, m.clip_norm) for m in planned} == {(1.2, 1.0)}


def test_plan_never_caps_above_the_largest_hospital():
  chosen = plan_mechanisms([20, 40], 32, [1, 1], PrivacyTarget(clip_norm=1.0, noise_multiplier=1.0))
  asked = plan_mechanisms(
    [20, 40], 32, [1, 1], PrivacyTarget(clip_norm=1.0, noise_multiplier=1.0, batch_cap=500)
  )
  assert {m.batch_cap for m in chosen + asked} == {40}


def test_plan_calibrates_each_hospital_to_its_target():
  counts, steps = [50, 400, 400], [40, 40, 80]
  planned = plan_mechanisms(counts, 16, steps, PrivacyTarget(clip_norm=1.0, target_epsilon=4.0))
  for m, num_steps in zip(planned, steps, strict=True):
    reached = epsilon(m, num_steps, default_delta(m.num_units))
    assert 0.995 * 4 <= reached <= 4
  sigmas = [m.noise_multiplier for m in planned]
  assert sigmas[0] > sigmas[2] > sigmas[1]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"counts": []}, "there is no hospital"),
    ({"counts": [100, 0]}, "num_units=0 must be"),
    ({"steps": [1]}, "steps has 1 entries for 2 hospitals"),
    ({"noise_multiplier": 0.0}, "leave σ open"),
    ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0 must be"),
    ({"delta": 0.01}, "delta=0.01 must be at least 1e-10 and under 1/n=0.01"),
    ({"batch_cap": 12}, "batch_cap=12 is under"),
    ({"batch_size": 0}, "batch_size=0 must be"),
  ],
)
def test_plan_refuses(changes, message):
  values = {"counts": [100, 60], "batch_size": 10, "steps": [1, 1], "noise_multiplier": 1.0}
  values |= {"clip_norm": 1.0, "delta": 0.0} | changes
  counts, batch_size, steps = (values.pop(name) for name in ("counts", "batch_size", "steps"))
  with pytest.raises(UserError, match=message):
    plan_mechanisms(counts, batch_size, steps, PrivacyTarget(**values))


def test_noise_that_the_grain_of_the_sum_would_swallow_is_refused():
  PoissonGaussian(1000, 0.064, 100, 64 * 2.0**-22, 1.0)
  with pytest.raises(UserError, match=r"noise_multiplier=1e-05 is under 1.53e-05, 32 grains of"):
    PoissonGaussian(1000, 0.064, 104, 1e-5, 1.0)
