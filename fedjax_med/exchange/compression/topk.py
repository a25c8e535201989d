"""The largest numbers of an update, and which they are."""

import jax.numpy as jnp

from fedjax_med.exchange.compression.compressor import Compressor
from fedjax_med.exchange.compression.largest import index_bits, kept, largest
from fedjax_med.exchange.compression.packing import Field
from fedjax_med.exchange.transform import Wire


def topk(share: float, value_bits: int) -> Compressor:
  """Sends the k largest absolute values of the whole vector; of equal ones those that come first.

  It is a contraction: ‖u - Q(u)‖² is at most (1 - k/d) ‖u‖², in 16 bits but for their rounding.

  Args:
    share: k/d.
    value_bits: 32, or 16 for float16 over the largest value, which is a float32 beside them, so
      that small updates do not vanish.
  """
  half = value_bits == 16

  def encode(vector, key):
    indices = largest(vector, kept(share, vector.shape[0]))
    values = vector[indices]
    if not half:
      return values, indices.astype(jnp.uint32)
    scale = jnp.abs(values).max()
    units = values / jnp.where(scale > 0, scale, 1)
    return units.astype(jnp.float16), indices.astype(jnp.uint32), scale[None]

  def decode(message, size, key):
    values, indices = message[0].astype(jnp.float32), message[1]
    if half:
      values = values * message[2]
    return jnp.zeros((size,), jnp.float32).at[indices].set(values)

  def fields(size):
    count = kept(share, size)
    scale = (Field(length=1, bits=32, dtype="float32", beside=True),) if half else ()
    return (
      Field(length=count, bits=value_bits, dtype=f"float{value_bits}"),
      Field(length=count, bits=index_bits(size), dtype="uint32"),
      *scale,
    )

  def wire(size):
    return Wire(
      dense=size,
      sent=kept(share, size),
      value_bits=value_bits,
      index_bits=index_bits(size),
      beside=4 * half,
    )

  return Compressor(
    encode=encode,
    decode=decode,
    fields=fields,
    wire=wire,
    unbiased=False,
    contraction=True,
    words=f"the largest {100 * share:g}% of their numbers in {value_bits} bits",
  )
