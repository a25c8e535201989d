"""Signs alone, one bit a number, times the mean absolute value of their block."""

import jax.numpy as jnp
import numpy as np

from fedjax_med.exchange.compression.compressor import BLOCK, Compressor, num_blocks
from fedjax_med.exchange.compression.packing import Field
from fedjax_med.exchange.transform import Wire


def sign() -> Compressor:
  """Sends sign(u) and the mean of |u| in each block of 512 (Karimireddy et al. 2019).

  It is biased, and a contraction: the error of a block is ‖u‖² - ‖u‖₁²/B. A 0 is sent as +.
  """

  def encode(vector, key):
    size = vector.shape[0]
    blocks = jnp.pad(jnp.abs(vector), (0, -size % BLOCK)).reshape(-1, BLOCK)
    held = np.minimum(BLOCK, size - BLOCK * np.arange(len(blocks))).astype(np.float32)
    return (vector >= 0).astype(jnp.uint8), blocks.sum(1) / held

  def decode(message, size, key):
    signs, scales = message
    return (2 * signs.astype(jnp.float32) - 1) * jnp.repeat(scales, BLOCK)[:size]

  def fields(size):
    return (
      Field(length=size, bits=1, dtype="uint8"),
      Field(length=num_blocks(size), bits=32, dtype="float32", beside=True),
    )

  def wire(size):
    return Wire(dense=size, sent=size, value_bits=1, beside=4 * num_blocks(size))

  return Compressor(
    encode=encode,
    decode=decode,
    fields=fields,
    wire=wire,
    unbiased=False,
    contraction=True,
    words="signs, times the mean absolute value of each block",
  )
