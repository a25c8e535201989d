"""Phantoms: reproducible, labelled by their masks, unlike between sites, not solved by pixels."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from fedjax_med.data import phantoms
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.phantoms import CHUNK, SCANNERS, make_phantoms


@pytest.fixture(scope="module")
def drawn() -> Dataset:
  return make_phantoms(600, 48, seed=3)


def test_same_arguments_give_the_same_bytes(drawn: Dataset):
  again = make_phantoms(600, 48, seed=3)
  for field in ("inputs", "labels", "sites", "patients", "tumour_masks"):
    assert getattr(again, field).tobytes() == getattr(drawn, field).tobytes(), field
  assert again.names == drawn.names


def test_another_seed_draws_other_pictures_and_labels(drawn: Dataset):
  other = make_phantoms(600, 48, seed=4)
  assert not np.array_equal(other.labels, drawn.labels)
  assert (other.inputs != drawn.inputs).any((1, 2, 3)).all()


@pytest.mark.parametrize("size", [16, 33, 64])
@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1])
def test_counts_and_types_are_exact(count: int, size: int):
  made = make_phantoms(count, size, seed=0)
  assert made.inputs.shape == (count, size, size, 1)
  assert made.inputs.dtype == np.uint8
  assert made.tumour_masks is not None
  assert made.tumour_masks.shape == (count, size, size)
  assert made.tumour_masks.dtype == bool
  assert made.sites is not None
  assert made.patients is not None
  for values in (made.labels, made.sites, made.patients):
    assert values.shape == (count,)
    assert values.dtype == np.int32
  assert len(made.names) == len(set(made.names)) == count
  assert made.notes


@pytest.mark.parametrize("size", [16, 33, 64])
def test_label_is_one_exactly_where_the_mask_is_not_empty(size: int):
  made = make_phantoms(700, size, seed=1)
  assert made.tumour_masks is not None
  np.testing.assert_array_equal(made.tumour_masks.any((1, 2)), made.labels == 1)
  assert made.tumour_masks[made.labels == 1].mean() < 0.2  # a lesion, not half of the head


def test_a_tumour_changes_its_mask_and_little_beyond(monkeypatch, drawn: Dataset):
  # Nobody ill, all else equal: the random numbers are the same, so the healthy twin is too.
  monkeypatch.setattr(phantoms, "SCANNERS", tuple(s._replace(prevalence=0.0) for s in SCANNERS))
  twin = make_phantoms(600, 48, seed=3)
  assert (twin.labels == 0).all()
  change = np.abs(twin.inputs[..., 0].astype(float) - drawn.inputs[..., 0])
  assert (change[drawn.labels == 0] == 0).all()
  ill, masks = drawn.labels == 1, drawn.tumour_masks
  assert masks is not None
  inside = np.array([c[m].mean() for c, m in zip(change[ill], masks[ill], strict=True)])
  assert np.median(inside) > 20
  assert inside.min() > 3
  far = np.logical_not(ndimage.binary_dilation(masks, np.ones((1, 3, 3)), iterations=12))
  assert change[ill][far[ill]].mean() < 1


def test_all_five_sites_hold_both_classes_in_their_shares(drawn: Dataset):
  made = make_phantoms(3000, 16, seed=0)
  assert made.sites is not None
  assert len(made.site_names) == len(SCANNERS) == 5
  for number, scanner in enumerate(SCANNERS):
    here = made.sites == number
    assert here.mean() == pytest.approx(scanner.share, abs=0.05)
    assert made.labels[here].mean() == pytest.approx(scanner.prevalence, abs=0.1)
  assert drawn.sites is not None
  cells = np.bincount(drawn.sites * 2 + drawn.labels, minlength=10)
  assert (cells > 10).all()


def test_sites_differ_in_look(drawn: Dataset):
  # Nearest-mean on four plain statistics names the site far more often than chance (20 to 26 %).
  pixels = drawn.inputs[..., 0].astype(np.float64)
  steps = np.abs(np.diff(pixels, axis=2)).mean((1, 2))
  noise = pixels[:, :4, :4].std((1, 2))  # corner: air
  middle, whole = pixels[:, 20:28, 20:28].mean((1, 2)), pixels.mean((1, 2))
  looks = np.stack([noise / whole, middle / whole, steps / whole, np.log(whole)], 1)
  looks = (looks - looks.mean(0)) / looks.std(0)
  assert drawn.sites is not None
  assert drawn.patients is not None
  even = drawn.patients % 2 == 0
  means = np.stack([looks[even & (drawn.sites == site)].mean(0) for site in range(5)])
  nearest = np.square(looks[~even, None] - means).sum(2).argmin(1)
  assert (nearest == drawn.sites[~even]).mean() > 0.5


def test_a_patient_has_one_site_one_label_and_at_most_three_slices(drawn: Dataset):
  assert drawn.patients is not None
  assert drawn.sites is not None
  slices = np.bincount(drawn.patients)
  assert slices.min() == 1
  assert slices.max() == 3
  pairs = np.stack([drawn.patients, drawn.sites, drawn.labels], 1)
  assert len(np.unique(pairs, axis=0)) == len(slices)


def test_slices_of_a_patient_resemble_each_other_across_a_chunk_boundary(drawn: Dataset):
  # Anatomy belongs to the patient; only what varies from slice to slice depends on the chunk.
  assert drawn.patients is not None
  assert drawn.tumour_masks is not None
  same = np.flatnonzero((np.diff(drawn.patients) == 0) & (drawn.labels[1:] == 1))
  masks = drawn.tumour_masks
  overlap = (masks[same] & masks[same + 1]).sum((1, 2)) / (masks[same] | masks[same + 1]).sum(
    (1, 2)
  )
  assert np.median(overlap) > 0.5
  split = make_phantoms(600, 48, seed=next(s for s in range(50) if _boundary_patient(s)))
  assert split.tumour_masks is not None
  before, after = split.tumour_masks[CHUNK - 1 : CHUNK + 1]
  assert (before & after).sum() > 0.3 * (before | after).sum()


def _boundary_patient(seed: int) -> bool:
  made = make_phantoms(600, 16, seed)  # labels and patients do not depend on the size
  assert made.patients is not None
  return bool(made.patients[CHUNK - 1] == made.patients[CHUNK] and made.labels[CHUNK] == 1)


def test_chunk_size_changes_slices_but_no_label_site_or_patient(monkeypatch, drawn: Dataset):
  monkeypatch.setattr(phantoms, "CHUNK", 100)
  other = make_phantoms(600, 48, seed=3)
  for field in ("labels", "sites", "patients"):
    np.testing.assert_array_equal(getattr(other, field), getattr(drawn, field))
  assert other.tumour_masks is not None
  np.testing.assert_array_equal(other.tumour_masks.any((1, 2)), other.labels == 1)


def test_size_changes_resolution_but_no_label_site_or_patient(drawn: Dataset):
  other = make_phantoms(600, 16, seed=3)
  for field in ("labels", "sites", "patients"):
    np.testing.assert_array_equal(getattr(other, field), getattr(drawn, field))


@pytest.mark.slow
def test_logistic_regression_on_pixels_stays_under_75_percent():
  made = make_phantoms(5000, 32, seed=0)
  assert made.patients is not None
  pixels = made.inputs.reshape(5000, -1).astype(np.float64)
  pixels = (pixels - pixels.mean(1, keepdims=True)) / pixels.std(1, keepdims=True)
  train = made.patients < np.quantile(made.patients, 0.8)
  model = LogisticRegression(C=1e-3, max_iter=500).fit(pixels[train], made.labels[train])
  accuracy = model.score(pixels[~train], made.labels[~train])
  assert 0.5 < accuracy < 0.75
