"""Some numbers of an update, drawn by chance, and the seed that says which."""

import jax
import jax.numpy as jnp

from fedjax_med.core import threefry
from fedjax_med.exchange.compression.compressor import Compressor
from fedjax_med.exchange.compression.largest import kept, largest
from fedjax_med.exchange.compression.packing import Field
from fedjax_med.exchange.transform import Wire


def randk(share: float, unscaled: bool = False) -> Compressor:
  """Sends k of d numbers in float32, all sets of k equally likely.

  Numbers times d/k are unbiased, of variance (d/k - 1) ‖u‖². As they are they are a contraction.

  Args:
    share: k/d.
    unscaled: whether numbers are sent as they are.
  """

  def chosen(seed, size):
    words = jax.random.bits(seed, (size,), jnp.uint32) >> jnp.uint32(2)
    # Of 30 bits no pattern is infinite or NaN, and floats are ordered as their patterns are.
    return largest(jax.lax.bitcast_convert_type(words, jnp.float32), kept(share, size))

  def encode(vector, key):
    size = vector.shape[0]
    # The seed travels, so that the server draws the same places.
    seed = jax.random.key_data(key)
    values = vector[chosen(_key(seed), size)]
    return (values if unscaled else values * (size / kept(share, size))), seed

  def decode(message, size, key):
    values, seed = message
    return jnp.zeros((size,), jnp.float32).at[chosen(_key(seed), size)].set(values)

  def fields(size):
    return (
      Field(length=kept(share, size), bits=32, dtype="float32"),
      Field(length=2, bits=32, dtype="uint32", beside=True),
    )

  how = "as they are" if unscaled else "scaled to be without bias"
  return Compressor(
    encode=encode,
    decode=decode,
    fields=fields,
    wire=lambda size: Wire(dense=size, sent=kept(share, size), beside=8),
    unbiased=not unscaled,
    contraction=unscaled,
    words=f"{100 * share:g}% of their numbers, drawn by chance and {how}",
  )


def _key(seed: jax.Array) -> jax.Array:
  return jax.random.wrap_key_data(seed, impl=threefry.IMPLEMENTATION)
