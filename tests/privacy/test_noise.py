"""Noise has the promised moments, is independent everywhere, and never depends on the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.privacy.noise import GRAIN, gaussian_noise_like, private_mean
from tests.privacy.draws import every_normal


def small_sum():
  return jnp.concatenate([jnp.ones(12), jnp.zeros(4), jnp.full(1, 2.0)])


def test_noise_is_normal_with_the_given_standard_deviation():
  noise = np.asarray(gaussian_noise_like(base_key(0), jnp.zeros(200_000), 2.5), float)
  assert stats.kstest(noise / 2.5, "norm").pvalue > 1e-3
  assert noise.std() == pytest.approx(2.5, rel=0.01)
  assert abs(noise.mean()) < 4 * 2.5 / np.sqrt(noise.size)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_noise_is_drawn_in_float32_whatever_the_leaf(dtype):
  noise = gaussian_noise_like(base_key(0), jnp.zeros(5000, dtype), 1.0)
  assert noise.dtype == jnp.float32
  assert len(np.unique(noise)) > 4900
  np.testing.assert_array_equal(noise, gaussian_noise_like(base_key(0), jnp.zeros(5000), 1.0))


def test_noise_is_uncorrelated_within_an_array_and_between_clients_steps_and_seeds():
  size = 40_000

  @functools.partial(jax.vmap, in_axes=(None, 0))
  def of_clients(step, client):
    key = key_for(base_key(0), Stream.NOISE, client, step)
    return gaussian_noise_like(key, jnp.zeros((2, size)), 1.0)

  first, second = of_clients(0, jnp.arange(2)), of_clients(1, jnp.arange(2))
  other = gaussian_noise_like(key_for(base_key(1), Stream.NOISE, 0, 0), jnp.zeros(size), 1.0)
  rows = np.concatenate([*np.asarray(first), *np.asarray(second), other[None]])
  assert rows.shape == (9, size)
  off_diagonal = np.corrcoef(rows)[np.triu_indices(9, 1)]
  assert np.abs(off_diagonal).max() < 4.5 / np.sqrt(size)


def test_noise_of_a_client_does_not_depend_on_the_vmap():
  keys = jax.random.split(base_key(3), 4)
  together = jax.vmap(lambda key: gaussian_noise_like(key, small_sum(), 1.0))(keys)
  for client in range(4):
    alone = gaussian_noise_like(keys[client], small_sum(), 1.0)
    np.testing.assert_array_equal(together[client], alone)


def test_without_noise_the_mean_is_exactly_sum_over_expected_size():
  total = jnp.concatenate([small_sum(), jnp.array([-3e-30, 1e30, -0.1])])
  mean = private_mean(total, base_key(0), 0.0, 1.5, 7.3)
  np.testing.assert_array_equal(mean, np.asarray(total) / np.float32(7.3))


def test_an_empty_batch_gives_noise_of_sigma_times_clip_over_expected_size():
  sigma, clip_norm, expected = 1.3, 0.5, 32.0
  mean = private_mean(jnp.zeros(100_000), base_key(1), sigma, clip_norm, expected)
  scaled = np.asarray(mean, float) * expected / (sigma * clip_norm)
  assert stats.kstest(scaled, "norm").pvalue > 1e-3
  assert scaled.std() == pytest.approx(1, rel=0.01)


def test_the_noise_added_does_not_depend_on_the_data():
  total = 100 * small_sum()
  noisy = private_mean(total, base_key(2), 1.0, 1.0, 4.0)
  noise = private_mean(jnp.zeros_like(total), base_key(2), 1.0, 1.0, 4.0)
  np.testing.assert_allclose(noisy, np.asarray(total) / 4 + np.asarray(noise), atol=1e-5)


def test_sigma_clip_and_size_may_be_traced_and_swept():
  sigmas = jnp.array([0.0, 1.0, 2.0], jnp.float32)
  sweep = jax.jit(
    jax.vmap(lambda sigma: private_mean(jnp.zeros(8), base_key(0), sigma, jnp.float32(2), 4.0))
  )(sigmas)
  assert np.all(sweep[0] == 0)
  np.testing.assert_allclose(sweep[2], 2 * sweep[1], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_a_release_is_float32_in_the_shape_of_the_sum(shape):
  for sigma in (0.0, 1.0):
    mean = private_mean(jnp.ones(shape, jnp.bfloat16), base_key(0), sigma, 1.0, 2.0)
    assert (mean.dtype, mean.shape) == (jnp.float32, shape)


SIZE = 16.0  # expected units of a batch, in the tests of single bits


def releases(total: np.ndarray, sigma: float, trials: int) -> np.ndarray:
  """[trials, N] releases of one clipped sum [N] at C = 1, each with noise of its own."""
  keys = jax.vmap(lambda trial: key_for(base_key(5), Stream.NOISE, trial))(jnp.arange(trials))
  given = jnp.asarray(total, jnp.float32)
  release = jax.jit(jax.vmap(lambda key: private_mean(given, key, sigma, 1.0, SIZE)))
  return np.asarray(release(keys))


def direction(size: int) -> np.ndarray:
  """[size] a record's clipped gradient of norm 1, no number of which is a round one."""
  values = np.random.default_rng(0).normal(size=size)
  return values / np.linalg.norm(values)


