"""The k largest of many numbers, exactly k of them."""

import jax
import jax.numpy as jnp

from fedjax_med.core.errors import require


def kept(share: float, size: int) -> int:
  """k, the numbers that a share of d leaves; UserError if that is none."""
  count = int(share * size + 1e-6)
  require(
    1 <= count <= size,
    f"compression.share={share:g} of {size} numbers is {count}",
    f"use {1 / size:.2g} to 1",
  )
  return count


def largest(values: jax.Array, count: int) -> jax.Array:
  """int32 indices of the ``count`` largest absolute values of [d]; of equal ones the first.

  A number that is no number is among the largest.
  """
  # XLA sorts no more than it must: on a CPU a threshold by bisection took 2 to 4 times as long.
  sizes = jnp.where(jnp.isnan(values), jnp.inf, jnp.abs(values))
  return jax.lax.top_k(sizes, count)[1]


def index_bits(size: int) -> int:
  """Bits that tell one of ``size`` numbers."""
  return (size - 1).bit_length()
