"""Sources of datasets: phantoms, folders, tables and arrays of pictures, the two public sets."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.registered import add_name
from fedjax_med.core.source_facts import SOURCE_FACTS, SourceFacts
from fedjax_med.core.sources import read_again
from fedjax_med.data.arrays import load_arrays
from fedjax_med.data.builders import load_builder
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.gdsc import load_gdsc
from fedjax_med.data.heart_disease import load_heart_disease
from fedjax_med.data.images import load_folder
from fedjax_med.data.lung import load_lung
from fedjax_med.data.manifest import load_manifest
from fedjax_med.data.phantoms import make_phantoms
from fedjax_med.data.series import load_series
from fedjax_med.data.tables import load_table


class Source(NamedTuple):
  """A source of examples.

  Attributes:
    load: data configuration -> dataset; UserError where files are not as they must be.
    facts: facts that rules of the configuration use.
    synthetic_people: whether examples show people who do not exist, so that they may be shown.
    seeded: whether data.seed makes other examples, and not only another split of them.
    beside_jax: whether it can be read by one thread while another one imports jax.
  """

  load: Callable[[DataConfig], Dataset]
  facts: SourceFacts = SourceFacts()
  synthetic_people: bool = False
  seeded: bool = False
  beside_jax: bool = True


def source_named(name: str) -> Source:
  """The source that ``data.source`` names; raises UserError where there is none."""
  require_choice("data.source", name, SOURCES)
  return SOURCES[name]


def shown_as(name: str) -> Source:
  """The source of a run that has ended: one that is not registered here is taken for patients'.

  It then counts as one of files, which is what ``Source`` says by itself.
  """
  return SOURCES.get(name, Source(load=load_dataset))


def register(name: str, source: Source) -> None:
  """Adds a source that data.source can name.

  One that was read from its file once more replaces itself: config files are read several times.

  Raises:
    UserError: the name is taken by another source.
  """
  known = SOURCES.get(name, source)
  require(
    known._replace(load=source.load) == source and read_again(known.load, source.load),
    f"a source named '{name}' is registered already",
    "choose another name",
  )
  SOURCES[name], SOURCE_FACTS[name] = source, source.facts
  add_name("data.source", name)


def load_dataset(data: DataConfig) -> Dataset:
  """The dataset of ``data.source``; UserError where its files are not as they must be."""
  return source_named(data.source).load(data)


def _phantoms(data: DataConfig) -> Dataset:
  return make_phantoms(data.num_examples, data.image_size, data.seed)


def _folder(data: DataConfig) -> Dataset:
  return load_folder(pathlib.Path(data.path).expanduser(), data)


def _manifest(data: DataConfig) -> Dataset:
  return load_manifest(pathlib.Path(data.path).expanduser(), data)


def _arrays(data: DataConfig) -> Dataset:
  return load_arrays(pathlib.Path(data.path).expanduser(), data)


def _builder(data: DataConfig) -> Dataset:
  return load_builder(pathlib.Path(data.path).expanduser(), data)


def _gdsc(data: DataConfig) -> Dataset:
  return load_gdsc(pathlib.Path(data.path).expanduser(), data)


# tensorflow-datasets changes how the whole process imports while it is imported itself.
SOURCES: dict[str, Source] = {
  "phantoms": Source(
    load=_phantoms, facts=SOURCE_FACTS["phantoms"], synthetic_people=True, seeded=True
  ),
  "folder": Source(load=_folder, facts=SOURCE_FACTS["folder"]),
  # pandas is imported in reading, and imports what jax does.
  "manifest": Source(load=_manifest, facts=SOURCE_FACTS["manifest"], beside_jax=False),
  "npz": Source(load=_arrays, facts=SOURCE_FACTS["npz"]),
  "br35h": Source(load=_builder, facts=SOURCE_FACTS["br35h"], beside_jax=False),
  "sars_cov2_ct": Source(load=_builder, facts=SOURCE_FACTS["sars_cov2_ct"], beside_jax=False),
  "table": Source(load=load_table, facts=SOURCE_FACTS["table"]),
  "heart_disease": Source(load=load_heart_disease, facts=SOURCE_FACTS["heart_disease"]),
  "lung": Source(load=load_lung, facts=SOURCE_FACTS["lung"]),
  "gdsc": Source(load=_gdsc, facts=SOURCE_FACTS["gdsc"]),
  "series": Source(load=load_series, facts=SOURCE_FACTS["series"], beside_jax=False),
}
