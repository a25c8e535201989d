"""Near-duplicates: copies are joined, different patients and blank images are not."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fedjax_med.data import duplicates
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.duplicates import (
  descriptors,
  find_contradictions,
  join_groups,
  near_duplicate_groups,
  number_groups,
)
from fedjax_med.data.phantoms import make_phantoms

COUNT = 40


def gamma(image: np.ndarray, exponent: float) -> np.ndarray:
  return (255 * (image / 255) ** exponent).round().astype(np.uint8)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
  return np.clip(image * factor, 0, 255).astype(np.uint8)


def crop(image: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
  side = image.shape[0]
  box = (side * left, side * top, side * (1 - right), side * (1 - bottom))
  resized = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box)
  return np.asarray(resized)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=quality)
  return np.asarray(Image.open(file))


COPIES = {
  "mirrored left-right": lambda image: image[:, ::-1],
  "mirrored up-down": lambda image: image[::-1],
  "turned half round": lambda image: image[::-1, ::-1],
  "darker by gamma": lambda image: gamma(image, 1.4),
  "brighter by gamma": lambda image: gamma(image, 0.7),
  "less contrast": lambda image: contrast(image, 0.7),
  "more contrast, clipped": lambda image: contrast(image, 1.3),
  "cropped at one corner": lambda image: crop(image, 0.03, 0.04, 0.0, 0.0),
  "cropped all round": lambda image: crop(image, 0.03, 0.02, 0.03, 0.02),
  "compressed": lambda image: jpeg(image, 50),
  "mirrored, cropped, darker, compressed": lambda image: jpeg(
    gamma(crop(image[:, ::-1], 0.02, 0.03, 0.02, 0.0), 1.2), 75
  ),
}


def without_air(image: np.ndarray) -> np.ndarray:
  """Black air round the head, as in published pictures; its noise is not part of the slice."""
  smooth = ndimage.gaussian_filter(image.astype(float), 2)
  return np.where(smooth > 40, image, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
  """[COUNT, 96, 96] uint8, one slice of each of COUNT patients, noise in the air included."""
  made = make_phantoms(110, 96, seed=7)
  assert made.patients is not None
  first = np.unique(made.patients, return_index=True)[1][:COUNT]
  assert len(first) == COUNT
  return made.inputs[first, :, :, 0]


@pytest.fixture(scope="module")
def originals(noisy: np.ndarray) -> np.ndarray:
  """The same with black air."""
  return np.stack([without_air(image) for image in noisy])


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
  return bool(((first[:, None] == first) == (second[:, None] == second)).all())


@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_joined_with_their_original(originals: np.ndarray, kind: str):
  copies = np.stack([COPIES[kind](image) for image in originals])
  groups = near_duplicate_groups(np.concatenate([originals, copies]))
  assert np.mean(groups[:COUNT] == groups[COUNT:]) >= 0.95


@pytest.mark.parametrize("kind", list(COPIES)[:3])
def test_mirrored_copies_are_joined_in_spite_of_noise_in_the_air(noisy: np.ndarray, kind: str):
  copies = np.stack([COPIES[kind](image) for image in noisy])
  groups = near_duplicate_groups(np.concatenate([noisy, copies]))
  np.testing.assert_array_equal(groups[:COUNT], groups[COUNT:])


@pytest.mark.parametrize("air", ["noisy", "black"])
def test_different_patients_are_not_joined(air: str):
  made = make_phantoms(600, 96, seed=8)
  assert made.patients is not None
  first = np.unique(made.patients, return_index=True)[1]
  images = made.inputs[first, :, :, 0]
  if air == "black":
    images = np.stack([without_air(image) for image in images])
  groups = near_duplicate_groups(images)
  assert len(first) > 250
  sizes = np.bincount(groups).astype(float)
  joined, pairs = (sizes * (sizes - 1) / 2).sum(), len(first) * (len(first) - 1) / 2
  assert joined / pairs <= 5e-4  # a few phantoms are doubles; a chain of 8 would be too many


def test_blank_images_are_never_joined(originals: np.ndarray):
  levels = np.array([0, 0, 1, 7, 128, 255, 255], np.uint8)
  for side in (5, 32, 96, 100):
    blank = np.broadcast_to(levels[:, None, None], (len(levels), side, side))
    np.testing.assert_array_equal(near_duplicate_groups(blank), np.arange(len(levels)))
  both = np.concatenate([np.zeros((3, 96, 96), np.uint8), originals[:2]])
  np.testing.assert_array_equal(near_duplicate_groups(both), np.arange(5))


def test_descriptors_have_norm_one_or_are_zero(originals: np.ndarray):
  found = descriptors(np.concatenate([originals[:3], np.zeros((1, 96, 96), np.uint8)]))
  assert found.dtype == np.float32
  np.testing.assert_allclose(np.square(found).sum((1, 2)), [1, 1, 1, 0], atol=1e-5)


def test_a_channel_axis_changes_nothing(originals: np.ndarray):
  np.testing.assert_array_equal(
    near_duplicate_groups(originals[..., None]), near_duplicate_groups(originals)
  )


@pytest.fixture(scope="module")
def mixture(originals: np.ndarray) -> np.ndarray:
  """Originals and copies of the first 12, some twice, so that groups have 1, 2 and 3 members."""
  mirrored = originals[:12, :, ::-1]
  darker = np.stack([gamma(image, 1.3) for image in originals[:6]])
  return np.concatenate([originals, mirrored, darker])


def test_order_of_images_does_not_matter(mixture: np.ndarray):
  groups = near_duplicate_groups(mixture)
  assert np.bincount(groups).max() >= 3
  for seed in range(3):
    order = np.random.default_rng(seed).permutation(len(mixture))
    assert same_partition(near_duplicate_groups(mixture[order]), groups[order])


@pytest.mark.parametrize("block", [1, 7, 58, 59])
def test_block_size_does_not_matter(monkeypatch, mixture: np.ndarray, block: int):
  groups = near_duplicate_groups(mixture)
  monkeypatch.setattr(duplicates, "BLOCK", block)
  np.testing.assert_array_equal(near_duplicate_groups(mixture), groups)


def test_chains_are_one_group():
  # Correlations of 0.94 between neighbours and about 0.77 between the ends: single linkage.
  rng = np.random.default_rng(0)
  base = np.linalg.qr(rng.standard_normal((duplicates.SIDE**2, 2)))[0].T
  turns = np.arccos(0.94) * np.arange(3)
  line = np.cos(turns)[:, None] * base[0] + np.sin(turns)[:, None] * base[1]
  found = line.astype(np.float32).reshape(3, duplicates.SIDE, duplicates.SIDE)
  pairs = np.concatenate(list(duplicates._correlated_pairs(found, 0.92)), axis=1)
  assert set(map(tuple, pairs.T.tolist())) == {(0, 1), (1, 2)}


def brute_force_join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Relabels until nothing changes: the smallest member number of every chain of groups."""
  joined = np.arange(len(first))
  while True:
    before = joined.copy()
    for groups in (first, second):
      for group in np.unique(groups):
        joined[groups == group] = joined[groups == group].min()
    if np.array_equal(before, joined):
      return joined


