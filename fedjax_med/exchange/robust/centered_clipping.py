"""Centered clipping: the last aggregate, moved by the mean of the clipped differences to it."""

import jax.numpy as jnp

from fedjax_med.exchange.robust.coordinates import coordinate_median
from fedjax_med.exchange.robust.rule import Rule, mean_of, norms_of


def centered_clipping(radius: float) -> Rule:
  """One step from the last round's aggregate (Karimireddy et al. 2021); f is not read.

  Args:
    radius: τ, largest norm of a difference; 0 takes the median norm of the round's differences.
  """

  def combine(vectors, present, f, memory):
    differences = jnp.where(present[:, None], vectors - memory[None], 0)
    norms = norms_of(differences)
    limit = jnp.float32(radius)
    if radius == 0:
      limit = coordinate_median(norms[:, None], present)[0]
    factors = jnp.minimum(1, limit / jnp.where(norms > 0, norms, 1))
    return memory + mean_of(differences * factors[:, None], present)

  return Rule(combine=combine, remembers=True)
