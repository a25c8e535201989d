"""Noise has the promised moments, is independent everywhere, and never depends on the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.privacy.noise import gaussian_noise_like, private_mean


def small_tree():
  return {"w": jnp.ones((3, 4)), "b": [jnp.zeros(4), jnp.full((), 2.0)]}


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


def test_noise_is_uncorrelated_between_leaves_clients_steps_and_seeds():
  size = 40_000

  @functools.partial(jax.vmap, in_axes=(None, 0))
  def of_clients(step, client):
    key = key_for(base_key(0), Stream.NOISE, client, step)
    return gaussian_noise_like(key, {"a": jnp.zeros(size), "b": jnp.zeros(size)}, 1.0)

  first, second = of_clients(0, jnp.arange(2)), of_clients(1, jnp.arange(2))
  other = gaussian_noise_like(key_for(base_key(1), Stream.NOISE, 0, 0), jnp.zeros(size), 1.0)
  rows = np.concatenate(
    [np.asarray(noise[leaf]) for noise in (first, second) for leaf in "ab"] + [other[None]]
  )
  assert rows.shape == (9, size)
  off_diagonal = np.corrcoef(rows)[np.triu_indices(9, 1)]
  assert np.abs(off_diagonal).max() < 4.5 / np.sqrt(size)


def test_noise_of_a_client_does_not_depend_on_the_vmap():
  keys = jax.random.split(base_key(3), 4)
  together = jax.vmap(lambda key: gaussian_noise_like(key, small_tree(), 1.0))(keys)
  for client in range(4):
    alone = gaussian_noise_like(keys[client], small_tree(), 1.0)
    for batched, single in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
      np.testing.assert_array_equal(batched[client], single)


def test_without_noise_the_mean_is_exactly_sum_over_expected_size():
  mean = private_mean(small_tree(), base_key(0), 0.0, 1.5, 7.3)
  for leaf, expected in zip(jax.tree.leaves(mean), jax.tree.leaves(small_tree()), strict=True):
    np.testing.assert_array_equal(leaf, np.asarray(expected) / np.float32(7.3))


def test_an_empty_batch_gives_noise_of_sigma_times_clip_over_expected_size():
  sigma, clip_norm, expected = 1.3, 0.5, 32.0
  mean = private_mean(jnp.zeros(100_000), base_key(1), sigma, clip_norm, expected)
  scaled = np.asarray(mean, float) * expected / (sigma * clip_norm)
  assert stats.kstest(scaled, "norm").pvalue > 1e-3
  assert scaled.std() == pytest.approx(1, rel=0.01)


def test_the_noise_added_does_not_depend_on_the_data():
  tree = jax.tree.map(lambda leaf: 100 * leaf, small_tree())
  zeros = jax.tree.map(jnp.zeros_like, tree)
  noisy = private_mean(tree, base_key(2), 1.0, 1.0, 4.0)
  noise = private_mean(zeros, base_key(2), 1.0, 1.0, 4.0)
  for leaf, plain, z in zip(*map(jax.tree.leaves, (noisy, tree, noise)), strict=True):
    np.testing.assert_allclose(leaf, np.asarray(plain) / 4 + np.asarray(z), atol=1e-5)


def test_sigma_clip_and_size_may_be_traced_and_swept():
  sigmas = jnp.array([0.0, 1.0, 2.0], jnp.float32)
  sweep = jax.jit(
    jax.vmap(lambda sigma: private_mean(jnp.zeros(8), base_key(0), sigma, jnp.float32(2), 4.0))
  )(sigmas)
  assert np.all(sweep[0] == 0)
  np.testing.assert_allclose(sweep[2], 2 * sweep[1], rtol=1e-6)


def test_output_is_float32_of_the_same_structure():
  tree = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(3)}
  mean = private_mean(tree, base_key(0), 1.0, 1.0, 2.0)
  assert jax.tree.structure(mean) == jax.tree.structure(tree)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(mean))
  assert mean["w"].shape == (2, 2)
