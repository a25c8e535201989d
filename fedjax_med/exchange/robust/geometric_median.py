"""The geometric median: the point of the least sum of distances to all updates.

Smoothed Weiszfeld steps (Pillutla et al. 2022). Of the rules here it is the one that held under
every attack in docs/exchange.md.
"""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.robust.coordinates import coordinate_median
from fedjax_med.exchange.robust.rule import Rule, near

EQUIVARIANT, BYZFL = "equivariant", "byzfl"
LEAST = 1e-30  # distance, where all updates are one point


def geometric_median(smoothing: float, steps: int, start: str) -> Rule:
  """Weighs each update by one over its distance to the last step's point, ``steps`` times.

  f is not read. An update whose squared norm is no float32 number has no weight.

  Args:
    smoothing: ν; smaller distances count as this large.
    steps: T.
    start: ``equivariant`` begins at the median of each number, and ν is times the median distance
      to it: moved and scaled updates give a moved and scaled result. ``byzfl`` begins at 0, and ν
      is a length, as in ByzFL 0.0.11.
  """

  def combine(vectors, present, f, memory):
    seen = present & near(vectors)
    inside = jnp.where(seen[:, None], vectors, 0)

    def distances(point: jax.Array) -> jax.Array:
      return jnp.sqrt(jnp.square(inside - point[None]).sum(1))

    point, least = jnp.zeros_like(vectors[0]), jnp.float32(smoothing)
    if start == EQUIVARIANT:
      point = coordinate_median(inside, seen)
      least = smoothing * coordinate_median(distances(point)[:, None], seen)[0]
      least = jnp.maximum(least, LEAST)
    for _ in range(steps):
      weights = jnp.where(seen, 1 / jnp.maximum(distances(point), least), 0)
      weights = weights / jnp.maximum(weights.sum(), LEAST)
      point = jnp.matmul(weights, inside, precision=jax.lax.Precision.HIGHEST)
    return point

  return Rule(combine=combine)
