"""Every way to get a dataset: embedded phantoms, a folder of pictures, the two public sets."""

import pathlib

from fedjax_med.core.config import DataConfig
from fedjax_med.data.builders import load_builder
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.images import load_folder
from fedjax_med.data.phantoms import make_phantoms


def load_dataset(data: DataConfig) -> Dataset:
  """The dataset that ``data.source`` names; UserError where its files are not as they must be."""
  if data.source == "phantoms":
    return make_phantoms(data.num_examples, data.image_size, data.seed)
  path = pathlib.Path(data.path).expanduser()
  if data.source == "folder":
    return load_folder(path, data)
  return load_builder(path, data)
