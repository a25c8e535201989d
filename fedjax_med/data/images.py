"""A folder of pictures as a dataset, all with the same channels and at one resolution."""

import concurrent.futures
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import require
from fedjax_med.data.classes import order_classes, require_distinct
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.files import counted, walk
from fedjax_med.data.folder_patterns import (
  Arrangement,
  LeftOut,
  Placed,
  arrange,
  matcher,
  pictures_remedy,
  require_none_left_out,
)
from fedjax_med.data.grey import (
  Grey,
  Values,
  choose_grey,
  has_colour,
  in_channels,
  parse_window,
  stored_levels,
  to_pixels,
)
from fedjax_med.data.patients import Patients, number_patients, patients_by_pattern

# Decoders that are asked: those of Pillow that read files of hospitals, and no others.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "JPEG2000", "PPM")
Image.init()  # all at once: threads that open pictures must not race to do it
WHITE_IS_ZERO = 0  # of PhotometricInterpretation, TIFF's tag 262
MASK_BY_VALUES = "one or two grey values, as a mask has, and no picture"


class Read(NamedTuple):
  """A picture file after reading: its place, and its values or the reason to leave it out."""

  placed: Placed
  values: Values | str


def read_values(
  path: pathlib.Path, min_size: int, size: int, exact: bool = False, colour: bool = False
) -> Values | str:
  """The grey values of a picture as a square of ``size`` pixels, or the reason to leave it out.

  Colours become ITU-R 601 grey, transparency is laid over black, EXIF orientation is applied. The
  resolution changes with bicubic antialiasing.

  Args:
    path: the file.
    min_size: least side in pixels.
    size: side of the square; 0 keeps the picture's own.
    exact: keep fractions of 8-bit values, which a window then spreads.
    colour: keep the colours of a picture that has some (``grey.has_colour``).
  """
  try:
    with Image.open(path, formats=FORMATS) as image:
      lost = _lost_bits(image)
      return lost or values_of(image, min_size, size, exact, colour)
  except Exception as error:  # a damaged file can make a decoder raise almost anything
    text = str(error).replace(repr(str(path)), "").replace(str(path), "the file")
    reason = " ".join(text.split()).rstrip(" :")[:120] or type(error).__name__
    return f"cannot be read ({reason})"


def read_pixels(
  path: pathlib.Path, min_size: int, size: int, grey: Grey, window: bool
) -> np.ndarray | str:
  """Returns [H, W, C] pixels of a picture by the rule of a run, or the reason why there are none.

  Args:
    path: the file.
    min_size: least side in pixels.
    size: side of the square; 0 keeps the picture's own.
    grey: how the run made pixels of grey values.
    window: whether the run's values were cut to a window.
  """
  values = read_values(path, min_size, size, exact=window, colour=grey.channels == 3)
  return pixels_of(values, grey, window)


def pixels_of(values: Values | str, grey: Grey, window: bool) -> np.ndarray | str:
  """[H, W, C] pixels of values by the rule of a run, or why they cannot be had."""
  if isinstance(values, str):
    return values
  if values.deep != grey.deep and not window:
    kinds = ("more than 8", "8") if values.deep else ("8", "more than 8")
    return (
      f"{kinds[0]} bits, and the run was trained on pictures of {kinds[1]}; export it as those were"
    )
  if not window and (values.low < grey.low or values.high > grey.high):
    return (
      f"grey values {values.low:g} to {values.high:g}, and the run was trained on {grey.low:g} to"
      f" {grey.high:g}; export it as those were"
    )
  return in_channels(to_pixels(values, grey), grey.channels)


def values_of(
  image: Image.Image, min_size: int, size: int, exact: bool, colour: bool = False
) -> Values | str:
  """The values of an opened picture; see ``read_values``."""
  if min(image.size) < min_size:
    return f"{image.width}x{image.height} pixels, under data.min_size={min_size}"
  frames = getattr(image, "n_frames", 1)
  inverted = _is_deep(image) and _photometric(image) == WHITE_IS_ZERO
  grey = to_grey(image)
  whole = np.asarray(grey)
  deep, levels = grey.mode == "F", _levels(whole)
  bands = [grey]
  if colour and not deep:
    coloured = to_colours(image)
    bands = list(coloured.split()) if has_colour(np.asarray(coloured)) else bands
  if exact and not deep:
    bands = [band.convert("F") for band in bands]
  if size and grey.size != (size, size):
    bands = [band.resize((size, size), Image.Resampling.BICUBIC) for band in bands]
  pixels = [np.asarray(band) for band in bands]
  return Values(
    pixels=pixels[0] if len(pixels) == 1 else np.stack(pixels, axis=2),
    deep=deep,
    inverted=inverted,
    low=float(whole.min()),
    high=float(whole.max()),
    levels=levels,
    whole=not deep or bool((whole == np.round(whole)).all()),
    frames=frames,
  )


