"""Every value that a draw can take, each as probable as any other: no sample."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np


def _every_uniform(key, width, shape):
  """Bits from which jax makes each of its 2^23 uniforms once."""
  assert (width, shape) == (32, (2**23,))
  return jax.lax.iota(jnp.uint32, 2**23) << np.uint32(9)


@functools.cache
def every_normal() -> np.ndarray:
  """[2^23] float32, all values of one float32 normal."""
  every = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jnp.zeros(2, jnp.uint32),
    split=lambda key, shape: jnp.zeros((*shape, 2), jnp.uint32),
    random_bits=_every_uniform,
    fold_in=lambda key, data: key,
  )
  key = jax.random.key(0, impl=every)
  return np.asarray(jax.random.normal(key, (2**23,), jnp.float32))
