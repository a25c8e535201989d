"""tfds builders: same pixels as the folder, never stale, quiet, without TensorFlow."""

import os
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError
from fedjax_med.data import builders
from fedjax_med.data.builders import SOURCES
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.images import load_folder as load_any_folder
from fedjax_med.data.sources import load_dataset

# Importing tfds and what it needs warns of deprecations that this package cannot mend.
pytestmark = [
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),
  pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
OPTIONS: dict[str, Any] = {"image_size": 24, "min_size": 12}
CORRUPT = "corrupt.jpg"


def load_folder(root: pathlib.Path, **options) -> Dataset:
  """The same pictures as any folder."""
  return load_any_folder(root, DataConfig(source="folder", **options))


def load_builder(name: str, root: pathlib.Path, cache: pathlib.Path, **options) -> Dataset:
  return builders.load_builder(root, DataConfig(source=name, cache_dir=str(cache), **options))


def fake_download(root: pathlib.Path, name: str) -> pathlib.Path:
  """A miniature of a public set: RGB in one class, L in the other, one file broken."""
  rng = np.random.default_rng(len(name))
  for label, folder in enumerate(SOURCES[name].class_names):
    (root / folder / "part").mkdir(parents=True)
    for number in range(4):
      shape = (20 + 3 * number, 30, 3) if label else (30, 20 + 3 * number)
      pixels = rng.integers(0, 256, shape).astype(np.uint8)
      image = Image.fromarray(pixels)
      image.save(root / folder / f"y{number}.{'jpg' if number % 2 else 'png'}")
    for place in ("part/nested.png", "part-0.png"):
      last = root / folder / "y2.png"
      (root / folder / place).write_bytes(last.read_bytes())
  Image.fromarray(rng.integers(0, 256, (9, 9)).astype(np.uint8)).save(
    root / SOURCES[name].class_names[1] / "tiny.png"
  )
  (root / SOURCES[name].class_names[0] / CORRUPT).write_bytes(b"\xff\xd8\xff\xe0 broken")
  return root


def same(first: Dataset, second: Dataset) -> None:
  np.testing.assert_array_equal(first.inputs, second.inputs)
  np.testing.assert_array_equal(first.labels, second.labels)
  assert first.names == second.names
  assert first.class_names == second.class_names
  assert sorted(first.skipped) == sorted(second.skipped)


@pytest.fixture(params=sorted(SOURCES))
def download(request, tmp_path: pathlib.Path) -> tuple[str, pathlib.Path]:
  return request.param, fake_download(tmp_path / "download", request.param)


def test_builder_equals_the_folder_pixel_for_pixel_also_from_the_cache(download, tmp_path):
  name, root = download
  expected = load_folder(root, **OPTIONS)
  assert {file for file, *_ in expected.skipped} == {
    f"{SOURCES[name].class_names[0]}/{CORRUPT}",
    f"{SOURCES[name].class_names[1]}/tiny.png",
  }
  assert len(expected.labels) == 12
  first = load_builder(name, root, tmp_path / "cache", **OPTIONS)
  same(first, expected)
  prepared = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*record*")}
  assert prepared
  second = load_builder(name, root, tmp_path / "cache", **OPTIONS)
  same(second, expected)
  assert {path: path.stat().st_mtime_ns for path in prepared} == prepared
  assert first.notes == second.notes == SOURCES[name].notes
  assert first.notes


def test_a_changed_folder_is_not_served_stale(download, tmp_path):
  name, root = download
  cache = tmp_path / "cache"
  before = load_builder(name, root, cache, **OPTIONS)
  victim = root / SOURCES[name].class_names[0] / "y0.png"
  pixels = np.asarray(Image.open(victim))
  Image.fromarray(255 - pixels).save(victim)  # same name; perhaps the same size
  os.utime(victim, ns=(1, victim.stat().st_mtime_ns + 1))
  changed = load_builder(name, root, cache, **OPTIONS)
  same(changed, load_folder(root, **OPTIONS))
  assert not np.array_equal(changed.inputs, before.inputs)
  victim.unlink()
  assert len(load_builder(name, root, cache, **OPTIONS).labels) == len(before.labels) - 1


