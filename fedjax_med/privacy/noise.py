"""Gaussian noise of a private step: four draws to a number, added to the sum in whole grains.

Two things would let floats say more than ε. One float32 normal takes 2^23 values, so that a
released number either is one of them or is not (Mironov 2012); here each is the sum of four over
two, which takes every value nearby (Holohan and Braghin 2021, arXiv 2107.10138). And sum and noise
would be rounded as finely as their size allows, which shows in the last bits; here both are whole
numbers of one grain, whose sum is exact, and what is done to it afterwards looks at no record.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_med.core.keys import require_threefry

# Draws are rounded up to this: XLA's CPU kernels for odd sizes are scalar, ten times slower.
_MULTIPLE = 1024
# Draws whose sum, over the square root of their number, is one normal.
_DRAWS = 4
# Of the noise's standard deviation. Float32 tells whole grains apart up to 64 deviations; a finer
# grain would skip every second one of a large number, and correlated noise has numbers of over 8.
GRAIN = 2.0**-18
# Of clip norm times expected batch: 31 bits hold a sum of fifteen times as much.
_COARSER = 2.0**-27
_MOST = 2.0**31 - 2.0**25  # grains of a sum; noise has far under 2^25 of them


def gaussian_noise_like(key: jax.Array, array: jax.Array, stddev: jax.Array | float) -> jax.Array:
  """Independent N(0, stddev²) noise in the shape of ``array``, float32 whatever its dtype.

  bfloat16 is never drawn: its normals take 128 distinct values. Simulation-grade: normals stop at
  |z| = 10.84 and threefry is no certified generator.

  Raises:
    UserError: ``key`` is no threefry key.
  """
  require_threefry(key)
  size = _padded_count(array)

  # A loop is computed for itself: fused into the kernels that add it, each of them would draw its
  # own stretch again, which takes twice as long to run and four times as long to compile.
  def draw(number: jax.Array, total: jax.Array) -> jax.Array:
    return total + jax.random.normal(jax.random.fold_in(key, number), (size,), jnp.float32)

  zero = _zero_after(jax.random.key_data(key)).astype(jnp.float32)
  values = jax.lax.fori_loop(0, _DRAWS, draw, jnp.broadcast_to(zero, (size,)))
  return jnp.asarray(stddev, jnp.float32) * _in_shape_of(array, values / math.sqrt(_DRAWS))


def _padded_count(array: jax.Array) -> int:
  """Count of the array's numbers, rounded up: to a power of two below ``_MULTIPLE``."""
  size = math.prod(jnp.shape(array))
  multiple = min(_MULTIPLE, 1 << max(size - 1, 0).bit_length())
  return -(-size // multiple) * multiple


def _in_shape_of(array: jax.Array, values: jax.Array) -> jax.Array:
  """The first of ``values`` in the array's shape."""
  return values[: math.prod(jnp.shape(array))].reshape(jnp.shape(array))


def _zero_after(array: jax.Array) -> jax.Array:
  """[] uint32 0, which a program has only once it has the array.

  Operations that use it wait for the array. A compiler that is free to choose draws the noise first
  and keeps it during the whole backward pass.
  """
  word = jax.lax.bitcast_convert_type(jnp.ravel(array)[0], jnp.uint32)
  return jax.lax.clz(word) >> 6  # at most 32 zeros lead a word, which the compiler does not know


def key_after(key: jax.Array, array: jax.Array) -> jax.Array:
  """The same key, which a program has only once it has the array."""
  words = jax.random.key_data(key) ^ _zero_after(array)
  return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))


