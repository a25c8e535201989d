"""Predictions of a trained model on pictures of any kind, as a table and as overlays."""

import concurrent.futures
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import readable
from fedjax_med.data.files import DICOM, EXTENSIONS, NIFTI, SYSTEM, File, counted, kind_of, walk
from fedjax_med.data.grey import to_eight_bits, without_channel
from fedjax_med.data.modality import preparation
from fedjax_med.data.sources import shown_as
from fedjax_med.data.volumes import read_examples
from fedjax_med.folder.writing import write_csv, write_whole
from fedjax_med.models import grad_cam
from fedjax_med.simulation.evaluation import make_classify
from fedjax_med.tasks.task import PredictionTable
from fedjax_med.trained.heat_pictures import overlay
from fedjax_med.trained.loading import Trained

LARGEST_SIDE = 1024  # of an overlay, pixels


class Picture(NamedTuple):
  """A picture file and its content.

  Attributes:
    path: of the file.
    part: number among the examples of the file, such as slices of a volume.
    name: relative to the folder that was asked for, as ``core.text.readable`` writes it.
    pixels: [H, W, C] uint8 or uint16 as the network sees it, None where it cannot be read.
    error: reason why it cannot be read; empty if it can.
  """

  path: pathlib.Path
  part: int
  name: str
  pixels: np.ndarray | None
  error: str


class Looked(NamedTuple):
  """Predictions and explanations of B images, on the host.

  Attributes:
    probabilities: [B, classes] float32.
    maps: [B, H', W'] float32 Grad-CAM of the class asked for.
    gated: {block: Gated}; {} for a network without squeeze-and-excitation.
  """

  probabilities: Any
  maps: Any
  gated: dict[str, grad_cam.Gated]


class Counts(NamedTuple):
  """Number of files that were predicted, and (name, error) of those that were not."""

  read: int
  errors: list[tuple[str, str]]


def make_probabilities(trained: Trained) -> Callable[[np.ndarray], np.ndarray]:
  """Compiles images [B, H, W, C] -> predictions [B, classes or numbers], on the host."""
  classify = jax.jit(
    make_classify(
      trained.model, preparation(trained.modality, trained.config.data), trained.task.predict
    )
  )
  return lambda images: np.asarray(classify(trained.params, trained.state, images))


def table_of(trained: Trained, predictions: np.ndarray) -> PredictionTable:
  """Predictions [n, columns] as the cells of a table: of most tasks one row an example."""
  if trained.predicts_classes:
    names = trained.class_names
    rows = [[[names[int(row.argmax())], *[f"{p:.7g}" for p in row]]] for row in predictions]
    return PredictionTable(
      heading=("predicted", *[f"probability of {c}" for c in names]), rows=rows
    )
  if trained.task.table is not None and trained.targets is not None:
    return trained.task.table(predictions, trained.targets)
  count = predictions.shape[1]
  names = ("prediction",) if count == 1 else [f"prediction {k + 1}" for k in range(count)]
  return PredictionTable(
    heading=tuple(names), rows=[[[f"{p:.7g}" for p in row]] for row in predictions]
  )


def choose_layer(trained: Trained, name: str = "") -> grad_cam.MapLayer:
  """The layer that Grad-CAM is made at; see ``grad_cam.choose_layer``.

  Raises:
    UserError: the examples of the run are of a kind that no map is drawn over, it predicts no
      classes, or there is no such layer.
  """
  require(
    trained.modality.explain,
    f"run {trained.run_id} was trained on {trained.modality.nouns}, over which no map is drawn",
    "leave out maps",
  )
  require(
    trained.predicts_classes,
    f"run {trained.run_id} has the task '{trained.task.name}', and a map is made for a class",
    "leave out maps",
  )
  image = jax.ShapeDtypeStruct((1, *trained.image_shape), jnp.float32)
  layers = grad_cam.find_layers(trained.model, trained.params, trained.state, image)
  return grad_cam.choose_layer(layers, name)


