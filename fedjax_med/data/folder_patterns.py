"""Layouts of a folder of pictures: class, site, patient and side as parts of a file's place.

A layout is a pattern of folder and file names such as ``{site}/{class}/{patient}_*``. ``*`` is any
text inside one name and ``**`` any number of folders; folders below the pattern, and the ending of
the file, are free.
"""

import pathlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fedjax_med.core.errors import UserError, nearest, require
from fedjax_med.data.files import (
  CONVERTIBLE,
  EXTENSIONS,
  REMEDY,
  SYSTEM,
  SYSTEM_FILES,
  File,
  Tree,
  counted,
)
from fedjax_med.data.first_level import (
  MASKS,
  TEST,
  TRAIN,
  VALIDATION,
  as_flags,
  names_masks,
  require_classes_first,
  require_no_parts,
  side_of,
  suggest,
)

PARTS = ("class", "site", "patient", "split")
MASK_NAME = re.compile(
  r"(.*[\s_.-])?(mask|masks|seg|segmentation|ground_?truth|contour|label_?map)([\s_.-].*|\s*\(?\d+\)?)?",
  re.IGNORECASE,
)
MASK = "a mask by its name, not a picture"
TWICE = "another name of a file that is read already"
MISFIT = "its place does not fit data.layout"
AUTO = "{class}/*"


class Placed(NamedTuple):
  """A picture file, with its class, site, patient and side as its place says.

  Attributes:
    file: the file.
    class_name: its class.
    site: the hospital; None where the layout does not say.
    patient: the patient; None where the layout does not say.
    in_test: whether it is of the given test part; None where the layout names no parts.
  """

  file: File
  class_name: str
  site: str | None
  patient: str | None
  in_test: bool | None


class LeftOut(NamedTuple):
  """A file, or a part of one, that is not among the examples.

  Attributes:
    name: relative to the folder.
    reason: reason to leave it out.
    class_name: class that its place says; empty where it says none.
  """

  name: str
  reason: str
  class_name: str


def require_none_left_out(
  root: pathlib.Path, left: Iterable[LeftOut], strict: bool, nouns: str = "files"
) -> None:
  """Raises UserError where ``data.strict`` and something is left out, files of the system aside."""
  stopping = [item for item in left if item.reason != SYSTEM]
  shown = "; ".join(f"'{item.name}': {item.reason}" for item in stopping[:3])
  require(
    not (strict and stopping),
    f"data.strict: {len(stopping)} {nouns} of {root} are left out, such as {shown}",
    "mend or remove them, or set data.strict=False to leave such ones out and count them",
  )


class Arrangement(NamedTuple):
  """All files of a folder, divided by their places into placed pictures and left-out files.

  Attributes:
    class_names: sorted; one may have no picture.
    placed: pictures in order of name.
    left_out: the other files in order of name.
  """

  class_names: tuple[str, ...]
  placed: tuple[Placed, ...]
  left_out: tuple[LeftOut, ...]


def arrange(root: pathlib.Path, tree: Tree, layout: str) -> Arrangement:
  """Reads class, site, patient and side of every file off its place.

  Args:
    root: the folder, for errors.
    tree: everything below it.
    layout: a pattern, or auto: the first level is the classes, if it looks like it.

  Raises:
    UserError: the pattern is wrong or fits nothing, or auto meets folders that do not look like
      classes; the sentence names the layout that would read them.
  """
  auto = layout == "auto"
  names = set(require_classes_first(root, tree)) if auto else set()
  pattern = AUTO if auto else layout
  find = matcher(pattern)
  places = [(file, find(file.parts)) for file in tree.files]
  literal = {name for name in pattern.split("/") if "{" not in name and "*" not in name}
  no_classes = SYSTEM_FILES | MASKS if auto else SYSTEM_FILES
  masks = {
    file
    for file, place in places
    if not file.reason
    and "class" in place
    and _is_mask(file, {*literal, *place.values()} - (MASKS if auto else set()))
  }
  if len(masks) == sum("class" in place and not file.reason for file, place in places):
    masks = set()  # beside no pictures, these are the pictures
  placed, left_out = [], []
  seen: set[tuple[str, int, int]] = set()
  for file, place in places:
    class_name = place.get("class", "")
    if class_name.startswith(".") or class_name.lower() in no_classes:
      class_name = ""
    reason = file.reason or (MASK if file in masks else "")
    if class_name and not reason:
      # Two names of one file are one image. In two classes they contradict, and both are kept.
      stat = file.path.stat()
      inode = class_name, stat.st_dev, stat.st_ino
      reason = TWICE if inode in seen else ""
      seen.add(inode)
    if reason or not class_name:
      misfit = "it lies beside the class folders" if auto else MISFIT
      left_out.append(LeftOut(name=file.name, reason=reason or misfit, class_name=class_name))
      continue
    in_test = _side(root, place["split"]) == "test" if "split" in place else None
    placed.append(
      Placed(
        file=file,
        class_name=class_name,
        site=place.get("site"),
        patient=place.get("patient"),
        in_test=in_test,
      )
    )
  # Under a layout of the user's, a stray text file makes no class; a folder of DICOM does.
  names |= {picture.class_name for picture in placed}
  names |= {file.class_name for file in left_out if _convertible(file.reason)} - {""}
  if not auto:
    _require_fit(root, tree, layout, placed)
    require_no_parts(sorted(names), layout)
  return Arrangement(
    class_names=tuple(sorted(names)), placed=tuple(placed), left_out=tuple(left_out)
  )


