"""Layouts of a folder of pictures: which part of a file's place is its class, site, patient, side.

A layout is a pattern of folder and file names such as ``{site}/{class}/{patient}_*``. ``*`` is any
text inside one name and ``**`` any number of folders; folders below the pattern, and the ending of
the file, are free.
"""

import pathlib
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fedjax_med.core.errors import UserError, nearest, require
from fedjax_med.data.classes import sign
from fedjax_med.data.files import (
  EXTENSIONS,
  KNOWN,
  REMEDY,
  SYSTEM_FILES,
  File,
  Tree,
  counted,
)

PARTS = ("class", "site", "patient", "split")
TRAIN = frozenset({"train", "training"})
VALIDATION = frozenset({"val", "valid", "validation", "dev"})
TEST = frozenset({"test", "testing", "holdout"})
IMAGES = frozenset({"image", "images", "img", "imgs", "pictures", "scans"})
MASKS = frozenset(
  {"mask", "masks", "segmentation", "segmentations", "annotation", "annotations"}
  | {"groundtruth", "ground_truth", "ground truth"}
)
MASK_NAME = re.compile(
  r"(^|.*[\s_.-])(mask|masks|segmentation|ground_?truth)([\s_.-]*\(?\d+\)?)?", re.IGNORECASE
)
MASK = "a mask by its name, not a picture"
MISFIT = "its place does not fit data.layout"
AUTO = "{class}/*"


class Placed(NamedTuple):
  """A picture file and what its place says of it.

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
    reason: why it is left out.
    class_name: class that its place says; empty where it says none.
  """

  name: str
  reason: str
  class_name: str


