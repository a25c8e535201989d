"""Pictures in a .npz file of MedMNIST's layout: data.source=npz."""

import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np
from PIL import Image

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import readable
from fedjax_med.data.classes import order_classes
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.files import File
from fedjax_med.data.folder_patterns import LeftOut, Placed
from fedjax_med.data.grey import has_colour, parse_window
from fedjax_med.data.images import Read, gather, values_of
from fedjax_med.data.manifest import require_undrawn
from fedjax_med.data.target_columns import group_names, require_no_positive, with_targets

PARTS = ("train", "val", "test")
# Kinds of NumPy's dtypes: whole numbers, fractions, and what labels may be besides.
NUMBERS, LABELS = "uif", "uifbU"


def load_arrays(path: pathlib.Path, data: DataConfig) -> Dataset:
  """Reads train_images, train_labels, val_..., test_... of a .npz file; val belongs to train.

  Images are [n, H, W], [n, H, W, 1] or [n, H, W, 3]. Labels are [n] or [n, 1], the class of each
  image, or [n, M] of 0 and 1, of which an image may have several (the task multilabel).

  Args:
    path: the file.
    data: the fields of pictures, channels and given_split are read.

  Raises:
    UserError: the file or its arrays are not as they must be, or see ``images.gather``.
  """
  parse_window(data.window)  # before anything is read
  require(
    path.is_file() and path.suffix.lower() == ".npz",
    f"data.path={path} is no .npz file",
    "point --config.data.path at the file with train_images, train_labels, test_images, ...",
  )
  held = _read(path)
  parts = {part: _part(path, part, held) for part in PARTS if f"{part}_images" in held}
  require(
    "train" in parts,
    f"{path} holds no train_images but {', '.join(map(readable, sorted(held))) or 'nothing'}",
    "name its arrays as MedMNIST does: train_images, train_labels, val_..., test_...",
  )
  require(
    data.given_split or "test" in parts,
    f"data.given_split=False with {path}, which has no test_images",
    "leave it at True: the split is drawn anyway",
  )
  sides = data.given_split and "test" in parts
  if sides:
    require_undrawn(data, f"test_images of {path}")
  colour = data.channels == "3" or (
    data.channels == "auto" and all(_coloured(images) for images, _ in parts.values())
  )
  several = _several(path, parts, data)
  reads = []
  for part, (images, labels) in parts.items():
    classes = _names(labels) if several is None else group_names(labels)
    for number, (image, label) in enumerate(zip(images, classes, strict=True)):
      placed = Placed(
        file=File(path=path, parts=(f"{part} {number}",), reason=""),
        class_name=label,
        site=None,
        patient=None,
        in_test=part == "test" if sides else None,
      )
      exact = bool(data.window)
      values = values_of(Image.fromarray(image), data.min_size, data.image_size, exact, colour)
      reads.append(Read(placed, values))
  found = {read.placed.class_name for read in reads}
  names = tuple(sorted(found)) if several is not None else _class_names(found, path, data)
  known = {f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")}
  others = [
    LeftOut(name=readable(name), reason="no array of MedMNIST's layout", class_name="")
    for name in sorted(set(held) - known)
  ]
  dataset = gather(reads, others, names, root=path, data=data, listed=True)
  if several is None:
    return dataset
  columns = next(iter(several.values())).shape[0]
  return with_targets(dataset, several, [f"label {place}" for place in range(columns)])


def _several(
  path: pathlib.Path, parts: dict[str, tuple[np.ndarray, np.ndarray]], data: DataConfig
) -> dict[str, np.ndarray] | None:
  """Labels [M] by name of the image, where an image may have several; None where it has a class."""
  counts = {labels.shape[1:] for _, labels in parts.values()}
  require(
    len(counts) == 1,
    f"labels of the parts of {path} are of unlike shapes: {sorted(map(list, counts))} an image",
    "store as many columns in each part",
  )
  if counts == {()}:
    return None
  require_no_positive(data.positive)
  return {
    f"{part} {number}": row
    for part, (_, labels) in parts.items()
    for number, row in enumerate(labels)
  }


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
    reason = " ".join(str(error).split())[:120]
    raise UserError(f"{path} cannot be read as .npz ({reason}); save it with np.savez") from error


def _part(
  path: pathlib.Path, part: str, held: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Images that Pillow takes, and labels [n] or [n, M] float32, of a part of the file."""
  images, labels = held[f"{part}_images"], held.get(f"{part}_labels")
  where = f"{part}_images of {path}"
  if images.ndim == 4 and images.shape[3] == 1:
    images = images[..., 0]
  require(
    images.dtype.kind in NUMBERS
    and (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)),
    f"{where} is {images.dtype}{list(images.shape)}, no pictures",
    "store [n, H, W] or [n, H, W, 3]; of volumes store slices",
  )
  require(
    images.ndim == 3 or images.dtype == np.uint8,
    f"{where} has colours of {images.dtype}, which cannot be read without loss",
    "store colours as uint8",
  )
  if labels is None:
    raise UserError(f"{path} has {part}_images and no {part}_labels; store both")
  labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
  require(
    len(labels) == len(images),
    f"{path} has {len(images)} {part}_images and {len(labels)} {part}_labels",
    "store a label for each image",
  )
  whole = labels.dtype.kind in LABELS and (labels.dtype.kind != "f" or not (labels % 1).any())
  require(
    labels.ndim in (1, 2) and whole,
    f"{part}_labels of {path} is {labels.dtype}{list(labels.shape)} with values that are no"
    " classes",
    "store whole numbers or text as [n], or 0 and 1 as [n, labels]",
  )
  require(
    labels.ndim == 1 or bool(np.isin(labels, (0, 1)).all()),
    f"{part}_labels of {path} is {list(labels.shape)}, several labels an image, with values other"
    " than 0 and 1",
    "store 1 where an image has the label and 0 where not, or one class an image as [n]",
  )
  labels = labels if labels.ndim == 1 else labels.astype(np.float32)
  return images if images.dtype == np.uint8 else images.astype(np.float32), labels


def _names(labels: np.ndarray) -> list[str]:
  return [_name(label) for label in labels.tolist()]


def _name(label: Any) -> str:
  return readable(label.strip()) if isinstance(label, str) else str(int(label))


def _class_names(labels: set[str], path: pathlib.Path, data: DataConfig) -> tuple[str, ...]:
  require("" not in labels, f"{path} has empty labels", "store the class of each image")
  require(
    len(labels) > 1,
    f"{path} holds one class only ('{''.join(labels)}')",
    "add images of a second class",
  )
  names = order_classes(sorted(labels), data.positive)
  if len(names) > 2 and all(name.isdecimal() for name in names):
    return tuple(sorted(names, key=int))
  return names


def _coloured(images: np.ndarray) -> bool:
  return images.ndim == 4 and all(map(has_colour, images))