def to_grey(image: Image.Image) -> Image.Image:
  """One channel, always: the channel count of a file can give its label away.

  Returns:
    Mode L of a picture of 8 bits, else mode F with the values of the file.

  Raises:
    ValueError: a picture holds NaN or infinity.
  """
  image = ImageOps.exif_transpose(image)
  if _is_deep(image):
    values = np.asarray(image, np.float32)
    if not np.isfinite(values).all():
      raise ValueError("some pixels are not finite numbers")
    return Image.fromarray(values)
  if image.mode == "LAB":
    return image.getchannel("L")
  return _over_black(image).convert("L")


def to_colours(image: Image.Image) -> Image.Image:
  """Red, green and blue of a picture of 8 bits, always: mode RGB."""
  image = ImageOps.exif_transpose(image)
  if image.mode == "LAB":
    image = image.getchannel("L")
  return _over_black(image).convert("RGB")


def _over_black(image: Image.Image) -> Image.Image:
  """The picture, what is transparent laid over black."""
  if image.mode not in ("P", "PA", "LA", "RGBA", "La", "RGBa"):
    return image
  coloured = image.convert("RGBA")
  black = Image.new("RGBA", coloured.size, (0, 0, 0, 255))
  return Image.alpha_composite(black, coloured)


def _is_deep(image: Image.Image) -> bool:
  return image.mode.startswith("I") or image.mode == "F"


def _photometric(image: Image.Image) -> int | None:
  tags: Any = getattr(image, "tag_v2", {})
  return tags.get(262)


def _lost_bits(image: Image.Image) -> str:
  """Reason to leave out a picture whose values Pillow scales by a factor in the file."""
  tiles = getattr(image, "tile", [])
  raw = str([tile[3] for tile in tiles])
  tags: Any = getattr(image, "tag_v2", {})
  bits, signed = tags.get(258, ()), 2 in tags.get(339, ())
  if signed and not _is_deep(image):
    return "signed values of 8 bits, which are read as others; save it with 16 bits"
  many = image.format == "PPM" and any(part[0] != "raw" and image.mode == "RGB" for part in tiles)
  if not _is_deep(image) and (";16" in raw or any(number > 8 for number in bits) or many):
    return "16 bits a colour channel, which cannot be read without loss; save it as grey"
  if image.format == "JPEG2000" and _is_deep(image):
    return "JPEG 2000 of more than 8 bits, whose values are scaled in reading; save it as PNG"
  if image.format == "PPM" and any(tile[0] != "raw" and tile[3] for tile in tiles):
    maxval = tiles[0][3][-1] if isinstance(tiles[0][3], tuple) else tiles[0][3]
    if isinstance(maxval, int) and maxval not in (1, 255, 65535):
      return "a largest value (maxval) other than 255 and 65535, to which it is scaled in reading"
  return ""


def _levels(values: np.ndarray) -> int:
  """Number of different values."""
  if values.dtype == np.uint8:
    return int(np.count_nonzero(np.bincount(values.ravel(), minlength=256)))
  return len(np.unique(values))


def load_folder(root: pathlib.Path, data: DataConfig) -> Dataset:
  """Reads a folder of pictures; every file that is left out is named in ``skipped``.

  Raises:
    UserError: see ``arrange``, ``order_classes``, ``choose_grey`` and ``Patients``; a class has no
      picture; with ``data.strict`` any file is left out.
  """
  parse_window(data.window)  # before anything is read
  if data.layout != "auto":
    matcher(data.layout)
  require(
    root.is_dir(),
    f"data.path={root} is not a folder",
    "point --config.data.path at the folder that holds one folder for each class",
  )
  arrangement = arrange(root, walk(root), data.layout)
  names = order_classes(require_pictures(root, arrangement), data.positive)
  return gather(
    read_all(arrangement.placed, data), arrangement.left_out, names, root=root, data=data
  )


def require_pictures(root: pathlib.Path, arrangement: Arrangement) -> tuple[str, ...]:
  """Class names of an arrangement; UserError unless there are several, each with a picture."""
  full = {picture.class_name for picture in arrangement.placed}
  for name in arrangement.class_names:
    reasons = [file.reason for file in arrangement.left_out if file.class_name == name]
    require(
      name in full,
      f"class folder {root / name} holds no pictures"
      + (f" but {len(reasons)} other files: {counted(reasons)}" if reasons else ""),
      pictures_remedy(reasons),
    )
  require(
    len(full) > 1,
    f"data.path={root} holds one class only ('{''.join(full)}')",
    "add pictures of a second class, or point data.path one level higher or lower",
  )
  return arrangement.class_names


def read_all(placed: Sequence[Placed], data: DataConfig) -> list[Read]:
  """Reads picture files in order, two at a time."""

  def read(picture: Placed) -> Read:
    exact, colour = bool(data.window), data.channels == "3"
    size = data.image_size
    return Read(picture, read_values(picture.file.path, data.min_size, size, exact, colour))

  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    return list(threads.map(read, placed))


