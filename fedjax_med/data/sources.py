"""Sources of datasets: embedded phantoms, a folder of pictures, the two public sets."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import require_choice
from fedjax_med.data.builders import load_builder
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.images import load_folder
from fedjax_med.data.phantoms import make_phantoms


class Source(NamedTuple):
  """A source of examples.

  Attributes:
    load: data configuration -> dataset; UserError where files are not as they must be.
    reads_files: whether data.path is read, and files under data.min_size are left out.
    synthetic_people: whether examples show people who do not exist, so that they may be shown.
    seeded: whether data.seed makes other examples, and not only another split of them.
    beside_jax: whether it can be read by one thread while another one imports jax.
  """

  load: Callable[[DataConfig], Dataset]
  reads_files: bool = True
  synthetic_people: bool = False
  seeded: bool = False
  beside_jax: bool = True


def source_named(name: str) -> Source:
  """The source that ``data.source`` names; raises UserError where there is none."""
  require_choice("data.source", name, SOURCES)
  return SOURCES[name]


def load_dataset(data: DataConfig) -> Dataset:
  """The dataset of ``data.source``; UserError where its files are not as they must be."""
  return source_named(data.source).load(data)


def _phantoms(data: DataConfig) -> Dataset:
  return make_phantoms(data.num_examples, data.image_size, data.seed)


def _folder(data: DataConfig) -> Dataset:
  return load_folder(pathlib.Path(data.path).expanduser(), data)


def _builder(data: DataConfig) -> Dataset:
  return load_builder(pathlib.Path(data.path).expanduser(), data)


# tensorflow-datasets changes how the whole process imports while it is imported itself.
SOURCES: dict[str, Source] = {
  "phantoms": Source(load=_phantoms, reads_files=False, synthetic_people=True, seeded=True),
  "folder": Source(load=_folder),
  "br35h": Source(load=_builder, beside_jax=False),
  "sars_cov2_ct": Source(load=_builder, beside_jax=False),
}