def make_look(
  trained: Trained, layer: grad_cam.MapLayer
) -> Callable[[np.ndarray, int | None], Looked]:
  """Compiles (images [B, H, W, C], target) -> Looked; None explains the predicted class.

  It raises UserError where the layer is inside a loop.
  """
  model, prepare = trained.model, preparation(trained.modality, trained.config.data)
  classify = make_classify(model, prepare, trained.task.predict)

  @jax.jit
  def look(params: Any, state: Any, images: jax.Array, target: Any) -> Looked:
    probabilities = classify(params, state, images)
    classes = jnp.where(target < 0, probabilities.argmax(1), target)
    inputs = prepare(images)
    maps = grad_cam.grad_cam(model, params, state, inputs, classes, layer)
    gated = grad_cam.gated(model, params, state, inputs)
    return Looked(probabilities=probabilities, maps=maps, gated=gated)

  def run(images: np.ndarray, target: int | None) -> Looked:
    number = np.int32(-1 if target is None else target)  # traced: one program for every target
    try:
      return jax.device_get(look(trained.params, trained.state, images, number))
    except jax.errors.UnexpectedTracerError as error:
      raise UserError(
        f"layer '{layer.name}' runs inside a loop (nn.scan), which its map does not leave; name a"
        " layer before it with --layer"
      ) from error

  return run


def files_in(place: pathlib.Path, volumes: bool = False) -> list[File]:
  """The files of a folder and below it, or a single one; those of the operating system left out.

  Args:
    place: the folder or the file.
    volumes: whether DICOM and NIfTI files are among those that are read.

  Raises:
    UserError: there is no such folder or file, or no picture in it.
  """
  require(place.exists(), f"--images={place} does not exist", "give a folder or a picture file")
  if not place.is_dir():
    require(place.is_file(), f"--images={place} is no regular file", "give a folder or a picture")
    return [File(path=place, parts=(readable(place.name),), reason="")]
  files = [file for file in walk(place).files if file.reason != SYSTEM]
  if volumes:
    files = [file._replace(reason="") if _is_volume(file) else file for file in files]
  reasons = [file.reason for file in files]
  require(
    not all(reasons),
    f"--images={place} holds no pictures, in it or below it"
    + (f", but {counted(reasons)}" if reasons else ""),
    f"give a folder with files ending in {', '.join(sorted(EXTENSIONS))}",
  )
  return files


def _is_volume(file: File) -> bool:
  """Whether a file is left out for no other reason than that it is DICOM or NIfTI."""
  return file.reason.endswith("is not read") and kind_of(file.path) in (DICOM, NIFTI)


def reads_volumes(trained: Trained) -> bool:
  """Whether the run may have been trained on DICOM or NIfTI, so that such files are read."""
  return trained.config.data.source == "manifest"


def _read(
  trained: Trained, path: pathlib.Path, least: int, size: int
) -> list[tuple[str, np.ndarray | str]]:
  """(end of its name, pixels or reason) of the examples of a file, read as the run read its own."""
  data, grey = trained.config.data, trained.grey
  if reads_volumes(trained):
    return read_examples(path, data, grey, least, size)
  return [("", trained.modality.read(path, least, size, grey, bool(data.window)))]


def read_pictures(trained: Trained, files: Sequence[File]) -> Iterator[Picture]:
  """Reads files as the training did: the same channels, size, window, slices and least size."""
  data = trained.config.data
  least = data.min_size if shown_as(data.source).facts.reads_files else 1

  def read(file: File) -> list[Picture]:
    if file.reason:
      return [Picture(path=file.path, part=0, name=file.name, pixels=None, error=file.reason)]
    return [
      Picture(
        path=file.path,
        part=part,
        name=file.name + ending,
        pixels=None if isinstance(pixels, str) else pixels,
        error=pixels if isinstance(pixels, str) else "",
      )
      for part, (ending, pixels) in enumerate(_read(trained, file.path, least, data.image_size))
    ]

  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    for pictures in threads.map(read, files):
      yield from pictures


