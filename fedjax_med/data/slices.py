"""Slices of volumes: which of a file are read, and what a reader of such files returns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.core.errors import UserError, require

MIDDLE, ALL = "middle", "all"


class Slice(NamedTuple):
  """A slice of a volume, or a frame of a file.

  Attributes:
    number: in its file, from 0.
    pixels: [H, W] uint8 or float32, or [H, W, 3] uint8 colours.
    inverted: whether the lowest value is white.
  """

  number: int
  pixels: np.ndarray
  inverted: bool


class Content(NamedTuple):
  """The slices of a file that are to be read.

  Attributes:
    slices: in order.
    total: slices in the file.
    patient: digest of the patient's name in the file; None where it holds none.
    volumes: whether a volume was chosen of several in the file.
  """

  slices: tuple[Slice, ...]
  total: int
  patient: str | None = None
  volumes: bool = False


def parse_slices(text: str) -> tuple[int, ...]:
  """The numbers of ``data.slices``, () for middle and all; UserError unless it is one of these."""
  if text in (MIDDLE, ALL):
    return ()
  numbers = [part.strip() for part in text.split(",")]
  require(
    all(number.isdecimal() for number in numbers) and len(set(numbers)) == len(numbers),
    f"data.slices='{text}' is neither middle nor all nor different numbers from 0",
    "use --config.data.slices=middle, or numbers with commas between them, such as 10,20",
  )
  return tuple(map(int, numbers))


def chosen(rule: str, total: int, name: str) -> Sequence[int]:
  """Numbers of the slices of a file of ``total`` that ``data.slices`` asks for; 0 of a single one.

  Raises:
    UserError: a number is beyond the last slice of the file ``name``.
  """
  if rule == ALL or total == 1:
    return range(total)
  numbers = parse_slices(rule) or (total // 2,)
  require(
    max(numbers) < total,
    f"data.slices='{rule}' names slice {max(numbers)}, and {name} has those from 0 to {total - 1}",
    "name slices that every file has, or use middle or all",
  )
  return numbers


def need(package: str, extra: str, name: str) -> UserError:
  """The error where a package that reads a file is not installed."""
  return UserError(
    f"{name} needs the package {package}, which is not installed; pip install"
    f" 'fedjax_med[{extra}]', or convert such files to 16-bit PNG or TIFF"
  )
