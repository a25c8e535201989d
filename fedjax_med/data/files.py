"""Every file below a folder: pictures, and all others with the reason why they are not read."""

import os
import pathlib
import unicodedata
from collections.abc import Collection, Iterator
from typing import NamedTuple

from fedjax_med.core.text import readable

EXTENSIONS = frozenset(
  {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"}
  | {".jp2", ".j2k", ".jpf", ".jpx", ".pgm", ".ppm", ".pnm", ".pbm"}
)
DICOM, NIFTI = "DICOM", "NIfTI"
# Endings that people meet in hospitals, and what such files are.
KNOWN = {
  ".dcm": DICOM,
  ".dicom": DICOM,
  ".ima": DICOM,
  ".nii": NIFTI,
  ".nii.gz": NIFTI,
  ".img": "Analyze",
  ".hdr": "Analyze",
  ".mha": "MetaImage",
  ".mhd": "MetaImage",
  ".nrrd": "NRRD",
  ".svs": "a whole-slide image",
  ".ndpi": "a whole-slide image",
  ".czi": "a microscope image",
  ".heic": "HEIC",
  ".avif": "AVIF",
  ".npy": "a NumPy array",
  ".npz": "NumPy arrays",
  ".h5": "HDF5",
  ".zip": "an archive",
  ".gz": "an archive",
  ".tar": "an archive",
  ".7z": "an archive",
}
# What needs a converter, and what is told by its ending: any other ending may be part of a name.
CONVERTIBLE = frozenset({DICOM, NIFTI, "Analyze", "MetaImage", "NRRD"})
PLAIN = frozenset(
  {".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".pdf", ".html", ".log", ".yaml", ".yml"}
  | {".toml", ".xls", ".xlsx", ".doc", ".docx", ".py", ".mat", ".mp4", ".avi", ".mov"}
  | {".svg", ".psd", ".ico"}
)
SYSTEM_FILES = frozenset(
  {".ds_store", "thumbs.db", "desktop.ini", "__macosx", "@eadir", "#recycle", "@recycle"}
  | {"$recycle.bin", "system volume information", "lost+found", ".appledouble", "#snapshot"}
)
# The reason of files that hold nothing of the user's: counted, but they do not stop a strict run.
SYSTEM = "written by the operating system"
REMEDY = (
  "convert them to 16-bit PNG or TIFF first (dcmtk's dcm2img for DICOM, or pydicom or nibabel with"
  " Pillow), or list DICOM and NIfTI files in a table and use data.source=manifest"
)


class File(NamedTuple):
  """A file below a folder.

  Attributes:
    path: where it is.
    parts: names of the folders on the way from the folder, and its own, as text that can be shown.
    reason: reason not to read it; empty for a picture.
  """

  path: pathlib.Path
  parts: tuple[str, ...]
  reason: str

  @property
  def name(self) -> str:
    """Name relative to the folder, with forward slashes."""
    return "/".join(self.parts)


class Tree(NamedTuple):
  """A folder with everything below it.

  Attributes:
    files: in the order of their parts.
    folders: parts of every folder below it that is not hidden, in order.
  """

  files: tuple[File, ...]
  folders: tuple[tuple[str, ...], ...]

  @property
  def pictures(self) -> tuple[File, ...]:
    """The files that may be read."""
    return tuple(file for file in self.files if not file.reason)


def walk(root: pathlib.Path, only: Collection[str] = ()) -> Tree:
  """Lists all files below ``root``. Links are followed, but not back to a folder above them.

  The order depends on names alone, not on the file system.

  Args:
    root: the folder.
    only: first-level folders to look into; empty is everything.
  """
  files: list[File] = []
  folders: list[tuple[str, ...]] = []
  for path, parts, reason in _entries(root, (), frozenset()):
    if only and parts[0] not in only:
      continue
    if reason is None:
      folders.append(parts)
    else:
      files.append(File(path=path, parts=parts, reason=reason))
  return Tree(tuple(sorted(files, key=lambda file: file.parts)), tuple(sorted(folders)))


def _entries(
  folder: pathlib.Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]], why: str = ""
) -> Iterator[tuple[pathlib.Path, tuple[str, ...], str | None]]:
  """(path, parts, reason) of everything below ``folder``; the reason of a folder is None.

  Args:
    folder: where to look.
    parts: of the folder.
    above: device and inode of the folders on the way.
    why: reason of every file below, for what is hidden.
  """
  try:
    stat = folder.stat()
    with os.scandir(folder) as found:
      names = sorted(entry.name for entry in found)
  except OSError as error:
    if not parts:
      raise
    yield folder, parts, f"the folder cannot be opened ({error.strerror})"
    return
  here = above | {(stat.st_dev, stat.st_ino)}
  for name in names:
    path, inside = folder / name, (*parts, _composed(name))
    reason = why or _hidden(name)
    if not os.path.isdir(path):
      yield path, inside, reason or _reason(path)
      continue
    place = path.stat()
    if (place.st_dev, place.st_ino) in here:
      yield path, inside, "a link back to a folder above it"
      continue
    if not reason:
      yield path, inside, None
    yield from _entries(path, inside, here, reason)


def _composed(name: str) -> str:
  """A name as text, in one spelling of its accents: a Mac writes another one than others do."""
  return unicodedata.normalize("NFC", readable(name))


def _hidden(name: str) -> str:
  if name.lower() in SYSTEM_FILES or name.startswith("._"):
    return SYSTEM
  return "hidden: its name, or that of its folder, begins with a dot" if name[0] == "." else ""


def _reason(path: pathlib.Path) -> str:
  """Reason why a file is not read as a picture; empty if its ending says that it is one."""
  if not os.path.exists(path):
    return "a link to nothing" if path.is_symlink() else "it cannot be opened"
  if not os.path.isfile(path):
    return "not a regular file"
  ending = ending_of(path)
  if ending in EXTENSIONS:
    return ""
  if ending in KNOWN:
    return f"{KNOWN[ending]} ({ending}) is not read"
  kind = _content(path)
  if kind:
    return f"{kind} is not read"
  if not ending:
    return "no file ending"
  return (
    f"a {ending} file is no picture" if ending in PLAIN else "its ending is not that of a picture"
  )


def ending_of(path: pathlib.Path) -> str:
  """The ending in small letters, .nii.gz as one."""
  ending = path.suffix.lower()
  return ".nii.gz" if path.name.lower().endswith(".nii.gz") else ending


def kind_of(path: pathlib.Path) -> str:
  """The kind of a file that is no picture, such as DICOM, by its ending or its first bytes."""
  return KNOWN.get(ending_of(path), "") or _content(path)


def _content(path: pathlib.Path) -> str:
  """The format of a file by its first bytes, where the ending does not say it."""
  try:
    with path.open("rb") as file:
      start = file.read(132)
  except OSError:
    return ""
  return DICOM if start[128:132] == b"DICM" else ""


def counted(reasons: list[str]) -> str:
  """Reasons with how often each is given, the frequent ones first: 'DICOM (.dcm) is not read (40)'.

  Only the first four are spelled out.
  """
  kinds = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
  order = sorted(kinds, key=lambda reason: (-kinds[reason], reason))
  shown = ", ".join(f"{reason} ({kinds[reason]})" for reason in order[:4])
  return shown + (f" and {len(order) - 4} more reasons" if len(order) > 4 else "")
