"""Survival of patients with advanced lung cancer at institutions of the NCCTG (Loprinzi 1994)."""

import pathlib

from fedjax_med.core.config import DataConfig
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.table_manifest import read_manifest
from fedjax_med.data.tables import read_dataset


def load_lung(data: DataConfig) -> Dataset:
  """The dataset of ``data.source=lung``: ``data.path`` is lung.csv of the package lifelines."""
  manifest = read_manifest(pathlib.Path(__file__).with_name("lung.toml"))
  return read_dataset(pathlib.Path(data.path).expanduser(), manifest, data)
