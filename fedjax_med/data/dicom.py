"""Pixels of DICOM files in the units of the scanner. No tag but those of pixels leaves this file.

The window that a file names is not applied: it differs from file to file, and so may tell the
hospital. ``data.window``, or the rule of data/grey.py, holds for all files of a data set.
"""

import hashlib
import logging
import pathlib
import warnings
from typing import Any

import numpy as np

from fedjax_med.data.slices import Content, Slice, chosen, need

NO_PICTURES = {"RTDOSE": "a dose", "SEG": "a segmentation", "RTSTRUCT": "contours"}  # by Modality
CODECS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"


def read_dicom(path: pathlib.Path, name: str, rule: str) -> Content | str:
  """The frames of a DICOM file that ``rule`` (data.slices) asks for, or why it cannot be read.

  Stored values go through the modality LUT or rescaling of the file or, in enhanced files, of the
  frame. Reasons hold no value of the file but its transfer syntax.

  Args:
    path: the file.
    name: its name for people.
    rule: middle, all or numbers of frames.

  Raises:
    UserError: pydicom is not installed, or the file has no frame of that number.
  """
  try:
    import pydicom
  except ImportError as error:
    raise need("pydicom", "dicom", name) from error
  _silence(pydicom)
  try:
    file = pydicom.dcmread(path)
    reason = _unreadable(file)
    total = 0 if reason else int(file.get("NumberOfFrames") or 1)
  except Exception as error:  # a damaged file can raise almost anything
    return f"cannot be read as DICOM ({type(error).__name__})"
  if reason:
    return reason
  numbers = chosen(rule, total, name)
  try:
    slices = tuple(_frame(file, number) for number in numbers)
  except Exception as error:
    syntax = file.file_meta.TransferSyntaxUID.name
    return f"its pixels cannot be decoded ({syntax}: {type(error).__name__})"
  if any(one.pixels.ndim == 3 and one.pixels.dtype != np.uint8 for one in slices):
    return "more than 8 bits a colour channel, which cannot be read without loss; save it as grey"
  return Content(slices=slices, total=total, patient=_patient(file))


def _silence(pydicom: Any) -> None:
  """Keeps pydicom's warnings off the terminal: they quote values, which may name a patient."""
  pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
  logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
  warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")


def _unreadable(file: Any) -> str:
  """Reason why a DICOM file holds no pixels that can be decoded here; empty if it does."""
  from pydicom.pixels.decoders.base import get_decoder

  kind = NO_PICTURES.get(str(file.get("Modality", "")))
  if kind:
    return f"DICOM of {kind}, no picture"
  if "PixelData" not in file:
    return "DICOM without pixels"
  syntax = file.file_meta.get("TransferSyntaxUID")
  if syntax is None:
    return "DICOM without a transfer syntax"
  try:
    decodable = get_decoder(syntax).is_available
  except NotImplementedError:  # pydicom knows no decoder of this syntax at all
    decodable = False
  if not decodable:
    return f"compressed as {syntax.name} ({syntax}), for which no codec is installed ({CODECS})"
  return ""


def _frame(file: Any, number: int) -> Slice:
  """A frame after the modality LUT; colours as RGB."""
  from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
  from pydicom.pixels.utils import pixel_array

  pixels, kind = pixel_array(file, index=number), str(file.PhotometricInterpretation)
  if kind == "PALETTE COLOR":
    pixels = apply_color_lut(pixels, file)
    pixels = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
  if pixels.ndim == 3:
    return Slice(number=number, pixels=np.ascontiguousarray(pixels), inverted=False)
  scaling = _frame_scaling(file, number)
  if scaling is not None:
    slope, intercept = float(scaling.RescaleSlope), float(scaling.RescaleIntercept)
    scaled: Any = pixels * slope + intercept
  else:
    scaled = apply_modality_lut(pixels, file)
  if scaled.dtype != np.uint8:
    scaled = scaled.astype(np.float32)
  return Slice(number=number, pixels=np.ascontiguousarray(scaled), inverted=kind == "MONOCHROME1")


def _frame_scaling(file: Any, number: int) -> Any:
  """The rescaling of a frame of an enhanced file; None where it stands in the file itself."""
  frames = file.get("PerFrameFunctionalGroupsSequence") or []
  for groups in (frames[number : number + 1], file.get("SharedFunctionalGroupsSequence") or []):
    for group in groups:
      found = group.get("PixelValueTransformationSequence")
      if found:
        return found[0]
  return None


def _patient(file: Any) -> str | None:
  """A digest of PatientID and its issuer, which tells patients apart and is written nowhere."""
  known = str(file.get("PatientID") or "").strip()
  if not known:
    return None
  issuer = str(file.get("IssuerOfPatientID") or "").strip()
  return hashlib.sha256(f"{issuer}\0{known}".encode(errors="replace")).hexdigest()