@pytest.mark.parametrize("seed", range(20))
def test_joined_groups_agree_with_brute_force(seed: int):
  rng = np.random.default_rng(seed)
  n = int(rng.integers(1, 60))
  first, second = rng.integers(0, n, n), rng.integers(0, max(1, n // 2), n)
  joined = join_groups(first, second)
  assert joined.dtype == np.int32
  assert same_partition(joined, brute_force_join(first, second))
  assert same_partition(joined, join_groups(second, first))
  np.testing.assert_array_equal(number_groups(joined), joined)


def test_groups_are_numbered_by_first_member():
  np.testing.assert_array_equal(number_groups(np.array([7, 2, 7, 9, 2])), [0, 1, 0, 2, 1])


def test_pictures_in_two_classes_are_counted_and_named():
  drawn = make_phantoms(6, 64, 3)
  images = np.concatenate([drawn.inputs, drawn.inputs[[1, 2]], drawn.inputs[[0], :, ::-1]])
  labels = np.array([0, 0, 0, 0, 0, 0, 1, 0, 1], np.int32)  # equal to 1, equal to 2, mirrored 0
  names = tuple(f"{'ab'[label]}/{number}" for number, label in enumerate(labels))
  dataset = Dataset(images, labels, names, ("a", "b"))
  found = find_contradictions(dataset, near_duplicate_groups(images))
  assert (found.identical, found.similar) == (2, 4)
  assert found.pairs == (("a/1", "b/6"), ("a/0", "b/8"))


def test_a_chain_of_small_steps_from_one_class_to_another_is_no_contradiction():
  drawn = make_phantoms(40, 64, 3)
  assert drawn.patients is not None
  first = np.unique(drawn.patients, return_index=True)[1][:2]
  images = drawn.inputs[[*first, *first]]
  images[2:] = np.roll(images[2:], 3, axis=2)
  images[2:] = np.random.default_rng(0).permutation(images[2:].ravel()).reshape(images[2:].shape)
  dataset = Dataset(images, np.array([0, 1, 0, 1], np.int32), tuple("abcd"), ("x", "y"))
  assert find_contradictions(dataset, np.zeros(4, np.int32)) == (0, 0, ())


def test_no_contradiction_is_found_where_none_is():
  images = np.random.default_rng(1).integers(0, 256, (6, 16, 16, 1)).astype(np.uint8)
  dataset = Dataset(images, np.arange(6, dtype=np.int32) % 3, tuple("abcdef"), ("x", "y", "z"))
  assert find_contradictions(dataset, np.arange(6)) == (0, 0, ())
