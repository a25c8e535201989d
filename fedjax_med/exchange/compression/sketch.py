"""A count sketch: a small table that adds up over hospitals, of which the server reads the mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.exchange.compression.compressor import Compressor
from fedjax_med.exchange.compression.largest import kept, largest
from fedjax_med.exchange.compression.packing import Field
from fedjax_med.exchange.transform import Wire


class Places(NamedTuple):
  """Where each number of a vector stands in the table, for stretches of as many as it has columns.

  Attributes:
    starts: [rows, stretches] int32 column of the first number of a stretch; others follow it, round
      the end.
    signs: [rows, stretches, columns] float32, 1 or -1.
  """

  starts: jax.Array
  signs: jax.Array


def sketch(rows: int, columns: int, share: float) -> Compressor:
  """Adds each number with a drawn sign to a drawn column in each row (FetchSGD, Rothchild 2020).

  ``decode`` takes the median over rows and keeps the k largest. It is biased, and a contraction
  only where the vector has few large numbers; the table itself is linear.

  Args:
    rows: of the table, whose medians are taken.
    columns: of the table.
    share: k/d, the numbers that are decoded.
  """

  def encode(vector, key):
    size = vector.shape[0]
    where = places(key, rows, columns, size)
    stretches = jnp.pad(vector, (0, -size % columns)).reshape(-1, columns)
    # A gather, since a CPU adds to drawn places one by one.
    here = _line(columns)[None] - where.starts[..., None]
    moved = jnp.take_along_axis(where.signs * stretches[None], here % columns, axis=2)
    return (moved.sum(1).reshape(-1),)

  def decode(message, size, key):
    where = places(key, rows, columns, size)

    def read(row):
      values, starts, signs = row
      there = (_line(columns) + starts[:, None]) % columns
      return (values[there] * signs).reshape(-1)[:size]

    # A loop, since XLA would otherwise read the table anew for every step of the median.
    found = jax.lax.map(read, (message[0].reshape(rows, columns), where.starts, where.signs))
    estimates = median(found)
    chosen = largest(estimates, kept(share, size))
    return jnp.zeros((size,), jnp.float32).at[chosen].set(estimates[chosen])

  return Compressor(
    encode=encode,
    decode=decode,
    fields=lambda size: (Field(length=rows * columns, bits=32, dtype="float32"),),
    wire=lambda size: Wire(dense=rows * columns, sent=rows * columns),
    unbiased=False,
    contraction=False,
    linear=True,
    words=(
      f"a count sketch of {rows} x {columns} numbers, of whose mean the server decodes the largest"
      f" {100 * share:g}%"
    ),
  )


def median(rows: jax.Array) -> jax.Array:
  """The median [d] over the rows of [r, d]; of two middle ones their mean.

  Rows are sorted by exchanging neighbours, whole rows at once: on a CPU a sort of every column by
  itself took ten times as long.
  """
  ordered = list(rows)
  for turn in range(len(ordered)):
    for upper in range(turn % 2, len(ordered) - 1, 2):
      one, other = ordered[upper], ordered[upper + 1]
      ordered[upper], ordered[upper + 1] = jnp.minimum(one, other), jnp.maximum(one, other)
  middle = len(ordered) // 2
  return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def places(key: jax.Array, rows: int, columns: int, size: int) -> Places:
  """The places that a key draws.

  In each row every stretch begins at a column of its own. So two numbers of different stretches
  meet in a column with probability 1/columns, and two of the same stretch never do. Signs are mixed
  of the number's index, which is cheaper than a draw for each.
  """
  stretches = -(-size // columns)
  of_starts, of_signs = jax.random.split(key)
  starts = jax.random.randint(of_starts, (rows, stretches), 0, columns, jnp.int32)
  seeds = jax.random.bits(of_signs, (2, rows, 1), jnp.uint32)
  numbers = jnp.arange(stretches * columns, dtype=jnp.uint32)[None]
  bits = _mixed(_mixed(numbers ^ seeds[0]) + seeds[1]) >> jnp.uint32(31)
  signs = 1 - 2 * bits.astype(jnp.float32)
  return Places(starts=starts, signs=signs.reshape(rows, stretches, columns))


def _line(columns: int) -> jax.Array:
  return jnp.arange(columns, dtype=jnp.int32)[None]


def _mixed(words: jax.Array) -> jax.Array:
  """Words [.] uint32 whose bits all depend on each bit of the input (murmur3's finaliser)."""
  words = (words ^ (words >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
  words = (words ^ (words >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
  return words ^ (words >> jnp.uint32(16))
