"""FedXNet as we read it: windowed attention beside separable convolutions, three loss terms.

The paper's text was not at hand. This is our reading of one sentence about it: Swin-style windowed
attention with depthwise-separable convolutions, and perceptual, contrastive and edge terms in the
loss. Sizes, places and weights of all of these are ours. Its fusion by performance is
``server.algorithm=performance``, for any network.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_med.models import ops
from fedjax_med.models.networks.blocks import (
  Style,
  block_class,
  classify,
  conv_norm,
  halvings,
  mean_pool,
  scaled,
)
from fedjax_med.models.networks.norms import EPSILON

WINDOW = 4  # positions a side: 7 in Swin, whose maps of 224 pixels it divides; ours are 2^k
HEAD_FEATURES = 16  # of a head; 32 in Swin, whose first stage is three times as wide
MLP_RATIO = 4  # as in Swin

# A tenth each: near the cross-entropy of two classes at first, and well below it in sum.
PENALTY_WEIGHT = 0.1
TEMPERATURE = 0.1  # Park et al. (2020) have 0.07 for 256 embedded features, eight times ours
MOST_PLACES = 256  # that are told apart in an image, as many as Park et al. (2020) draw
CHARBONNIER = 1e-3  # where the edge error turns from squared to absolute


def num_heads(features: int) -> int:
  """Heads of ``HEAD_FEATURES`` features, or the next fewer that divide them."""
  most = max(1, features // HEAD_FEATURES)
  return next(heads for heads in range(most, 0, -1) if features % heads == 0)


def relative_offsets() -> np.ndarray:  # [T * T, (2 WINDOW - 1)**2] float32
  """One-hot (row, column) offset from query to key of every pair in a window of T positions.

  A dense layer on it holds the bias table of Liu et al. (2021, equation 4) as its kernel.
  """
  places = np.stack(np.divmod(np.arange(WINDOW**2), WINDOW), axis=1)
  offsets = places[:, None] - places[None] + WINDOW - 1  # [T, T, 2], all at least 0
  numbers = offsets[:, :, 0] * (2 * WINDOW - 1) + offsets[:, :, 1]
  return np.eye((2 * WINDOW - 1) ** 2, dtype=np.float32)[numbers.reshape(-1)]


def _shift(side: int, shift: int) -> int:
  """The shift of windows; 0 for a map of one window, which has nothing to exchange (as in Swin)."""
  return shift if side > WINDOW else 0


def _regions(side: int, shift: int) -> np.ndarray:  # [side rounded up to windows]
  """Kind of each position of a padded and shifted axis: 0, 1 (came round the end), 2 (padding)."""
  positions = -(-side // WINDOW) * WINDOW
  moved = np.arange(positions) + _shift(side, shift)
  return np.where(moved % positions >= side, 2, moved // positions)


def attention_mask(height: int, width: int, shift: int) -> np.ndarray:  # [windows, T, T] bool
  """Pairs of a window that see each other: neighbours in the image, or padding both."""
  rows, columns = _regions(height, shift), _regions(width, shift)
  regions = (3 * rows[:, None] + columns[None]).reshape(
    len(rows) // WINDOW, WINDOW, len(columns) // WINDOW, WINDOW
  )
  regions = regions.transpose(0, 2, 1, 3).reshape(-1, WINDOW**2)
  return regions[:, :, None] == regions[:, None]


def window_attention(
  values: jax.Array,  # [B, H, W, 3 * C], queries, keys and values
  bias: jax.Array,  # [B, T * T, heads]
  shift: int,
) -> jax.Array:  # [B, H, W, C], dtype of values
  """Multi-head attention inside windows, which are shifted by ``shift`` positions up and left.

  Shifting is cyclic, with a mask between distant positions (Liu et al. 2021, figure 4). Sides
  that are no multiple of the window are padded, and nothing sees the padding.
  """
  batch, height, width, channels = values.shape
  heads, dtype = bias.shape[2], ops.accumulator(values.dtype)
  sides = [-(-side // WINDOW) * WINDOW for side in (height, width)]
  (rows, columns), features = [side // WINDOW for side in sides], channels // (3 * heads)
  shifts = _shift(height, shift), _shift(width, shift)
  edges = ((0, 0, 0), (0, sides[0] - height, 0), (0, sides[1] - width, 0), (0, 0, 0))
  values = lax.pad(values, jnp.zeros((), values.dtype), edges)
  values = jnp.roll(values, (-shifts[0], -shifts[1]), (1, 2))

  # The batch stays an axis of its own, so that coverage sees the examples; windows and heads are
  # one axis, so that products have few (see ``ops``).
  values = values.reshape(batch, rows, WINDOW, columns, WINDOW, 3 * heads, features)
  values = values.transpose(0, 1, 3, 5, 2, 4, 6)
  values = values.reshape(batch, rows * columns, 3, heads, WINDOW**2, features)
  queries, keys, values = (
    values[:, :, part].reshape(batch, -1, WINDOW**2, features) for part in range(3)
  )
  scores = jnp.einsum("bgtd,bgsd->bgts", queries, keys, preferred_element_type=dtype)
  scores = (scores * features**-0.5).reshape(batch, rows * columns, heads, -1)
  scores = scores + bias.astype(dtype).swapaxes(1, 2)[:, None]
  mask = attention_mask(height, width, shift)
  if not mask.all():
    # Everything sees itself at least, so that no row is of these alone.
    far = np.where(mask, 0, -1e9).reshape(1, rows * columns, 1, -1)
    scores = scores + jnp.asarray(far, dtype)
  weights = jax.nn.softmax(scores.reshape(batch, -1, WINDOW**2, WINDOW**2))
  seen = jnp.einsum("bgts,bgsd->bgtd", weights.astype(values.dtype), values)

  seen = seen.reshape(batch, rows, columns, heads, WINDOW, WINDOW, features)
  seen = seen.transpose(0, 1, 4, 2, 5, 3, 6).reshape(batch, *sides, -1)
  return jnp.roll(seen, shifts, (1, 2))[:, :height, :width]


class SwinBlock(nn.Module):
  """Attention inside windows, then a perceptron at each position, both residual (Liu et al. 2021).

  Attributes:
    shift: positions that the windows are shifted by.
    dtype: dtype of activations.
  """

  shift: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [B, H, W, C], and so is the result
    batch, _, _, channels = x.shape
    norm = functools.partial(nn.LayerNorm, epsilon=EPSILON, dtype=self.dtype)
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    y = dense(3 * channels, name="qkv")(norm(name="norm1")(x))
    # A table of weights would be a parameter outside all layers; a row of input for each example
    # is what clipping can follow.
    offsets = jnp.asarray(relative_offsets(), x.dtype)
    offsets = jnp.broadcast_to(offsets[None], (batch, *offsets.shape))
    bias = dense(
      num_heads(channels), use_bias=False, kernel_init=nn.initializers.normal(0.02), name="bias"
    )(offsets)
    x = x + dense(channels, name="project")(window_attention(y, bias, self.shift))
    y = dense(MLP_RATIO * channels, name="expand")(norm(name="norm2")(x))
    return x + dense(channels, name="contract")(nn.gelu(y))


class Stage(nn.Module):
  """Patches merged, a depthwise-separable convolution, and two Swin blocks, the second shifted.

  Attributes:
    features: channels handed on.
    stride: 1 or 2, of merging; 0 merges nothing, for inputs that have ``features`` channels.
    norm: group, batch or frozen_batch, of the convolutions.
    dtype: dtype of activations.
  """

  features: int
  stride: int
  norm: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:  # [B, H, W, C] -> [B, H', W', C']
    if self.stride:
      below, right = (1 if self.stride == 1 else side % 2 for side in x.shape[1:3])
      x = ops.patches(x, (2, 2), (self.stride, self.stride), ((0, below), (0, right)))
      x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="merge_norm")(x)
      x = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="merge")(x)
    style = Style(norm=self.norm, train=train, dtype=self.dtype)
    layer = functools.partial(conv_norm, style=style)
    y = layer(x, self.features, 3, groups=self.features, name="depthwise")
    x = x + layer(y, self.features, style=style._replace(act=None), name="pointwise")
    x = SwinBlock(0, self.dtype, name="swin1")(x)
    return SwinBlock(WINDOW // 2, self.dtype, name="swin2")(x)


def _edges_repeated(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
  """``x`` with its first and last slice along an axis again; ``jnp.pad`` looks at the batch too."""
  size = x.shape[axis]
  first, last = (lax.slice_in_dim(x, i, i + 1, axis=axis) for i in (0, size - 1))
  return jnp.concatenate([first] * before + [x] + [last] * after, axis=axis)


def halved(x: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]
  """Means of 2x2 positions; a last odd row or column counts twice."""
  for axis in (1, 2):
    x = _edges_repeated(x, axis, 0, x.shape[axis] % 2)
  return mean_pool(x)


def sobel(images: jax.Array) -> jax.Array:  # [B, H, W, C] -> [B, H, W, 1]
  """Magnitude of the gradient of the channels' mean by Sobel's masks, in values a pixel.

  Pixels at the border are repeated beyond it.
  """
  grey = images.mean(axis=3, keepdims=True)
  height, width = grey.shape[1:3]
  padded = _edges_repeated(_edges_repeated(grey, 1, 1, 1), 2, 1, 1)

  def smooth(axis: int, size: int) -> jax.Array:
    first, second, third = (lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))
    return (first + 2 * second + third) / 4

  down, right = smooth(2, width), smooth(1, height)
  down = (down[:, 2:] - down[:, :-2]) / 2
  right = (right[:, :, 2:] - right[:, :, :-2]) / 2
  return jnp.sqrt(jnp.square(down) + jnp.square(right))


def edge_penalty(predicted: jax.Array, edges: jax.Array) -> jax.Array:  # [B, H, W, 1] -> [B]
  """Charbonnier's error of predicted edges, mean over positions."""
  return jnp.sqrt(jnp.square(predicted - edges) + CHARBONNIER**2).mean(axis=(1, 2, 3))


