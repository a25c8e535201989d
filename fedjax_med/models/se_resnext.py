"""SE-ResNeXt (Hu et al. 2018; Xie et al. 2017) and two small siblings of the same architecture."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models import ops
from fedjax_med.models.layers import normalise

# Variance over the fan-in: the fan-out of a grouped kernel would count all groups (He et al. 2015).
_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class SqueezeExcite(nn.Module):
  """Scales the channels of [B, H, W, C] by gates in (0, 1) computed from their spatial means."""

  reduction: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    gates = x.mean(axis=(1, 2))
    gates = nn.Dense(max(1, channels // self.reduction), dtype=self.dtype, name="squeeze")(gates)
    gates = nn.Dense(channels, dtype=self.dtype, name="excite")(nn.relu(gates))
    return x * nn.sigmoid(gates)[:, None, None, :]


class Bottleneck(nn.Module):
  """1x1 to ``width``, grouped 3x3 with the stride, 1x1 to ``features``, squeeze-excite, residual.

  Every norm scale starts at 1, as published: with the last one at 0 the inner layers would have no
  gradient in the first steps, and under differential privacy would receive noise only.
  """

  width: int
  features: int
  stride: int
  groups: int
  reduction: int
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # [B, H, W, C] -> [B, H', W', C']
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=_KERNEL_INIT)
    norm = functools.partial(normalise, norm=self.norm, train=train, dtype=self.dtype)
    strides = (self.stride, self.stride)
    y = conv(self.width, (1, 1), name="conv1")(x)
    y = nn.relu(norm(y, name="norm1"))
    y = conv(self.width, (3, 3), strides, padding=1, feature_group_count=self.groups, name="conv2")(
      y
    )
    y = nn.relu(norm(y, name="norm2"))
    y = norm(conv(self.features, (1, 1), name="conv3")(y), name="norm3")
    y = SqueezeExcite(self.reduction, self.dtype, name="se")(y)
    if self.stride != 1 or x.shape[-1] != self.features:
      x = conv(self.features, (1, 1), strides, padding=0, name="downsample")(x)
      x = norm(x, name="downsample_norm")
    return nn.relu(x + y)


class SEResNeXt(nn.Module):
  """Residual network of grouped bottlenecks with squeeze-and-excitation.

  Attributes:
    num_classes: logits.
    stage_blocks: bottlenecks of each stage; every stage but the first halves the resolution.
    widths: channels of the grouped 3x3 convolutions, one number a stage.
    features: channels a stage hands on.
    groups: groups of every 3x3 convolution.
    reduction: squeeze factor of the gates.
    stem_features: channels of the stem, whose convolution has stride 2.
    stem_kernel: side of the stem's convolution, odd.
    stem_pool: whether a 3x3 max pool of stride 2 follows the stem.
    stem_pool_padding: of that pool, a name of ``STEM_POOLS``; weights fit the one they met.
    norm: group, batch or frozen_batch.
    dropout: rate before the head.
    dtype: of activations; parameters are float32.
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
    x = nn.Conv(
      self.stem_features,
      (self.stem_kernel, self.stem_kernel),
      (2, 2),
      padding=self.stem_kernel // 2,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_KERNEL_INIT,
      name="stem",
    )(images.astype(self.dtype))
    x = normalise(x, self.norm, train=train, dtype=self.dtype, name="stem_norm")
    x = nn.relu(x)
    if self.stem_pool:
      x = STEM_POOLS[self.stem_pool_padding](x)
    shapes = zip(self.stage_blocks, self.widths, self.features, strict=True)
    for stage, (blocks, width, features) in enumerate(shapes, start=1):
      block = functools.partial(
        nn.remat(Bottleneck, static_argnums=(2,)) if self.remat else Bottleneck,  # 2: train
        width=width,
        features=features,
        groups=self.groups,
        reduction=self.reduction,
        norm=self.norm,
        dtype=self.dtype,
      )
      # Not nn.scan over equal blocks: at 64 pixels it took 1.3 times as long to run (parameters are
      # copied into every turn) and 1.7 times as long to compile, with 1.4 times the memory.
      for index in range(1, blocks + 1):
        stride = 2 if index == 1 and stage > 1 else 1
        x = block(stride=stride, name=f"stage{stage}_block{index}")(x, train)
    x = x.mean(axis=(1, 2))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)
    return logits.astype(ops.accumulator(self.dtype))


def ceil_max_pool(x: jax.Array) -> jax.Array:
  """3x3 max pool of stride 2 that pads only below and right, as the published weights expect.

  The Caffe original and Cadene's port round the output size up (``ceil_mode``) in place of
  torchvision's one pixel all around; the sizes agree at even inputs, the windows do not.
  """
  bottom, right = ((n - 3) % 2 for n in x.shape[1:3])
  return ops.max_pool(x, (3, 3), (2, 2), ((0, bottom), (0, right)))


def around_max_pool(x: jax.Array) -> jax.Array:
  """3x3 max pool of stride 2 with one pixel all around, as in torchvision and timm."""
  return ops.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


STEM_POOLS = {"ceil": ceil_max_pool, "around": around_max_pool}


def se_resnext50_32x4d(num_classes: int, **kwargs: Any) -> SEResNeXt:
  """The published network: 32 groups of width 4, 27,559,896 parameters at 3 x 1000 (batch norm).

  Meant for images of 32 pixels or more; ``kwargs`` are norm, dropout and dtype.
  """
  return SEResNeXt(
    num_classes,
    stage_blocks=(3, 4, 6, 3),
    widths=(128, 256, 512, 1024),
    features=(256, 512, 1024, 2048),
    groups=32,
    reduction=16,
    stem_features=64,
    stem_kernel=7,
    stem_pool=True,
    **kwargs,
  )


def se_resnext_tiny(num_classes: int, **kwargs: Any) -> SEResNeXt:
  """Three stages of one block and 8 groups for 32 to 64 pixels on a CPU, 75 thousand parameters.

  The stem's max pool is kept: without it a step takes 4.5 times as long.
  """
  return SEResNeXt(
    num_classes,
    stage_blocks=(1, 1, 1),
    widths=(32, 64, 128),
    features=(32, 64, 128),
    groups=8,
    reduction=8,
    stem_features=16,
    stem_kernel=3,
    stem_pool=True,
    **kwargs,
  )


def se_resnext_micro(num_classes: int, **kwargs: Any) -> SEResNeXt:
  """Every kind of layer of the large network in 3,462 parameters, for tests at 8 pixels."""
  return SEResNeXt(
    num_classes,
    stage_blocks=(1, 1),
    widths=(8, 16),
    features=(16, 32),
    groups=4,
    reduction=4,
    stem_features=8,
    stem_kernel=3,
    stem_pool=False,
    **kwargs,
  )
