"""MobileNetV2 (Sandler et al. 2018) and EfficientNet-B0 (Tan and Le 2019): inverted residuals."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models.networks.blocks import (
  SqueezeExcite,
  Style,
  block_class,
  classify,
  conv_norm,
  halvings,
  scaled,
)
from fedjax_med.models.networks.texture import texture_features


class Stage(NamedTuple):
  """Equal blocks in a row.

  Attributes:
    expand: factor on the channels inside a block.
    kernel: side of the depthwise convolution, odd.
    features: channels handed on.
    blocks: number of blocks.
    stride: stride of the first block.
  """

  expand: int
  kernel: int
  features: int
  blocks: int
  stride: int


class InvertedResidual(nn.Module):
  """1x1 to more channels, depthwise, gates if any, 1x1 to ``features``; residual if it fits."""

  expand: int
  kernel: int
  features: int
  stride: int
  reduction: int
  act: Callable[[jax.Array], jax.Array]
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # [B, H, W, C] -> [B, H', W', C']
    style = Style(norm=self.norm, train=train, dtype=self.dtype, act=self.act)
    layer = functools.partial(conv_norm, style=style)
    channels = x.shape[-1]
    inner = self.expand * channels
    y = layer(x, inner, name="expand") if self.expand > 1 else x
    y = layer(y, inner, self.kernel, self.stride, groups=inner, name="depthwise")
    if self.reduction:
      squeezed = max(1, channels // self.reduction)  # of the block's input, not of y
      y = SqueezeExcite(squeezed, self.dtype, self.act, name="se")(y)
    y = layer(y, self.features, style=style._replace(act=None), name="project")
    return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
  """A strided 3x3 stem, stages of inverted residuals, and a last 1x1 convolution.

  Attributes:
    num_classes: number of logits.
    stages: stages of equal blocks.
    stem_features: channels of the stem.
    last_features: channels of the last convolution.
    act: nonlinearity.
    reduction: squeeze factor of the gates, relative to a block's input; 0 has none.
    texture: size of a dense layer on texture features, beside the network's own; 0 has none.
    norm: group, batch or frozen_batch.
    dropout: rate before the head.
    dtype: dtype of activations; parameters are float32.
    remat: whether the backward pass computes each block again instead of keeping it.
  """

  num_classes: int
  stages: tuple[Stage, ...]
  stem_features: int
  last_features: int
  act: Callable[[jax.Array], jax.Array]
  reduction: int = 0
  texture: int = 0
  norm: str = "group"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes], float32 or wider."""
    style = Style(norm=self.norm, train=train, dtype=self.dtype, act=self.act)
    layer = functools.partial(conv_norm, style=style)
    block = functools.partial(
      block_class(InvertedResidual, self.remat),
      reduction=self.reduction,
      act=self.act,
      norm=self.norm,
      dtype=self.dtype,
    )
    strides = iter(halvings(images, 1 + sum(stage.stride == 2 for stage in self.stages)))
    x = layer(images.astype(self.dtype), self.stem_features, 3, next(strides), name="stem")
    for number, stage in enumerate(self.stages, start=1):
      stride = next(strides) if stage.stride == 2 else 1
      for index in range(1, stage.blocks + 1):
        x = block(
          expand=stage.expand,
          kernel=stage.kernel,
          features=stage.features,
          stride=stride if index == 1 else 1,
          name=f"stage{number}_block{index}",
        )(x, train)
    x = layer(x, self.last_features, name="last")
    x = x.mean(axis=(1, 2))
    if self.texture:
      described = texture_features(images).astype(x.dtype)
      described = nn.Dense(self.texture, dtype=self.dtype, name="texture")(described)
      x = jnp.concatenate([x, nn.relu(described)], axis=-1)
    return classify(x, self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype)


# Sandler et al. (2018), table 2: expand, kernel, features, blocks, stride.
MOBILENET_V2 = (
  Stage(expand=1, kernel=3, features=16, blocks=1, stride=1),
  Stage(expand=6, kernel=3, features=24, blocks=2, stride=2),
  Stage(expand=6, kernel=3, features=32, blocks=3, stride=2),
  Stage(expand=6, kernel=3, features=64, blocks=4, stride=2),
  Stage(expand=6, kernel=3, features=96, blocks=3, stride=1),
  Stage(expand=6, kernel=3, features=160, blocks=3, stride=2),
  Stage(expand=6, kernel=3, features=320, blocks=1, stride=1),
)
# Tan and Le (2019), table 1.
EFFICIENTNET_B0 = (
  Stage(expand=1, kernel=3, features=16, blocks=1, stride=1),
  Stage(expand=6, kernel=3, features=24, blocks=2, stride=2),
  Stage(expand=6, kernel=5, features=40, blocks=2, stride=2),
  Stage(expand=6, kernel=3, features=80, blocks=3, stride=2),
  Stage(expand=6, kernel=5, features=112, blocks=3, stride=1),
  Stage(expand=6, kernel=5, features=192, blocks=4, stride=2),
  Stage(expand=6, kernel=3, features=320, blocks=1, stride=1),
)


def _mobile(num_classes: int, stages: tuple[Stage, ...], width: float, **kwargs: Any) -> MobileNet:
  wide = tuple(stage._replace(features=scaled(stage.features, width)) for stage in stages)
  return MobileNet(num_classes, wide, scaled(32, width), scaled(1280, width), **kwargs)


def mobilenet_v2(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> MobileNet:
  """The published network, 3,504,872 parameters at 3 x 1000 (batch norm).

  ``kwargs`` are norm, dropout and dtype.
  """
  return _mobile(num_classes, MOBILENET_V2, width, act=nn.relu6, **kwargs)


def efficientnet_b0(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> MobileNet:
  """The published network, 5,288,548 parameters at 3 x 1000 (batch norm), no stochastic depth.

  ``kwargs`` are norm, dropout and dtype.
  """
  return _mobile(num_classes, EFFICIENTNET_B0, width, act=nn.silu, reduction=4, **kwargs)


def efficientnet_b0_texture(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> MobileNet:
  """EfficientNet-B0 with texture features: co-occurrence properties and local binary patterns.

  ``kwargs`` are norm, dropout and dtype.
  """
  return efficientnet_b0(num_classes, width=width, texture=scaled(64, width), **kwargs)
