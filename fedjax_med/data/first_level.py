"""Recognises whether the first level of a folder is its classes, and suggests a layout if not."""

import collections
import pathlib
import re
from collections.abc import Iterable
from typing import NoReturn

from fedjax_med.core.errors import UserError, require
from fedjax_med.data.classes import sign
from fedjax_med.data.files import Tree, counted

TRAIN = frozenset({"train", "training"})
VALIDATION = frozenset({"val", "valid", "validation", "dev"})
TEST = frozenset({"test", "testing", "holdout"})
IMAGES = frozenset({"image", "images", "img", "imgs", "pictures", "scans", "imagestr", "imagests"})
MASKS = frozenset(
  {"mask", "masks", "segmentation", "segmentations", "annotation", "annotations", "contours"}
  | {"groundtruth", "ground_truth", "ground truth", "labels", "labelstr", "labelsts"}
)
LEFTOVERS = frozenset(
  {"unlabeled", "unlabelled", "unsorted", "backup", "trash", "excluded", "discarded", "unused"}
)
PLACE = re.compile(
  r"(hospital|site|cent(er|re)|clinic|institution|scanner|patient|subject|sub|pat)s?[\s_-]?"
  r"(\d+|[a-z]|[ivx]+)",
  re.IGNORECASE,
)
NUMBERED = re.compile(r"[a-z]{0,4}[\s_-]?\d+", re.IGNORECASE)
MOST_SITES = 12  # more folders than these are taken for patients, by their number alone


def names_masks(name: str) -> bool:
  """Whether a folder's name says that it holds masks: masks, or infection masks."""
  words = set(re.findall(r"[a-z]+", name.lower()))
  return name.lower() in MASKS or bool(words & {"mask", "masks", "segmentation", "segmentations"})


def require_no_parts(classes: list[str], layout: str) -> None:
  """Raises UserError where classes of a layout of the user's are train and test parts."""
  parts = [name for name in classes if name.lower() in TRAIN | VALIDATION | TEST]
  require(
    not parts,
    f"data.layout='{layout}' makes {_shown(parts)} a class beside"
    f" {_shown(name for name in classes if name not in parts)}: folders of another depth are mixed"
    " in",
    "point data.path at the folder with the parts, or move the others out",
  )


def side_of(name: str) -> str:
  """Part that a name such as testset stands for: train, validation or test; empty if none."""
  words = re.findall(r"[a-z]+", name.lower())
  stems = {re.sub(r"(set|data)$", "", word) for word in words}
  for side, known in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
    if stems & known:
      return side
  return ""


def require_classes_first(root: pathlib.Path, tree: Tree) -> list[str]:
  """The first level of folders, masks left out.

  Raises:
    UserError: it does not look like classes; the sentence names a layout that would read it.
  """
  firsts = [parts[0] for parts in tree.folders if len(parts) == 1]
  reasons = [file.reason or "a picture" for file in tree.files]
  require(
    bool(firsts),
    f"data.path={root} holds no class folders"
    + (f" but {len(reasons)} files: {counted(reasons)}" if reasons else ""),
    "put the pictures of each class into a folder named after it, or say with data.layout where the"
    " class stands in their names, such as '{class}_*'",
  )
  classes = [name for name in firsts if name.lower() not in MASKS]
  stray = [name for name in classes if name.lower() in LEFTOVERS]
  require(
    not stray,
    f"{_shown(stray)} beside the classes of {root} is no class",
    "move it elsewhere, or rename it if it is one",
  )
  why = _parts_or_kinds(classes, firsts) or _places(classes) or _deeper(classes, tree)
  if why:
    _refuse(root, tree, why)
  require(
    len(classes) != 1,
    f"data.path={root} holds one class only ('{classes[0] if classes else ''}')",
    "add a folder for a second class, or point data.path one level higher or lower",
  )
  return classes


def _parts_or_kinds(classes: list[str], firsts: list[str]) -> str:
  """Reason why names are no classes but train and test parts, or kinds of files; else empty."""
  sides = {side_of(name) for name in classes}
  parts = [name for name in classes if re.sub("(set|data)$", "", name.lower()) in TRAIN | TEST]
  parts += [name for name in classes if name.lower() in VALIDATION]
  if "" not in sides and (len(sides) > 1 or len(parts) == len(classes)):
    return f"its first level ({_shown(classes)}) names parts, not classes"
  if parts:
    return f"{_shown(sorted(parts))} beside {_shown(classes)} is a part, not a class"
  if all(name.lower() in IMAGES for name in classes):
    return f"its first level ({_shown(firsts)}) names kinds of files, not classes"
  return ""


def _places(classes: list[str]) -> str:
  """Reason why names are no classes but hospitals, or many patients; else empty."""
  if len(classes) > 1 and all(PLACE.fullmatch(name) for name in classes):
    return f"its first level ({_shown(classes)}) names hospitals or patients, not classes"
  if len(classes) > MOST_SITES and all(NUMBERED.fullmatch(name) for name in classes):
    return f"its first level ({_shown(classes)}) looks like patients, not classes"
  return ""