def private_mean(
  clipped_sum: jax.Array,
  key: jax.Array,
  noise_multiplier: jax.Array | float,
  clip_norm: jax.Array | float,
  expected_batch_size: jax.Array | float,
) -> jax.Array:
  """(clipped_sum + σ·C·z) / (q·n) with z ~ N(0, I): the noisy mean gradient (Abadi et al. 2016).

  The noise is on the sum, whose sensitivity is C, and the denominator is public and fixed: an empty
  batch gives pure noise, and σ = 0 gives exactly clipped_sum / (q·n).

  Args:
    clipped_sum: sum of clipped per-example gradients, an array of any shape.
    key: key of this client and step.
    noise_multiplier: [] σ; may be traced.
    clip_norm: [] C; may be traced.
    expected_batch_size: [] q·n, never the size of the batch drawn; may be traced.

  Returns:
    float32 in the shape of ``clipped_sum``.
  """
  settings = (noise_multiplier, clip_norm, expected_batch_size)
  grains = whole_grains(clipped_sum, key, *settings)
  noise = gaussian_noise_like(key_after(key, grains), grains, 1.0)
  return noised_mean(grains, noise, *settings)


def grain_of(noise_multiplier: Any, expected_batch_size: Any) -> jax.Array:
  """The grain of sum and noise, in units of the clip norm."""
  sigma, size = (jnp.asarray(x, jnp.float32) for x in (noise_multiplier, expected_batch_size))
  return jnp.maximum(GRAIN * sigma, _COARSER * size)


def _scales(*settings: jax.Array | float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """σ·C, the grain, q·n, and whether there is noise at all; of (σ, C, q·n)."""
  sigma, bound, size = (jnp.asarray(each, jnp.float32) for each in settings)
  noisy = sigma * bound > 0
  return sigma * bound, jnp.where(noisy, bound * grain_of(sigma, size), 1), size, noisy


def whole_grains(
  clipped_sum: jax.Array,
  key: jax.Array,
  noise_multiplier: jax.Array | float,
  clip_norm: jax.Array | float,
  expected_batch_size: jax.Array | float,
) -> jax.Array:
  """A sum in whole grains, int32; without noise the bits of the sum itself.

  The sum is rounded up or down by chance, to itself on average: so the grain is part of the noise,
  whose density is a staircase of steps of one grain, and no rounding adds to the sensitivity. A
  grain is σ·C·2^-18, or q·n·C·2^-27 if that is more; a number of the sum is held to 2^31 of them.
  """
  _, grain, _, noisy = _scales(noise_multiplier, clip_norm, expected_batch_size)
  total = jnp.asarray(clipped_sum).astype(jnp.float32)
  key = jax.random.fold_in(key_after(key, total), _DRAWS)
  chances = jax.random.uniform(key, (_padded_count(total),), jnp.float32)
  chances = _in_shape_of(total, jax.lax.optimization_barrier(chances))
  grains = jnp.clip(total / grain, -_MOST, _MOST)
  whole = jnp.floor(grains)
  up = (chances < grains - whole).astype(jnp.int32)
  # One array for both cases: a second one would be a vector more in memory.
  itself = jax.lax.bitcast_convert_type(total, jnp.int32)
  return jnp.where(noisy, whole.astype(jnp.int32) + up, itself)


def noised_mean(
  grains: jax.Array,
  noise: jax.Array,
  noise_multiplier: jax.Array | float,
  clip_norm: jax.Array | float,
  expected_batch_size: jax.Array | float,
) -> jax.Array:
  """(sum + σ·C·noise) / (q·n) of ``whole_grains`` of the sum, with any noise in its shape."""
  stddev, grain, size, noisy = _scales(noise_multiplier, clip_norm, expected_batch_size)
  # Halves always up: to even, as jnp.round does, even numbers would be a tenth more likely. The
  # half is not added: from 2^23 grains on the sum would be rounded, to even again.
  noise = noise * (stddev / grain)
  least = jnp.floor(noise)
  more = (noise - least >= 0.5).astype(jnp.int32)
  total = (grains + least.astype(jnp.int32) + more).astype(jnp.float32) * (grain / size)
  itself = jax.lax.bitcast_convert_type(grains, jnp.float32)
  # A division of both cases, by 1 in the first, is one vector; of one case it would be a second.
  return jnp.where(noisy, total, itself) / jnp.where(noisy, 1, size)
