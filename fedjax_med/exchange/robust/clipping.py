"""Steps before a rule that shorten long updates: to a given norm, or to one that follows from f."""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.robust.rule import Before, norms_of, tolerated


def _shortened(vectors: jax.Array, limit: jax.Array | float) -> jax.Array:
  norms = norms_of(vectors)
  factors = jnp.minimum(1, limit / jnp.where(norms > 0, norms, 1))
  return vectors * factors[:, None]


def clipping(norm: float) -> Before:
  """Scales every update down to at most this l2 norm."""

  def before(vectors, present, f, key):
    return _shortened(vectors, norm), present

  return before


def adaptive_clipping() -> Before:
  """Scales the ⌊2f(n − f)/n⌋ longest updates down to the norm of the next one.

  ARC (Allouah et al. 2024).
  """

  def before(vectors, present, f, key):
    number, hostile = tolerated(present, f)
    clipped = 2 * hostile * (number - hostile) // jnp.maximum(number, 1)
    norms = jnp.sort(jnp.where(present, norms_of(vectors), jnp.inf))
    limit = jnp.take(norms, jnp.maximum(number - clipped - 1, 0))
    return jnp.where(present[:, None], _shortened(vectors, limit), 0), present

  return before
