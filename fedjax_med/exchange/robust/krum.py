"""Krum and Multi-Krum: the update, or the n − f updates, with the nearest neighbours.

Blanchard et al. 2017. A score is the mean squared distance to n − f − 1 neighbours, as in ByzFL
0.0.11; the paper has n − f − 2.
"""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.robust.rule import Rule, mean_of, ranks, squared_distances, tolerated


def _scores(vectors: jax.Array, present: jax.Array, f: int) -> jax.Array:
  """[n] score of each row, infinite where it is absent."""
  number, hostile = tolerated(present, f)
  nearest = jnp.sort(squared_distances(vectors, present), axis=1)
  places = jnp.arange(len(vectors))
  counted = (places >= 1) & (places < number - hostile)  # place 0 is the row itself
  total = jnp.where(counted, nearest, 0).sum(1)
  scores = total / jnp.maximum(number - hostile - 1, 1).astype(jnp.float32)
  return jnp.where(present, scores, jnp.inf)


def krum() -> Rule:
  """The one update of the lowest score; of equal scores the first."""

  def combine(vectors, present, f, memory):
    return jnp.take(vectors, jnp.argmin(_scores(vectors, present, f)), axis=0)

  return Rule(combine=combine)


def multi_krum() -> Rule:
  """The mean of the n − f updates of the lowest scores."""

  def combine(vectors, present, f, memory):
    number, hostile = tolerated(present, f)
    return mean_of(vectors, present & (ranks(_scores(vectors, present, f)) < number - hostile))

  return Rule(combine=combine)