def test_parent_folder_is_accepted(download, tmp_path):
  name, root = download
  found = load_builder(name, root.parent, tmp_path / "cache", **OPTIONS)
  same(found, load_folder(root, **OPTIONS))


def test_other_folders_of_the_download_are_left_alone(download, tmp_path):
  # Br35H comes with 'pred' (unlabelled pictures) and 'Br35H-Mask-RCNN' beside its two classes.
  name, root = download
  expected = load_folder(root, **OPTIONS)
  (root / "pred").mkdir()
  Image.new("L", (30, 30), 7).save(root / "pred" / "pred0.jpg")
  same(load_builder(name, root, tmp_path / "cache", **OPTIONS), expected)


def test_strict_names_the_broken_file(download, tmp_path):
  name, root = download
  with pytest.raises(UserError, match=r"corrupt\.jpg': cannot be read .*; mend or remove them"):
    load_builder(name, root, tmp_path / "cache", **{**OPTIONS, "strict": True})


def test_patients_come_from_the_pattern(download, tmp_path):
  name, root = download
  options = {**OPTIONS, "patient_pattern": r"^y(\d)\."}
  found = load_builder(name, root, tmp_path / "cache", **options)
  expected = load_folder(root, **options).patients
  assert found.patients is not None
  assert expected is not None
  np.testing.assert_array_equal(found.patients, expected)


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_wrong_folder_is_refused_with_a_sentence(name, tmp_path):
  (tmp_path / "cats").mkdir()
  wanted = " and ".join(SOURCES[name].class_names)
  expected = rf"^data\.path=.* holds no folders {wanted}, which data\.source='{name}' needs; point"
  with pytest.raises(UserError, match=expected):
    load_builder(name, tmp_path, tmp_path / "cache", **OPTIONS)
  with pytest.raises(UserError, match=r"^data\.path=.*nowhere is not a folder; download https://"):
    load_builder(name, tmp_path / "nowhere", tmp_path / "cache", **OPTIONS)
  assert not (tmp_path / "cache").exists()


def test_builder_prints_nothing_and_imports_no_tensorflow(download, tmp_path, capfd):
  name, root = download
  load_builder(name, root, tmp_path / "cache", **OPTIONS)
  load_builder(name, root, tmp_path / "cache", **OPTIONS)
  printed = capfd.readouterr()
  assert printed.out == ""
  assert printed.err == ""
  assert "tensorflow_datasets" in sys.modules
  assert "tensorflow" not in sys.modules


def test_every_source_is_reached_through_its_configuration(tmp_path):
  root = fake_download(tmp_path / "download", "br35h")
  config = DataConfig(
    source="br35h", path=str(root), cache_dir=str(tmp_path / "cache"), image_size=24, min_size=12
  )
  by_builder = load_dataset(config)
  config.source = "folder"
  same(by_builder, load_dataset(config))
  phantoms = load_dataset(DataConfig(num_examples=7, image_size=24, seed=2))
  assert phantoms.inputs.shape == (7, 24, 24, 1)


REAL = {"br35h": ("Br35H", 3000, 1500), "sars_cov2_ct": ("SARS-CoV-2-CT", 2481, 1252)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REAL))
def test_public_sets_are_read_whole(real_data: pathlib.Path, tmp_path: pathlib.Path, name: str):
  folder, count, positive = REAL[name]
  options = {**OPTIONS, "image_size": 64, "min_size": 32}
  dataset = load_builder(name, real_data / folder, tmp_path, **options)
  assert dataset.skipped == ()
  assert len(dataset.labels) == count
  assert dataset.labels.sum() == positive
  same(dataset, load_folder(real_data / folder, **options))
