"""A file of any kind as the values of its examples: a picture, or slices of DICOM and NIfTI."""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError
from fedjax_med.data.dicom import read_dicom
from fedjax_med.data.files import DICOM, NIFTI, kind_of
from fedjax_med.data.grey import Grey, Values
from fedjax_med.data.images import pixels_of, read_values, values_of
from fedjax_med.data.nifti import read_nifti
from fedjax_med.data.slices import Slice


class FileValues(NamedTuple):
  """A file after reading.

  Attributes:
    values: (end of its name, values or the reason why they cannot be had) of each example.
    total: slices in the file.
    patient: digest of the patient's name in the file; None where it holds none.
    volumes: whether a volume was chosen of several in the file.
  """

  values: tuple[tuple[str, Values | str], ...]
  total: int = 1
  patient: str | None = None
  volumes: bool = False


def read_file(path: pathlib.Path, name: str, data: DataConfig, colour: bool) -> FileValues:
  """The values of a picture, or of the slices of a volume that ``data.slices`` asks for.

  Args:
    path: the file.
    name: its name for people.
    data: image_size, min_size, window, slices and volume are read.
    colour: keep the colours of pictures that have some.

  Raises:
    UserError: the package that reads such files is not installed, the file has not the slice that
      is asked for, or holds several volumes and data.volume names none of them.
  """
  kind, exact, size = kind_of(path), bool(data.window), data.image_size
  if kind == DICOM:
    content = read_dicom(path, name, data.slices)
  elif kind == NIFTI:
    content = read_nifti(path, name, data.slices, data.volume)
  else:
    return FileValues(values=(("", read_values(path, data.min_size, size, exact, colour)),))
  if isinstance(content, str):
    return FileValues(values=(("", content),))
  single = content.total == 1
  return FileValues(
    values=tuple(
      ("" if single else f", slice {one.number}", _values(one, data, colour))
      for one in content.slices
    ),
    total=content.total,
    patient=content.patient,
    volumes=content.volumes,
  )


def read_examples(
  path: pathlib.Path, data: DataConfig, grey: Grey, min_size: int, size: int
) -> list[tuple[str, np.ndarray | str]]:
  """(end of its name, [H, W, C] pixels or why they cannot be had) of each example of a file.

  Args:
    path: the file.
    data: of the run: window, slices and volume are read.
    grey: rule by which the run made pixels of values.
    min_size: least side in pixels.
    size: side of the square; 0 keeps the file's own.
  """
  data = dataclasses.replace(data, image_size=size, min_size=min_size)
  try:
    content = read_file(path, "the file", data, grey.channels == 3)
  except UserError as error:
    return [("", str(error))]
  exact = bool(data.window)
  return [(ending, pixels_of(values, grey, exact)) for ending, values in content.values]


def _values(one: Slice, data: DataConfig, colour: bool) -> Values | str:
  image, exact = Image.fromarray(one.pixels), bool(data.window)
  deep = one.pixels.dtype != np.uint8
  if deep and not np.isfinite(one.pixels).all():
    return "some values are not finite numbers"
  inverted = one.inverted
  if inverted and not deep and not exact:  # such pixels are stored as they are
    image, inverted = ImageOps.invert(image), False
  values = values_of(image, data.min_size, data.image_size, exact, colour)
  return values if isinstance(values, str) else values._replace(inverted=inverted)