def perceptual_penalty(predicted: jax.Array, features: jax.Array) -> jax.Array:
  """Feature reconstruction (Johnson et al. 2016, equation 2): [B, H, W, C] twice -> [B].

  Mean squared error of features that are standardised at each position; they get no gradient.
  """
  features = lax.stop_gradient(features)
  centred = features - features.mean(axis=3, keepdims=True)
  spread = lax.rsqrt(jnp.square(centred).mean(axis=3, keepdims=True) + EPSILON)
  return jnp.square(predicted - centred * spread).mean(axis=(1, 2, 3))


def contrastive_penalty(deep: jax.Array, shallow: jax.Array) -> jax.Array:
  """InfoNCE between the places of one image (Hjelm et al. 2019; Park et al. 2020).

  Each place's deep embedding is to find the shallow one of the same place among those of all N
  places of its image. In shares of log N, the cost of a blind guess; 0 where N is 1.

  Args:
    deep: [B, H, W, E].
    shallow: [B, H, W, E].

  Returns:
    [B].
  """
  batch, height, width, size = deep.shape
  places = height * width
  if places == 1:  # nothing to mistake it for; a difference of equal scores may round to another
    return jnp.zeros(batch, deep.dtype)
  deep, shallow = (x.reshape(batch, places, size) for x in (deep, shallow))
  # Under the root: a norm has no gradient at 0.
  deep, shallow = (
    x * lax.rsqrt(jnp.square(x).sum(axis=2, keepdims=True) + 1e-6) for x in (deep, shallow)
  )
  scores = jnp.einsum("bnd,bmd->bnm", deep, shallow) / TEMPERATURE
  same = jnp.where(jnp.eye(places, dtype=bool)[None], scores, 0).sum(axis=2)
  missed = jax.nn.logsumexp(scores, axis=2) - same
  return missed.mean(axis=1) / math.log(places)


