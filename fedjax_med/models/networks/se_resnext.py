"""ResNet, ResNeXt and SE-ResNeXt (He et al. 2016; Xie et al. 2017; Hu et al. 2018)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models.networks.blocks import (
  KERNEL_INIT,
  SqueezeExcite,
  Style,
  around_max_pool,
  block_class,
  ceil_max_pool,
  classify,
  conv_norm,
  halvings,
  scaled,
)
from fedjax_med.models.networks.norms import normalise

STEM_POOLS = {"ceil": ceil_max_pool, "around": around_max_pool}


class Bottleneck(nn.Module):
  """1x1 to ``width``, grouped 3x3 with the stride, 1x1 to ``features``, gates if any, residual.

  Every norm scale starts at 1, as published: with the last one at 0 the inner layers would have no
  gradient in the first steps, and under differential privacy would receive noise only.
  """

  width: int
  features: int
  stride: int
  groups: int
  reduction: int
  project: bool
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # [B, H, W, C] -> [B, H', W', C']
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KERNEL_INIT)
    norm = functools.partial(normalise, norm=self.norm, train=train, dtype=self.dtype)
    strides = (self.stride, self.stride)
    y = conv(self.width, (1, 1), name="conv1")(x)
    y = nn.relu(norm(y, name="norm1"))
    y = conv(self.width, (3, 3), strides, padding=1, feature_group_count=self.groups, name="conv2")(
      y
    )
    y = nn.relu(norm(y, name="norm2"))
    y = norm(conv(self.features, (1, 1), name="conv3")(y), name="norm3")
    if self.reduction:
      y = SqueezeExcite(max(1, self.features // self.reduction), self.dtype, name="se")(y)
    if self.project:
      x = conv(self.features, (1, 1), strides, padding=0, name="downsample")(x)
      x = norm(x, name="downsample_norm")
    return nn.relu(x + y)


class SEResNeXt(nn.Module):
  """Residual network of grouped bottlenecks, with or without squeeze-and-excitation.

  Attributes:
    num_classes: number of logits.
    stage_blocks: bottlenecks of each stage; every stage but the first halves the resolution,
      unless the image is too small (``blocks.halvings``, of stem and pool as well).
    widths: channels of the grouped 3x3 convolutions, one number a stage.
    features: channels a stage hands on.
    groups: groups of every 3x3 convolution; of one with fewer channels, a group a channel.
    reduction: squeeze factor of the gates; 0 has none (ResNeXt, and ResNet where groups is 1).
    stem_features: channels of the stem, whose convolution has stride 2.
    stem_kernel: side of the stem's convolution, odd.
    stem_pool: whether a 3x3 max pool of stride 2 follows the stem.
    stem_pool_padding: padding of that pool, a name of ``STEM_POOLS``; pretrained weights fit the
      one that they were trained with.
    norm: group, batch or frozen_batch.
    dropout: rate before the head.
    dtype: dtype of activations; parameters are float32.
    remat: whether the backward pass computes each bottleneck again instead of keeping it.
  """

  num_classes: int
  stage_blocks: tuple[int, ...]
  widths: tuple[int, ...]
  features: tuple[int, ...]
  groups: int
  reduction: int
  stem_features: int
  stem_kernel: int
  stem_pool: bool
  norm: str = "group"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False
  stem_pool_padding: str = "ceil"

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes], float32 or wider."""
    strides = iter(halvings(images, self.stem_pool + len(self.stage_blocks)))
    x = conv_norm(
      images.astype(self.dtype),
      self.stem_features,
      self.stem_kernel,
      next(strides),
      style=Style(norm=self.norm, train=train, dtype=self.dtype),
      name="stem",
    )
    if self.stem_pool and next(strides) == 2:
      x = STEM_POOLS[self.stem_pool_padding](x)
    shapes = zip(self.stage_blocks, self.widths, self.features, strict=True)
    for stage, (blocks, width, features) in enumerate(shapes, start=1):
      block = functools.partial(
        block_class(Bottleneck, self.remat),
        width=width,
        features=features,
        groups=min(self.groups, width),
        reduction=self.reduction,
        norm=self.norm,
        dtype=self.dtype,
      )
      # Not nn.scan over equal blocks: at 64 pixels it took 1.3 times as long to run (parameters are
      # copied into every turn) and 1.7 times as long to compile, with 1.4 times the memory.
      stride = next(strides) if stage > 1 else 1
      for index in range(1, blocks + 1):
        first, name = index == 1, f"stage{stage}_block{index}"
        x = block(stride=stride if first else 1, project=first, name=name)(x, train)
    return classify(
      x.mean(axis=(1, 2)), self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype
    )


