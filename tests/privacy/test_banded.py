"""Correlated noise against the dense inverse, and the sampler of its subsets.

Statistical bounds are 4.5 standard errors, seeds fixed.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, stats

from fedjax_med.core.keys import base_key
from fedjax_med.privacy.banded import banded_batch, correlated_noise, empty_memory
from fedjax_med.privacy.noise import GRAIN, gaussian_noise_like, noised_mean, whole_grains
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.privacy.strategy import prefix_errors, toeplitz_strategy
from tests.privacy.banded_cases import dense, mechanism


def empty_buffer(array, bands):
  """Zeros in the place of earlier noise, in the shape of an array."""
  return empty_memory(array.size, bands).noise.reshape(bands - 1, *array.shape)


def run(fresh, coefficients):
  """[T, ...] noise of ``fresh`` [T, ...], step by step on the device."""

  def step(buffer, z):
    noise, buffer = correlated_noise(buffer, z, jnp.asarray(coefficients, jnp.float32))
    return buffer, noise

  return jax.lax.scan(step, empty_buffer(fresh[0], len(coefficients)), fresh)[1]


@pytest.mark.parametrize("bands", [1, 2, 3, 8, 20])
def test_the_recursion_is_the_inverse_times_the_draws(bands):
  steps = 20
  c = toeplitz_strategy(steps, bands)
  fresh = np.asarray(jax.random.normal(base_key(1), (steps, 50), jnp.float32))
  expected = linalg.solve_triangular(dense(np.float32(c), steps), fresh.astype(float), lower=True)
  np.testing.assert_allclose(run(jnp.asarray(fresh), c), expected, rtol=1e-5, atol=1e-5)


def test_the_recursion_is_exact_where_float32_is():
  # Halves and whole draws: no rounding in 12 steps.
  c, steps = np.array([1, 0.5, 0.25]), 12
  fresh = np.random.default_rng(0).integers(-8, 9, (steps, 30)).astype(np.float32)
  expected = linalg.solve_triangular(dense(c, steps), fresh.astype(float), lower=True)
  np.testing.assert_array_equal(run(jnp.asarray(fresh), c), expected)


def test_a_thousand_steps_in_float32_stay_with_the_dense_inverse():
  steps, bands = 1000, 16
  c = np.float32(toeplitz_strategy(steps, bands))
  fresh = np.asarray(jax.random.normal(base_key(2), (steps, 4), jnp.float32))
  expected = linalg.solve_triangular(dense(c, steps), fresh.astype(float), lower=True)
  assert np.abs(np.asarray(run(jnp.asarray(fresh), c)) - expected).max() < 1e-4


@pytest.mark.parametrize("shape", [(), (4,), (3, 4)])
def test_one_band_is_plain_noise_bit_for_bit(shape):
  fresh = gaussian_noise_like(base_key(0), jnp.ones(shape), 1.0)
  noise, buffer = correlated_noise(empty_buffer(fresh, 1), fresh, jnp.ones(1))
  np.testing.assert_array_equal(noise, fresh)
  assert buffer.shape == (0, *shape)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_the_buffer_holds_the_last_noise_newest_first_in_float32(shape):
  c = jnp.asarray(toeplitz_strategy(10, 4), jnp.float32)
  array = jnp.zeros(shape, jnp.bfloat16)
  buffer, past = empty_buffer(array, 4), []
  for step in range(6):
    fresh = gaussian_noise_like(jax.random.fold_in(base_key(0), step), array, 1.0)
    noise, buffer = correlated_noise(buffer, fresh, c)
    past.insert(0, noise)
    assert buffer.dtype == noise.dtype == jnp.float32
    assert buffer.shape == (3, *shape)
    known = past[:3]
    np.testing.assert_array_equal(buffer[: len(known)], np.stack(known))
    assert not np.any(buffer[len(known) :])


def test_vmapped_clients_equal_a_loop_over_them():
  clients, steps = 3, 7
  coefficients = jnp.stack(
    [jnp.asarray(toeplitz_strategy(horizon, 3), jnp.float32) for horizon in (5, 20, 400)]
  )
  fresh = jax.random.normal(base_key(4), (clients, steps, 2, 5), jnp.float32)
  start = empty_buffer(fresh[:, 0, 0], 3)  # only for its rank
  assert start.shape == (2, 3, 5)

  def client(fresh, c):
    buffer, rows = empty_buffer(fresh[0], 3), []
    for step in range(steps):
      noise, buffer = correlated_noise(buffer, fresh[step], c)
      rows.append(noise)
    return jnp.stack(rows)

  together = jax.jit(jax.vmap(client))(fresh, coefficients)
  for k in range(clients):
    np.testing.assert_array_equal(together[k], jax.jit(client)(fresh[k], coefficients[k]))
  assert not np.allclose(together[0], client(fresh[0], coefficients[2]))


def test_noise_of_a_step_depends_on_no_later_draw_and_on_every_earlier_one():
  steps, c = 6, toeplitz_strategy(6, 3)
  jacobian = jax.jacobian(lambda fresh: run(fresh, c))(jnp.zeros(steps))
  np.testing.assert_array_equal(np.triu(jacobian, 1), 0)
  assert np.all(jacobian[np.tril_indices(steps)] != 0)


def test_the_covariance_over_steps_is_that_of_the_inverse():
  steps, size, sigma = 6, 40_000, 1.7
  c = toeplitz_strategy(steps, 3)
  keys = jax.random.split(base_key(5), steps)
  fresh = jnp.stack([gaussian_noise_like(key, jnp.zeros(size), 1.0) for key in keys])
  noise = sigma * np.asarray(run(fresh, c), float)
  inverse = np.linalg.inv(dense(c, steps))
  expected = sigma**2 * inverse @ inverse.T
  scale = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / size)
  assert np.abs((noise @ noise.T / size - expected) / scale).max() < 4.5
  assert abs(expected[1, 0]) > 50 * scale[1, 0]  # correlated enough for the test to see it


# The sampler.


@functools.partial(jax.jit, static_argnames=("n", "q", "bands", "rows", "cap"))
def draw(keys, steps, *, n, q, bands, rows, cap):
  sampler = functools.partial(banded_batch, bands=bands, max_examples=rows, batch_cap=cap)
  return jax.vmap(lambda key, step: sampler(key, n, q, step=step))(keys, steps)


def counts(slots, mask, rows):
  """[draws, rows] how often each slot is in each batch."""
  chosen = np.zeros((len(slots), rows), int)
  np.add.at(chosen, (np.nonzero(mask)[0], slots[mask]), 1)
  return chosen


@pytest.mark.parametrize(("n", "rows", "bands"), [(12, 12, 4), (14, 20, 4), (9, 12, 5), (7, 7, 7)])
def test_a_slot_is_drawn_with_probability_q_in_its_own_steps_only(n, rows, bands):
  draws, q = 4000 * bands, 0.3
  keys, steps = jax.random.split(base_key(6), draws), jnp.arange(draws)
  batches = draw(keys, steps, n=n, q=q, bands=bands, rows=rows, cap=-(-rows // bands))
  slots, mask = (np.asarray(value) for value in batches)
  chosen = counts(slots, mask, rows)
  assert chosen.max() == 1
  assert chosen[:, n:].sum() == 0
  mine = np.arange(draws)[:, None] % bands == np.arange(n) % bands
  assert chosen[:, :n][~mine].sum() == 0
  pvalues = [stats.binomtest(int(count), 4000, q).pvalue for count in chosen[:, :n].sum(axis=0)]
  assert min(pvalues) > 1e-4 / n
  np.testing.assert_array_equal(np.sort(~mask, axis=1), ~mask)  # drawn slots come first
  assert not np.any(slots[~mask])


def test_with_one_band_batches_are_those_of_poisson_batch():
  keys = jax.random.split(base_key(7), 200)
  slots, mask = draw(keys, jnp.arange(200), n=30, q=0.3, bands=1, rows=40, cap=12)
  plain = jax.vmap(lambda key: poisson_batch(key, 30, 0.3, max_examples=40, batch_cap=12))(keys)
  np.testing.assert_array_equal(slots, plain[0])
  np.testing.assert_array_equal(mask, plain[1])


def test_a_blank_place_is_drawn_and_cut_like_a_record():
  # 7 records in 2 subsets: the second has 3 and a blank; of 4 places 3 are kept.
  draws, q, cap = 20_000, 0.3, 3
  keys, steps = jax.random.split(base_key(8), draws), jnp.ones(draws, jnp.int32)
  slots, mask = draw(keys, steps, n=7, q=q, bands=2, rows=7, cap=cap)
  chosen = counts(np.asarray(slots), np.asarray(mask), 7)[:, 1::2]
  # One of 4 drawn places is cut: a record is kept in 3 of 4 full draws.
  kept = q - q**4 / 4
  assert stats.binomtest(int(chosen.sum()), 3 * draws, kept).pvalue > 1e-4
  full = q**3 * (1 - q) + q**4 / 4  # all three records
  assert stats.binomtest(int((chosen.sum(axis=1) == 3).sum()), draws, full).pvalue > 1e-4


def test_the_sampler_called_with_the_mechanism_draws_batches_of_the_event():
  m = mechanism(num_units=120, batch_cap=18)
  event, draws = m.event(), 20_000
  keys, steps = jax.random.split(base_key(9), draws), jnp.full(draws, 5)
  batches = draw(
    keys, steps, n=m.num_units, q=m.sampling_probability, bands=4, rows=150, cap=m.batch_cap
  )
  cap, n, q = event.truncated_batch_size, event.dataset_size, event.sampling_probability
  assert (cap, n) == (18, 30)
  observed = np.bincount(np.asarray(batches[1]).sum(axis=1), minlength=cap + 1)
  expected = stats.binom.pmf(np.arange(cap + 1), n, q) * draws
  expected[cap] = stats.binom.sf(cap - 1, n, q) * draws
  observed, expected = (np.append(v[5:], v[:5].sum()) for v in (observed, expected))
  assert stats.chisquare(observed, expected).pvalue > 1e-4


def test_prefix_errors_are_the_variances_of_simulated_sums():
  steps, size = 12, 50_000
  c = toeplitz_strategy(steps, 4)
  fresh = jax.random.normal(base_key(0), (steps, size), jnp.float32)
  sums = np.cumsum(np.asarray(run(fresh, c), float), axis=0)
  found = (sums**2).mean(axis=1) / prefix_errors(c, steps)
  assert np.abs(found - 1).max() < 4.5 * math.sqrt(2 / size)


def test_large_numbers_of_correlated_noise_take_every_grain():
  """From 8 deviations on they were even alone where nothing was in the sum; so it was told."""
  size = 4096
  large = jnp.asarray(np.random.default_rng(0).uniform(8, 40, size), jnp.float32)

  @jax.jit
  def released(total, sigma, key):
    settings = (sigma, jnp.float32(1), jnp.float32(64))
    return noised_mean(whole_grains(total, key, *settings), large, *settings)

  def odd(total):
    step = np.float32(np.float32(GRAIN) * np.float32(1.5)) / np.float32(64)
    grains = np.round(np.asarray(released(total, jnp.float32(1.5), base_key(0)), float) / step)
    return int((grains % 2).sum())

  absent, present = odd(jnp.zeros(size)), odd(jnp.full(size, 1 / np.sqrt(size), jnp.float32))
  for count in (absent, present):
    assert abs(count - size / 2) < 4.5 * np.sqrt(size) / 2
