"""The normalisation layer every network shares."""

import math
from typing import Any

import flax.linen as nn
import jax

from fedjax_med.core.errors import require_choice

NORMS = ("group", "batch", "frozen_batch")
EPSILON = 1e-5
LEAST_NUMBERS = 16  # in a group of channels of one image


def num_norm_groups(channels: int, pixels: int) -> int:
  """32 groups (Wu and He 2018), or the most that divide ``channels`` and leave each enough.

  Enough is two channels, and ``LEAST_NUMBERS`` in all their ``pixels``. Normalised by itself one
  number is 0 and a pair is +-1, whatever the input; of n numbers two directions carry no gradient.
  With pairs on maps of one pixel GoogLeNet, EfficientNet and MobileNetV2 hardly learnt.
  """
  least = max(2, -(-LEAST_NUMBERS // pixels))  # channels
  most = max(1, min(32, channels // least))
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
    groups = num_norm_groups(x.shape[-1], math.prod(x.shape[1:-1]))
    return nn.GroupNorm(num_groups=groups, epsilon=EPSILON, dtype=dtype, name=name)(x)
  stored = norm == "frozen_batch" or not train
  batch_norm = nn.BatchNorm(
    use_running_average=stored, momentum=0.9, epsilon=EPSILON, dtype=dtype, name=name
  )
  return batch_norm(x)