def _widths(published: tuple[int, ...], width: float, groups: int) -> tuple[int, ...]:
  """Channels of the grouped convolutions: whole groups of at least one channel, or fewer groups."""
  return tuple(
    scaled(channels, width, max(8, groups) if channels * width >= groups else 8)
    for channels in published
  )


def _fifty(num_classes: int, width: float, inner: int, groups: int, **kwargs: Any) -> SEResNeXt:
  """The 50 layers of He et al. (2016), table 1, with ``inner`` channels in the first 3x3 layers.

  The stride is in the 3x3 convolution (torchvision's V1.5, and Cadene's SE-ResNeXt).
  """
  return SEResNeXt(
    num_classes,
    stage_blocks=(3, 4, 6, 3),
    widths=_widths((inner, 2 * inner, 4 * inner, 8 * inner), width, groups),
    features=scaled((256, 512, 1024, 2048), width),
    groups=groups,
    stem_features=scaled(64, width),
    stem_kernel=7,
    stem_pool=True,
    **kwargs,
  )


def resnet50(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> SEResNeXt:
  """The published network, 25,557,032 parameters at 3 x 1000 (batch norm).

  ``kwargs`` are norm, dropout and dtype.
  """
  return _fifty(num_classes, width, 64, 1, reduction=0, stem_pool_padding="around", **kwargs)


def resnext50_32x4d(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> SEResNeXt:
  """The published network: 32 groups of width 4, 25,028,904 parameters at 3 x 1000 (batch norm).

  ``kwargs`` are norm, dropout and dtype; ``width`` leaves the number of groups as it is.
  """
  return _fifty(num_classes, width, 128, 32, reduction=0, stem_pool_padding="around", **kwargs)


def se_resnext50_32x4d(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> SEResNeXt:
  """The published network: 32 groups of width 4, 27,559,896 parameters at 3 x 1000 (batch norm).

  ``kwargs`` are norm, dropout and dtype; ``width`` leaves the number of groups as it is.
  """
  return _fifty(num_classes, width, 128, 32, reduction=16, **kwargs)


def se_resnext_tiny(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> SEResNeXt:
  """Three stages of one block and 8 groups for 32 to 64 pixels on a CPU, 75 thousand parameters.

  The stem's max pool is kept: without it a step takes 4.5 times as long.
  """
  return SEResNeXt(
    num_classes,
    stage_blocks=(1, 1, 1),
    widths=_widths((32, 64, 128), width, 8),
    features=scaled((32, 64, 128), width),
    groups=8,
    reduction=8,
    stem_features=scaled(16, width),
    stem_kernel=3,
    stem_pool=True,
    **kwargs,
  )


def se_resnext_micro(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> SEResNeXt:
  """Every kind of layer of the large network in 3,462 parameters, for tests at 8 pixels."""
  return SEResNeXt(
    num_classes,
    stage_blocks=(1, 1),
    widths=_widths((8, 16), width, 4),
    features=scaled((16, 32), width),
    groups=4,
    reduction=4,
    stem_features=scaled(8, width),
    stem_kernel=3,
    stem_pool=False,
    **kwargs,
  )
