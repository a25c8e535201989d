"""Messages as the bytes that travel, on the host: numbers of any width, bit by bit."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.core.errors import require


class Field(NamedTuple):
  """One array of a message.

  Attributes:
    length: how many numbers it has.
    bits: bits of a number as it travels, at most those of ``dtype``.
    dtype: of the array; floats travel as they are.
    beside: whether it stands after the packed numbers, in whole bytes, as scales and seeds do.
  """

  length: int
  bits: int
  dtype: str
  beside: bool = False


def pack(message: Sequence[Any], fields: Sequence[Field]) -> bytes:
  """The arrays of a message as bytes: all bits in a row, then what stands beside (little-endian).

  Raises:
    UserError: an array has another length, or a number that its bits cannot hold.
  """
  bits, beside = [], []
  for array, field in zip(message, fields, strict=True):
    values = np.asarray(array, field.dtype).reshape(-1)
    require(
      len(values) == field.length,
      f"a message of {len(values)} numbers where {field.length} are due",
      "pack it with the fields of its own length",
    )
    if field.beside:
      beside.append(values.astype(values.dtype.newbyteorder("<")).tobytes())
      continue
    words = values.view(_unsigned(field.dtype))
    require(
      field.bits == 8 * words.itemsize or not (words >> field.bits).any(),
      f"a number of a message needs more than {field.bits} bits",
      "pack it with the fields of its own kind",
    )
    places = np.arange(field.bits - 1, -1, -1, dtype=words.dtype)
    bits.append(((words[:, None] >> places) & 1).astype(np.uint8).reshape(-1))
  stream = np.packbits(np.concatenate(bits)) if bits else np.zeros(0, np.uint8)
  return stream.tobytes() + b"".join(beside)


def unpack(data: bytes, fields: Sequence[Field]) -> tuple[np.ndarray, ...]:
  """Inverse of ``pack``; UserError if the bytes are not as many as the fields say."""
  packed = sum(field.length * field.bits for field in fields if not field.beside)
  start = -(-packed // 8)
  sizes = [field.length * np.dtype(field.dtype).itemsize for field in fields if field.beside]
  require(
    len(data) == start + sum(sizes),
    f"a packed message has {len(data)} bytes where {start + sum(sizes)} are due",
    "unpack it with the fields that it was packed with",
  )
  bits, place = np.unpackbits(np.frombuffer(data, np.uint8, start)), 0
  arrays = []
  for field in fields:
    dtype = np.dtype(field.dtype)
    if field.beside:
      raw = np.frombuffer(data, dtype.newbyteorder("<"), field.length, start)
      arrays.append(raw.astype(dtype))
      start += field.length * dtype.itemsize
      continue
    own = bits[place : place + field.length * field.bits].reshape(field.length, field.bits)
    place += own.size
    words = np.zeros(field.length, _unsigned(field.dtype))
    for column in own.T:
      words = (words << 1) | column
    arrays.append(words.astype(_unsigned(field.dtype)).view(dtype))
  return tuple(arrays)


def _unsigned(dtype: str) -> np.dtype:
  return np.dtype(f"u{np.dtype(dtype).itemsize}")
