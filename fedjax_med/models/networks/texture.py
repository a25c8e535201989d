"""Texture of grey images as numbers: co-occurrence of grey levels, and local binary patterns.

Computed in JAX on the device, so that a network may take them beside its own features; they are
steps of the pixels' values and have no gradient. Each image is described by itself.
"""

import jax
import jax.numpy as jnp

# Neighbours at distance 1: right, down right, down, down left, as (row, column) steps; a matrix is
# symmetric, so the opposite ones are counted with them (Haralick et al. 1973, figure 2).
DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1))
PROPERTIES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation", "entropy")
NEIGHBOURS = 8


def quantise(images: jax.Array, levels: int) -> jax.Array:
  """Images [B, H, W, C] to the grey levels 0 .. levels − 1 of their channel mean, int32 [B, H, W].

  Levels are equal steps between the image's own darkest and brightest pixel; a blank one is 0.
  """
  grey = images.astype(jnp.float32).mean(axis=-1)
  low, high = (reduce(grey, axis=(1, 2), keepdims=True) for reduce in (jnp.min, jnp.max))
  share = (grey - low) / jnp.maximum(high - low, 1e-6)
  return jnp.clip(jnp.floor(share * levels), 0, levels - 1).astype(jnp.int32)


def cooccurrence(grey: jax.Array, levels: int) -> jax.Array:
  """Shares of neighbouring pairs of grey levels in each direction (Haralick et al. 1973).

  Args:
    grey: [B, H, W] int32 in 0 .. levels − 1.
    levels: L.

  Returns:
    [B, directions, L, L] float32, symmetric, each matrix summing to 1.
  """
  marks = jax.nn.one_hot(grey, levels, dtype=jnp.float32)
  batch, height, width = grey.shape
  matrices = []
  for down, right in DIRECTIONS:
    first = marks[:, : height - down, max(0, -right) : width - max(0, right)]
    second = marks[:, down:, max(0, right) : width + min(0, right)]
    first, second = (part.reshape(batch, -1, levels) for part in (first, second))
    pairs = jnp.einsum("bpi,bpj->bij", first, second)
    both = pairs + pairs.swapaxes(1, 2)
    matrices.append(both / jnp.maximum(both.sum(axis=(1, 2), keepdims=True), 1))
  return jnp.stack(matrices, axis=1)


def properties(matrices: jax.Array) -> jax.Array:
  """Statistics of a co-occurrence matrix by Haralick et al. (1973).

  Args:
    matrices: [..., L, L], each summing to 1.

  Returns:
    [..., properties] float32 in the order of ``PROPERTIES``. The correlation of a matrix without
    variance is 1, entropy is in nats.
  """
  levels = jnp.arange(matrices.shape[-1], dtype=jnp.float32)
  gap = levels[:, None] - levels[None, :]

  def total(weights):
    return jnp.einsum("...ij,ij->...", matrices, weights, precision="highest")

  rows, columns = matrices.sum(-1), matrices.sum(-2)

  def mean(shares, values):
    return jnp.einsum("...i,i->...", shares, values, precision="highest")

  row_mean, column_mean = mean(rows, levels), mean(columns, levels)
  row_variance = mean(rows, jnp.square(levels)) - jnp.square(row_mean)
  column_variance = mean(columns, jnp.square(levels)) - jnp.square(column_mean)
  covariance = total(jnp.outer(levels, levels)) - row_mean * column_mean
  spread = jnp.sqrt(jnp.maximum(row_variance * column_variance, 0))
  correlation = jnp.where(spread > 1e-9, covariance / jnp.maximum(spread, 1e-9), 1)
  logs = jnp.log(jnp.where(matrices > 0, matrices, 1))
  return jnp.stack(
    [
      total(jnp.square(gap)),
      total(jnp.abs(gap)),
      total(1 / (1 + jnp.square(gap))),
      jnp.sqrt(jnp.square(matrices).sum(axis=(-2, -1))),
      correlation,
      -(matrices * logs).sum(axis=(-2, -1)),
    ],
    axis=-1,
  )


def local_binary_patterns(grey: jax.Array) -> jax.Array:
  """Uniform local binary patterns of 8 neighbours at radius 1 (Ojala et al. 2002, equation 9).

  Args:
    grey: [B, H, W]; outside the image everything is 0.

  Returns:
    [B, H, W] int32: the number of neighbours that are at least as bright, 0 .. 8, where they are
    neighbours of each other too, else 9.
  """
  values = grey.astype(jnp.float32)
  padded = jnp.pad(values, ((0, 0), (1, 1), (1, 1)))
  height, width = values.shape[1:]

  def at(row: int, column: int) -> jax.Array:  # brighter than the centre by
    view = padded[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
    return view - values

  near = 0.5**0.5  # a diagonal neighbour lies between four pixels, the centre among them
  bits = []
  for row, column in ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)):
    if row and column:
      side = near * (1 - near) * (at(row, 0) + at(0, column))
      bits.append(side + near * near * at(row, column) >= 0)
    else:
      bits.append(at(row, column) >= 0)
  ring = jnp.stack(bits, axis=-1)
  changes = (ring != jnp.roll(ring, 1, axis=-1)).sum(-1, dtype=jnp.int32)
  return jnp.where(changes <= 2, ring.sum(-1, dtype=jnp.int32), NEIGHBOURS + 1)


def texture_features(images: jax.Array, levels: int = 16) -> jax.Array:
  """Co-occurrence properties over all directions and the histogram of local binary patterns.

  Args:
    images: [B, H, W, C], any scale.
    levels: grey levels of the co-occurrence matrices.

  Returns:
    [B, 2 · properties + 10] float32: mean and range of each property over the directions (Haralick
    et al. 1973), with differences of levels as shares of L − 1; then shares of pixels.
  """
  values = properties(cooccurrence(quantise(images, levels), levels))
  scale = jnp.asarray([(levels - 1.0) ** -2, 1 / (levels - 1.0), 1, 1, 1, 1], jnp.float32)
  values = values * scale[None, None, :]
  # Patterns compare pixels as they are: at 16 levels most neighbours would be equal.
  patterns = local_binary_patterns(images.astype(jnp.float32).mean(axis=-1))
  shares = jax.nn.one_hot(patterns, NEIGHBOURS + 2, dtype=jnp.float32).mean(axis=(1, 2))
  spread = values.max(axis=1) - values.min(axis=1)
  return jnp.concatenate([values.mean(axis=1), spread, shares], axis=-1)