class Arrangement(NamedTuple):
  """What the places of all files of a folder say.

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
  names = set(_classes_first(root, tree)) if auto else set()
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
  for file, place in places:
    class_name = place.get("class", "")
    if class_name.startswith(".") or class_name.lower() in no_classes:
      class_name = ""
    reason = file.reason or (MASK if file in masks else "")
    if reason or not class_name:
      misfit = "it lies beside the class folders" if auto else MISFIT
      left_out.append(LeftOut(file.name, reason or misfit, class_name))
      continue
    in_test = _side(root, place["split"]) == "test" if "split" in place else None
    placed.append(Placed(file, class_name, place.get("site"), place.get("patient"), in_test))
  names |= {picture.class_name for picture in (*placed, *left_out)} - {""}
  if not auto:
    _require_fit(root, tree, layout, placed)
  return Arrangement(tuple(sorted(names)), tuple(placed), tuple(left_out))


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
  sound = not re.search(r"[{}]", re.sub(r"{\w+}", "", pattern))
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


def side_of(name: str) -> str:
  """train, validation or test for a name that says so, such as Training or test_set; else empty."""
  words = set(re.findall(r"[a-z]+", name.lower()))
  for side, known in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
    if words & known:
      return side
  return ""


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
  """Whether a file is a mask beside a picture by the names that the layout does not explain."""
  *folders, last = file.parts
  stem = pathlib.PurePosixPath(last).stem
  by_folder = any(name.lower() in MASKS and name not in named for name in folders)
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
    f"it looks like --config.data.layout='{suggest(tree)}'",
  )
  if "{split}" in layout:
    missing = "test" if True not in sides else "train" if False not in sides else ""
    require(
      not missing,
      f"{{split}} of data.layout finds no {missing} part in {root}",
      "use * in place of {split} to split anew",
    )


def _classes_first(root: pathlib.Path, tree: Tree) -> list[str]:
  """The first level of folders; UserError where it does not look like classes."""
  firsts = [parts[0] for parts in tree.folders if len(parts) == 1]
  require(
    bool(firsts),
    f"data.path={root} holds no class folders"
    + (f" but {len(tree.files)} files" if tree.files else "")
    + (f": {counted([file.reason or 'a picture' for file in tree.files])}" if tree.files else ""),
    "put the pictures of each class into a folder named after it, or say with data.layout where the"
    " class stands in their names, such as '{class}_*'",
  )
  classes = [name for name in firsts if name.lower() not in MASKS]
  seconds = {name: set() for name in classes}
  for first, second in (parts for parts in tree.folders if len(parts) == 2):
    if first in seconds:
      seconds[first].add(second)
  sides = {side_of(name) for name in classes}
  words = {word for name in classes for word in [name.lower()] if word in TRAIN | VALIDATION | TEST}
  if "" not in sides and (len(sides) > 1 or len(words) == len(classes)):
    _refuse(root, tree, f"its first level ({_shown(classes)}) names parts, not classes")
  if words:
    _refuse(root, tree, f"{_shown(sorted(words))} beside {_shown(classes)} is a part, not a class")
  if classes and all(name.lower() in IMAGES for name in classes):
    _refuse(root, tree, f"its first level ({_shown(firsts)}) names kinds of files, not classes")
  repeated = _repeated(seconds)
  if repeated:
    _refuse(
      root,
      tree,
      f"the folders {_shown(repeated)} repeat below its first level ({_shown(classes)}), which is"
      " then hospitals, patients or the like, and not the classes",
    )
  require(
    len(classes) != 1,
    f"data.path={root} holds one class only ('{classes[0] if classes else ''}')",
    "add a folder for a second class, or point data.path one level higher or lower",
  )
  return classes


def _repeated(seconds: dict[str, set[str]]) -> list[str]:
  """Second-level folders that look like the classes: most first-level folders hold them.

  Two of them at least, or else they cannot be classes. Where each first-level folder is of one
  class, as a patient may be, few names that all repeat give them away as well.
  """
  kinds = IMAGES | MASKS
  times: dict[str, int] = {}
  for names in seconds.values():
    for name in names:
      if name.lower() not in kinds:
        times[name] = times.get(name, 0) + 1
  most = sorted(name for name, count in times.items() if count >= 2 and 2 * count > len(seconds))
  if len(most) >= 2:
    return most
  few = 2 <= len(times) < len(seconds) and sum(times.values()) >= 2 * len(times)
  return sorted(times) if few and len(seconds) > 2 else []


def _refuse(root: pathlib.Path, tree: Tree, why: str) -> None:
  likely = suggest(tree)
  others = [
    layout
    for layout in ("{site}/{class}/*", "{patient}/{class}/*", "{class}/*/*")
    if layout != likely and "{split}" not in likely and likely.count("/") == 2
  ]
  more = f" (or {' or '.join(others)})" if others else ""
  raise UserError(
    f"data.path={root} is not read by guess: {why}; say how its folders are meant, it looks like"
    f" --config.data.layout='{likely}'{more}"
  )


def suggest(tree: Tree) -> str:
  """The layout that a folder seems to have, for errors."""
  depths = [len(file.parts) - 1 for file in tree.pictures]
  if not depths:
    return "{class}/*"
  depth = max(set(depths), key=depths.count)
  rows = [file.parts[:-1] for file in tree.pictures if len(file.parts) - 1 == depth]
  levels = [sorted({row[level] for row in rows}) for level in range(depth)]
  roles = ["*"] * depth
  free = []
  for level, names in enumerate(levels):
    if all(side_of(name) for name in names):
      roles[level] = "{split}"
    elif all(name.lower() in IMAGES | MASKS for name in names):
      images = [name for name in names if name.lower() in IMAGES]
      roles[level] = images[0] if len(images) == 1 else "*"
    else:
      free.append(level)
  signed = [level for level in free if any(sign(name) for name in levels[level])]
  several = [level for level in free if len(levels[level]) >= 2]
  if signed or several:
    chosen = max(signed) if signed else min(several, key=lambda level: (len(levels[level]), -level))
    roles[chosen] = "{class}"
    left = [level for level in free if level != chosen]
    kinds = ["{site}", "{patient}"]
    if len(left) == 1 and len(levels[left[0]]) > 12:
      kinds = ["{patient}"]
    for level, kind in zip(left, kinds, strict=False):
      roles[level] = kind
  return "/".join([*roles, "*"]) if "{class}" in roles else "{class}_*"


def _shown(names: Iterable[str]) -> str:
  listed = list(names)
  return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def pictures_remedy(reasons: list[str]) -> str:
  """What to do where a class holds no picture, by the reasons of what it holds instead."""
  kinds = tuple(set(KNOWN.values()))
  if any(reason.startswith(kinds) for reason in reasons):
    return REMEDY
  return f"remove it or add files ending in {', '.join(sorted(EXTENSIONS))}"
