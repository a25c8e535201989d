"""Random mirror images and shifts of training images, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# What may be asked for: (mirrored, shifted).
KINDS = {
  "none": (False, False),
  "flip": (True, False),
  "shift": (False, True),
  "flip_shift": (True, True),
}
MAX_SHIFT = 1 / 8  # of the side


class Changes(NamedTuple):
  """Changes of every image of an array, in the array's leading shape.

  Attributes:
    flip: bool, mirrored left to right.
    shift: [..., 2] float32 in -1 .. 1, share of the largest shift down and to the right.
  """

  flip: jax.Array
  shift: jax.Array


def draw_changes(key: jax.Array, shape: tuple[int, ...], kind: str) -> Changes:
  """Independent changes for images of leading ``shape``; ``kind`` is a name of KINDS."""
  flips, shifts = KINDS[kind]
  keys = jax.random.split(key, 2)
  flip = jax.random.bernoulli(keys[0], 0.5, shape) if flips else jnp.zeros(shape, bool)
  shift = jnp.zeros((*shape, 2), jnp.float32)
  if shifts:
    shift = jax.random.uniform(keys[1], (*shape, 2), jnp.float32, -1, 1)
  return Changes(flip, shift)


def change(images: jax.Array, changes: Changes) -> jax.Array:
  """Images [B, H, W, C] mirrored, then shifted; uncovered pixels repeat the image's border."""

  def one(image, flip, shift):
    height, width = image.shape[:2]
    image = jnp.where(flip, image[:, ::-1], image)
    sides = jnp.asarray([height, width], jnp.float32)
    moves = jnp.round(shift * MAX_SHIFT * sides).astype(jnp.int32)
    rows = jnp.clip(jnp.arange(height) - moves[0], 0, height - 1)
    columns = jnp.clip(jnp.arange(width) - moves[1], 0, width - 1)
    return image[rows][:, columns]

  return jax.vmap(one)(images, *changes)
