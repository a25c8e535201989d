"""One number of channels for the whole data set: a file's own never tells its class."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.augmentation import Changes, change
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.duplicates import near_duplicate_groups
from fedjax_med.data.grey import as_grey, has_colour
from fedjax_med.data.images import read_pixels
from fedjax_med.data.normalisation import normalise
from fedjax_med.data.sources import load_dataset
from tests.data.folders import SIDE, load, pattern, save
from tests.prepare.setting_cases import base

PLACES = [f"{name}/{number}.png" for name in ("no", "yes") for number in range(3)]


def fill(root: pathlib.Path, pictures: dict[str, Image.Image]) -> pathlib.Path:
  """Pictures at these places, and a manifest that lists them."""
  for place, picture in pictures.items():
    save(root / place, picture)
  frame = pd.DataFrame({"path": list(pictures)})
  frame.assign(label=frame.path.str.split("/").str[0]).to_csv(root / "list.csv", index=False)
  return root / "list.csv"


def grey(number: int) -> Image.Image:
  return Image.fromarray(pattern(number))


def colours(number: int) -> Image.Image:
  return Image.fromarray(pattern(number, SIDE, SIDE, 3))


def read(path: pathlib.Path, **changes) -> Dataset:
  options = {"image_size": SIDE, "min_size": 8, "source": "manifest", "path": str(path)}
  return load_dataset(DataConfig(**(options | changes)))


@pytest.mark.parametrize("channels", ["auto", "1", "3"])
def test_grey_pictures_are_equal_whatever_channels_their_files_have(tmp_path, channels):
  one = fill(tmp_path / "one", {place: grey(k) for k, place in enumerate(PLACES)})
  modes = ("L", "RGB", "RGBA", "P", "L", "RGB")
  many = {p: grey(k).convert(mode) for k, (p, mode) in enumerate(zip(PLACES, modes, strict=True))}
  # One class in three channels, the other in one, as the public SARS-CoV-2-CT has them.
  apart = {p: grey(k).convert("RGB" if k < 3 else "L") for k, p in enumerate(PLACES)}
  first = read(one, channels=channels)
  assert first.inputs.shape[3] == (3 if channels == "3" else 1)
  for number, pictures in enumerate((many, apart)):
    other = read(fill(tmp_path / str(number), pictures), channels=channels)
    np.testing.assert_array_equal(other.inputs, first.inputs)
  np.testing.assert_array_equal(first.inputs[..., -1], np.stack([pattern(k) for k in range(6)]))


def test_jpegs_of_grey_pictures_do_not_tell_how_they_were_stored(tmp_path):
  save(tmp_path / "a.jpg", grey(0).convert("RGB"))
  save(tmp_path / "b.jpg", colours(0))
  assert not has_colour(np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")))
  assert has_colour(np.asarray(Image.open(tmp_path / "b.jpg")))
  marked = np.repeat(pattern(0)[..., None], 3, axis=2)
  marked[0, :10] = (255, 0, 0)  # under 1% of the pixels
  assert not has_colour(marked)


def test_auto_is_three_channels_where_every_picture_of_a_manifest_has_colours(tmp_path):
  path = fill(tmp_path, {place: colours(k) for k, place in enumerate(PLACES)})
  dataset = read(path)
  expected = np.stack([pattern(k, SIDE, SIDE, 3) for k in range(6)])
  np.testing.assert_array_equal(dataset.inputs, expected)
  assert dataset.grey.channels == 3
  assert dataset.grey.described.startswith("Red, green and blue values 0 (black) to 255 (white)")
  assert [note.partition(":")[0] for note in dataset.notes] == [
    "Three channels, since all pictures have colours"
  ]
  assert read(path, channels="3").notes == ()
  as_pillow = np.stack([np.asarray(colours(k).convert("L")) for k in range(6)])
  np.testing.assert_array_equal(read(path, channels="1").inputs[..., 0], as_pillow)
  np.testing.assert_array_equal(load(tmp_path).inputs[..., 0], as_pillow)  # a folder stays grey
  np.testing.assert_array_equal(load(tmp_path, channels="3").inputs, expected)
  save(tmp_path / PLACES[4], grey(4))
  mixed = read(path)
  assert mixed.inputs.shape[3] == 1
  three = read(path, channels="3")
  assert three.notes == (
    "1 of 6 pictures have no colours (1 of class yes): this may tell their class.",
  )
  np.testing.assert_array_equal(three.inputs[4], np.repeat(pattern(4)[..., None], 3, axis=2))


def test_an_array_of_colours_is_three_channels_and_one_of_greys_is_one(tmp_path):
  values = np.stack([pattern(k, SIDE, SIDE, 3) for k in range(8)])
  labels = np.arange(8) % 2
  np.savez(tmp_path / "set.npz", train_images=values, train_labels=labels)
  np.testing.assert_array_equal(read(tmp_path / "set.npz", source="npz").inputs, values)
  assert read(tmp_path / "set.npz", source="npz", channels="1").inputs.shape[3] == 1
  same = np.repeat(values[..., :1], 3, axis=3)
  np.savez(tmp_path / "set.npz", train_images=same, train_labels=labels)
  dataset = read(tmp_path / "set.npz", source="npz")
  np.testing.assert_array_equal(dataset.inputs, same[..., :1])


def test_a_window_holds_for_each_colour_and_a_picture_is_read_as_in_training(tmp_path):
  path = fill(tmp_path, {place: colours(k) for k, place in enumerate(PLACES)})
  for window in ("", "50,200"):
    dataset = read(path, window=window, image_size=24)
    found = read_pixels(tmp_path / PLACES[2], 8, 24, dataset.grey, bool(window))
    np.testing.assert_array_equal(found, dataset.inputs[2])
  exact = np.clip((pattern(2, SIDE, SIDE, 3) - 50.0) / 150, 0, 1)
  whole = read(path, window="50,200").inputs[2]
  np.testing.assert_allclose(whole / 65535, exact, atol=1 / 65535)


def test_near_duplicates_of_colours_are_those_of_their_greys():
  images = np.stack([pattern(k, 32, 32, 3) for k in range(8)])
  images = np.concatenate([images, images[:3, :, ::-1]])
  pillow = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
  np.testing.assert_array_equal(as_grey(images), pillow)
  groups = near_duplicate_groups(images)
  np.testing.assert_array_equal(groups, near_duplicate_groups(pillow))
  assert groups[8:].tolist() == [0, 1, 2]


def test_colours_are_varied_and_normalised_together():
  images = jnp.asarray(pattern(0, 2, 16, 16, 3))
  flipped = change(images, Changes(flip=jnp.array([True, False]), shift=jnp.zeros((2, 2))))
  np.testing.assert_array_equal(flipped[0], np.asarray(images)[0, :, ::-1])
  ready = np.asarray(normalise(images, "image"))
  values = np.asarray(images, np.float64)
  axes = (1, 2, 3)
  expected = (values - values.mean(axes, keepdims=True)) / values.std(axes, keepdims=True)
  np.testing.assert_allclose(ready, expected, atol=1e-5)


def test_the_record_of_grey_runs_is_as_it_was_and_that_of_colours_names_three_channels(tmp_path):
  path = fill(tmp_path, {place: colours(k) for k, place in enumerate(PLACES)})
  assert "channels" not in read(path, channels="1").grey.record
  assert read(path).grey.record["channels"] == 3


def test_channels_are_chosen_for_files_of_pictures_only():
  config = base()
  config.data.channels = "3"
  with pytest.raises(UserError, match=r"channels='3' is read with data.source=folder, manifest or"):
    validate(config)
