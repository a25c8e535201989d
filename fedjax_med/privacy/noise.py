"""Gaussian noise of a private step, always drawn and added in float32."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_med.core.keys import require_threefry

Tree = Any  # a pytree of arrays

# Draws are rounded up to this: XLA's CPU kernels for odd sizes are scalar, ten times slower.
_MULTIPLE = 1024


def gaussian_noise_like(key: jax.Array, tree: Tree, stddev: jax.Array | float) -> Tree:
  """Independent N(0, stddev²) noise in the shapes of ``tree``, float32 whatever its dtypes.

  The leaves take consecutive stretches of one draw, so equal leaves get different noise. bfloat16
  is never drawn: its normals take 128 distinct values. Simulation-grade: float32 normals stop at
  |z| = 5.42 and threefry is no certified generator.

  Raises:
    UserError: ``key`` is no threefry key.
  """
  require_threefry(key)
  leaves, structure = jax.tree.flatten(tree)
  sizes = [math.prod(jnp.shape(leaf)) for leaf in leaves]
  padded = -(-sum(sizes) // _MULTIPLE) * _MULTIPLE
  # The barrier: else every leaf would draw its own stretch again, inside the kernel that adds it. A
  # draw per leaf, compiled once a leaf, was two thirds of the compile time of SE-ResNeXt-50.
  values = jax.lax.optimization_barrier(jax.random.normal(key, (padded,), jnp.float32))
  scale = jnp.asarray(stddev, jnp.float32)
  stretches = zip(leaves, sizes, itertools.accumulate(sizes), strict=True)
  noise = [
    scale * values[end - size : end].reshape(jnp.shape(leaf)) for leaf, size, end in stretches
  ]
  return jax.tree.unflatten(structure, noise)


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
  stddev = jnp.asarray(noise_multiplier, jnp.float32) * jnp.asarray(clip_norm, jnp.float32)
  return noised_mean(
    clipped_sum, gaussian_noise_like(key, clipped_sum, stddev), expected_batch_size
  )


def noised_mean(clipped_sum: Tree, noise: Tree, expected_batch_size: jax.Array | float) -> Tree:
  """(clipped_sum + noise) / (q·n) in float32: noise is on the sum, whatever it is made of."""
  denominator = jnp.asarray(expected_batch_size, jnp.float32)
  return jax.tree.map(
    lambda leaf, z: (jnp.asarray(leaf).astype(jnp.float32) + z) / denominator, clipped_sum, noise
  )