def gather(
  results: Sequence[Read],
  left_out: Iterable[LeftOut],
  class_names: tuple[str, ...],
  *,
  root: pathlib.Path,
  data: DataConfig,
  notes: tuple[str, ...] = (),
  listed: bool = False,
) -> Dataset:
  """Makes a dataset of the files that were read; see ``load_folder``.

  ``listed`` says that somebody named each file, so that none is taken for a mask by its values.
  """
  pictures: list[tuple[Placed, Values]] = []
  lost = list(left_out)
  for placed, values in results if listed else _without_masks(results, root):
    name, class_name = placed.file.name, placed.class_name
    if isinstance(values, str):
      lost.append(LeftOut(name=name, reason=values, class_name=class_name))
      continue
    pictures.append((placed, values))
    if values.frames > 1:
      more = f"{name}, frames 2 to {values.frames}"
      lost.append(
        LeftOut(name=more, reason="only the first frame of a file is read", class_name=class_name)
      )
  _require_usable(pictures, lost, class_names, root, data.strict)
  grey = choose_grey([values for _, values in pictures], data.window)
  coloured = [values.pixels.ndim == 3 for _, values in pictures]
  if data.channels == "3" or any(coloured):
    grey = grey._replace(channels=3)
  stored = [to_pixels(values, grey) for _, values in pictures]
  grey = grey._replace(**stored_levels([values for _, values in pictures], stored, grey))
  placed = [picture for picture, _ in pictures]
  names = [picture.file.name for picture in placed]
  sites = _sites(placed)
  site_names = sorted(set(sites)) if sites else []
  require_distinct(site_names, "sites")
  patients = _patients(placed, names, sites, data)
  sides = [picture.in_test for picture in placed]
  return Dataset(
    inputs=np.stack([in_channels(pixels, grey.channels) for pixels in stored]),
    labels=np.array([class_names.index(picture.class_name) for picture in placed], np.int32),
    names=tuple(names),
    class_names=class_names,
    sites=np.array([site_names.index(site) for site in sites], np.int32) if sites else None,
    site_names=tuple(site_names),
    patients=patients and patients.numbers,
    patient_counts=patients and patients.counts,
    skipped=tuple(sorted(lost)),
    notes=(*notes, *_chosen_channels(grey, data), *_colourless(pictures, class_names, grey)),
    grey=grey,
    in_test=None if None in sides else np.array(sides, bool),
  )


def _chosen_channels(grey: Grey, data: DataConfig) -> tuple[str, ...]:
  """A sentence on a number of channels that the pictures, and not the user, have chosen."""
  if grey.channels == 1 or data.channels != "auto":
    return ()
  return (
    "Three channels, since all pictures have colours: it follows from all of them, without noise,"
    " unless data.channels=3 says it.",
  )


def _colourless(
  pictures: Sequence[tuple[Placed, Values]], class_names: tuple[str, ...], grey: Grey
) -> tuple[str, ...]:
  """A sentence on pictures without colours among those that have some."""
  bare = [placed.class_name for placed, values in pictures if values.pixels.ndim == 2]
  if grey.channels == 1 or not bare:
    return ()
  shares = ", ".join(f"{bare.count(name)} of class {name}" for name in class_names if name in bare)
  told = "data.channels=1 would do" if len(bare) == len(pictures) else "this may tell their class"
  return (f"{len(bare)} of {len(pictures)} pictures have no colours ({shares}): {told}.",)


def _without_masks(results: Sequence[Read], root: pathlib.Path) -> list[Read]:
  """Replaces masks by a reason: pictures of two grey values, and blank ones beside such.

  UserError if most pictures are like that and others are not: either may be meant.
  """
  known = [read.values for read in results if isinstance(read.values, Values)]
  flat = sum(values.levels <= 2 for values in known)
  if flat == len(known) or not any(values.levels == 2 for values in known):
    return list(results)
  require(
    2 * flat <= len(known),
    f"{flat} of {len(known)} pictures of {root} have one or two grey values, as masks do, and the"
    " others have more",
    "move what is not to be learned from into folders named masks, or out of the folder",
  )
  return [
    read._replace(values=MASK_BY_VALUES)
    if isinstance(read.values, Values) and read.values.levels <= 2
    else read
    for read in results
  ]


def _require_usable(
  pictures: Sequence[tuple[Placed, Values]],
  lost: Sequence[LeftOut],
  class_names: tuple[str, ...],
  root: pathlib.Path,
  strict: bool,
) -> None:
  require_none_left_out(root, lost, strict)
  usable = {placed.class_name for placed, _ in pictures}
  for class_name in class_names:
    files = [file for file in lost if file.class_name == class_name]
    require(
      class_name in usable,
      f"class '{class_name}' of {root} has no usable picture: {len(files)} files left out"
      f"{f', for example {files[0].name}: {files[0].reason}' if files else ''}",
      "lower data.min_size or mend the files",
    )


def _sites(placed: Sequence[Placed]) -> list[str] | None:
  sites = [picture.site for picture in placed if picture.site is not None]
  return sites if len(sites) == len(placed) else None


def _patients(
  placed: Sequence[Placed], names: Sequence[str], sites: Sequence[str] | None, data: DataConfig
) -> Patients | None:
  if "{patient}" in data.layout:
    return number_patients([picture.patient for picture in placed], "data.layout", sites)
  if data.patient_pattern:
    return patients_by_pattern(names, data.patient_pattern, sites)
  return None
