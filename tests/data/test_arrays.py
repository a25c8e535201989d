"""A .npz file in MedMNIST's layout: its images, classes and sides, and what is refused."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.config import DataConfig, PartitionConfig
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.sources import load_dataset
from tests.data.folders import pattern

SIDE = 28
COUNTS = {"train": 20, "val": 6, "test": 10}


def arrays(classes: int = 3, shape: tuple[int, ...] = (SIDE, SIDE)) -> dict[str, np.ndarray]:
  """Arrays as MedMNIST stores them: labels [n, 1]."""
  held = {}
  for seed, (part, count) in enumerate(COUNTS.items()):
    held[f"{part}_images"] = pattern(seed, count, *shape)
    held[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
  return held


def write(folder: pathlib.Path, held: dict[str, np.ndarray], **others) -> pathlib.Path:
  kept = {name: value for name, value in (held | others).items() if value is not None}
  np.savez(folder / "set.npz", **kept)  # pyright: ignore[reportArgumentType]
  return folder / "set.npz"


def data_of(path: pathlib.Path, **changes) -> DataConfig:
  options = {"image_size": SIDE, "min_size": SIDE, "source": "npz", "path": str(path)}
  return DataConfig(**(options | changes))


def read(path: pathlib.Path, **changes) -> Dataset:
  return load_dataset(data_of(path, **changes))


def test_images_and_labels_are_those_of_the_arrays_and_val_is_trained_on(tmp_path):
  held = arrays()
  dataset = read(write(tmp_path, held))
  images = np.concatenate([held[f"{part}_images"] for part in COUNTS])
  labels = np.concatenate([held[f"{part}_labels"][:, 0] for part in COUNTS])
  np.testing.assert_array_equal(dataset.inputs, images[..., None])
  np.testing.assert_array_equal(dataset.labels, labels)
  assert dataset.class_names == ("0", "1", "2")
  assert dataset.names[19:21] == ("train 19", "val 0")
  assert dataset.in_test is not None
  assert np.flatnonzero(dataset.in_test).tolist() == list(range(26, 36))
  assert dataset.skipped == ()


def test_the_split_is_kept_or_drawn_anew(tmp_path):
  path = write(tmp_path, arrays())
  partition = PartitionConfig(scheme="iid", num_clients=2, min_client_size=1)
  data = data_of(path)
  assert build_hospitals(load_dataset(data), data, partition).split.test.tolist() == [
    *range(26, 36)
  ]
  data = data_of(path, given_split=False, test_fraction=0.5)
  split = build_hospitals(load_dataset(data), data, partition).split
  assert (split.scheme, len(split.test)) == ("grouped", 18)
  with pytest.raises(UserError, match=r"test_fraction=0.5 is not read: test_images of .* gives th"):
    read(path, test_fraction=0.5)
  path = write(tmp_path, arrays(), test_images=None, test_labels=None)
  assert read(path).in_test is None
  with pytest.raises(UserError, match=r"given_split=False with .*, which has no test_images"):
    read(path, given_split=False)


def test_other_sizes_depths_and_labels_are_read_as_pictures_are(tmp_path):
  held = arrays(2)
  deep = {name: value.astype(np.uint16) * 16 for name, value in held.items() if "images" in name}
  dataset = read(write(tmp_path, held, **deep), window="0,4080")
  exact = np.concatenate([held[f"{part}_images"] for part in COUNTS]) / 255
  np.testing.assert_allclose(dataset.inputs[..., 0] / 65535, exact, atol=1 / 65535)
  small = read(write(tmp_path, held), image_size=16)
  expected = Image.fromarray(held["train_images"][3]).resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(small.inputs[3, ..., 0], np.asarray(expected))
  names = {f"{part}_labels": np.where(held[f"{part}_labels"] == 1, "no", "yes") for part in COUNTS}
  assert read(write(tmp_path, held, **names)).class_names == ("no", "yes")
  assert read(write(tmp_path, held), positive="0").class_names == ("1", "0")
  many = {f"{part}_labels": np.arange(count) % 11 for part, count in COUNTS.items()}
  many |= {"test_images": None, "test_labels": None}
  assert read(write(tmp_path, held, **many)).class_names == tuple(map(str, range(11)))


def test_an_image_may_have_several_labels(tmp_path):
  held = arrays()
  random = np.random.default_rng(0)
  marks = {part: random.integers(0, 2, (count, 4)) for part, count in COUNTS.items()}
  path = write(tmp_path, held | {f"{part}_labels": each for part, each in marks.items()})
  dataset = read(path)
  assert dataset.targets is not None
  assert (dataset.task, dataset.targets.names) == (
    "multilabel",
    tuple(f"label {k}" for k in range(4)),
  )
  whole = np.concatenate([marks[part] for part in COUNTS])
  np.testing.assert_array_equal(dataset.targets.values, whole)
  np.testing.assert_array_equal(dataset.labels, whole.any(axis=1))
  assert dataset.class_names == ("no label", "some label")
  with pytest.raises(UserError, match=r"data.positive='1' is of classes, and several labels or"):
    read(path, positive="1")


def test_an_array_of_another_name_is_counted(tmp_path):
  path = write(tmp_path, arrays(), ages=np.arange(3))
  assert read(path).skipped == (("ages", "no array of MedMNIST's layout", ""),)


def test_images_under_the_least_size_say_so(tmp_path):
  with pytest.raises(UserError, match=r"28x28 pixels, under data.min_size=32; lower data.min_size"):
    read(write(tmp_path, arrays()), min_size=32)


@pytest.mark.parametrize(
  ("others", "sentence"),
  [
    ({"train_images": None}, r"holds no train_images but test_images, test_labels, .*; name its a"),
    ({"val_labels": None}, r"has val_images and no val_labels; store both"),
    ({"train_labels": np.zeros((20, 14), int)}, r"labels of the parts of .* are of unlike shapes"),
    ({"train_labels": np.full((20, 3), 2)}, r"train_labels of .* is \[20, 3\], several labels an"),
    ({"train_labels": np.zeros(19, int)}, r"has 20 train_images and 19 train_labels; store a"),
    ({"train_labels": np.full(20, 0.5)}, r"train_labels of .* is float64\[20\] with values th"),
    ({"train_labels": np.full(20, np.nan)}, r"train_labels of .* with values that are no classes"),
    ({"train_images": np.zeros((20, 8, 8, 8), np.uint8)}, r"is uint8\[20, 8, 8, 8\], no pict"),
    ({"train_images": np.zeros((20, 8, 8, 3))}, r"has colours of float64, which cannot be read"),
    ({"train_images": np.zeros((20, 9, 9), complex)}, r"complex128\[20, 9, 9\], no pictures"),
    ({"train_labels": np.array([{}] * 20)}, r"cannot be read as .npz \(Object arrays cannot"),
    ({f"{part}_labels": np.ones(count, int) for part, count in COUNTS.items()},
     r"holds one class only \('1'\); add images"),
  ],
)  # fmt: skip
def test_wrong_arrays_are_refused_in_a_sentence(tmp_path, others, sentence):
  with pytest.raises(UserError, match=sentence):
    read(write(tmp_path, arrays(), **others))


def test_what_is_no_npz_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"is no .npz file; point --config.data.path at the file"):
    read(tmp_path)
  (tmp_path / "set.npz").write_bytes(b"none")
  with pytest.raises(UserError, match=r"cannot be read as .npz"):
    read(tmp_path / "set.npz")