class FedXNet(nn.Module):
  """A strided 3x3 stem and stages; in training also the three penalties, as last columns.

  Attributes:
    num_classes: number of logits.
    features: channels of each stage.
    embedded: size of an embedding in the contrastive penalty.
    edge_weight: factor on the edge penalty.
    perceptual_weight: factor on the perceptual penalty.
    contrastive_weight: factor on the contrastive penalty.
    norm: group, batch or frozen_batch, of the convolutions; attention has layer norm.
    dropout: rate before the head.
    dtype: dtype of activations; parameters are float32.
    remat: whether the backward pass computes each stage again instead of keeping it.
  """

  num_classes: int
  features: tuple[int, ...]
  embedded: int
  edge_weight: float = PENALTY_WEIGHT
  perceptual_weight: float = PENALTY_WEIGHT
  contrastive_weight: float = PENALTY_WEIGHT
  norm: str = "group"
  dropout: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False
  penalties: ClassVar[int] = 3

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes], float32 or wider.

    In training edge, perceptual and contrastive penalty follow: [B, num_classes + 3].
    """
    style = Style(norm=self.norm, train=train, dtype=self.dtype)
    stage = functools.partial(block_class(Stage, self.remat), norm=self.norm, dtype=self.dtype)
    first, *strides = halvings(images, len(self.features))
    x = images.astype(self.dtype)
    x = conv_norm(x, self.features[0], 3, first, style=style, name="stem")
    x = shallow = stage(self.features[0], 0, name="stage1")(x, train)
    for number, stride in enumerate(strides, start=2):
      x = stage(self.features[number - 1], stride, name=f"stage{number}")(x, train)
    deep = x
    x = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(x).mean(axis=(1, 2))
    logits = classify(x, self.num_classes, dropout=self.dropout, train=train, dtype=self.dtype)
    if not train and not self.is_initializing():
      return logits
    penalties = self.penalise(images, shallow, deep, (first, *strides))
    return jnp.concatenate([logits, penalties], axis=1) if train else logits

  def penalise(
    self, images: jax.Array, shallow: jax.Array, deep: jax.Array, strides: tuple[int, ...]
  ) -> jax.Array:  # [B, 3], dtype of logits
    """Edge, perceptual and contrastive penalty of each image by itself, times their weights."""
    wide = ops.accumulator(self.dtype)
    head = functools.partial(nn.Dense, dtype=self.dtype)
    edges = sobel(images.astype(wide))
    edges = lax.stop_gradient(halved(edges) if strides[0] == 2 else edges)
    drawn = head(1, name="edge")(shallow).astype(wide)

    for stride in strides[1:]:
      shallow = halved(shallow) if stride == 2 else shallow
    predicted = head(shallow.shape[3], name="perceptual")(deep).astype(wide)
    perceptual = perceptual_penalty(predicted, shallow.astype(wide))

    while deep.shape[1] * deep.shape[2] > MOST_PLACES:
      deep, shallow = halved(deep), halved(shallow)
    embeddings = (
      head(self.embedded, name=f"contrastive_{name}")(x).astype(wide)
      for name, x in (("deep", deep), ("shallow", shallow))
    )
    columns = (
      self.edge_weight * edge_penalty(drawn, edges),
      self.perceptual_weight * perceptual,
      self.contrastive_weight * contrastive_penalty(*embeddings),
    )
    return jnp.stack(columns, axis=1)


def fedxnet(num_classes: int, *, width: float = 1.0, **kwargs: Any) -> FedXNet:
  """Three stages of 32, 64 and 128 channels; ``kwargs`` are norm, dropout and dtype."""
  return FedXNet(num_classes, scaled((32, 64, 128), width), scaled(32, width), **kwargs)