def _deeper(classes: list[str], tree: Tree) -> str:
  """Reason why a deeper level of folders looks more like the classes; else empty.

  It does where its names repeat below most first-level folders, or where they sound negative or
  positive and those of the first level do not.
  """
  deepest = max((len(parts) for parts in tree.folders), default=1)
  for level in range(1, deepest):
    below: dict[str, set[str]] = {name: set() for name in classes}
    spelling: dict[str, str] = {}
    for parts in tree.folders:
      name = parts[level].lower() if len(parts) > level else ""
      if parts[0] in below and name and name not in IMAGES | MASKS:
        below[parts[0]].add(name)
        spelling.setdefault(name, parts[level])
    repeated = _repeated(below, loose=_loose_pictures(tree, classes))
    if repeated:
      shown = _shown(spelling[name] for name in repeated)
      return (
        f"the folders {shown} repeat below its first level ({_shown(classes)}), which is then"
        " hospitals, patients or the like, and not the classes"
      )
    speaking = [name for name in spelling.values() if sign(name)]
    if speaking and not any(sign(name) for name in classes):
      return (
        f"the folders {_shown(sorted(speaking))} below its first level ({_shown(classes)}) sound"
        " like the classes"
      )
  return ""


def _loose_pictures(tree: Tree, classes: list[str]) -> bool:
  """Whether pictures lie in first-level folders themselves, as they do in those of classes."""
  return any(len(file.parts) == 2 and file.parts[0] in classes for file in tree.pictures)


def _repeated(below: dict[str, set[str]], loose: bool) -> list[str]:
  """Names that most first-level folders hold below them, if they may be the classes.

  Classes are two names at least. Where each first-level folder is of one class, as a patient may
  be, they are few names, each below several folders.
  """
  times = collections.Counter(name for names in below.values() for name in names)
  most = sorted(name for name, count in times.items() if count >= 2 and 2 * count > len(below))
  if len(most) >= 2 or (most and len(times) >= 2 and not loose):
    return most
  few = 2 <= len(times) < len(below) and sum(times.values()) >= 2 * len(times)
  return sorted(times) if few and len(below) > 2 else []


def _refuse(root: pathlib.Path, tree: Tree, why: str) -> NoReturn:
  likely = suggest(tree)
  others = [
    layout
    for layout in ("{site}/{class}/*", "{patient}/{class}/*", "{class}/*/*")
    if layout != likely and "{split}" not in likely and likely.count("/") == 2
  ]
  more = f" (or {' or '.join(others)})" if others else ""
  raise UserError(
    f"data.path={root} is not read by guess: {why}; say how its folders are meant, it looks like"
    f" {as_flags(likely)}{more}"
  )


def as_flags(layout: str) -> str:
  """The flags that read a folder by a layout, with its sites as the hospitals."""
  sites = " --config.partition.scheme=site --config.partition.num_clients=0"
  return f"--config.data.layout='{layout}'" + (sites if "{site}" in layout else "")


def suggest(tree: Tree) -> str:
  """The layout that a folder seems to have, for errors."""
  depths = [len(file.parts) - 1 for file in tree.pictures]
  if not depths:
    return "{class}/*"
  depth = max(set(depths), key=depths.count)
  files = [file for file in tree.pictures if len(file.parts) - 1 == depth]
  levels = [sorted({file.parts[level] for file in files}) for level in range(depth)]
  roles, free = ["*"] * depth, []
  for level, names in enumerate(levels):
    if all(side_of(name) for name in names):
      roles[level] = "{split}"
    elif all(name.lower() in IMAGES | MASKS for name in names):
      images = [name for name in names if name.lower() in IMAGES]
      roles[level] = images[0] if len(images) == 1 else "*"
    else:
      free.append(level)
  last = "*"
  chosen = _class_level(levels, free)
  if chosen is None:
    last = "{class}_*"
  else:
    roles[chosen] = "{class}"
    free = [level for level in free if level != chosen]
  many = len(free) == 1 and len(levels[free[0]]) > MOST_SITES
  for level, role in zip(free, ["{patient}"] if many else ["{site}", "{patient}"], strict=False):
    roles[level] = role
  return "/".join([*roles, last])


def _class_level(levels: list[list[str]], free: list[int]) -> int | None:
  """The level whose names are the classes; None where none looks like it."""
  signed = [level for level in free if any(sign(name) for name in levels[level])]
  if signed:
    return max(signed)
  several = [level for level in free if len(levels[level]) >= 2 and not _places(levels[level])]
  return min(several, key=lambda level: (len(levels[level]), -level), default=None)


def _shown(names: Iterable[str]) -> str:
  listed = list(names)
  return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
