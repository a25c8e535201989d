"""Group normalisation against its equations, finite differences and rounding."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from fedjax_med.models.group_norm import group_norm


def norm_reference(x, scale, bias, num_groups, epsilon):
  """Wu and He (2018), equations 1 to 8, one example and one group at a time."""
  out = np.empty(x.shape)
  width = x.shape[-1] // num_groups
  for b, g in np.ndindex(x.shape[0], num_groups):
    part = x[b, ..., g * width : (g + 1) * width]
    standard = np.sqrt(((part - part.mean()) ** 2).mean() + epsilon)
    out[b, ..., g * width : (g + 1) * width] = (part - part.mean()) / standard
  return out * scale + bias


@pytest.mark.parametrize("shape", [(3, 4, 5, 12), (3, 7, 12), (2, 12)])
@pytest.mark.parametrize("num_groups", [1, 3, 6])
def test_group_norm_equals_its_equations(shape, num_groups):
  rng = np.random.default_rng(1)
  x, scale, bias = rng.normal(1, 2, shape), rng.normal(size=12), rng.normal(size=12)
  arrays = [jnp.float32(a) for a in (x, scale, bias)]
  out = jax.jit(lambda *a: group_norm(*a, num_groups=num_groups, epsilon=1e-3))(*arrays)
  expected = norm_reference(x, scale, bias, num_groups, 1e-3)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_group_norm_without_scale_and_bias_only_normalises():
  x = np.random.default_rng(6).normal(1, 2, (2, 3, 3, 4))
  out = group_norm(jnp.float32(x), None, None, num_groups=2, epsilon=1e-3)
  np.testing.assert_allclose(out, norm_reference(x, 1, 0, 2, 1e-3), rtol=1e-4, atol=1e-4)


def test_group_norm_gradients_equal_finite_differences():
  rng = np.random.default_rng(2)
  with jax.enable_x64(True):
    arrays = [jnp.asarray(rng.normal(size=s)) for s in ((2, 3, 2, 6), (6,), (6,))]
    run = jax.jit(lambda *a: group_norm(*a, num_groups=3, epsilon=1e-5))
    jax.test_util.check_grads(run, arrays, order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


def test_group_norm_of_one_example_ignores_the_others():
  x = np.random.default_rng(5).normal(size=(4, 3, 3, 8)).astype(np.float32)
  spoilt = np.concatenate([np.full_like(x[:1], np.nan), x[1:]])
  norm = jax.jit(lambda x: group_norm(x, None, None, num_groups=4, epsilon=1e-5))
  np.testing.assert_array_equal(np.asarray(norm(x))[1:], np.asarray(norm(spoilt))[1:])


def test_group_norm_keeps_two_digits_at_a_mean_of_a_hundred_deviations():
  x = np.random.default_rng(3).normal(100, 1, (2, 8, 8, 8))
  out = group_norm(jnp.float32(x), None, None, num_groups=2, epsilon=1e-5)
  np.testing.assert_allclose(out, norm_reference(x, 1, 0, 2, 1e-5), rtol=5e-3, atol=5e-3)


def test_bfloat16_group_norm_has_float32_statistics():
  # Their bfloat16 sum is 256 short of half the pixels; the variance would be far off.
  x = jnp.tile(jnp.array([1.0, 3.0], jnp.bfloat16)[:, None], (2048, 2))[None]
  out = group_norm(x, None, None, num_groups=1, epsilon=0.0)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.unique(out), [-1, 1])
