"""Compressed updates as the attacks of ``inversion`` see them."""

import jax
import jax.numpy as jnp

# Numbers that share a scale, and the share of an update that top-k sends.
BLOCK, TOP_SHARE = 512, 0.01


def int8(update: jax.Array, key: jax.Array) -> jax.Array:
  """An update [P] in 8 bits, decoded: rounded by chance, without bias, to 255 levels of a block."""
  size, levels = update.shape[0], 127
  blocks = jnp.pad(update, (0, -size % BLOCK)).reshape(-1, BLOCK)
  scales = jnp.abs(blocks).max(1)
  units = (blocks / jnp.where(scales > 0, scales, 1)[:, None] * levels).reshape(-1)[:size]
  below = jnp.floor(units)
  up = jax.random.uniform(key, (size,)) < units - below
  whole = below + up.astype(jnp.float32)
  return whole / levels * jnp.repeat(scales, BLOCK)[:size]


def top_k(update: jax.Array, key: jax.Array) -> jax.Array:
  """An update [P] of which the largest hundredth is sent, at least one number; the rest is 0."""
  del key
  kept = max(1, round(TOP_SHARE * update.shape[0]))
  _, places = jax.lax.top_k(jnp.abs(update), kept)
  return jnp.zeros_like(update).at[places].set(update[places])
