"""DP-FedAvg: clipped updates, noise on the sum, a fixed denominator, an adaptive clip norm."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.privacy.client_level import ClientLevel, clip_update, noisy_mean
from fedjax_med.privacy.mechanism import PoissonGaussian
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper, make_pool

POOL = make_pool()


def level(**changes):
  values = {
    "noise_multiplier": 0.0,
    "expected_cohort": 3.0,
    "count_noise": 0.0,
    "quantile": 0.5,
    "clip_learning_rate": 0.0,
  }
  return ClientLevel(**{name: jnp.float32(v) for name, v in {**values, **changes}.items()})


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 7.0, 1e30])
def test_an_update_leaves_with_norm_at_most_the_clip_norm(size):
  random = np.random.default_rng(0)
  update = random.normal(size=23)
  scaled = jnp.asarray(size * update / np.linalg.norm(update), jnp.float32)
  clipped, inside = clip_update(scaled, jnp.float32(2.0))
  sent, given = np.asarray(clipped, np.float64), np.asarray(scaled, np.float64)
  assert np.linalg.norm(sent) <= 2.0 * (1 + 1e-6)
  assert float(inside) == float(size <= 2.0)
  np.testing.assert_allclose(sent, given * min(1, 2.0 / np.linalg.norm(given)), rtol=2e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_leaves_as_exactly_zero(bad):
  clipped, inside = clip_update(jnp.array([1.0, bad, 1.0, 1.0]), jnp.float32(1.0))
  assert (np.asarray(clipped) == 0).all()
  assert float(inside) == 0


@functools.cache
def federation(**changes):
  return make_federation(client_level=True, **changes)


def one_round(
  state=None, cohort_cap=None, private=False, chunk=3, clients=None, devices=1, **levels
):
  initial, block, _ = federation(
    cohort_cap=cohort_cap, private=private, chunk=chunk, devices=devices
  )
  rate, clip_norm = levels.pop("rate", 1.0), levels.pop("clip_norm_state", 1.0)
  hyper = make_hyper(participation_rate=rate)._replace(client_level=level(**levels))
  clients = make_clients() if clients is None else clients
  state = (initial() if state is None else state)._replace(exchange=(jnp.float32(clip_norm),))
  return block(state, clients, POOL, hyper, KEY, jnp.asarray(1))[0]


def moved(after):
  initial, _, _ = federation()
  return np.asarray(after.server.params - initial().server.params)


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_the_round_is_the_sum_of_clipped_updates_over_the_fixed_denominator():
  initial, _, _ = federation()
  hyper = make_hyper()
  alone = []
  for k in range(3):  # one client at a time, no clipping, by the plain program
    _, block, _ = make_federation(num_clients=1, chunk=1)
    clients = jax.tree.map(lambda leaf, k=k: leaf[k : k + 1], make_clients())
    start = initial()._replace(steps=jnp.zeros((1,), jnp.int32), exchange=(), transform_states=())
    after, _ = block(start, clients, POOL, hyper, KEY, jnp.asarray(1))
    alone.append(np.asarray(after.server.params - initial().server.params))
  clip = float(np.median([np.linalg.norm(update) for update in alone]))
  expected = sum(update * min(1, clip / np.linalg.norm(update)) for update in alone) / 7
  found = flat(moved(one_round(clip_norm_state=clip, expected_cohort=7.0)))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_noise_is_on_the_sum_in_every_round_even_where_nobody_takes_part():
  noisy = moved(
    one_round(
      cohort_cap=2, rate=0.0, noise_multiplier=5.0, clip_norm_state=2.0, expected_cohort=4.0
    )
  )
  values = flat(noisy)
  assert values.size >= 30
  assert 0.6 < values.std() / (5.0 * 2.0 / 4.0) < 1.5
  silent = moved(one_round(cohort_cap=2, rate=0.0, noise_multiplier=0.0))
  assert (flat(silent) == 0).all()


def test_noise_has_the_stated_deviation_and_is_fresh_in_every_round():
  total, settings = jnp.zeros(20_000), level(noise_multiplier=3.0, expected_cohort=6.0)

  def noise(round):
    mean, _ = noisy_mean(total, jnp.float32(0), jnp.float32(2.0), settings, KEY, round)
    return np.asarray(mean)

  first, second = noise(0), noise(1)
  assert first.std() == pytest.approx(3.0 * 2.0 / 6.0, rel=0.02)
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
  assert (noise(0) == first).all()  # a replayed round is no new release


@pytest.mark.parametrize(("within", "direction"), [(3, -1), (0, 1)])
def test_the_clip_norm_moves_towards_the_quantile_by_the_published_rule(within, direction):
  settings = level(quantile=0.5, clip_learning_rate=0.2, expected_cohort=3.0)
  count = jnp.float32(within - 1.5)  # sum of (bit - 1/2)
  _, after = noisy_mean(jnp.zeros(2), count, jnp.float32(2.0), settings, KEY, 0)
  expected = 2.0 * math.exp(-0.2 * (within / 3 - 0.5))  # Andrew et al. 2021, section 2
  assert float(after) == pytest.approx(expected, rel=1e-6)
  assert math.copysign(1, float(after) - 2.0) == direction


@pytest.mark.parametrize(("within", "bound"), [(3, 1e-12), (0, 1e30)])
def test_the_clip_norm_stays_where_its_bound_holds(within, bound):
  settings = level(quantile=0.5, clip_learning_rate=10.0, expected_cohort=0.01)
  count = jnp.float32(within - 1.5)
  clip_norm = jnp.float32(1.0)
  for round in range(3):
    _, clip_norm = noisy_mean(jnp.zeros(2), count, clip_norm, settings, KEY, round)
  assert float(clip_norm) == pytest.approx(bound, rel=1e-6, abs=0)


def test_an_adaptive_clip_norm_settles_where_half_the_updates_pass():
  initial, block, _ = federation()
  hyper = make_hyper(client_learning_rate=0.01)
  hyper = hyper._replace(client_level=level(clip_learning_rate=0.2))
  state = initial()._replace(exchange=(jnp.float32(50.0),))
  state, _ = block(state, make_clients(), POOL, hyper, KEY, jnp.asarray(60))
  low = float(state.exchange[0])
  state, _ = block(state, make_clients(), POOL, hyper, KEY, jnp.asarray(1))
  assert low < 1.0  # from 50
  assert 0.8 < float(state.exchange[0]) / low < 1.25


def test_the_count_costs_nothing_beyond_the_noise_multiplier():
  counted = PoissonGaussian(6, 1.0, 6, 1.5, 0.3, count_noise=2.0)
  z = counted.sum_noise_multiplier
  assert 1 / z**2 + 1 / (2 * 2.0) ** 2 == pytest.approx(1 / 1.5**2)
  assert z > 1.5
  assert counted.event() == dataclasses.replace(counted, count_noise=0.0).event()
  with pytest.raises(UserError, match=r"count_noise=0.7 must be above half the noise multiplier"):
    dataclasses.replace(counted, count_noise=0.7)


def test_one_hospital_moves_the_sum_by_at_most_the_clip_norm():
  everybody = flat(moved(one_round(clip_norm_state=0.3, expected_cohort=1.0)))
  clients = make_clients()
  for k in range(3):
    absent = clients._replace(num_steps=clients.num_steps.at[k].set(0))  # its update is 0
    others = flat(moved(one_round(clip_norm_state=0.3, expected_cohort=1.0, clients=absent)))
    assert 0.1 < np.linalg.norm(everybody - others) <= 0.3 * (1 + 1e-5)


@pytest.mark.parametrize(
  ("chunk", "devices"), [(1, 1), (2, 1), (1, 8), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_layouts_and_devices_agree_to_rounding(chunk, devices):
  settings: dict[str, Any] = {
    "noise_multiplier": 1.0,
    "clip_norm_state": 0.3,
    "clip_learning_rate": 0.2,
    "count_noise": 1.0,
  }
  expected = one_round(**settings)
  found = one_round(chunk=chunk, devices=devices, **settings)
  np.testing.assert_allclose(flat(moved(found)), flat(moved(expected)), rtol=2e-5, atol=1e-6)
  assert float(found.exchange[0]) == pytest.approx(float(expected.exchange[0]), rel=1e-6)
