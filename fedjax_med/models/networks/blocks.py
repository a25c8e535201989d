"""Parts of several networks: sizes by width, halvings, convolution blocks, gates, pools, head."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.models import ops
from fedjax_med.models.networks.norms import normalise

# Variance over the fan-in: the fan-out of a grouped kernel would count all groups (He et al. 2015).
KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


def scaled(channels: Any, width: float, multiple: int = 8) -> Any:
  """Every number of ``channels`` (one, or nested tuples) times ``width``.

  Rounded to the nearest multiple of ``multiple`` and at least that, so that norm groups and grouped
  convolutions divide it (Sandler et al. 2018 round so).
  """
  return jax.tree.map(lambda c: multiple * max(1, int(c * width / multiple + 0.5)), channels)


def halvings(images: jax.Array, published: int) -> tuple[int, ...]:
  """Strides, 1 or 2, of the ``published`` halvings of a network, for images [B, H, W, C].

  Published as they are for images of at least 2**published pixels (five halvings: 32). Of smaller
  images a network leaves out its first ones, as many as it takes for one pixel to be left at the
  end. Parameters do not depend on it.
  """
  kept = min(published, min(images.shape[1:3]).bit_length() - 1)
  return (1,) * (published - kept) + (2,) * kept


class Style(NamedTuple):
  """Settings that the convolution blocks of a network have in common.

  Attributes:
    norm: group, batch or frozen_batch.
    train: whether the network is called in training.
    dtype: dtype of activations.
    act: nonlinearity after the norm; None has none.
    use_bias: whether convolutions have a bias.
  """

  norm: str
  train: bool
  dtype: Any
  act: Callable[[jax.Array], jax.Array] | None = nn.relu
  use_bias: bool = False


def conv_norm(
  x: jax.Array,  # [B, H, W, C]
  features: int,
  kernel: int = 1,
  stride: int = 1,
  *,
  groups: int = 1,
  style: Style,
  name: str,
) -> jax.Array:  # [B, ceil(H / stride), ceil(W / stride), features]
  """Adds a convolution, its norm and nonlinearity to the module being called; odd kernels."""
  conv = nn.Conv(
    features,
    (kernel, kernel),
    (stride, stride),
    padding=kernel // 2,
    feature_group_count=groups,
    use_bias=style.use_bias,
    dtype=style.dtype,
    kernel_init=KERNEL_INIT,
    name=name,
  )
  x = normalise(conv(x), style.norm, train=style.train, dtype=style.dtype, name=f"{name}_norm")
  return style.act(x) if style.act else x


class SqueezeExcite(nn.Module):
  """Scales the channels of [B, H, W, C] by gates in (0, 1) computed from their spatial means.

  Attributes:
    squeezed: size of the layer between means and gates (Hu et al. 2018).
    dtype: dtype of activations.
    act: nonlinearity of that layer.
  """

  squeezed: int
  dtype: Any
  act: Callable[[jax.Array], jax.Array] = nn.relu

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gates = nn.Dense(self.squeezed, dtype=self.dtype, name="squeeze")(x.mean(axis=(1, 2)))
    gates = nn.Dense(x.shape[-1], dtype=self.dtype, name="excite")(self.act(gates))
    return x * nn.sigmoid(gates)[:, None, None, :]


def block_class(block: type[nn.Module], remat: bool) -> Callable[..., nn.Module]:
  """``block``, called with (x, train); with ``remat`` computed again in the backward pass."""
  return nn.remat(block, static_argnums=(2,)) if remat else block  # 2: train


def classify(
  x: jax.Array,  # [B, C]
  num_classes: int,
  *,
  dropout: float,
  train: bool,
  dtype: Any,
) -> jax.Array:  # [B, num_classes], float32 or wider
  """Adds dropout and the dense head to the module being called."""
  x = nn.Dropout(dropout, deterministic=not train)(x)
  return nn.Dense(num_classes, dtype=dtype, name="head")(x).astype(ops.accumulator(dtype))


def ceil_max_pool(x: jax.Array) -> jax.Array:
  """3x3 max pool of stride 2 that pads only below and right, as the published weights expect.

  Caffe and its ports round the output size up (``ceil_mode``) in place of torchvision's one pixel
  all around; the sizes agree at even inputs, the windows do not.
  """
  bottom, right = ((n - 3) % 2 for n in x.shape[1:3])
  return ops.max_pool(x, (3, 3), (2, 2), ((0, bottom), (0, right)))


def around_max_pool(x: jax.Array, stride: int = 2) -> jax.Array:
  """3x3 max pool with one pixel all around, as in torchvision and timm."""
  return ops.max_pool(x, (3, 3), (stride, stride), ((1, 1), (1, 1)))


def mean_pool(x: jax.Array) -> jax.Array:
  """2x2 mean pool of stride 2; a last odd row or column is left out."""
  views = [view for _, _, view in ops.shifted_views(x, (2, 2), (2, 2))]
  return sum(views[1:], views[0]) / 4


def adaptive_mean_pool(x: jax.Array, size: int) -> jax.Array:  # [B, H, W, C] -> [B, size, size, C]
  """Means over ``size`` x ``size`` cells that cover the image, whatever its size.

  Cell i of n pixels goes from floor(i n / size) to ceil((i + 1) n / size), so that cells overlap
  where they do not divide the image and repeat pixels where there are fewer (as in PyTorch).
  """
  batch, height, width, channels = x.shape
  if (height, width) == (size, size):
    return x
  cells = np.kron(_cells(height, size), _cells(width, size))  # [size**2, H * W]
  # One product of three axes: see ``ops`` on products of many.
  means = jnp.einsum(
    "ps,bsc->bpc",
    jnp.asarray(cells, x.dtype),
    x.reshape(batch, -1, channels),
    preferred_element_type=ops.accumulator(x.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  return means.astype(x.dtype).reshape(batch, size, size, channels)


def _cells(pixels: int, size: int) -> np.ndarray:  # [size, pixels]
  """Weights of every pixel in the mean of every cell."""
  weights = np.zeros((size, pixels))
  for i in range(size):
    start, end = i * pixels // size, -(-(i + 1) * pixels // size)
    weights[i, start:end] = 1 / (end - start)
  return weights
