"""Folders of small pictures that tests make, and the configuration that reads them."""

import pathlib

import numpy as np
from PIL import Image

from fedjax_med.core.config import DataConfig
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.images import load_folder

SIDE = 40


def pattern(seed: int, *shape: int) -> np.ndarray:
  """uint8 noise of that shape, SIDE x SIDE by default."""
  return np.random.default_rng(seed).integers(0, 256, shape or (SIDE, SIDE)).astype(np.uint8)


def save(path: pathlib.Path, pixels: np.ndarray | Image.Image, kind: str | None = None) -> None:
  """Writes a picture, and the folders on the way to it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  image.save(path, kind)


def load(root: pathlib.Path, **changes) -> Dataset:
  """Reads a folder at SIDE pixels; ``changes`` are fields of DataConfig."""
  options = {"image_size": SIDE, "min_size": 8, "source": "folder"}
  return load_folder(root, DataConfig(**(options | changes)))


def fill(root: pathlib.Path, *names: str) -> None:
  """Different pictures at these places below ``root``."""
  for seed, name in enumerate(names):
    save(root / name, pattern(seed))
