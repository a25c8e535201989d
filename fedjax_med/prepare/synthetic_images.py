"""Synthetic training images of a run: their number and classes; made once, stored in the workdir.

They are examples at the end of the dataset and of their hospital's training row. First
``reserve_synthetic`` adds them without their pixels. From that follow the run's id, its layout and
its program. Then ``completed`` trains the GANs, or reads the images of an earlier start.
"""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_med import __version__
from fedjax_med.core.config import Config, fingerprint
from fedjax_med.core.errors import require
from fedjax_med.data.dataset import Hospitals, client_rows, client_table
from fedjax_med.data.splits import largest_remainder
from fedjax_med.folder import writing as files
from fedjax_med.simulation.gans import BATCH, Learner, make_synthesis
from fedjax_med.simulation.mesh import RUNS_AT_ONCE, local_devices
from fedjax_med.simulation.processes import is_first, require_same_run
from fedjax_med.tasks.registry import task_named

FILE = "synthetic.npz"
MIN_IMAGES = 2  # of a class that a hospital's GAN learns: of one image it could only make copies


def reserve_synthetic(config: Config, hospitals: Hospitals) -> Hospitals:
  """Adds the synthetic images of the hospitals, all black as yet; none without client.synthetic.

  A hospital gets ``client.synthetic_share`` images for each training image of the classes that it
  has ``MIN_IMAGES`` of, in the proportions of these classes, each to less than one image.

  Raises:
    UserError: no hospital would get an image, or images have no classes to be made of.
  """
  if config.client.synthetic == "none" or hospitals.dataset.modality != "pictures":
    return hospitals
  require(
    task_named(hospitals.dataset.task).has_classes,
    f"client.synthetic='{config.client.synthetic}' makes images of a class, and the task is"
    f" '{hospitals.dataset.task}'",
    "use client.synthetic=none",
  )
  share, dataset, real = config.client.synthetic_share, hospitals.dataset, hospitals.train
  learned = np.where(_class_counts(hospitals) >= MIN_IMAGES, _class_counts(hospitals), 0)
  counts = [largest_remainder(share * row, round(share * int(row.sum()))) for row in learned]
  labels = [np.repeat(np.arange(len(row), dtype=np.int32), row) for row in counts]
  sizes = [len(row_labels) for row_labels in labels]
  require(
    sum(sizes) > 0,
    f"client.synthetic_share={share:g} makes not one synthetic image at any hospital",
    "raise it, or use client.synthetic=none",
  )
  ends = len(dataset.labels) + np.cumsum(sizes)
  new = [np.arange(end - size, end, dtype=np.int32) for size, end in zip(sizes, ends, strict=True)]
  names = [
    f"synthetic {number} of {name}"
    for name, size in zip(hospitals.names, sizes, strict=True)
    for number in range(1, size + 1)
  ]
  dataset = dataclasses.replace(
    dataset,
    labels=np.concatenate([dataset.labels, *labels]),
    names=(*dataset.names, *names),
    num_synthetic=sum(sizes),
  )
  rows = [np.concatenate(both) for both in zip(client_rows(real), new, strict=True)]
  hospitals = dataclasses.replace(hospitals, dataset=dataset, train=client_table(rows))
  return _with_images(
    hospitals, np.zeros((sum(sizes), *dataset.inputs.shape[1:]), dataset.inputs.dtype)
  )


def left_out(hospitals: Hospitals) -> list[tuple[str, str]]:
  """(hospital, class) of each class of which a hospital has too few images to learn from."""
  counts = _class_counts(hospitals)
  return [
    (hospitals.names[k], hospitals.dataset.class_names[label])
    for k, label in np.argwhere((counts > 0) & (counts < MIN_IMAGES))
  ]


def digest(hospitals: Hospitals) -> str:
  """SHA-256 of the synthetic images."""
  images = hospitals.dataset.inputs[hospitals.dataset.num_real :]
  return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def completed(
  config: Config, hospitals: Hospitals, folder: pathlib.Path, tell: Callable[[str], Any]
) -> Hospitals:
  """The hospitals of ``reserve_synthetic`` with their images, read from ``folder`` or made.

  Images that were made are stored in the folder. A file that is damaged, or comes from other data
  or settings, is replaced.

  Args:
    config: validated config.
    hospitals: from ``reserve_synthetic``.
    folder: the workdir, claimed by this run.
    tell: is called with a line before anything that takes time.

  Raises:
    UserError: images of an earlier start were lost, and those that were made now differ from them,
      so that another run would go on.
  """
  dataset = hospitals.dataset
  if not dataset.num_synthetic:
    return hospitals
  source, known = _source(config, hospitals), _known_digest(folder / "hospitals.json")
  like = dataset.inputs[dataset.num_real :]
  images = _read(folder / FILE, source, like)
  if images is not None and known in (None, digest(finished := _with_images(hospitals, images))):
    tell(f"Synthetic images: {dataset.num_synthetic}, as an earlier start has made them")
  else:
    tell(
      f"Synthetic images: training a GAN at each of {len(hospitals.names)} hospitals,"
      f" {config.client.gan_steps} steps, to make {dataset.num_synthetic} images ..."
    )
    images = make_images(config, hospitals)
    finished = _with_images(hospitals, images)
    require(
      known in (None, digest(finished)),
      f"{folder / FILE} is lost or damaged, and images made again differ from those that the run"
      " began with (another machine, or other package versions)",
      f"restore {FILE}, or use another --workdir",
    )
    if is_first():
      files.write_whole(folder / FILE, lambda place: _write(place, images, source))
  require_same_run(digest(finished)[:12])
  return finished


