"""Axial slices of NIfTI volumes, all in one orientation."""

import pathlib
from typing import Any

import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.data.slices import Content, Slice, chosen, need


def read_nifti(path: pathlib.Path, name: str, rule: str, volume: int) -> Content | str:
  """The slices of a volume that ``rule`` (data.slices) asks for, or why it cannot be read.

  The volume is turned and mirrored into the orientation that is nearest to right, anterior,
  superior. Slices are axial, from the feet up, anterior on top and the patient's right on the left,
  as radiologists look at them. Values are scaled as the header says.

  Args:
    path: the file.
    name: its name for people.
    rule: middle, all or numbers of slices.
    volume: number of the volume in a 4-D file, from 0; -1 says nothing.

  Raises:
    UserError: nibabel is not installed, the file has no slice of that number, or it holds several
      volumes and ``volume`` names none of them.
  """
  try:
    import nibabel
  except ImportError as error:
    raise need("nibabel", "nifti", name) from error
  try:
    image: Any = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):
      return f"no volume of NIfTI but {type(image).__name__}"
    shape, kind = image.shape, np.dtype(image.get_data_dtype())
    while len(shape) > 3 and shape[-1] == 1:
      shape = shape[:-1]
    if len(shape) not in (3, 4) or kind.fields is not None:
      return f"a NIfTI file of {len(shape)} dimensions or of colours, no volume"
  except Exception as error:  # a damaged file can raise almost anything
    return f"cannot be read as NIfTI ({type(error).__name__})"
  if len(shape) == 4:
    require(
      0 <= volume < shape[3],
      f"{name} holds {shape[3]} volumes (4-D), and data.volume={volume} names none of them",
      f"say with --config.data.volume=0 to {shape[3] - 1} which one is read of every such file, or"
      " list files of one volume",
    )
  try:
    turned = nibabel.as_closest_canonical(image)
    values = np.asarray(turned.dataobj)
  except Exception as error:
    return f"cannot be read as NIfTI ({type(error).__name__})"
  values = values.reshape(*values.shape[:3], -1)[..., volume if len(shape) == 4 else 0]
  numbers = chosen(rule, values.shape[2], name)
  # [x to the right, y to the front] -> rows from front to back, columns from right to left.
  slices = tuple(
    Slice(
      number=int(number),
      pixels=np.ascontiguousarray(values[::-1, ::-1, number].T, np.float32),
      inverted=False,
    )
    for number in numbers
  )
  return Content(slices=slices, total=values.shape[2], volumes=len(shape) == 4)
