"""Gaussian noise of a private step: four draws to a number, added to the sum in whole grains.

Two things would let floats say more than ε. One float32 normal takes 2^23 values, so that a
released number either is one of them or is not (Mironov 2012); here each is the sum of four over
two, which takes every value nearby (Holohan and Braghin 2021, arXiv 2107.10138). And sum and noise
would be rounded as finely as their size allows, which shows in the last bits; here both are whole
numbers of one grain, whose sum is exact, and what is done to it afterwards looks at no record.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_med.core.keys import require_threefry

Tree = Any  # a pytree of arrays

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


def gaussian_noise_like(key: jax.Array, tree: Tree, stddev: jax.Array | float) -> Tree:
  """Independent N(0, stddev²) noise in the shapes of ``tree``, float32 whatever its dtypes.

  The leaves take consecutive stretches of one draw, so equal leaves get different noise. bfloat16
  is never drawn: its normals take 128 distinct values. Simulation-grade: normals stop at |z| =
  10.84 and threefry is no certified generator.

  Raises:
    UserError: ``key`` is no threefry key.
  """
  require_threefry(key)
  leaves, structure = jax.tree.flatten(tree)
  size = _padded(leaves)

  # A loop is computed for itself: fused into the kernels that add it, every leaf would draw its own
  # stretch again, which takes twice as long to run and four times as long to compile.
  def draw(number: jax.Array, total: jax.Array) -> jax.Array:
    return total + jax.random.normal(jax.random.fold_in(key, number), (size,), jnp.float32)

  values = jax.lax.fori_loop(0, _DRAWS, draw, jnp.zeros((size,), jnp.float32))
  values = values / math.sqrt(_DRAWS)
  scale = jnp.asarray(stddev, jnp.float32)
  return jax.tree.unflatten(structure, [scale * part for part in _stretches(values, leaves)])


def _padded(leaves: list[Any]) -> int:
  """Count of numbers of the leaves, rounded up: to a power of two below ``_MULTIPLE``."""
  size = sum(math.prod(jnp.shape(leaf)) for leaf in leaves)
  multiple = min(_MULTIPLE, 1 << max(size - 1, 0).bit_length())
  return -(-size // multiple) * multiple


def _stretches(values: jax.Array, leaves: list[Any]) -> list[jax.Array]:
  """Consecutive stretches of ``values`` in the leaves' shapes."""
  sizes = [math.prod(jnp.shape(leaf)) for leaf in leaves]
  ends = itertools.accumulate(sizes)
  return [
    values[end - size : end].reshape(jnp.shape(leaf))
    for leaf, size, end in zip(leaves, sizes, ends, strict=True)
  ]


def private_mean(
  clipped_sum: Tree,
  key: jax.Array,
  noise_multiplier: jax.Array | float,
  clip_norm: jax.Array | float,
  expected_batch_size: jax.Array | float,
) -> Tree:
  """(clipped_sum + σ·C·z) / (q·n) with z ~ N(0, I): the noisy mean gradient (Abadi et al. 2016).

  The noise is on the sum, whose sensitivity is C, and the denominator is public and fixed: an empty
  batch gives pure noise, and σ = 0 gives exactly clipped_sum / (q·n).

  Args:
    clipped_sum: pytree of the sum of clipped per-example gradients.
    key: key of this client and step.
    noise_multiplier: [] σ; may be traced.
    clip_norm: [] C; may be traced.
    expected_batch_size: [] q·n, never the size of the batch drawn; may be traced.

  Returns:
    float32 pytree of ``clipped_sum``'s structure.
  """
  noise = gaussian_noise_like(key, clipped_sum, 1.0)
  return noised_mean(clipped_sum, noise, key, noise_multiplier, clip_norm, expected_batch_size)


def grain_of(noise_multiplier: Any, expected_batch_size: Any) -> jax.Array:
  """The grain of sum and noise, in units of the clip norm."""
  sigma, size = (jnp.asarray(x, jnp.float32) for x in (noise_multiplier, expected_batch_size))
  return jnp.maximum(GRAIN * sigma, _COARSER * size)


def noised_mean(
  clipped_sum: Tree,
  noise: Tree,
  key: jax.Array,
  noise_multiplier: jax.Array | float,
  clip_norm: jax.Array | float,
  expected_batch_size: jax.Array | float,
) -> Tree:
  """(clipped_sum + σ·C·noise) / (q·n) in whole grains: as ``private_mean``, of any ``noise``.

  The sum is rounded up or down by chance, to itself on average: so the grain is part of the noise,
  whose density is a staircase of steps of one grain, and no rounding adds to the sensitivity. A
  grain is σ·C·2^-18, or q·n·C·2^-27 if that is more; a number of the sum is held to 2^31 of them.
  """
  sigma, bound, size = (
    jnp.asarray(each, jnp.float32) for each in (noise_multiplier, clip_norm, expected_batch_size)
  )
  stddev = sigma * bound
  noisy = stddev > 0
  grain = jnp.where(noisy, bound * grain_of(sigma, size), 1)
  leaves, structure = jax.tree.flatten(clipped_sum)
  chances = jax.random.uniform(jax.random.fold_in(key, _DRAWS), (_padded(leaves),), jnp.float32)
  chances = _stretches(jax.lax.optimization_barrier(chances), leaves)

  def released(leaf, z, chance):
    leaf = jnp.asarray(leaf).astype(jnp.float32)
    grains = jnp.clip(leaf / grain, -_MOST, _MOST)
    whole = jnp.floor(grains)
    up = (chance < grains - whole).astype(jnp.int32)
    # Halves always up: to even, as jnp.round does, even numbers would be a tenth more likely. The
    # half is not added: from 2^23 grains on the sum would be rounded, to even again.
    noise = z * (stddev / grain)
    least = jnp.floor(noise)
    more = (noise - least >= 0.5).astype(jnp.int32)
    total = whole.astype(jnp.int32) + up + least.astype(jnp.int32) + more
    return jnp.where(noisy, total.astype(jnp.float32) * (grain / size), leaf / size)

  return jax.tree.unflatten(
    structure,
    [released(*each) for each in zip(leaves, jax.tree.leaves(noise), chances, strict=True)],
  )
