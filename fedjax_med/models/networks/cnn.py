"""Plain small networks for tests, records and quick runs: a CNN, an MLP and logistic regression."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models import ops
from fedjax_med.models.networks.blocks import classify, scaled
from fedjax_med.models.networks.norms import normalise


class CNN(nn.Module):
  """3x3 convolutions, each with norm, relu and 2x2 max pool, then mean over space and a head.

  Attributes:
    num_classes: number of logits.
    features: channels of each convolution; images need at least 2**len(features) pixels a side.
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
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes], float32 or wider."""
    x = images.astype(self.dtype)
    for index, channels in enumerate(self.features, start=1):
      x = nn.Conv(channels, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{index}")(x)
      x = normalise(x, self.norm, train=train, dtype=self.dtype, name=f"norm{index}")
      x = ops.max_pool(nn.relu(x), (2, 2), (2, 2))
    return classify(
      x.mean(axis=(1, 2)), self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype
    )


class MLP(nn.Module):
  """Flattened inputs of any rank, hidden layers with relu, and a head; without hidden ones linear.

  Attributes:
    num_classes: number of logits.
    hidden: sizes of the hidden layers.
    dropout: rate before the head.
    dtype: dtype of activations; parameters are float32.
  """

  num_classes: int
  hidden: tuple[int, ...]
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
    """Inputs [B, ...] to logits [B, num_classes], float32 or wider."""
    x = inputs.astype(self.dtype).reshape(inputs.shape[0], -1)
    for index, size in enumerate(self.hidden, start=1):
      x = nn.relu(nn.Dense(size, dtype=self.dtype, name=f"hidden{index}")(x))
    return classify(x, self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype)


def cnn_small(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> CNN:
  """Two convolutions of 16 and 32 channels; ``kwargs`` are norm, dropout and dtype."""
  return CNN(num_classes, features=scaled((16, 32), width), **kwargs)


def mlp(
  num_classes: int, *, norm: str = "group", width: float = 1.0, hidden: int = 32, **kwargs: Any
) -> MLP:
  """One hidden layer; it has nothing to normalise, so ``norm`` changes nothing."""
  del norm
  size = hidden if width == 1 else scaled(hidden, width)
  return MLP(num_classes, hidden=(size,), **kwargs)


def linear(num_classes: int, *, norm: str = "group", **kwargs: Any) -> MLP:
  """Multinomial logistic regression; ``norm`` changes nothing."""
  del norm
  return MLP(num_classes, hidden=(), **kwargs)
