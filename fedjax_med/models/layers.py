"""The normalisation layer every network shares."""

from typing import Any

import flax.linen as nn
import jax

from fedjax_med.core.errors import require_choice

NORMS = ("group", "batch", "frozen_batch")
EPSILON = 1e-5


def num_norm_groups(channels: int) -> int:
  """32 groups (Wu and He 2018), or the most that divide ``channels`` with two channels each.

  A group of one channel at one pixel normalises to 0 whatever the input, so pairs are the least.
  """
  most = max(1, min(32, channels // 2))
  return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def normalise(x: jax.Array, norm: str, *, train: bool, dtype: Any, name: str) -> jax.Array:
  """Adds a normalisation of [B, ..., C] to the module being called.

  group: each example by itself. batch: over the batch, running averages outside training.
  frozen_batch: stored statistics always, so that examples stay independent (converted weights);
  they are state, which training leaves as it is, while scale and bias are trained parameters.
  Raises UserError for any other name.
  """
  require_choice("model.norm", norm, NORMS)
  if norm == "group":
    groups = num_norm_groups(x.shape[-1])
    return nn.GroupNorm(num_groups=groups, epsilon=EPSILON, dtype=dtype, name=name)(x)
  stored = norm == "frozen_batch" or not train
  batch_norm = nn.BatchNorm(
    use_running_average=stored, momentum=0.9, epsilon=EPSILON, dtype=dtype, name=name
  )
  return batch_norm(x)
