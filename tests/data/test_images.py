"""A folder of pictures: every format becomes one channel, nothing is lost without being named."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.errors import UserError
from tests.data.folders import SIDE, load, pattern, save


@pytest.fixture
def two(tmp_path: pathlib.Path) -> pathlib.Path:
  """Folder of two classes with three good grey pictures each."""
  for name in ("no", "yes"):
    for number in range(3):
      save(tmp_path / name / f"{number}.png", pattern(number))
  return tmp_path


def test_seven_classes_of_colour_pictures(tmp_path: pathlib.Path):
  names = [f"kind {letter}" for letter in "gfedcba"]
  for seed, name in enumerate(names):
    for number in range(seed % 3 + 1):
      save(tmp_path / name / f"{number}.jpg", pattern(seed, 30, 50, 3))
  dataset = load(tmp_path, image_size=24)
  assert dataset.class_names == tuple(sorted(names))
  np.testing.assert_array_equal(np.bincount(dataset.labels), [1, 3, 2, 1, 3, 2, 1])
  assert dataset.inputs.shape == (13, 24, 24, 1)
  assert dataset.inputs.dtype == np.uint8
  assert dataset.labels.dtype == np.int32
  assert dataset.skipped == ()
  assert dataset.patients is None
  for name, label in zip(dataset.names, dataset.labels, strict=True):
    assert name.split("/")[0] == dataset.class_names[label]


def luma(colour: np.ndarray) -> np.ndarray:
  """ITU-R 601 grey of [..., 3] colours."""
  return colour @ np.array([0.299, 0.587, 0.114])


def palette_image() -> tuple[Image.Image, np.ndarray]:
  numbers, colours = pattern(3) % 16, pattern(4, 16, 3)
  image = Image.fromarray(numbers, "L").convert("P")
  image.putdata(numbers.ravel().tolist())
  image.putpalette(colours.ravel().tolist())
  return image, luma(colours[numbers])


def mode_case(mode: str) -> tuple[Image.Image, np.ndarray, str]:
  """A picture of the mode, the greys it must give, and a file ending that keeps the mode."""
  grey, colour = pattern(0), pattern(1, SIDE, SIDE, 3)
  if mode == "L":
    return Image.fromarray(grey), grey, "png"
  if mode == "RGB":
    return Image.fromarray(colour), luma(colour), "png"
  if mode == "RGBA":
    alpha = pattern(5)
    image = Image.fromarray(np.concatenate([colour, alpha[..., None]], 2))
    return image, luma(colour * (alpha[..., None] / 255)), "png"
  if mode == "LA":
    alpha = pattern(5)
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    return image, grey * (alpha / 255), "png"
  if mode == "P":
    return *palette_image(), "png"
  if mode == "CMYK":
    image = Image.fromarray(colour).convert("CMYK")
    return image, luma(np.asarray(image.convert("RGB"))), "tif"
  if mode == "YCbCr":
    image = Image.fromarray(colour).convert("YCbCr")
    return image, luma(np.asarray(image.convert("RGB"))), "tif"
  if mode == "LAB":
    lightness = np.concatenate([grey[..., None], np.zeros((SIDE, SIDE, 2), np.uint8)], 2)
    return Image.fromarray(lightness, "LAB"), grey, "tif"
  return Image.fromarray(grey > 127), (grey > 127) * 255, "png"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_eight_bits_gives_the_same_one_channel(tmp_path: pathlib.Path, mode: str):
  image, greys, ending = mode_case(mode)
  for name in ("no", "yes"):
    for number in range(2):
      save(tmp_path / name / f"{number}.{ending}", image)
  with Image.open(tmp_path / "no" / f"0.{ending}") as reopened:
    assert reopened.mode == mode
  dataset = load(tmp_path)
  assert dataset.skipped == ()
  assert dataset.inputs.dtype == np.uint8
  # Two grey levels: Pillow rounds the blend with black and the grey of a colour one after another.
  assert np.abs(dataset.inputs[..., 0].astype(float) - greys).max() <= 2


def test_the_content_decides_the_format_not_the_ending(two: pathlib.Path):
  save(two / "yes" / "really a png.jpg", pattern(9), "PNG")
  dataset = load(two)
  found = dataset.inputs[dataset.names.index("yes/really a png.jpg")]
  np.testing.assert_array_equal(found[..., 0], pattern(9))


def test_exif_orientation_is_applied(two: pathlib.Path):
  exif = Image.Exif()
  exif[0x0112] = 6  # stored lying on its side: turn it a quarter clockwise to view it
  Image.fromarray(pattern(9)).save(two / "yes" / "turned.png", exif=exif)
  dataset = load(two)
  found = dataset.inputs[dataset.names.index("yes/turned.png")]
  np.testing.assert_array_equal(found[..., 0], np.rot90(pattern(9), -1))


def test_pictures_are_resized_with_antialiasing(two: pathlib.Path):
  fine = np.indices((160, 160)).sum(0) % 2 * 200  # a checkerboard no sample of which is its mean
  save(two / "yes" / "fine.png", (fine + pattern(0, 160, 160) % 20).astype(np.uint8))
  dataset = load(two)
  found = dataset.inputs[dataset.names.index("yes/fine.png")][4:-4, 4:-4]
  assert np.abs(found.astype(float) - 109.5).max() < 12


def test_too_small_pictures_are_named_with_the_reason(two: pathlib.Path):
  save(two / "no" / "small.png", pattern(0, 7, 30))
  save(two / "no" / "just.png", pattern(0, 8, 30))
  dataset = load(two)
  assert dataset.skipped == (("no/small.png", "30x7 pixels, under data.min_size=8", "no"),)
  assert "no/just.png" in dataset.names


def damage(path: pathlib.Path, how: str) -> None:
  if how == "zero bytes":
    path.write_bytes(b"")
  elif how == "corrupt":
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
  elif how == "text":
    path.write_text("<html>404</html>")
  elif how == "not finite":
    save(path, np.full((SIDE, SIDE), np.nan, np.float32), "TIFF")
  else:
    save(path, pattern(0, SIDE, SIDE, 3), how)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = ["zero bytes", "corrupt", "text", "not finite", "PNG", "JPEG", "BMP", "TIFF"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_left_out_and_named(two: pathlib.Path, how: str):
  damage(two / "yes" / "bad.png", how)
  dataset = load(two)
  assert len(dataset.labels) == 6
  ((name, reason, class_name),) = dataset.skipped
  assert (name, class_name) == ("yes/bad.png", "yes")
  assert reason.startswith("cannot be read (")
  assert "bad" not in reason  # reports of private runs show reasons, and names may be patients'
  assert str(two) not in reason
  assert ("finite" in reason) == (how == "not finite")


@pytest.mark.parametrize("how", DAMAGE)
def test_strict_stops_at_a_damaged_file_and_names_it(two: pathlib.Path, how: str):
  damage(two / "yes" / "bad.png", how)
  with pytest.raises(UserError, match=r"1 files .*'yes/bad\.png': cannot be read .*; mend or"):
    load(two, strict=True)


def test_strict_names_a_too_small_picture(two: pathlib.Path):
  save(two / "no" / "small.png", pattern(0, 7, 30))
  with pytest.raises(UserError, match=r"'no/small\.png': 30x7 pixels, under .*data\.strict=False"):
    load(two, strict=True)


def test_strict_accepts_a_sound_folder(two: pathlib.Path):
  assert len(load(two, strict=True).labels) == 6


def test_nested_folders_belong_to_their_class(two: pathlib.Path):
  save(two / "yes" / "P7" / "scan 1" / "a.PNG", pattern(0))
  dataset = load(two)
  assert dataset.labels[dataset.names.index("yes/P7/scan 1/a.PNG")] == 1


def test_order_does_not_depend_on_the_file_system(two: pathlib.Path, monkeypatch):
  for name in ("B", "a", "10", "9", "deep/a", "deep-a"):
    save(two / "yes" / f"{name}.png", pattern(0))
  expected = load(two).names
  assert expected == tuple(sorted(expected, key=lambda name: name.split("/")))
  for reverse in (False, True):
    listing, walk = os.listdir, os.scandir
    monkeypatch.setattr(os, "listdir", lambda p=".", f=listing, r=reverse: sorted(f(p), reverse=r))

    class Sorted:
      """os.scandir in a chosen order, as another file system might give it."""

      def __init__(self, path=".", walk=walk, reverse=reverse):
        with walk(path) as entries:
          self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=reverse))

      def __enter__(self):
        return self

      def __exit__(self, *_):
        return None

      def __iter__(self):
        return self.entries

      def __next__(self):
        return next(self.entries)

    monkeypatch.setattr(os, "scandir", Sorted)
    assert load(two).names == expected
    monkeypatch.undo()


def test_a_missing_folder_is_refused(tmp_path: pathlib.Path):
  with pytest.raises(UserError, match=r"^data\.path=.*nowhere is not a folder; point --config"):
    load(tmp_path / "nowhere")


def test_a_folder_without_class_folders_is_refused(tmp_path: pathlib.Path):
  save(tmp_path / "a.png", pattern(0))
  with pytest.raises(
    UserError,
    match=r"no class folders but 1 files: a picture \(1\); put the pictures of each class",
  ):
    load(tmp_path)


def test_one_class_is_refused(tmp_path: pathlib.Path):
  save(tmp_path / "yes" / "a.png", pattern(0))
  with pytest.raises(UserError, match=r"holds one class only \('yes'\); add a folder"):
    load(tmp_path)


def test_an_empty_class_is_refused(two: pathlib.Path):
  (two / "maybe").mkdir()
  with pytest.raises(UserError, match=r"class folder .*maybe holds no pictures; remove it or add"):
    load(two)


def test_a_class_of_broken_files_is_refused_with_one_of_them(two: pathlib.Path):
  damage(two / "no" / "alien.png", "corrupt")
  for number in range(3):
    damage(two / "yes" / f"{number}.png", "zero bytes")
  expected = (
    r"class 'yes' of .* has no usable picture: 3 files .*yes/0\.png: cannot be read .*; lower"
  )
  with pytest.raises(UserError, match=expected):
    load(two)
