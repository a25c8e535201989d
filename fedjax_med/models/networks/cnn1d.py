"""A small convolutional network for series, with kernels along time."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models import ops
from fedjax_med.models.networks.blocks import KERNEL_INIT, classify, scaled
from fedjax_med.models.networks.norms import normalise

KERNELS = (9, 7, 5)  # samples


class CNN1D(nn.Module):
  """Convolutions along time with norm, relu and a halving each, then mean and maximum, and a head.

  A series is an image of height T and width 1, so that kernels are [k, 1].

  Attributes:
    num_classes: number of logits.
    features: channels of each convolution, as many as ``KERNELS``.
    norm: group, batch or frozen_batch.
    dropout: rate before the head.
    dtype: dtype of activations; parameters are float32.
  """

  num_classes: int
  features: tuple[int, ...]
  norm: str = "group"
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, series: jax.Array, train: bool = False) -> jax.Array:
    """Series [B, T, 1, C] to logits [B, num_classes], float32 or wider."""
    x = series.astype(self.dtype)
    for index, (channels, samples) in enumerate(zip(self.features, KERNELS, strict=True), start=1):
      conv = nn.Conv(
        channels,
        (samples, 1),
        use_bias=False,
        dtype=self.dtype,
        kernel_init=KERNEL_INIT,
        name=f"conv{index}",
      )
      x = normalise(conv(x), self.norm, train=train, dtype=self.dtype, name=f"norm{index}")
      x = nn.relu(x)
      if x.shape[1] > 1:
        x = ops.max_pool(x, (2, 1), (2, 1))
    pooled = jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)
    return classify(pooled, self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype)


def cnn1d(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> CNN1D:
  """Convolutions of 32, 48 and 64 channels; ``kwargs`` are norm, dropout and dtype."""
  return CNN1D(num_classes, features=scaled((32, 48, 64), width), **kwargs)
