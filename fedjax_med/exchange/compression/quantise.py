"""Whole numbers of a few bits, by chance and unbiased (QSGD), or by nearest rounding."""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.compression.compressor import BLOCK, Compressor, num_blocks
from fedjax_med.exchange.compression.packing import Field
from fedjax_med.exchange.transform import Wire


def quantise(bits: int, nearest: bool = False) -> Compressor:
  """Rounds each number to one of 2s + 1 levels, s = 2^(bits - 1) - 1, within its block's range.

  The range is the largest absolute value of the block, so that the variance is within the bound of
  QSGD (Alistarh et al. 2017), whose range is the block's norm: at most min(B/s², √B/s) ‖u‖² in a
  block of B numbers. A block has 512 numbers and one float32 scale.

  Args:
    bits: 2 to 16.
    nearest: whether it rounds to the nearest level instead of by chance. It is then biased and a
      contraction, since the largest number of a block is kept.
  """
  levels = 2 ** (bits - 1) - 1

  def encode(vector, key):
    size = vector.shape[0]
    blocks = jnp.pad(vector, (0, -size % BLOCK)).reshape(-1, BLOCK)
    scales = jnp.abs(blocks).max(1)
    units = blocks / jnp.where(scales > 0, scales, 1)[:, None] * levels
    units = units.reshape(-1)[:size]
    if nearest:
      whole = jnp.round(units)
    else:
      below = jnp.floor(units)
      up = jax.random.uniform(key, (size,)) < units - below
      whole = below + up.astype(jnp.float32)
    return (whole.astype(jnp.int32) + levels).astype(jnp.uint16), scales

  def decode(message, size, key):
    codes, scales = message
    whole = codes.astype(jnp.float32) - levels
    return whole / levels * jnp.repeat(scales, BLOCK)[:size]

  def fields(size):
    return (
      Field(length=size, bits=bits, dtype="uint16"),
      Field(length=num_blocks(size), bits=32, dtype="float32", beside=True),
    )

  def wire(size):
    return Wire(dense=size, sent=size, value_bits=bits, beside=4 * num_blocks(size))

  how = "rounded to the nearest level" if nearest else "rounded by chance, without bias"
  return Compressor(
    encode=encode,
    decode=decode,
    fields=fields,
    wire=wire,
    unbiased=not nearest,
    contraction=nearest,
    words=f"whole numbers of {bits} bits, {how}",
  )
