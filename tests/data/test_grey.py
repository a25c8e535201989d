"""One rule turns the grey values of a whole data set into pixels, whatever files they came in."""

import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.errors import UserError
from fedjax_med.data.duplicates import near_duplicate_groups
from fedjax_med.data.images import read_values
from fedjax_med.data.normalisation import normalise
from tests.data.folders import SIDE, fill, load, pattern, save

PLACES = ["no/0", "no/1", "yes/0", "yes/1"]


def counts(number: int, high: int = 4000) -> np.ndarray:
  """int32 values of a scanner, 0 to ``high``."""
  return np.random.default_rng(number).integers(0, high + 1, (SIDE, SIDE)).astype(np.int32)


def write(root: pathlib.Path, scenes: list[np.ndarray], kind: str) -> None:
  """The same scenes as files of a kind."""
  for place, scene in zip(PLACES, scenes, strict=True):
    ending, dtype = {
      "png16": ("png", np.uint16),
      "tif16": ("tif", np.uint16),
      "tif32": ("tif", np.int32),
      "float": ("tiff", np.float32),
    }[kind]
    save(root / f"{place}.{ending}", scene.astype(dtype))


@pytest.mark.parametrize("kind", ["png16", "tif16", "tif32", "float"])
@pytest.mark.parametrize(
  ("high", "bits"), [(200, 8), (1000, 10), (4095, 12), (4096, 14), (40000, 16)]
)
def test_the_largest_value_of_all_files_gives_one_depth_for_each_of_them(
  tmp_path, kind, high, bits
):
  scenes = [counts(0, high), *(counts(number, high // 9) for number in range(1, 4))]
  scenes[0][0, 0] = high
  write(tmp_path, scenes, kind)
  dataset = load(tmp_path)
  assert dataset.inputs.dtype == np.uint16
  assert (dataset.grey.low, dataset.grey.high) == (0, 2**bits - 1)
  exact = np.stack(scenes) / (2**bits - 1)
  np.testing.assert_allclose(dataset.inputs[..., 0] / 65535, exact, atol=1 / 65535)


def test_negative_values_move_the_black_end_for_all_files(tmp_path):
  scenes = [counts(number) - 1024 for number in range(4)]
  scenes[2] = np.maximum(scenes[2], 5)
  write(tmp_path, scenes, "tif32")
  dataset = load(tmp_path)
  assert (dataset.grey.low, dataset.grey.high) == (-1024, 4095)
  restored = dataset.inputs[..., 0] / 65535 * (4095 + 1024) - 1024
  np.testing.assert_allclose(restored, np.stack(scenes), atol=0.1)


@pytest.mark.parametrize(("low", "expected"), [(0.0, (0, 1)), (-0.5, (-1, 1))])
def test_fractions_keep_their_usual_range(tmp_path, low, expected):
  write(tmp_path, [counts(number) / 5000 + low for number in range(4)], "float")
  grey = load(tmp_path).grey
  assert (grey.low, grey.high) == expected


def test_a_window_is_applied_to_the_values_of_every_file(tmp_path):
  scenes = [counts(number) for number in range(4)]
  write(tmp_path, scenes, "tif16")
  dataset = load(tmp_path, window="1000,3000")
  expected = np.clip((np.stack(scenes) - 1000) / 2000, 0, 1)
  np.testing.assert_allclose(dataset.inputs[..., 0] / 65535, expected, atol=1 / 65535)


def test_a_window_spreads_pictures_of_eight_bits_too(tmp_path):
  fill(tmp_path, *(f"{place}.png" for place in PLACES))
  dataset = load(tmp_path, window="100,150")
  expected = np.clip((np.stack([pattern(n) for n in range(4)]) - 100.0) / 50, 0, 1)
  np.testing.assert_allclose(dataset.inputs[..., 0] / 65535, expected, atol=1 / 65535)


@pytest.mark.parametrize("window", ["1", "1,2,3", "a,b", "5,5", "9,1", "nan,1", "0,inf"])
def test_a_wrong_window_is_refused_before_anything_is_read(tmp_path, window):
  with pytest.raises(UserError, match=rf"data\.window='{window}' is not LOW,HIGH with LOW < HIGH"):
    load(tmp_path / "nowhere", window=window)


def test_depth_is_kept_through_a_change_of_size(tmp_path):
  for number, place in enumerate(PLACES):
    scene = 1000 + 40 * np.random.default_rng(number).random((4 * SIDE, 4 * SIDE))
    save(tmp_path / f"{place}.tif", scene.round().astype(np.uint16))
  inputs = load(tmp_path).inputs
  assert len(np.unique(inputs[0])) > 100  # of 41 values in the file; 8 bits would keep three


def test_files_of_eight_bits_and_deeper_ones_are_not_mixed_without_a_window(tmp_path):
  fill(tmp_path, "no/0.png", "yes/0.png")
  save(tmp_path / "yes" / "1.png", counts(1).astype(np.uint16))
  with pytest.raises(UserError, match=r"2 pictures of 8 bits and 1 deeper ones .* are mixed"):
    load(tmp_path)
  assert len(load(tmp_path, window="0,4095").names) == 3


def test_values_beyond_sixteen_bits_want_a_window(tmp_path):
  write(tmp_path, [counts(number, 100_000) for number in range(4)], "tif32")
  with pytest.raises(UserError, match=r"beyond 16 bits; give data\.window=LOW,HIGH"):
    load(tmp_path)
  assert load(tmp_path, window="0,100000").grey.high == 100_000


def white_is_zero(path: pathlib.Path) -> None:
  """Says in a TIFF of one page that the lowest value is white (PhotometricInterpretation)."""
  data = bytearray(path.read_bytes())
  place = struct.unpack("<I", data[4:8])[0]
  entries = struct.unpack("<H", data[place : place + 2])[0]
  for entry in range(place + 2, place + 2 + 12 * entries, 12):
    if struct.unpack("<H", data[entry : entry + 2])[0] == 262:
      data[entry + 8 : entry + 10] = struct.pack("<H", 0)
      path.write_bytes(data)
      return
  raise AssertionError("no tag 262")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_where_white_is_zero_pictures_are_inverted(tmp_path, dtype):
  high = 255 if dtype == np.uint8 else 4095
  scenes = [counts(number, high) for number in range(4)]
  scenes[0][0, 0] = high
  for number, (place, scene) in enumerate(zip(PLACES, scenes, strict=True)):
    save(tmp_path / f"{place}.tif", (high - scene if number == 3 else scene).astype(dtype))
  white_is_zero(tmp_path / f"{PLACES[3]}.tif")
  dataset = load(tmp_path)
  top = np.iinfo(dataset.inputs.dtype).max
  np.testing.assert_allclose(
    dataset.inputs[..., 0] / top, np.stack(scenes) / high, atol=0.5 / 255 if top == 255 else 1e-4
  )


def test_deep_colours_that_pillow_halves_are_named(tmp_path):
  fill(tmp_path, *(f"{place}.png" for place in PLACES))
  header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)  # 2x2, 16 bits, RGB

  def chunk(kind: bytes, data: bytes) -> bytes:
    whole = kind + data
    return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

  rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
  png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
  (tmp_path / "yes" / "deep.png").write_bytes(png + chunk(b"IEND", b""))
  ((name, reason, _),) = load(tmp_path, min_size=1).skipped
  assert name == "yes/deep.png"
  assert reason.startswith("16 bits a colour channel, which cannot be read without loss")


def test_further_frames_are_named_and_stop_a_strict_run(tmp_path):
  fill(tmp_path, *(f"{place}.png" for place in PLACES))
  frames = [Image.fromarray(pattern(number)) for number in range(5, 8)]
  frames[0].save(tmp_path / "yes" / "stack.tif", save_all=True, append_images=frames[1:])
  dataset = load(tmp_path)
  lost = ("yes/stack.tif, frames 2 to 3", "only the first frame of a file is read", "yes")
  assert dataset.skipped == (lost,)
  found = dataset.inputs[dataset.names.index("yes/stack.tif"), :, :, 0]
  np.testing.assert_array_equal(found, pattern(5))
  with pytest.raises(UserError, match=r"data\.strict: .*'yes/stack\.tif, frames 2 to 3'"):
    load(tmp_path, strict=True)


def test_few_grey_levels_are_counted(tmp_path):
  for number, place in enumerate(PLACES):
    save(tmp_path / f"{place}.png", pattern(number) // 16 * 16)
  assert load(tmp_path).grey.levels == 16


def test_jpeg_2000_and_portable_greymaps_are_read(tmp_path):
  for number, (place, ending) in enumerate(zip(PLACES, ("jp2", "pgm", "j2k", "pnm"), strict=True)):
    path = tmp_path / f"{place}.{ending}"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pattern(number)).save(path)  # JPEG 2000 without loss by default
  found = load(tmp_path, strict=True)
  np.testing.assert_array_equal(found.inputs[..., 0], [pattern(number) for number in range(4)])


@pytest.mark.parametrize("maxval", [100, 1023, 4095])
def test_greymaps_that_pillow_scales_are_named(tmp_path, maxval):
  fill(tmp_path, *(f"{place}.png" for place in PLACES))
  size = 1 if maxval < 256 else 2
  values = b"".join((50).to_bytes(size, "big") for _ in range(100))
  (tmp_path / "no" / "scaled.pgm").write_bytes(b"P5\n10 10\n%d\n" % maxval + values)
  ((name, reason, _),) = load(tmp_path, min_size=1).skipped
  assert name == "no/scaled.pgm"
  assert reason.startswith("a largest value (maxval) other than 255 and 65535")


def test_a_window_that_keeps_few_levels_or_cuts_much_is_told(tmp_path):
  write(tmp_path, [counts(number) for number in range(4)], "tif16")
  far = load(tmp_path, window="-150,50").grey
  assert far.levels < 32
  assert 0.98 < far.outside < 0.99
  with pytest.raises(UserError, match=r"100% of all pixels lie outside the grey values -150"):
    load(tmp_path, window="-150,-50")
  half = load(tmp_path, window="0,2000").grey
  assert half.levels > 500
  assert 0.4 < half.outside < 0.6


def test_fractions_may_overshoot_their_range_a_little(tmp_path):
  write(tmp_path, [counts(number) / 3997.3 for number in range(4)], "float")  # up to 1.0007
  assert (load(tmp_path).grey.low, load(tmp_path).grey.high) == (0, 1)


def test_the_same_scene_gives_the_same_network_inputs_at_any_depth(tmp_path):
  scenes = [counts(number, 255) for number in range(4)]
  scenes[0][0, 0] = 255
  found = []
  for kind, factor in (("png8", 1), ("tif16", 257), ("tif32", 257)):
    root = tmp_path / kind
    for place, scene in zip(PLACES, scenes, strict=True):
      dtype = {"png8": np.uint8, "tif16": np.uint16, "tif32": np.int32}[kind]
      ending = "png" if kind == "png8" else "tif"
      save(root / f"{place}.{ending}", (scene * factor).astype(dtype))
    found.append(load(root).inputs)
  for how in ("image", "fixed"):
    first, *others = (np.asarray(normalise(images, how)) for images in found)
    for other in others:
      np.testing.assert_allclose(other, first, atol=1e-5)


def test_near_duplicates_do_not_depend_on_the_depth(tmp_path):
  # Smooth shades with a bright disc: noise would have no copies.
  y, x = np.mgrid[:64, :64]
  rng = np.random.default_rng(0)
  scenes = []
  for _ in range(5):
    centre = rng.uniform(15, 49, 2)
    shades = 900 + 200 * np.sin(x / rng.uniform(3, 9)) * np.cos(y / rng.uniform(3, 9))
    scenes.append(shades + 150 * (np.hypot(x - centre[0], y - centre[1]) < 9))
  deep = np.stack([*scenes, scenes[0][:, ::-1] * 1.2 - 40]).astype(np.uint16) * 16
  low, high = deep.min(), deep.max()
  flat = ((deep - low) / (high - low) * 255).astype(np.uint8)
  np.testing.assert_array_equal(near_duplicate_groups(deep), near_duplicate_groups(flat))
  assert near_duplicate_groups(deep)[5] == near_duplicate_groups(deep)[0]


def test_a_picture_of_its_own_size_keeps_its_values(tmp_path):
  save(tmp_path / "a.tif", counts(3).astype(np.uint16))
  values = read_values(tmp_path / "a.tif", 1, 0)
  assert not isinstance(values, str)
  np.testing.assert_array_equal(values.pixels, counts(3))


def test_small_fractions_keep_their_levels(tmp_path):
  write(tmp_path, [counts(number) / 4000 * 0.003 for number in range(4)], "float")
  grey = load(tmp_path).grey
  assert (grey.low, grey.high) == (0, 2**-8)
  assert grey.levels > 1000


def test_blank_pictures_are_counted(tmp_path):
  fill(tmp_path, *(f"{place}.png" for place in PLACES))
  save(tmp_path / "no" / "2.png", np.zeros((SIDE, SIDE), np.uint8))
  assert load(tmp_path).grey.blank == 1


def test_signed_values_of_eight_bits_are_named(tmp_path):
  fill(tmp_path, *(f"{place}.png" for place in PLACES))
  path = tmp_path / "no" / "signed.tif"
  Image.fromarray(pattern(9)).save(path, tiffinfo={339: 2})
  ((name, reason, _),) = load(tmp_path).skipped
  assert name == "no/signed.tif"
  assert reason.startswith("signed values of 8 bits")
