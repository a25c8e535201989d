"""A rule that joins stacked updates, and the numbers that all rules count with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any  # a pytree of arrays

# (vectors [n, D] float32, present [n] bool, f, memory [D] or ()) -> [D]. Rows that are absent hold
# zeros and count nothing.
Combine = Callable[[jax.Array, jax.Array, int, Tree], jax.Array]
# (vectors, present, f, key) -> the vectors that the rule gets, and which of those are present.
Before = Callable[[jax.Array, jax.Array, int, jax.Array], tuple[jax.Array, jax.Array]]


class Rule(NamedTuple):
  """One rule.

  Attributes:
    combine: joins the vectors of a round.
    remembers: whether it reads the vector that it gave in the round before (zeros in the first).
  """

  combine: Combine
  remembers: bool = False


def tolerated(present: jax.Array, f: int) -> tuple[jax.Array, jax.Array]:
  """Clients that are present, and how many of them are taken for hostile: under half of them.

  Fewer than 2f + 1 clients come where participation is drawn or messages are left out. The rules
  then take as many for hostile as they can.
  """
  number = present.sum(dtype=jnp.int32)
  return number, jnp.clip((number - 1) // 2, 0, f)


def mean_of(vectors: jax.Array, chosen: jax.Array) -> jax.Array:
  """Mean of the chosen rows [n] bool; of none, zeros."""
  total = jnp.where(chosen[:, None], vectors, 0).sum(0)
  return total / jnp.maximum(chosen.sum(), 1).astype(jnp.float32)


def norms_of(vectors: jax.Array) -> jax.Array:
  """[n] l2 norms; they do not overflow where the norm itself is a float32 number."""
  largest = jnp.abs(vectors).max(1)
  scale = jnp.where(largest > 0, largest, 1)
  return scale * jnp.sqrt(jnp.square(vectors / scale[:, None]).sum(1))


def near(vectors: jax.Array) -> jax.Array:
  """[n] bool: rows whose squared norm is a float32 number, so that distances to them are known."""
  return jnp.isfinite(jnp.square(vectors).sum(1))


def squared_distances(vectors: jax.Array, present: jax.Array) -> jax.Array:
  """[n, n] squared distances by the Gram matrix, in float32 at the highest precision.

  A distance is infinite where a row is absent, or too large for float32; to itself it is 0.
  """
  known = present & near(vectors)
  inside = jnp.where(known[:, None], vectors, 0)
  gram = jnp.matmul(inside, inside.T, precision=jax.lax.Precision.HIGHEST)
  squares = jnp.diagonal(gram)
  distances = jnp.maximum(squares[:, None] + squares[None] - 2 * gram, 0)
  distances = jnp.where(known[:, None] & known[None], distances, jnp.inf)
  return jnp.where(jnp.eye(len(vectors), dtype=bool) & present[None], 0, distances)


def ranks(values: jax.Array) -> jax.Array:
  """Rank of each value along the last axis, from 0; equal ones in their order."""
  return jnp.argsort(jnp.argsort(values, axis=-1, stable=True), axis=-1, stable=True)
