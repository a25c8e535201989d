"""Pixels to network inputs, on the device."""

import jax
import jax.numpy as jnp


def normalise(images: jax.Array, how: str) -> jax.Array:
  """Turns pixels into float32 network inputs, each image by itself.

  Args:
    images: [..., H, W, C] uint8 or uint16, whose whole range is from black to white.
    how: 'image' gives each image mean 0 and standard deviation 1 (a function of that image
      alone, so it costs no privacy); 'fixed' maps black to -1 and white to 1.

  Returns:
    [..., H, W, C] float32. A constant image becomes 0 under 'image'.
  """
  pixels = images.astype(jnp.float32)
  if how == "fixed":
    return pixels / (jnp.iinfo(images.dtype).max / 2) - 1.0
  axes = (-3, -2, -1)
  centred = pixels - pixels.mean(axes, keepdims=True)
  deviation = jnp.sqrt(jnp.square(centred).mean(axes, keepdims=True))
  # One stored level, not an epsilon: a blank image must not have its rounding amplified.
  return centred / jnp.maximum(deviation, 1.0)
