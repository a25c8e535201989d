"""GoogLeNet, the first Inception network (Szegedy et al. 2015), with norms and one head."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models.networks.blocks import (
  Style,
  around_max_pool,
  block_class,
  ceil_max_pool,
  classify,
  conv_norm,
  halvings,
  scaled,
)

# Channels of an inception block: 1x1; 1x1 before 3x3, 3x3; the same before and in the second 3x3
# (5x5 in the paper, 3x3 in every port of the released weights); 1x1 after the pool.
Branches = tuple[int, int, int, int, int, int]

# Szegedy et al. (2015), table 1.
STEM = (64, 64, 192)
STAGES: tuple[tuple[Branches, ...], ...] = (
  ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
  (
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
  ),
  ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class Inception(nn.Module):
  """Four branches side by side, whose channels are put one after the other."""

  branches: Branches
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # [B, H, W, C] -> [B, H, W, C']
    style = Style(norm=self.norm, train=train, dtype=self.dtype)
    layer = functools.partial(conv_norm, style=style)
    point, reduce2, conv2, reduce3, conv3, pooled = self.branches
    outputs = [
      layer(x, point, name="branch1"),
      layer(layer(x, reduce2, name="branch2_reduce"), conv2, 3, name="branch2"),
      layer(layer(x, reduce3, name="branch3_reduce"), conv3, 3, name="branch3"),
      layer(around_max_pool(x, stride=1), pooled, name="branch4"),
    ]
    return jnp.concatenate(outputs, axis=-1)


class GoogLeNet(nn.Module):
  """A stem of three convolutions and stages of inception blocks, without auxiliary heads.

  Every max pool is 3x3, as in the paper (torchvision's last one is 2x2).

  Attributes:
    num_classes: number of logits.
    stem: channels of the stem's convolutions: 7x7 of stride 2, 1x1, 3x3.
    stages: the blocks of each stage; a max pool comes before every stage.
    norm: group, batch or frozen_batch.
    dropout: rate before the head.
    dtype: dtype of activations; parameters are float32.
    remat: whether the backward pass computes each block again instead of keeping it.
  """

  num_classes: int
  stem: tuple[int, int, int]
  stages: tuple[tuple[Branches, ...], ...]
  norm: str = "group"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes], float32 or wider."""
    style = Style(norm=self.norm, train=train, dtype=self.dtype)
    layer = functools.partial(conv_norm, style=style)
    block = block_class(Inception, self.remat)
    stride, *pools = halvings(images, 2 + len(self.stages))

    def pool(x, number):
      return ceil_max_pool(x) if pools[number] == 2 else x

    x = layer(images.astype(self.dtype), self.stem[0], 7, stride, name="conv1")
    x = layer(pool(x, 0), self.stem[1], name="conv2")
    x = layer(x, self.stem[2], 3, name="conv3")
    for stage, blocks in enumerate(self.stages, start=1):
      x = pool(x, stage)
      for index, branches in enumerate(blocks, start=1):
        name = f"stage{stage}_block{index}"
        x = block(branches=branches, norm=self.norm, dtype=self.dtype, name=name)(x, train)
    return classify(
      x.mean(axis=(1, 2)), self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype
    )


def googlenet(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> GoogLeNet:
  """The published network, 6,624,904 parameters at 3 x 1000 (batch norm).

  ``kwargs`` are norm, dropout and dtype.
  """
  return GoogLeNet(num_classes, scaled(STEM, width), scaled(STAGES, width), **kwargs)
