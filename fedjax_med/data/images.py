"""A folder of class folders as a dataset: any picture becomes one channel at one resolution."""

import concurrent.futures
import pathlib
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fedjax_med.core.errors import UserError, require
from fedjax_med.data.dataset import Dataset

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".gif", ".webp"})
POSITIVE_NAMES = frozenset(
  {"yes", "positive", "pos", "1", "true", "tumor", "tumour", "covid", "covid-19", "abnormal"}
  | {"disease", "diseased", "malignant", "cancer", "pneumonia", "sick", "case"}
)


class Listing(NamedTuple):
  """Picture files of a folder, class by class.

  Attributes:
    class_names: class folders, the negative class first where there are two.
    files: (path, name relative to the folder, class number), in order of class and name.
  """

  class_names: tuple[str, ...]
  files: tuple[tuple[pathlib.Path, str, int], ...]


def _hidden(path: pathlib.Path) -> bool:
  return path.name.startswith(".") or path.name == "__MACOSX"


def order_classes(names: list[str]) -> tuple[str, ...]:
  """Sorted names; of two, the one that sounds affirmative (yes, COVID, tumour ...) comes last.

  Label 1 is the positive class everywhere: recall is sensitivity to it.
  """
  ordered = sorted(names)
  if len(ordered) == 2 and ordered[0].lower() in POSITIVE_NAMES:
    ordered.reverse()
  return tuple(ordered)


def list_folder(root: pathlib.Path, wanted: tuple[str, ...] = ()) -> Listing:
  """Lists the pictures below each class folder of ``root``, hidden files left out.

  Args:
    root: holds one folder for each class.
    wanted: the class folders to read; all of them if empty.

  Raises:
    UserError: the folder is missing, has no class folders, one class only, or an empty class.
  """
  require(
    root.is_dir(),
    f"data.path={root} is not a folder",
    "point --config.data.path at the folder that holds one folder for each class",
  )
  folders = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and not _hidden(p)}
  folders = {name: folders[name] for name in wanted or folders}
  require(
    bool(folders),
    f"data.path={root} holds no class folders",
    "put the pictures of each class into a folder named after it",
  )
  class_names = order_classes(list(folders))
  require(
    len(class_names) > 1,
    f"data.path={root} holds one class only ('{class_names[0]}')",
    "add a folder for a second class, or point data.path one level higher or lower",
  )
  files = []
  for label, name in enumerate(class_names):
    found = list_pictures(folders[name])
    require(
      bool(found),
      f"class folder {folders[name]} holds no pictures",
      f"remove it or add files ending in {', '.join(sorted(EXTENSIONS))}",
    )
    files += [(path, path.relative_to(root).as_posix(), label) for path in found]
  return Listing(class_names, tuple(files))


def list_pictures(folder: pathlib.Path) -> list[pathlib.Path]:
  """Picture files in ``folder`` and below it in order of name, hidden ones left out."""
  return [
    path
    for path in sorted(folder.rglob("*"))
    if path.suffix.lower() in EXTENSIONS
    and path.is_file()
    and not any(_hidden(part) for part in (path, *path.relative_to(folder).parents))
  ]


def to_grey(image: Image.Image) -> Image.Image:
  """One 8-bit channel, always: the channel count of a file can give its label away.

  Transparency is laid over black, 16-bit and floating-point greys are scaled to their range,
  EXIF orientation is applied.

  Raises:
    ValueError: a floating-point picture holds NaN or infinity.
  """
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I") or image.mode == "F":
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
      raise ValueError("some pixels are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
      low, high = 0.0, 65535.0
    scaled = (values - low) / max(high - low, 1e-12) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))
  if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa"):
    coloured = image.convert("RGBA")
    black = Image.new("RGBA", coloured.size, (0, 0, 0, 255))
    image = Image.alpha_composite(black, coloured)
  return image.convert("L")


def read_image(path: pathlib.Path, min_size: int) -> Image.Image | str:
  """The picture as one 8-bit channel, or why it is left out."""
  try:
    with Image.open(path) as image:
      if min(image.size) < min_size:
        return f"{image.width}x{image.height} pixels, under data.min_size={min_size}"
      return to_grey(image)
  except Exception as error:  # a damaged file can make a decoder raise almost anything
    text = str(error).replace(repr(str(path)), "").replace(str(path), "the file")
    reason = " ".join(text.split()).rstrip(" :")[:120] or type(error).__name__
    return f"cannot be read ({reason})"


def resize(image: Image.Image, size: int) -> np.ndarray:
  """[size, size, 1] uint8, antialiased."""
  if image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(image, np.uint8)[..., None]


def parse_patients(names: list[str], pattern: str) -> np.ndarray | None:
  """Patient number of each file name by the first group of ``pattern``; None without a pattern.

  A name that does not match is a patient of its own.
  """
  if not pattern:
    return None
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise UserError(
      f"data.patient_pattern='{pattern}' is not a regular expression ({error}); put the patient"
      r" into its first group, such as '^[^/]*/(P\d+)_'"
    ) from error
  require(
    compiled.groups >= 1,
    f"data.patient_pattern='{pattern}' has no group",
    "put brackets around the part of the file name that is the patient",
  )
  matches = [compiled.search(name) for name in names]
  keys = [
    f"patient {match[1]}" if match and match[1] is not None else f"file {name}"
    for name, match in zip(names, matches, strict=True)
  ]
  return np.unique(keys, return_inverse=True)[1].astype(np.int32)


def gather(
  results: list[tuple[str, int, np.ndarray | str]],
  class_names: tuple[str, ...],
  *,
  root: pathlib.Path,
  strict: bool,
  patient_pattern: str,
  notes: tuple[str, ...] = (),
) -> Dataset:
  """Puts (name, label, picture or why not) together; UserError where ``strict`` forbids a gap."""
  skipped = tuple((name, result) for name, _, result in results if isinstance(result, str))
  if strict and skipped:
    raise UserError(
      f"{root / skipped[0][0]} {skipped[0][1]}; mend or remove it, or set data.strict=False to"
      " leave such files out and count them"
    )
  kept = [(name, label, image) for name, label, image in results if not isinstance(image, str)]
  labels = np.array([label for _, label, _ in kept], np.int32)
  for label, class_name in enumerate(class_names):
    lost = [f"{name} {why}" for name, of, why in results if of == label and isinstance(why, str)]
    require(
      bool((labels == label).any()),
      f"class '{class_name}' of {root} has no usable picture: {len(lost)} files left out"
      f"{', for example ' + lost[0] if lost else ''}",
      "lower data.min_size or mend the files",
    )
  names = [name for name, _, _ in kept]
  return Dataset(
    inputs=np.stack([image for _, _, image in kept]),
    labels=labels,
    names=tuple(names),
    class_names=class_names,
    patients=parse_patients(names, patient_pattern),
    skipped=skipped,
    notes=notes,
  )


def load_folder(
  root: pathlib.Path, *, image_size: int, min_size: int, strict: bool, patient_pattern: str
) -> Dataset:
  """Reads a folder of class folders; unreadable and too small files are named in ``skipped``.

  Raises:
    UserError: see ``list_folder``, ``parse_patients`` and, with ``strict``, any unusable file.
  """
  listing = list_folder(root)

  def read(entry: tuple[pathlib.Path, str, int]) -> tuple[str, int, np.ndarray | str]:
    path, name, label = entry
    image = read_image(path, min_size)
    return name, label, image if isinstance(image, str) else resize(image, image_size)

  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    results = list(threads.map(read, listing.files))
  return gather(
    results, listing.class_names, root=root, strict=strict, patient_pattern=patient_pattern
  )
