"""Steps before a rule that mix updates: nearest neighbours, and random buckets."""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.robust.rule import Before, ranks, squared_distances, tolerated


def nearest_neighbours() -> Before:
  """Each update becomes the mean of the n − f nearest ones, itself among them.

  NNM (Allouah et al. 2023). With few and unlike hospitals it may leave out an honest one and keep
  attackers who agree with each other: see docs/exchange.md.
  """

  def before(vectors, present, f, key):
    number, hostile = tolerated(present, f)
    counted = number - hostile
    near = (ranks(squared_distances(vectors, present)) < counted) & present[None]
    shares = near.astype(jnp.float32) / jnp.maximum(counted, 1).astype(jnp.float32)
    mixed = jnp.matmul(shares, vectors, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(present[:, None], mixed, 0), present

  return before


def in_buckets(
  vectors: jax.Array, present: jax.Array, order: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
  """Means of ``size`` rows each [⌈n/size⌉, D], and which of them hold a row.

  Args:
    vectors: [n, D].
    present: [n] bool.
    order: [n] row numbers; those that are present come first.
    size: rows of a bucket; the last one may have fewer.
  """
  buckets = -(-len(vectors) // size)
  numbers = jnp.zeros((len(vectors),), jnp.int32).at[order].set(jnp.arange(len(order)) // size)
  held = (numbers[None] == jnp.arange(buckets)[:, None]) & present[None]
  counts = held.sum(1)
  shares = held.astype(jnp.float32) / jnp.maximum(counts, 1).astype(jnp.float32)[:, None]
  means = jnp.matmul(shares, vectors, precision=jax.lax.Precision.HIGHEST)
  return means, counts > 0


def bucketing(size: int) -> Before:
  """Means of random groups of ``size`` updates (Karimireddy et al. 2022).

  A rule behind it sees fewer, more alike vectors; each hostile client spoils a whole bucket, so f
  stays as it is.
  """

  def before(vectors, present, f, key):
    # A key for each row: the draws of a row depend on no number of empty places behind it.
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(vectors)))
    draws = jax.vmap(jax.random.uniform)(keys)
    order = jnp.argsort(jnp.where(present, draws, 2), stable=True)
    return in_buckets(vectors, present, order, size)

  return before
