"""DenseNet with bottlenecks and compression (Huang et al. 2017)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models.networks.blocks import (
  KERNEL_INIT,
  Style,
  around_max_pool,
  block_class,
  classify,
  conv_norm,
  halvings,
  mean_pool,
  scaled,
)
from fedjax_med.models.networks.norms import normalise


def _norm_conv(
  x: jax.Array,  # [B, H, W, C]
  features: int,
  kernel: int,
  *,
  style: Style,
  name: str,
) -> jax.Array:  # [B, H, W, features]
  """Adds normalisation, relu and a convolution, in this order, to the module being called."""
  x = nn.relu(normalise(x, style.norm, train=style.train, dtype=style.dtype, name=f"{name}_norm"))
  conv = nn.Conv(
    features,
    (kernel, kernel),
    padding=kernel // 2,
    use_bias=False,
    dtype=style.dtype,
    kernel_init=KERNEL_INIT,
    name=name,
  )
  return conv(x)


class DenseLayer(nn.Module):
  """1x1 to 4 x ``growth`` and 3x3 to ``growth`` channels, put behind those of the input."""

  growth: int
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # [B, H, W, C] -> [.., C + growth]
    style = Style(norm=self.norm, train=train, dtype=self.dtype)
    layer = functools.partial(_norm_conv, style=style)
    y = layer(x, 4 * self.growth, 1, name="conv1")
    return jnp.concatenate([x, layer(y, self.growth, 3, name="conv2")], axis=-1)


class DenseNet(nn.Module):
  """Stages of dense layers; between them channels and resolution are halved.

  Attributes:
    num_classes: number of logits.
    stage_layers: dense layers of each stage.
    growth: channels that each of them adds.
    stem_features: channels of the stem's 7x7 convolution of stride 2, which a max pool follows.
    norm: group, batch or frozen_batch.
    dropout: rate before the head.
    dtype: dtype of activations; parameters are float32.
    remat: whether the backward pass computes each dense layer again (Pleiss et al. 2017).
  """

  num_classes: int
  stage_layers: tuple[int, ...]
  growth: int
  stem_features: int
  norm: str = "group"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes], float32 or wider."""
    style = Style(norm=self.norm, train=train, dtype=self.dtype)
    block = block_class(DenseLayer, self.remat)
    stem, pool, *transitions = halvings(images, 1 + len(self.stage_layers))
    x = conv_norm(images.astype(self.dtype), self.stem_features, 7, stem, style=style, name="stem")
    if pool == 2:
      x = around_max_pool(x)
    for stage, layers in enumerate(self.stage_layers, start=1):
      for index in range(1, layers + 1):
        name = f"stage{stage}_layer{index}"
        x = block(growth=self.growth, norm=self.norm, dtype=self.dtype, name=name)(x, train)
      if stage < len(self.stage_layers):
        x = _norm_conv(x, x.shape[-1] // 2, 1, style=style, name=f"transition{stage}")
        x = mean_pool(x) if transitions[stage - 1] == 2 else x
    x = nn.relu(normalise(x, self.norm, train=train, dtype=self.dtype, name="last_norm"))
    return classify(
      x.mean(axis=(1, 2)), self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype
    )


def densenet121(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> DenseNet:
  """The published network, 7,978,856 parameters at 3 x 1000 (batch norm).

  ``kwargs`` are norm, dropout and dtype.
  """
  stage_layers = (6, 12, 24, 16)
  return DenseNet(num_classes, stage_layers, scaled(32, width), scaled(64, width), **kwargs)