def in_grains(released: np.ndarray, sigma: float) -> np.ndarray:
  """The whole numbers that releases stand for; AssertionError where one is no whole number."""
  step = np.float32(np.float32(GRAIN) * np.float32(sigma)) / np.float32(SIZE)
  whole = np.round(released / step.astype(np.float64))
  np.testing.assert_array_equal((whole.astype(np.float32) * step).astype(np.float32), released)
  return whole.astype(np.int64)


@pytest.mark.parametrize("sigma", [1.1, 10.0, 100.0])
def test_no_float_of_a_release_tells_whether_a_record_was_in_it(sigma):
  # What told them apart without an error: is every number the noise of one float32 normal?
  table = np.unique((np.float32(sigma) * every_normal()) / np.float32(SIZE))

  def scores(total):
    released = releases(total, sigma, 400)
    places = np.clip(np.searchsorted(table, released), 0, len(table) - 1)
    return (table[places] == released).mean(1)

  absent, present = scores(np.zeros(64)), scores(direction(64))
  assert stats.mannwhitneyu(absent, present).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [1.1, 100.0])
def test_the_last_bits_of_a_release_are_even_whatever_is_in_the_sum(sigma):
  for total in (np.zeros(64), direction(64), 3e-5 * direction(64)):
    last = in_grains(releases(total, sigma, 1000), sigma) % 64
    counts = np.bincount(last.reshape(-1), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_sums_are_rounded_to_grains_by_chance_and_to_themselves_on_average():
  sigma, total = 1.0, 3e-5 * direction(64)
  grains = total / (GRAIN * sigma)
  moved = in_grains(releases(total, sigma, 2000), sigma) - in_grains(
    releases(np.zeros(64), sigma, 2000), sigma
  )
  assert (moved >= np.floor(grains)).all()
  assert (moved <= np.ceil(grains)).all()
  assert np.abs(moved.mean(0) - grains).max() < 4.5 * 0.5 / np.sqrt(2000)


def test_normals_of_one_release_take_values_between_those_of_a_single_draw():
  values = np.asarray(gaussian_noise_like(base_key(0), jnp.zeros(100_000), 1.0))
  table = np.sort(every_normal())
  places = np.clip(np.searchsorted(table, values), 0, len(table) - 1)
  assert (table[places] == values).mean() < 0.5


@pytest.mark.parametrize(("sigma", "expected"), [(1e-3, 64.0), (0.05, 512.0), (3.0, 4.0)])
def test_a_sum_of_fifteen_expected_batches_still_fits_its_grains(sigma, expected):
  total = jnp.asarray([15.7, -15.7, 1.0, -0.37], jnp.float32) * expected
  mean = np.asarray(private_mean(total, base_key(4), sigma, 2.0, expected / 2))
  noise = np.asarray(private_mean(jnp.zeros(4), base_key(4), sigma, 2.0, expected / 2))
  np.testing.assert_allclose(mean, np.asarray(total) / (expected / 2) + noise, atol=2e-6 * expected)
