"""Predictions of a trained model on pictures of any kind, as a table and as overlays."""

import concurrent.futures
import csv
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import REPLACING, readable
from fedjax_med.data.images import EXTENSIONS, list_pictures, read_image, resize
from fedjax_med.data.normalisation import normalise
from fedjax_med.experiment.overlays import overlay
from fedjax_med.experiment.trained import Trained
from fedjax_med.experiment.workdir import write_whole
from fedjax_med.models import attention
from fedjax_med.simulation.evaluation import make_classify

LARGEST_SIDE = 1024  # of an overlay, pixels


class Picture(NamedTuple):
  """A file that was to be read.

  Attributes:
    path: where it is.
    name: relative to the folder that was asked for, as ``core.text.readable`` writes it.
    pixels: [H, W, C] uint8 as the network sees it, None where it cannot be read.
    error: why not; empty where it can.
  """

  path: pathlib.Path
  name: str
  pixels: np.ndarray | None
  error: str


class Looked(NamedTuple):
  """What a model makes of B images, on the host.

  Attributes:
    probabilities: [B, classes] float32.
    maps: [B, H', W'] float32 Grad-CAM of the class asked for.
    gated: {block: Gated}; {} for a network without squeeze-and-excitation.
  """

  probabilities: np.ndarray
  maps: np.ndarray
  gated: dict[str, attention.Gated]


class Counts(NamedTuple):
  """How many files were predicted, and (name, error) of those that were not."""

  read: int
  errors: list[tuple[str, str]]


def make_probabilities(trained: Trained) -> Callable[[np.ndarray], np.ndarray]:
  """Compiles images [B, H, W, C] uint8 -> class probabilities [B, classes], on the host."""
  classify = jax.jit(make_classify(trained.model, trained.config.data.normalisation))
  return lambda images: np.asarray(classify(trained.params, trained.state, images))


def choose_layer(trained: Trained, name: str = "") -> attention.Layer:
  """The layer that Grad-CAM is made at; see ``attention.choose_layer``."""
  image = jax.ShapeDtypeStruct((1, *trained.image_shape), jnp.float32)
  layers = attention.find_layers(trained.model, trained.params, trained.state, image)
  return attention.choose_layer(layers, name)


def make_look(
  trained: Trained, layer: attention.Layer
) -> Callable[[np.ndarray, int | None], Looked]:
  """Compiles (images [B, H, W, C] uint8, target) -> Looked; None explains the predicted class.

  It raises UserError where the layer is inside a loop.
  """
  model, normalisation = trained.model, trained.config.data.normalisation
  classify = make_classify(model, normalisation)

  @jax.jit
  def look(params: Any, state: Any, images: jax.Array, target: Any) -> tuple[Any, ...]:
    probabilities = classify(params, state, images)
    classes = jnp.where(target < 0, probabilities.argmax(1), target)
    inputs = normalise(images, normalisation)
    maps = attention.grad_cam(model, params, state, inputs, classes, layer)
    return probabilities, maps, attention.gated(model, params, state, inputs)

  def run(images: np.ndarray, target: int | None) -> Looked:
    number = np.int32(-1 if target is None else target)  # traced: one program for every target
    try:
      return Looked(*jax.device_get(look(trained.params, trained.state, images, number)))
    except jax.errors.UnexpectedTracerError as error:
      raise UserError(
        f"layer '{layer.name}' runs inside a loop (nn.scan), which its map does not leave; name a"
        " layer before it with --layer"
      ) from error

  return run


