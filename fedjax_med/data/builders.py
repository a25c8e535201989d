"""tensorflow-datasets builders of Br35H and SARS-CoV-2-CT, prepared and read without TensorFlow."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError, require
from fedjax_med.data.classes import order_classes
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.files import walk
from fedjax_med.data.folder_patterns import AUTO, Arrangement, arrange
from fedjax_med.data.grey import Values
from fedjax_med.data.images import Read, gather, read_values, require_pictures, values_of


class PublicSet(NamedTuple):
  """One of the two public data sets.

  Attributes:
    class_names: class folders, the positive one last.
    description: one sentence.
    homepage: where a person downloads it.
    citation: its reference.
    notes: sentences that must stand beside every result.
  """

  class_names: tuple[str, str]
  description: str
  homepage: str
  citation: str
  notes: tuple[str, ...]


SOURCES = {
  "br35h": PublicSet(
    class_names=("no", "yes"),
    description="Br35H: brain MRI slices with and without a tumour, 1500 each.",
    homepage="https://www.kaggle.com/datasets/ahmedhamada0/brain-tumor-detection",
    citation="A. Hamada. Br35H :: Brain Tumor Detection 2020. Kaggle, 2020.",
    notes=(
      "Br35H holds many near-duplicates (mirrored, contrast-changed, re-cropped copies of one"
      " slice) and names no patients: a random split puts copies on both sides and flatters every"
      " model; only the grouped split is meaningful, and it cannot separate different slices of"
      " one patient.",
    ),
  ),
  "sars_cov2_ct": PublicSet(
    class_names=("non-COVID", "COVID"),
    description="SARS-CoV-2-CT: lung CT slices, 1252 with and 1229 without COVID-19.",
    homepage="https://www.kaggle.com/datasets/plameneduardo/sarscov2-ctscan-dataset",
    citation="E. Soares et al. SARS-CoV-2 CT-scan dataset. medRxiv 2020.04.24.20078584, 2020.",
    notes=(
      "SARS-CoV-2-CT names no patients and holds adjacent slices of one scan: they leak between"
      " train and test under every split, so scores are optimistic.",
      "Licence CC BY-NC-SA 4.0 (by a third-party readme); not redistributed here.",
    ),
  ),
}

MIN_STORED = 1  # builders keep every readable picture; data.min_size applies when they are read


@functools.cache  # tfds refuses to register one name twice
def _builder_class(name: str) -> Any:
  """The tfds builder of a source; made on demand, for importing tfds takes most of a second."""
  import tensorflow_datasets as tfds

  source = SOURCES[name]

  def info(self):
    features = tfds.features.FeaturesDict(
      {
        "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png"),
        "label": tfds.features.ClassLabel(names=list(source.class_names)),
        "name": tfds.features.Text(),
      }
    )
    return self.dataset_info_from_configs(
      features=features,
      description=source.description,
      homepage=source.homepage,
      citation=source.citation,
      supervised_keys=("image", "label"),
      metadata=tfds.core.MetadataDict(),
    )

  def split_generators(self, download_manager):
    arrangement = arrangement_of(name, pathlib.Path(download_manager.manual_dir))
    return {"train": self._generate_examples(arrangement)}

  def generate_examples(self, arrangement) -> Iterator[tuple[str, dict[str, Any]]]:
    skipped, frames = {}, {}
    for picture in arrangement.placed:
      values, file_name = read_values(picture.file.path, MIN_STORED, 0), picture.file.name
      if isinstance(values, str) or values.deep:
        reason = values if isinstance(values, str) else "more than 8 bits, which this set has not"
        skipped[file_name] = reason
        continue
      frames[file_name] = values.frames
      png = io.BytesIO()
      Image.fromarray(values.pixels).save(png, "PNG")
      label = {"label": picture.class_name, "name": file_name}
      yield file_name, {"image": png.getvalue(), **label}
    self.info.metadata["skipped"] = json.dumps(skipped)
    self.info.metadata["frames"] = json.dumps(frames)

  return type(
    "".join(part.capitalize() for part in name.split("_")),
    (tfds.core.GeneratorBasedBuilder,),
    {
      "__module__": __name__,
      "name": name,
      "VERSION": tfds.core.Version("1.1.0"),
      "MANUAL_DOWNLOAD_INSTRUCTIONS": (
        f"Download {source.homepage} and unpack it: the folder must hold"
        f" {' and '.join(source.class_names)}."
      ),
      "_info": info,
      "_split_generators": split_generators,
      "_generate_examples": generate_examples,
    },
  )


def _class_root(name: str, path: pathlib.Path) -> pathlib.Path:
  """The folder that holds the class folders: ``path`` or the one folder below it that does."""
  wanted = SOURCES[name].class_names
  require(
    path.is_dir(),
    f"data.path={path} is not a folder",
    f"download {SOURCES[name].homepage} by hand and point --config.data.path at the unpacked"
    f" folder with {' and '.join(wanted)}",
  )
  for root in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
    if all((root / folder).is_dir() for folder in wanted):
      return root
  raise UserError(
    f"data.path={path} holds no folders {' and '.join(wanted)}, which data.source='{name}' needs;"
    " point data.path at the unpacked download, or use data.source=folder for other class folders"
  )


def arrangement_of(name: str, root: pathlib.Path) -> Arrangement:
  """The files of the two class folders; other folders of the download are left out."""
  arrangement = arrange(root, walk(root, SOURCES[name].class_names), AUTO)
  require_pictures(root, arrangement)
  return arrangement


def _content_key(arrangement: Arrangement) -> str:
  """Fingerprint of the files' names, sizes and times: a changed folder is prepared anew."""
  sha = hashlib.sha256()
  for picture in arrangement.placed:
    stat = picture.file.path.stat()
    sha.update(f"{picture.file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
  return sha.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps tfds's announcements (preparation, PIL instead of OpenCV) off the terminal."""
  log = logging.getLogger("absl")
  level = log.level
  log.setLevel(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    log.setLevel(level)


def prepare(name: str, root: pathlib.Path, cache: pathlib.Path) -> Any:
  """The tfds builder of ``name``, its records prepared from ``root`` below ``cache``."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  key = _content_key(arrangement_of(name, root))
  builder = _builder_class(name)(data_dir=str(cache / key))
  with _quiet():
    builder.download_and_prepare(
      file_format="array_record",
      download_config=tfds.download.DownloadConfig(manual_dir=str(root), try_download_gcs=False),
    )
  return builder


def load_builder(path: pathlib.Path, data: DataConfig) -> Dataset:
  """Reads ``br35h`` or ``sars_cov2_ct`` from a hand-downloaded folder, by way of tfds.

  Raises:
    UserError: the folder is missing or lacks the class folders; see ``load_folder``.
  """
  name, cache = data.source, pathlib.Path(data.cache_dir).expanduser()
  root = _class_root(name, path)
  arrangement, builder = arrangement_of(name, root), prepare(name, root, cache)
  source = SOURCES[name]
  class_names = order_classes(source.class_names, data.positive)
  skipped, frames = (json.loads(builder.info.metadata[key]) for key in ("skipped", "frames"))
  results: dict[str, Values | str] = dict(skipped)
  with _quiet():
    records = list(builder.as_data_source(split="train"))
  for record in records:
    pixels = record["image"]
    # tfds does not hold records to the declared shape: one channel, or the label may leak.
    if pixels.ndim != 3 or pixels.shape[-1] != 1 or pixels.dtype != np.uint8:
      raise UserError(
        f"{record['name']} in {cache} is {pixels.dtype}{pixels.shape}, not one uint8 channel;"
        " delete that cache folder"
      )
    file_name = record["name"]
    file_name = file_name.decode() if isinstance(file_name, bytes) else str(file_name)
    image = Image.fromarray(pixels[..., 0])
    values = values_of(image, data.min_size, data.image_size, bool(data.window))
    if not isinstance(values, str):
      values = values._replace(frames=frames[file_name])
    results[file_name] = values
  # tfds shuffles; files have an order, that of load_folder.
  reads = [Read(picture, results[picture.file.name]) for picture in arrangement.placed]
  return gather(reads, arrangement.left_out, class_names, root=root, data=data, notes=source.notes)
