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

PARTS = ("train", "val", "test")
# Kinds of NumPy's dtypes: whole numbers, fractions, and what labels may be besides.
NUMBERS, LABELS = "uif", "uifbU"


def load_arrays(path: pathlib.Path, data: DataConfig) -> Dataset:
  """Reads train_images, train_labels, val_..., test_... of a .npz file; val belongs to train.

  Images are [n, H, W], [n, H, W, 1] or [n, H, W, 3], labels [n] or [n, 1]: one for each image.

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
  reads = []
  for part, (images, labels) in parts.items():
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
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
  names = _class_names({label for _, labels in parts.values() for label in labels}, path, data)
  known = {f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")}
  others = [
    LeftOut(name=readable(name), reason="no array of MedMNIST's layout", class_name="")
    for name in sorted(set(held) - known)
  ]
  return gather(reads, others, names, root=path, data=data, listed=True)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      return {name: archive[name] for name in archive.files}
  except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
    reason = " ".join(str(error).split())[:120]
    raise UserError(f"{path} cannot be read as .npz ({reason}); save it with np.savez") from error


def _part(
  path: pathlib.Path, part: str, held: dict[str, np.ndarray]
) -> tuple[np.ndarray, list[str]]:
  """Images that Pillow takes and names of classes of a part of the file."""
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
    labels.ndim == 1,
    f"{part}_labels of {path} is {list(labels.shape)}: several labels an image, and one can be"
    " learned",
    "choose one of them and store it as [n]",
  )
  require(
    len(labels) == len(images),
    f"{path} has {len(images)} {part}_images and {len(labels)} {part}_labels",
    "store a label for each image",
  )
  require(
    labels.dtype.kind in LABELS and (labels.dtype.kind != "f" or not (labels % 1).any()),
    f"{part}_labels of {path} is {labels.dtype} with values that are no classes",
    "store whole numbers or text",
  )
  deep = images.dtype != np.uint8
  return images.astype(np.float32) if deep else images, [_name(label) for label in labels.tolist()]


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
