"""A compressor: a pure pair of functions, the message between them, and the bytes of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_med.exchange.compression.packing import Field
from fedjax_med.exchange.transform import Wire

Message = tuple[Any, ...]  # the arrays that would travel

# Numbers that share one scale. Layers are not known to a transform, which gets one vector. With
# blocks of 512 the scales cost 0.8% of int8, and a layer of few numbers pays for no scale of its
# own. Within a block of a large layer the scale fits better than one of the whole layer.
BLOCK = 512


class Compressor(NamedTuple):
  """Functions of one kind.

  Attributes:
    encode: (vector [d], key) -> message.
    decode: (message, d, key) -> vector [d]. ``key`` is that of ``encode`` for a linear kind, whose
      draws all clients and the server share; others do not read it.
    fields: d -> Field of each array of the message, in order.
    wire: d -> Wire of the message.
    unbiased: whether the mean of decoded vectors over draws is the vector.
    contraction: whether the expected ‖u - Q(u)‖² is at most (1 - 1/d)‖u‖², as error feedback needs
      it.
    linear: whether messages of several vectors add up to that of their sum.
    words: the kind for people, with its numbers.
  """

  encode: Callable[[jax.Array, jax.Array], Message]
  decode: Callable[[Message, int, jax.Array], jax.Array]
  fields: Callable[[int], tuple[Field, ...]]
  wire: Callable[[int], Wire]
  unbiased: bool
  contraction: bool
  words: str
  linear: bool = False


def num_blocks(size: int) -> int:
  """Blocks of ``size`` numbers; the last one may be short."""
  return -(-size // BLOCK)