def make_images(config: Config, hospitals: Hospitals) -> np.ndarray:
  """Trains the GANs; the synthetic images [S, H, W, C] in the order and dtype of the dataset.

  Those of a hospital are a function of its own training images, its number, ``seed`` and
  ``client.gan_steps``, to rounding: other hospitals, and how all are laid out, change nothing.

  Raises:
    UserError: an image is not finite.
  """
  dataset, held = hospitals.dataset, _class_counts(hospitals)
  cpu = jax.default_backend() == "cpu"
  learners = _learners(hospitals, held)
  height, width, channels = dataset.inputs.shape[1:]
  synthesise = make_synthesis(
    height,
    width,
    len(dataset.class_names),
    channels=channels,
    devices=min(local_devices(), len(hospitals.names)),
    at_once=1 if cpu else RUNS_AT_ONCE,
    lowering="auto" if cpu else "matmul",
  )
  real = slice(dataset.num_real)
  steps = config.client.gan_steps
  images, finite = synthesise(
    dataset.inputs[real], dataset.labels[real], config.seed, steps, learners
  )
  sizes = hospitals.train.counts - hospitals.real_counts
  finite = finite | (sizes == 0)  # a hospital that gets no image has a GAN of nothing
  require(
    bool(finite.all()),
    f"the GAN at '{hospitals.names[int(finite.argmin())]}' did not stay finite in"
    f" client.gan_steps={steps}",
    "lower it, or use client.synthetic=none",
  )
  images = images.reshape(len(sizes), -1, *dataset.inputs.shape[1:])
  return np.concatenate([row[:size] for row, size in zip(images, sizes, strict=True)])


def image_keeper(limit: int = 2**30) -> Callable[[Config, Hospitals], Hospitals]:
  """Builds ``completed`` without a folder, for many runs: it stores the last ``limit`` bytes.

  Runs that share the object ``hospitals``, seed and steps have the same images, made once.
  """
  made: dict[tuple[Any, ...], tuple[Hospitals, np.ndarray]] = {}

  def complete(config: Config, hospitals: Hospitals) -> Hospitals:
    if not hospitals.dataset.num_synthetic:
      return hospitals
    key = image_key(config, hospitals)
    # The hospitals are kept beside, so that their id names no others.
    _, images = made.pop(key, None) or (hospitals, make_images(config, hospitals))
    made[key] = hospitals, images
    while sum(images.nbytes for _, images in made.values()) > limit and len(made) > 1:
      made.pop(next(iter(made)))
    return _with_images(hospitals, images)

  return complete


def image_key(config: Config, hospitals: Hospitals) -> tuple[Any, ...]:
  """A key of the images of a run, within this process: runs of one key have the same images."""
  if not hospitals.dataset.num_synthetic:
    return (id(hospitals.dataset),)
  return id(hospitals), config.seed, config.client.gan_steps


def _class_counts(hospitals: Hospitals) -> np.ndarray:
  """[K, classes] real training images."""
  dataset = hospitals.dataset
  rows = zip(client_rows(hospitals.train), hospitals.real_counts, strict=True)
  classes = len(dataset.class_names)
  return np.stack([np.bincount(dataset.labels[r[:n]], minlength=classes) for r, n in rows])


def _learners(hospitals: Hospitals, held: np.ndarray) -> Learner:
  labels = hospitals.dataset.labels
  rows, blocks = [], []
  for k, row in enumerate(client_rows(hospitals.train)):
    real, made = np.split(row, [hospitals.real_counts[k]])
    rows.append(real[held[k][labels[real]] >= MIN_IMAGES])
    blocks.append(labels[made])
  table, number = client_table(rows), -(-max(map(len, blocks)) // BATCH)
  places = np.zeros((len(rows), number * BATCH), np.int32)
  for k, classes in enumerate(blocks):
    places[k, : len(classes)] = classes
  places = places.reshape(len(rows), number, BATCH)
  return Learner(
    number=np.arange(len(rows), dtype=np.int32),
    indices=table.indices,
    size=table.counts,
    labels=places,
  )


def _with_images(hospitals: Hospitals, images: np.ndarray) -> Hospitals:
  dataset, real = hospitals.dataset, len(hospitals.dataset.labels) - len(images)
  inputs = np.concatenate([dataset.inputs[:real], images])
  return dataclasses.replace(hospitals, dataset=dataclasses.replace(dataset, inputs=inputs))


def _source(config: Config, hospitals: Hospitals) -> str:
  """Fingerprint of the data and settings that the images follow from."""
  dataset, sha = hospitals.dataset, hashlib.sha256()
  real = dataset.inputs[: dataset.num_real], dataset.labels
  for array in (*real, hospitals.train.indices, hospitals.train.counts):
    sha.update(np.ascontiguousarray(array).tobytes())
  values = {"code": __version__, "seed": config.seed, "steps": config.client.gan_steps}
  return fingerprint({**values, "data": sha.hexdigest()})


def _write(place: pathlib.Path, images: np.ndarray, source: str) -> None:
  with place.open("wb") as file:  # np.savez would give a path another ending
    np.savez_compressed(file, images=images, source=np.array(source))


def _read(path: pathlib.Path, source: str, like: np.ndarray) -> np.ndarray | None:
  """The images of a file of that source, shape and dtype; None without one, or if it is damaged."""
  try:
    # A file of our own: np.load leaves that of a damaged archive open.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      images, stored = archive["images"], str(archive["source"])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
    return None
  right = stored == source and (images.shape, images.dtype) == (like.shape, like.dtype)
  return images if right else None


def _known_digest(path: pathlib.Path) -> str | None:
  """The digest of the images in hospitals.json of an earlier start; None without one."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))["synthetic"]["sha256"]
  except (OSError, ValueError, KeyError, TypeError):
    return None