def matcher(pattern: str) -> Callable[[tuple[str, ...]], dict[str, str]]:
  """The function that reads a file's parts by a layout: {part: name}, empty where it does not fit.

  Raises:
    UserError: the layout names an unknown part, no class, or is not a pattern of names.
  """
  where = f"data.layout='{pattern}'"
  for name in re.findall(r"{([^{}]*)}", pattern):
    if name not in PARTS:
      raise UserError(f"{where}: {{{name}}} is unknown; {nearest(name, PARTS)}")
  names = pattern.split("/")
  sound = "}{" not in pattern and not re.search(r"[{}]", re.sub(r"{\w+}", "", pattern))
  require(
    sound and all(names) and not {".", ".."} & set(names),
    f"{where} is not a pattern of folder and file names",
    "write one such as '{site}/{class}/{patient}_*', without a slash at its ends",
  )
  require(
    "{class}" in pattern,
    f"{where} does not say where the class is",
    "put {class} into it, such as '{site}/{class}/*'",
  )
  seen: set[str] = set()
  compiled = re.compile("".join(_expression(name, seen) for name in names) + "(?:/.*)?", re.DOTALL)

  def find(parts: tuple[str, ...]) -> dict[str, str]:
    *folders, last = parts
    stem = pathlib.PurePosixPath(last).stem
    for ending in (stem, last):  # a pattern may name the ending or leave it out
      found = compiled.fullmatch("".join(f"/{name}" for name in (*folders, ending)))
      if found:
        return {name: value for name, value in found.groupdict().items() if value is not None}
    return {}

  return find


def _expression(name: str, seen: set[str]) -> str:
  """The regular expression of one name of a pattern, with the slash before it."""
  if name == "**":
    return "(?:/[^/]+)*"
  pieces = []
  for piece in re.split(r"({\w+}|\*)", name):
    if piece == "*":
      pieces.append("[^/]*")
    elif piece.startswith("{"):
      part = piece[1:-1]
      pieces.append(f"(?P={part})" if part in seen else f"(?P<{part}>[^/]+?)")
      seen.add(part)
    else:
      pieces.append(re.escape(piece))
  return "/" + "".join(pieces)


def _side(root: pathlib.Path, name: str) -> str:
  side = side_of(name)
  require(
    bool(side),
    f"{{split}} of data.layout is '{name}' in {root}, which is no part that is known",
    f"name the parts {', '.join(sorted(TRAIN | VALIDATION | TEST))}, or use * in place of {{split}}"
    " to split anew",
  )
  return side


def _is_mask(file: File, named: set[str]) -> bool:
  """Whether a file is a mask, judged by those of its names that are no part of the layout."""
  *folders, last = file.parts
  stem = pathlib.PurePosixPath(last).stem
  by_folder = any(names_masks(name) for name in folders if name not in named)
  return by_folder or (stem not in named and bool(MASK_NAME.fullmatch(stem)))


def _require_fit(root: pathlib.Path, tree: Tree, layout: str, placed: Iterable[Placed]) -> None:
  sides = {picture.in_test for picture in placed}
  reasons = [file.reason for file in tree.files]
  require(
    bool(tree.pictures),
    f"data.path={root} holds no pictures"
    + (f" but {len(reasons)} other files: {counted(reasons)}" if reasons else ""),
    pictures_remedy(reasons),
  )
  require(
    bool(sides),
    f"data.layout='{layout}' fits none of the {len(tree.pictures)} pictures of {root}, such as"
    f" '{tree.pictures[0].name}'",
    f"it looks like {as_flags(suggest(tree))}",
  )
  if "{split}" in layout:
    missing = "test" if True not in sides else "train" if False not in sides else ""
    require(
      not missing,
      f"{{split}} of data.layout finds no {missing} part in {root}",
      "use * in place of {split} to split anew",
    )


def _convertible(reason: str) -> bool:
  return reason.startswith(tuple(CONVERTIBLE))


def pictures_remedy(reasons: list[str]) -> str:
  """Remedy for a class without pictures, by the reasons of the files that it holds."""
  if any(map(_convertible, reasons)):
    return REMEDY
  return f"remove it or add files ending in {', '.join(sorted(EXTENSIONS))}"