def predict_files(
  trained: Trained,
  images: pathlib.Path,
  output: pathlib.Path,
  layer: grad_cam.MapLayer | None,
  tell: Callable[[str], None],
) -> Counts:
  """Writes a row for each picture of ``images``, and each slice of a volume, to ``output``, a CSV.

  Columns: file, predicted, the probability of each class under 'probability of CLASS', with
  ``layer`` map (the overlay, from the table's folder), error. Files that cannot be read have a row
  with an error and no numbers. Of a task that predicts no classes: file, what ``Task.table`` says,
  error, in a row for each target.

  Args:
    trained: the model.
    images: a folder, which is searched with all below it, or a file.
    output: the table; its folder is made. With ``layer`` a folder beside it, of its name and
      '_maps', gets an overlay of each picture.
    layer: layer of Grad-CAM for the predicted class; None makes none.
    tell: called with lines of progress.

  Raises:
    UserError: there is nothing to read.
  """
  beside = output.with_name(f"{output.stem}_maps")
  made = {output.resolve(), beside.resolve()}  # by an earlier call

  def is_ours(file: File) -> bool:
    place = pathlib.Path(os.path.realpath(file.path))  # resolve() raises for a link to itself
    return bool(made & {place, *place.parents})

  files = [file for file in files_in(images, reads_volumes(trained)) if not is_ours(file)]
  require(
    not all(file.reason for file in files),
    f"--images={images} holds overlays only",
    "give a folder with pictures",
  )
  size = min(trained.config.eval.batch_size, len(files))
  predict = make_probabilities(trained) if layer is None else None
  look = None if layer is None else make_look(trained, layer)
  titles, num_read = (), 0
  rows: list[list[str]] = []
  errors: list[tuple[str, str]] = []
  for start, pictures in _batches(trained, files, size):
    # One shape, so that one program is compiled.
    batch = np.zeros((size, *trained.image_shape), trained.grey.dtype)
    for row, picture in enumerate(pictures):
      if picture.pixels is not None:
        batch[row] = picture.pixels
    looked = look(batch, None) if look else None
    probabilities = looked.probabilities if looked else predict(batch) if predict else batch
    told = table_of(trained, probabilities)
    for row, picture in enumerate(pictures):
      if picture.error:
        errors.append((picture.name, picture.error))
        rows.append([picture.name, *[""] * len(told.heading), *[""] * bool(layer), picture.error])
        continue
      shown = []
      if looked:
        place = _write_overlay(trained, picture, looked.maps[row], beside)
        shown = [place.relative_to(output.parent).as_posix()]
      rows += [[picture.name, *cells, *shown, ""] for cells in told.rows[row]]
      num_read += 1
    titles = told.heading
    if len(files) > size:
      tell(f"{start} of {len(files)} files")

  write_csv(output, ["file", *titles, *["map"] * bool(layer), "error"], rows)
  return Counts(num_read, errors)


def _batches(
  trained: Trained, files: Sequence[File], size: int
) -> Iterator[tuple[int, list[Picture]]]:
  """(files read so far, at most ``size`` pictures) after each other; a file may hold several."""
  for start in range(0, len(files), size):
    part = files[start : start + size]
    pictures = list(read_pictures(trained, part))
    for first in range(0, len(pictures), size):
      yield start + len(part), pictures[first : first + size]


def _write_overlay(
  trained: Trained, picture: Picture, heat: np.ndarray, folder: pathlib.Path
) -> pathlib.Path:
  """Writes FOLDER/NAME.png: the picture at its own size, Grad-CAM over it."""
  _, pixels = _read(trained, picture.path, 1, 0)[picture.part]
  assert not isinstance(pixels, str)  # it was read a moment ago
  image = Image.fromarray(to_eight_bits(without_channel(pixels)))
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