def pictures_in(place: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """The folder that names are relative to, and the picture files of a folder or a single one.

  Raises:
    UserError: there is no such folder or file, or no picture in it.
  """
  require(place.exists(), f"--images={place} does not exist", "give a folder or a picture file")
  if not place.is_dir():
    return place.parent, [place]
  files = list_pictures(place)
  require(
    bool(files),
    f"--images={place} holds no pictures, in it or below it",
    f"give a folder with files ending in {', '.join(sorted(EXTENSIONS))}",
  )
  return place, files


def read_pictures(
  trained: Trained, root: pathlib.Path, files: Sequence[pathlib.Path]
) -> Iterator[Picture]:
  """Reads files as the training did: one grey channel, the same size, the same least size."""
  data = trained.config.data
  least = 1 if data.source == "phantoms" else data.min_size  # no phantom was left out

  def read(path: pathlib.Path) -> Picture:
    image = read_image(path, least)
    name = readable(path.relative_to(root).as_posix())
    if isinstance(image, str):
      return Picture(path, name, None, image)
    return Picture(path, name, resize(image, data.image_size), "")

  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    yield from threads.map(read, files)


def predict_files(
  trained: Trained,
  images: pathlib.Path,
  output: pathlib.Path,
  layer: attention.Layer | None,
  tell: Callable[[str], None],
) -> Counts:
  """Writes a row for each picture of ``images`` to ``output``, a CSV file.

  Columns: file, predicted, the probability of each class under 'probability of CLASS', with
  ``layer`` map (the overlay, from the table's folder), error. Files that cannot be read have a row
  with an error and no numbers.

  Args:
    trained: the model.
    images: a folder, which is searched with all below it, or a file.
    output: the table; its folder is made. With ``layer`` a folder beside it, of its name and
      '_maps', gets an overlay of each picture.
    layer: where Grad-CAM of the predicted class is made; None makes none.
    tell: hears of progress.

  Raises:
    UserError: there is nothing to read.
  """
  root, files = pictures_in(images)
  beside = output.with_name(f"{output.stem}_maps")
  files = [path for path in files if beside.resolve() not in path.resolve().parents]
  require(bool(files), f"--images={images} holds overlays only", "give a folder with pictures")
  size = min(trained.config.eval.batch_size, len(files))
  predict = make_probabilities(trained) if layer is None else None
  look = None if layer is None else make_look(trained, layer)
  names = trained.class_names
  rows: list[list[str]] = []
  errors: list[tuple[str, str]] = []
  for start in range(0, len(files), size):
    pictures = list(read_pictures(trained, root, files[start : start + size]))
    # One shape, so that one program is compiled.
    batch = np.zeros((size, *trained.image_shape), np.uint8)
    for row, picture in enumerate(pictures):
      if picture.pixels is not None:
        batch[row] = picture.pixels
    looked = look(batch, None) if look else None
    probabilities = looked.probabilities if looked else predict(batch) if predict else batch
    for row, picture in enumerate(pictures):
      if picture.error:
        errors.append((picture.name, picture.error))
        rows.append([picture.name, "", *[""] * len(names), *[""] * bool(layer), picture.error])
        continue
      own, shown = probabilities[row], []
      if looked:
        place = _write_overlay(picture, looked.maps[row], beside)
        shown = [place.relative_to(output.parent).as_posix()]
      rows.append([picture.name, names[int(own.argmax())], *[f"{p:.7g}" for p in own], *shown, ""])
    if len(files) > size:
      tell(f"{min(start + size, len(files))} of {len(files)} files")

  def write(place: pathlib.Path) -> None:
    with place.open("w", newline="", encoding="utf-8", errors=REPLACING) as file:
      table = csv.writer(file, lineterminator="\n")
      title = ["file", "predicted", *[f"probability of {c}" for c in names]]
      table.writerow([*title, *["map"] * bool(layer), "error"])
      table.writerows(rows)

  output.parent.mkdir(parents=True, exist_ok=True)
  write_whole(output, write)
  return Counts(len(rows) - len(errors), errors)


def _write_overlay(picture: Picture, heat: np.ndarray, folder: pathlib.Path) -> pathlib.Path:
  """Writes FOLDER/NAME.png: the picture at its own size, Grad-CAM over it."""
  image = read_image(picture.path, 1)
  assert not isinstance(image, str)  # it was read a moment ago
  image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
  # The whole name: a.png and a.jpg are two pictures.
  place = folder.joinpath(*map(_fitting, f"{picture.name}.png".split("/")))
  place.parent.mkdir(parents=True, exist_ok=True)
  drawn = overlay(np.asarray(image), heat)
  write_whole(place, lambda part: drawn.save(part, format="PNG"))
  return place


def _fitting(name: str) -> str:
  """A file's name of at most 240 bytes, those that are longer with a digest in their middle."""
  if len(name.encode()) <= 240:
    return name
  digest = hashlib.sha256(name.encode()).hexdigest()[:16]
  start, end = name.encode()[:180].decode(errors="ignore"), name[-8:]
  return f"{start}.{digest}.{end}"
