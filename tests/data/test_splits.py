"""Splits: units stay whole, shares are kept, leaks are counted, impossible requests fail."""

import dataclasses

import numpy as np
import pytest

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError
from fedjax_med.data.builders import load_builder
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.duplicates import near_duplicate_groups
from fedjax_med.data.hospitals import split_with_duplicates
from fedjax_med.data.phantoms import make_phantoms
from fedjax_med.data.splits import largest_remainder, split_dataset, unit_classes


def random_units(seed: int, mixed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Labels, units and sites of a few hundred examples; units of 1 to 12, of one class or mixed."""
  rng = np.random.default_rng(seed)
  units = np.repeat(np.arange(120), rng.choice([1, 1, 2, 3, 12], 120))
  labels = rng.integers(0, 3, 120)[units]
  if mixed:
    flip = rng.random(len(units)) < 0.1
    labels = np.where(flip, rng.integers(0, 3, len(units)), labels)
  sites = rng.choice(4, 120, p=[0.4, 0.3, 0.2, 0.1])[units]
  order = rng.permutation(len(units))
  return labels[order], units[order] * 7 + 3, sites[order]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_unit_stands_on_two_sides_and_every_example_on_one(seed, mixed, fraction):
  labels, units, _ = random_units(seed, mixed)
  train, test = split_dataset(labels, units, 3, fraction, "grouped", seed)
  np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
  assert not set(units[train]) & set(units[test])
  assert set(labels[train]) == set(labels[test]) == {0, 1, 2}
  assert (np.diff(train) > 0).all()
  assert (np.diff(test) > 0).all()
  assert train.dtype == test.dtype == np.int32


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(5))
def test_share_of_every_class_is_within_one_unit_of_the_fraction(seed, fraction):
  labels, units, _ = random_units(seed, mixed=False)
  _, test = split_dataset(labels, units, 3, fraction, "grouped", seed)
  for label in range(3):
    sizes = np.unique(units[labels == label], return_counts=True)[1]
    held_out = (labels[test] == label).sum()
    assert abs(held_out - fraction * sizes.sum()) <= sizes.max()


@pytest.mark.parametrize("scheme", ["grouped", "paper"])
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_over_the_folds_every_example_is_tested_once(seed, parts, scheme):
  labels, units, sites = random_units(seed, mixed=True)
  arguments = (labels, units, 3, 0.2, scheme, seed, sites)
  sides = [split_dataset(*arguments, f"{part}/{parts}") for part in range(1, parts + 1)]
  tested = np.concatenate([test for _, test in sides])
  np.testing.assert_array_equal(np.sort(tested), np.arange(len(labels)))
  for train, test in sides:
    np.testing.assert_array_equal(np.setdiff1d(np.arange(len(labels)), test), train)
    assert scheme == "paper" or not set(units[train]) & set(units[test])
  if scheme == "paper":
    assert np.ptp([len(test) for _, test in sides]) <= 1


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_shares_of_folds_of_a_class_and_site_differ_by_one_unit_at_most(seed, parts):
  labels, units, sites = random_units(seed, mixed=False)
  arguments = (labels, units, 3, 0.2, "grouped", seed, sites)
  tests = [split_dataset(*arguments, f"{part}/{parts}")[1] for part in range(1, parts + 1)]
  for label in range(3):
    for site in range(4):
      cell = (labels == label) & (sites == site)
      largest = np.unique(units[cell], return_counts=True)[1].max(initial=0)
      assert np.ptp([cell[test].sum() for test in tests]) <= largest


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "1", "1/5/2", "-1/5", "a/b"])
def test_a_fold_that_is_no_part_is_refused(fold):
  with pytest.raises(UserError, match=f"^data.fold='{fold}' is not K/F, part K of F from 1/F to"):
    split_dataset(np.arange(10) % 2, np.arange(10), 2, 0.2, "grouped", 0, None, fold)


@pytest.mark.parametrize("seed", range(5))
def test_units_of_one_example_give_the_share_exactly(seed):
  labels = np.random.default_rng(seed).integers(0, 3, 500)
  _, test = split_dataset(labels, np.arange(500), 3, 0.2, "grouped", seed)
  for label in range(3):
    assert (labels[test] == label).sum() == round(0.2 * (labels == label).sum())


@pytest.mark.parametrize("seed", range(5))
def test_share_of_every_class_and_site_is_within_a_unit_with_sites(seed):
  labels, units, sites = random_units(seed, mixed=False)
  _, test = split_dataset(labels, units, 3, 0.3, "grouped", seed, sites)
  for label in range(3):
    for site in range(4):
      cell = (labels == label) & (sites == site)
      sizes = np.unique(units[cell], return_counts=True)[1]
      if len(sizes):
        assert abs(cell[test].sum() - 0.3 * cell.sum()) <= sizes.max() + 1


@pytest.mark.parametrize("scheme", ["grouped", "paper"])
def test_split_is_a_function_of_its_arguments(scheme):
  labels, units, _ = random_units(0, mixed=True)
  first = split_dataset(labels, units, 3, 0.2, scheme, 5)
  second = split_dataset(labels, units, 3, 0.2, scheme, 5)
  other = split_dataset(labels, units, 3, 0.2, scheme, 6)
  for one, two in zip(first, second, strict=True):
    np.testing.assert_array_equal(one, two)
  assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("count", [50, 101, 1003])
def test_paper_split_holds_out_a_rounded_share_whatever_class_or_unit(count):
  labels = (np.arange(count) % 2).astype(np.int32)
  units = np.arange(count) // 4
  _, test = split_dataset(labels, units, 2, 0.2, "paper", 1)
  assert len(test) == round(0.2 * count)
  torn = [0 < np.isin(np.flatnonzero(units == unit), test).mean() < 1 for unit in set(units)]
  assert any(torn)


def test_paper_split_draws_every_example_equally_often():
  labels = np.arange(40) % 2
  drawn = np.zeros(40)
  for seed in range(1000):
    drawn[split_dataset(labels, np.arange(40), 2, 0.4, "paper", seed)[1]] += 1
  deviation = np.sqrt(1000 * 0.4 * 0.6)
  assert np.abs(drawn - 400).max() < 4.5 * deviation


@pytest.mark.parametrize("scheme", ["grouped", "paper"])
def test_a_class_that_cannot_stand_on_both_sides_is_refused(scheme):
  labels = np.array([0] * 20 + [1] * 5)
  units = np.concatenate([np.arange(20), np.full(5, 20)])
  if scheme == "paper":
    labels, units = np.array([0] * 20 + [1]), np.arange(21)
  with pytest.raises(UserError, match=r"^data\.test_fraction=0\.2 leaves class 1 .*; every class"):
    split_dataset(labels, units, 2, 0.2, scheme, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 3.0])
def test_a_fraction_outside_zero_to_one_is_refused(fraction):
  with pytest.raises(UserError, match=r"^data\.test_fraction=.* must be above 0 and under 1; use"):
    split_dataset(np.arange(10) % 2, np.arange(10), 2, fraction, "grouped", 0)


def test_an_unknown_scheme_is_refused_with_the_nearest():
  with pytest.raises(UserError, match=r"^data\.split='group' is unknown; did you mean 'grouped'"):
    split_dataset(np.arange(10) % 2, np.arange(10), 2, 0.2, "group", 0)


def test_two_units_of_a_class_are_enough_even_for_a_tiny_fraction():
  labels = np.array([0, 0, 0, 1, 1])
  units = np.array([0, 0, 1, 2, 3])
  for fraction in (0.01, 0.99):
    train, test = split_dataset(labels, units, 2, fraction, "grouped", 0)
    assert set(labels[train]) == set(labels[test]) == {0, 1}


def test_majority_class_of_units_agrees_with_a_count():
  labels, units, _ = random_units(2, mixed=True)
  numbers = np.unique(units, return_inverse=True)[1]
  expected = [np.bincount(labels[numbers == u], minlength=3).argmax() for u in range(120)]
  np.testing.assert_array_equal(unit_classes(labels, numbers, 3), expected)


@pytest.mark.parametrize("seed", range(10))
def test_largest_remainder_sums_to_the_total_within_one_of_each_quota(seed):
  rng = np.random.default_rng(seed)
  total = int(rng.integers(1, 200))
  quotas = rng.dirichlet(np.full(12, 0.5)) * total
  whole = largest_remainder(quotas, total)
  assert whole.sum() == total
  assert (np.abs(whole - quotas) < 1).all()
  raised, left = quotas % 1 * (whole > quotas), quotas % 1 * (whole < quotas)
  assert raised[raised > 0].min(initial=1) >= left.max() - 1e-9


@pytest.fixture(scope="module")
def copied() -> Dataset:
  """120 phantoms and mirror images of half of them, without patient numbers."""
  made = make_phantoms(120, 64, seed=2)
  inputs = np.concatenate([made.inputs, made.inputs[::2, :, ::-1]])
  labels = np.concatenate([made.labels, made.labels[::2]])
  names = tuple(str(number) for number in range(len(labels)))
  return Dataset(inputs, labels, names, made.class_names)


@pytest.mark.parametrize("scheme", ["grouped", "paper"])
def test_leaks_are_counted_as_by_an_independent_count(copied: Dataset, scheme: str):
  split = split_with_duplicates(copied, DataConfig(split=scheme, test_fraction=0.25, seed=1))
  same = near_duplicate_groups(copied.inputs)
  same = same[:, None] == same
  grouped = same.sum(1) > 1
  assert split.num_in_duplicate_groups == grouped.sum() >= 120
  assert split.num_duplicate_groups == len({tuple(row) for row in same[grouped]})
  leaks = same[np.ix_(split.test, split.train)].any(1).sum()
  assert split.num_test_with_duplicate_in_train == leaks
  assert (leaks > 10) if scheme == "paper" else (leaks == 0)
  assert split.scheme == scheme


def test_grouped_split_keeps_patients_and_near_duplicates_together(copied: Dataset):
  patients = np.arange(180) // 5
  dataset = dataclasses.replace(copied, patients=patients)
  split = split_with_duplicates(dataset, DataConfig(split="grouped", seed=0))
  groups = near_duplicate_groups(copied.inputs)
  for key in (patients, groups, split.units):
    assert not set(key[split.train]) & set(key[split.test])


def test_paper_split_makes_every_example_its_own_unit(copied: Dataset):
  split = split_with_duplicates(copied, DataConfig(split="paper"))
  np.testing.assert_array_equal(split.units, np.arange(180))
  assert len(split.test) == 36


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # third-party imports of tfds
def test_random_split_of_br35h_leaks_and_grouped_split_does_not(real_data, tmp_path):
  dataset = load_builder(
    real_data / "Br35H", DataConfig(source="br35h", cache_dir=str(tmp_path), image_size=192)
  )
  leaky = split_with_duplicates(dataset, DataConfig(split="paper"))
  assert len(leaky.test) == 600
  assert leaky.num_test_with_duplicate_in_train >= 0.85 * 600
  clean = split_with_duplicates(dataset, DataConfig(split="grouped"))
  assert clean.num_test_with_duplicate_in_train == 0
  assert len(clean.test) == pytest.approx(600, abs=20)
