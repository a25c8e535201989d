"""VGG (Simonyan and Zisserman 2015) with a normalisation after every convolution."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models import ops
from fedjax_med.models.networks.blocks import (
  KERNEL_INIT,
  Style,
  adaptive_mean_pool,
  conv_norm,
  halvings,
  scaled,
)


class VGG(nn.Module):
  """Stages of 3x3 convolutions, each followed by a 2x2 max pool, and three dense layers.

  Attributes:
    num_classes: number of logits.
    stages: channels of the convolutions of each stage.
    hidden: sizes of the dense layers before the head.
    cells: side of the grid of means that the first dense layer sees, whatever the image's size.
    norm: group, batch or frozen_batch.
    dropout: rate after each hidden dense layer.
    dtype: dtype of activations; parameters are float32.
  """

  num_classes: int
  stages: tuple[tuple[int, ...], ...]
  hidden: tuple[int, ...]
  cells: int = 7
  norm: str = "group"
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes], float32 or wider."""
    # A bias as published, though batch norm takes it out again.
    style = Style(norm=self.norm, train=train, dtype=self.dtype, use_bias=True)
    x = images.astype(self.dtype)
    strides = halvings(images, len(self.stages))
    for stage, (features, stride) in enumerate(zip(self.stages, strides, strict=True), start=1):
      for index, channels in enumerate(features, start=1):
        x = conv_norm(x, channels, 3, style=style, name=f"stage{stage}_conv{index}")
      if stride == 2:
        x = ops.max_pool(x, (2, 2), (2, 2))
    x = adaptive_mean_pool(x, self.cells).reshape(images.shape[0], -1)
    for index, size in enumerate(self.hidden, start=1):
      dense = nn.Dense(size, dtype=self.dtype, kernel_init=KERNEL_INIT, name=f"hidden{index}")
      x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(dense(x)))
    logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
    return logits.astype(ops.accumulator(self.dtype))


def vgg16(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> VGG:
  """Configuration D with norms: 138,365,992 parameters at 3 x 1000, as torchvision's vgg16_bn.

  Nine tenths are in the dense layers. ``kwargs`` are norm, dropout and dtype.
  """
  stages = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
  return VGG(num_classes, scaled(stages, width), scaled((4096, 4096), width), **kwargs)
