"""A small class-conditional GAN for images of any size: a generator and a discriminator.

After DCGAN (Radford et al. 2016), conditional on the class (Mirza and Osindero 2014), and without
batch normalisation: a hospital's batch may hold one class only, and no image may depend on others.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.models import ops
from fedjax_med.models.model import Model, from_flax
from fedjax_med.models.networks.norms import normalise

LATENT = 32  # random numbers that an image is made of
BASE = 7  # pixels a side of the smallest maps, at most
# Channels of the largest maps, twice as many a level below, and the most.
GENERATOR_WIDTH, DISCRIMINATOR_WIDTH, MOST = 8, 16, 128
SLOPE = 0.2  # of leaky relu


class Gan(NamedTuple):
  """Two networks as pure functions; neither has a state.

  Attributes:
    generator: inputs [B, LATENT + classes], standard normals beside the one-hot class, to images
      [B, H, W, C] in -1 .. 1.
    discriminator: images [B, H, W, C] in -1 .. 1 to scores [B, classes]: how real each of them
      looks as one of that class.
  """

  generator: Model
  discriminator: Model


def levels(height: int, width: int) -> int:
  """Number of halvings of a map until no side is over ``BASE`` pixels."""
  number = 0
  while max(height, width) > BASE << number:
    number += 1
  return number


class Generator(nn.Module):
  """A dense layer, then nearest-neighbour doubling and 3x3 convolutions; the middle is cut out.

  Doubling before a convolution leaves no checkerboard (Odena et al. 2016).

  Attributes:
    height: rows of an image, at least 1.
    width: columns of an image, at least 1.
    channels: of an image.
  """

  height: int
  width: int
  channels: int = 1

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Normals and one-hot class [B, LATENT + classes] to images [B, height, width, channels]."""
    number = levels(self.height, self.width)
    rows, columns = (-(-side // 2**number) for side in (self.height, self.width))
    channels = min(MOST, GENERATOR_WIDTH << number)
    x = nn.Dense(rows * columns * channels, name="dense")(inputs)
    x = x.reshape(-1, rows, columns, channels)
    for level in reversed(range(number)):
      x = _active(x, f"norm{level + 1}")
      x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
      channels = min(MOST, GENERATOR_WIDTH << level)
      x = nn.Conv(channels, (3, 3), use_bias=False, name=f"conv{level}")(x)
    x = _active(x, "norm0")
    top, left = (x.shape[1] - self.height) // 2, (x.shape[2] - self.width) // 2
    x = x[:, top : top + self.height, left : left + self.width]
    return jnp.tanh(nn.Conv(self.channels, (3, 3), name="image")(x))


def _active(x: jax.Array, name: str) -> jax.Array:
  return nn.leaky_relu(normalise(x, "group", train=True, dtype=None, name=name), SLOPE)


class Discriminator(nn.Module):
  """Strided 3x3 convolutions, and a head with a score for each class.

  A column of the head is the projection of Miyato and Koyama (2018) for a class.

  Attributes:
    num_classes: scores.
  """

  num_classes: int

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Images [B, H, W, C] to scores [B, num_classes]."""
    x = images
    for level in range(levels(images.shape[1], images.shape[2])):
      channels = min(MOST, DISCRIMINATOR_WIDTH << level)
      x = nn.Conv(channels, (3, 3), strides=(2, 2), name=f"conv{level}")(x)
      x = nn.leaky_relu(x, SLOPE)
    return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


def make_gan(
  height: int,
  width: int,
  num_classes: int,
  lowering: ops.Lowering = "matmul",
  channels: int = 1,
) -> Gan:
  """Both networks for images of a size, their convolutions lowered as ``from_flax`` says."""
  return Gan(
    from_flax(Generator(height, width, channels), lowering),
    from_flax(Discriminator(num_classes), lowering),
  )
