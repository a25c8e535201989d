"""Threefry-2x32 (Salmon et al. 2011) written out, which on CPUs beats jax's loop.

On CPUs jax compiles the 20 rounds as a loop, to compile sooner, and every turn passes the whole
array through memory. Written out they are one kernel. ``IMPLEMENTATION`` gives keys whose draws
equal those of jax's own threefry2x32 bit for bit.
"""

import math

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_STOCK = "threefry2x32"


def cipher(key: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Both words of the cipher's blocks at the counters (0, low); ``key`` [2], all uint32."""
  keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
  x, y = jnp.full_like(low, keys[0]), low + keys[1]
  for group in range(5):
    for turn in _ROTATIONS[group % 2]:
      x = x + y
      y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
    x = x + keys[(group + 1) % 3]
    y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
  return x, y


def _stock(key: jax.Array) -> jax.Array:
  return jax.random.wrap_key_data(key, impl=_STOCK)


def _seed(seed: jax.Array) -> jax.Array:
  return jax.random.key_data(jax.random.key(seed, impl=_STOCK))


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.key_data(jax.random.split(_stock(key), shape))


def _fold_in(key: jax.Array, data: int) -> jax.Array:
  return jax.random.key_data(jax.random.fold_in(_stock(key), data))


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
  size = math.prod(shape)
  if bit_width != 32 or size >= 2**32:
    dtype = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[bit_width]
    return jax.random.bits(_stock(key), shape, dtype)
  x, y = cipher(key, jax.lax.iota(jnp.uint32, size))
  return (x ^ y).reshape(shape)


IMPLEMENTATION = jax.extend.random.define_prng_impl(
  key_shape=(2,),
  seed=_seed,
  split=_split,
  random_bits=_random_bits,
  fold_in=_fold_in,
  name="threefry2x32_unrolled",
  tag="fry_unrolled",
)
