"""A folder of pictures: every format becomes one channel, nothing is lost without being named."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.images import list_folder, load_folder, order_classes, parse_patients

SIDE = 40


def pattern(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape or (SIDE, SIDE)).astype(np.uint8)


def save(path: pathlib.Path, pixels: np.ndarray | Image.Image, kind: str | None = None) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  image.save(path, kind)


def load(root: pathlib.Path, **changes) -> Dataset:
  options = {"image_size": SIDE, "min_size": 8, "strict": False, "patient_pattern": ""}
  return load_folder(root, **(options | changes))


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
  wide = np.random.default_rng(2).integers(0, 65536, (SIDE, SIDE))
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
  if mode == "1":
    return Image.fromarray(grey > 127), (grey > 127) * 255, "png"
  if mode == "I;16":
    return Image.fromarray(wide.astype(np.uint16)), wide / 65535 * 255, "png"
  if mode == "I":
    spread = (wide - wide.min()) / (wide.max() - wide.min())
    return Image.fromarray(wide.astype(np.int32)), spread * 255, "tif"
  values = (wide / 100 - 50).astype(np.float32)
  return Image.fromarray(values), (values - values.min()) / np.ptp(values) * 255, "tiff"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "I", "F"])
def test_every_mode_gives_the_same_one_channel(two: pathlib.Path, mode: str):
  image, greys, ending = mode_case(mode)
  save(two / "yes" / f"odd.{ending}", image)
  with Image.open(two / "yes" / f"odd.{ending}") as reopened:
    assert reopened.mode == mode
  dataset = load(two)
  assert dataset.skipped == ()
  found = dataset.inputs[dataset.names.index(f"yes/odd.{ending}")]
  assert found.shape == (SIDE, SIDE, 1)
  # Two grey levels: Pillow rounds the blend with black and the grey of a colour one after another.
  assert np.abs(found[..., 0].astype(float) - greys).max() <= 2


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
  fine = np.indices((160, 160)).sum(0) % 2 * 255  # a checkerboard no sample of which is its mean
  save(two / "yes" / "fine.png", fine.astype(np.uint8))
  dataset = load(two)
  found = dataset.inputs[dataset.names.index("yes/fine.png")][4:-4, 4:-4]
  assert np.abs(found.astype(float) - 127.5).max() < 12


def test_too_small_pictures_are_named_with_the_reason(two: pathlib.Path):
  save(two / "no" / "small.png", pattern(0, 7, 30))
  save(two / "no" / "just.png", pattern(0, 8, 30))
  dataset = load(two)
  assert dataset.skipped == (("no/small.png", "30x7 pixels, under data.min_size=8"),)
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
  ((name, reason),) = dataset.skipped
  assert name == "yes/bad.png"
  assert reason.startswith("cannot be read (")
  assert "bad" not in reason  # reports of private runs show reasons, and names may be patients'
  assert str(two) not in reason
  assert ("finite" in reason) == (how == "not finite")


@pytest.mark.parametrize("how", DAMAGE)
def test_strict_stops_at_a_damaged_file_and_names_it(two: pathlib.Path, how: str):
  damage(two / "yes" / "bad.png", how)
  with pytest.raises(UserError, match=r"yes/bad\.png cannot be read .*; mend or remove it"):
    load(two, strict=True)


def test_strict_names_a_too_small_picture(two: pathlib.Path):
  save(two / "no" / "small.png", pattern(0, 7, 30))
  with pytest.raises(UserError, match=r"no/small\.png 30x7 pixels, under .*data\.strict=False"):
    load(two, strict=True)


def test_strict_accepts_a_sound_folder(two: pathlib.Path):
  assert len(load(two, strict=True).labels) == 6


def test_hidden_files_and_other_files_are_ignored(two: pathlib.Path):
  before = load(two)
  save(two / "__MACOSX" / "yes" / "a.png", pattern(0))
  save(two / ".cache" / "a.png", pattern(0))
  save(two / "yes" / "__MACOSX" / "a.png", pattern(0))
  save(two / "yes" / ".thumbnails" / "deep" / "a.png", pattern(0))
  (two / "yes" / "._0.png").write_bytes(b"resource fork")
  (two / "yes" / "notes.txt").write_text("not a picture")
  (two / "README.md").write_text("not a class")
  after = load(two, strict=True)
  assert after.names == before.names
  assert after.class_names == before.class_names


def test_nested_folders_belong_to_their_class(two: pathlib.Path):
  save(two / "yes" / "P7" / "scan 1" / "a.PNG", pattern(0))
  dataset = load(two)
  assert dataset.labels[dataset.names.index("yes/P7/scan 1/a.PNG")] == 1


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    (["yes", "no"], ("no", "yes")),
    (["COVID", "non-COVID"], ("non-COVID", "COVID")),
    (["Tumor", "healthy"], ("healthy", "Tumor")),
    (["abnormal", "normal"], ("normal", "abnormal")),
    (["0", "1"], ("0", "1")),
    (["negative", "positive"], ("negative", "positive")),
    (["cats", "dogs"], ("cats", "dogs")),
    (["yes", "no", "maybe"], ("maybe", "no", "yes")),
  ],
)
def test_the_positive_of_two_classes_comes_last(given, expected):
  assert order_classes(given) == expected
  assert order_classes(given[::-1]) == expected


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
  with pytest.raises(UserError, match="holds no class folders; put the pictures of each class"):
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
    r"class 'yes' of .* has no usable picture: 3 files .*yes/0\.png cannot be read .*; lower"
  )
  with pytest.raises(UserError, match=expected):
    load(two)


def test_a_broken_pattern_is_refused(two: pathlib.Path):
  with pytest.raises(UserError, match=r"^data\.patient_pattern='\(' is not a regular expression"):
    load(two, patient_pattern="(")


def test_a_pattern_without_a_group_is_refused(two: pathlib.Path):
  with pytest.raises(UserError, match=r"^data\.patient_pattern='P1' has no group; put brackets"):
    load(two, patient_pattern="P1")


def test_patients_are_grouped_by_the_first_group_of_the_pattern(two: pathlib.Path):
  for name in ("no/P1_a", "no/P2_a", "yes/P1_b", "yes/P2_b", "yes/P2_c"):
    save(two / f"{name}.png", pattern(0))
  dataset = load(two, patient_pattern=r"/(P\d+)_")
  assert dataset.patients is not None
  assert dataset.patients.dtype == np.int32
  keys = [name.split("/")[1].split("_")[0] if "_" in name else name for name in dataset.names]
  for number, key in enumerate(keys):
    same = dataset.patients == dataset.patients[number]
    np.testing.assert_array_equal(same, np.array(keys) == key)


def test_a_name_whose_group_took_no_part_is_a_patient_of_its_own():
  found = parse_patients(["a/P1_x", "a/y", "a/z", "a/P1_y"], r"^a/(P\d+)?")
  assert found is not None
  assert len(set(found.tolist())) == 3
  assert found[0] == found[3]


def test_listing_names_files_relative_to_the_folder(two: pathlib.Path):
  listing = list_folder(two)
  assert [(name, label) for _, name, label in listing.files] == [
    (f"{folder}/{number}.png", label)
    for label, folder in enumerate(("no", "yes"))
    for number in range(3)
  ]
  assert all(path == two / name for path, name, _ in listing.files)
