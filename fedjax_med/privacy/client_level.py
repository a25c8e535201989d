"""DP-FedAvg at the server: clipped updates, a noisy sum, a clip norm that may follow a quantile.

McMahan et al. 2018 (arXiv 1710.06963) with a fixed denominator; the clip norm by Andrew et al. 2021
(arXiv 1905.03871).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.keys import Stream, key_for
from fedjax_med.core.rounding import MAX_CLIP_NORM, MIN_CLIP_NORM
from fedjax_med.privacy.clipping import evaluated_once
from fedjax_med.privacy.distributed import Shares
from fedjax_med.privacy.noise import private_mean


class ClientLevel(NamedTuple):
  """Traced float32 scalars of client-level privacy.

  Attributes:
    noise_multiplier: noise on the sum of updates, over the clip norm;
      ``PoissonGaussian.sum_noise_multiplier``.
    expected_cohort: q·K, the fixed denominator.
    count_noise: standard deviation of the noise on the sum of (bit - 1/2), where a bit says whether
      an update was within the clip norm.
    quantile: share of the updates that the clip norm shall let pass unclipped.
    clip_learning_rate: geometric step of the clip norm; 0 keeps it as it is.
    shares: what hospitals draw their noise with; None where the server adds it.
  """

  noise_multiplier: jax.Array
  expected_cohort: jax.Array
  count_noise: jax.Array
  quantile: jax.Array
  clip_learning_rate: jax.Array
  shares: Shares | None = None


def clip_update(update: jax.Array, clip_norm: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Scales one client's update to l2 norm at most C; returns it and whether it was within (0 or 1).

  An update [P] whose norm is not finite becomes exactly 0.
  """
  update = evaluated_once(update)
  # By the largest value first: squares of float32 overflow from 1.8e19 and vanish under 1e-19.
  largest = jnp.abs(update).max()
  unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  norm = unit * jnp.sqrt(jnp.square(update / unit).sum())
  finite = jnp.isfinite(norm) & jnp.isfinite(largest)
  inside = finite & (norm <= clip_norm)
  scale = jnp.where(inside, 1, clip_norm / jnp.where(finite & ~inside, norm, 1))
  return jnp.where(finite, update * scale, 0), inside.astype(jnp.float32)


def noisy_mean(
  total: jax.Array,
  count: jax.Array,
  clip_norm: jax.Array,
  level: ClientLevel,
  key: jax.Array,
  round: Any,
) -> tuple[jax.Array, jax.Array]:
  """The released mean update of a round, and the clip norm of the next one, 1e-12 to 1e30.

  Args:
    total: [P] sum of the cohort's clipped updates; exactly 0 for an empty cohort, which is noised
      too.
    count: [] sum of (bit - 1/2) over the cohort.
    clip_norm: [] C of this round.
    level: traced settings.
    key: key of the run.
    round: [] int32; the noise is a function of (key, round), so a replayed round is no new release.
  """
  updates, bits = (key_for(key, Stream.CLIENT_NOISE, round, number) for number in (0, 1))
  mean = private_mean(total, updates, level.noise_multiplier, clip_norm, level.expected_cohort)
  within = private_mean(count, bits, level.count_noise, 1.0, level.expected_cohort) + 0.5
  step = level.clip_learning_rate * (within - level.quantile)
  return mean, jnp.clip(clip_norm * jnp.exp(-step), MIN_CLIP_NORM, MAX_CLIP_NORM)
