"""Rules that look at each number by itself: median, trimmed mean, mean around the median.

Yin et al. 2018 (median, trimmed mean), Xie et al. 2018 (mean around the median, meamed).
"""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.robust.rule import Rule, tolerated


def _sorted(vectors: jax.Array, present: jax.Array) -> jax.Array:
  """Columns in ascending order; absent rows come last, as infinity."""
  return jnp.sort(jnp.where(present[:, None], vectors, jnp.inf), axis=0)


def _middle(ordered: jax.Array, number: jax.Array) -> jax.Array:
  """Median of the first ``number`` rows of sorted columns; of none, zeros."""
  low, high = jnp.maximum(number - 1, 0) // 2, number // 2
  low, high = jnp.take(ordered, low, axis=0), jnp.take(ordered, high, axis=0)
  return jnp.where(number > 0, low / 2 + high / 2, 0)  # their sum could overflow


def coordinate_median(vectors: jax.Array, present: jax.Array) -> jax.Array:
  """[D] median of each number over the rows that are present."""
  return _middle(_sorted(vectors, present), present.sum(dtype=jnp.int32))


def median() -> Rule:
  """The median of each number; f is not read."""
  return Rule(combine=lambda vectors, present, f, memory: coordinate_median(vectors, present))


def trimmed_mean() -> Rule:
  """The mean of each number without its f largest and its f smallest values."""

  def combine(vectors, present, f, memory):
    number, hostile = tolerated(present, f)
    places = jnp.arange(len(vectors))
    inside = (places >= hostile) & (places < number - hostile)
    total = jnp.where(inside[:, None], _sorted(vectors, present), 0).sum(0)
    return total / jnp.maximum(number - 2 * hostile, 1).astype(jnp.float32)

  return Rule(combine=combine)


def meamed() -> Rule:
  """The mean, of each number, of the n − f values that are nearest to the median.

  They are a run of neighbours in sorted order. Of two that are equally far the smaller one counts.
  """

  def combine(vectors, present, f, memory):
    number, hostile = tolerated(present, f)
    ordered = _sorted(vectors, present)
    far = jnp.abs(ordered - _middle(ordered, number)[None])  # infinite of absent rows
    rank = jnp.argsort(jnp.argsort(far, axis=0, stable=True), axis=0, stable=True)
    total = jnp.where(rank < number - hostile, ordered, 0).sum(0)
    total = jnp.where(number > 0, total, 0)
    return total / jnp.maximum(number - hostile, 1).astype(jnp.float32)

  return Rule(combine=combine)
