"""Partitions: every example once, units whole, shares as drawn, impossible requests fail."""

import dataclasses

import numpy as np
import pytest

from fedjax_med.core.config import DataConfig, PartitionConfig
from fedjax_med.core.errors import UserError
from fedjax_med.data import partitions
from fedjax_med.data.dataset import ClientTable, Dataset, Hospitals, client_rows
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.modality import MODALITIES, PICTURES
from fedjax_med.data.partitions import (
  apportion,
  drawn_mixture,
  mixture_shifts,
  proportions,
  repair,
)

COUNT, CLASSES = 4200, 3


def make_dataset(seed: int = 0, count: int = COUNT) -> Dataset:
  """Examples with labels, sites and patients of 1 to 3 examples; their pixels do not matter."""
  rng = np.random.default_rng(seed)
  patients = np.repeat(np.arange(count), rng.integers(1, 4, count))[:count]
  shuffle = rng.permutation(count)
  labels = rng.choice(CLASSES, count, p=[0.5, 0.3, 0.2])[patients]
  sites = rng.choice(4, count, p=[0.4, 0.3, 0.2, 0.1])[patients]
  return Dataset(
    inputs=np.zeros((count, 2, 2, 1), np.uint8),
    labels=labels[shuffle].astype(np.int32),
    names=tuple(str(number) for number in range(count)),
    class_names=("a", "b", "c"),
    sites=sites[shuffle].astype(np.int32),
    site_names=("N", "E", "S", "W"),
    patients=patients[shuffle].astype(np.int32),
  )


DATASET = make_dataset()


def use_groups(monkeypatch, copies):
  """Replaces the search for near-duplicates of pictures."""
  monkeypatch.setitem(MODALITIES, "pictures", PICTURES._replace(copies=copies))


@pytest.fixture(autouse=True)
def _no_detector(monkeypatch):
  """Near-duplicates are tested elsewhere: here every picture is its own group."""
  use_groups(monkeypatch, lambda images: np.arange(len(images)))


def build(scheme: str, dataset: Dataset = DATASET, split: str = "grouped", seed: int = 0, **fields):
  partition = PartitionConfig(scheme=scheme, **fields)
  return build_hospitals(dataset, DataConfig(split=split, seed=seed), partition)


def require_consistent(table: ClientTable, expected: np.ndarray, num_clients: int) -> None:
  rows = client_rows(table)
  assert len(rows) == num_clients
  np.testing.assert_array_equal(np.sort(np.concatenate(rows)), expected)
  assert table.indices.dtype == table.counts.dtype == np.int32
  assert table.indices.shape == (num_clients, max(len(row) for row in rows))
  assert table.counts.tolist() == [len(row) for row in rows]
  slots = np.arange(table.indices.shape[1])
  assert (table.indices[slots >= table.counts[:, None]] == 0).all()


def same_hospitals(first: Hospitals, second: Hospitals) -> bool:
  return all(
    np.array_equal(one.indices, two.indices) and np.array_equal(one.counts, two.counts)
    for one, two in ((first.train, second.train), (first.test, second.test))
  )


GRID = [
  (scheme, num_clients, alpha)
  for scheme in ("iid", "dirichlet", "quantity", "shards")
  for num_clients in (2, 5, 100, 1000)
  for alpha in ((0.05, 0.5, 100.0) if scheme in ("dirichlet", "quantity") else (0.5,))
]


@pytest.mark.parametrize(("scheme", "num_clients", "alpha"), GRID)
def test_every_example_stands_once_and_every_unit_in_one_hospital(scheme, num_clients, alpha):
  min_size = 8 if num_clients <= 100 else 2
  fields = {
    "num_clients": num_clients,
    "alpha": alpha,
    "classes_per_client": 2,
    "min_client_size": min_size,
  }
  made = build(scheme, **fields)
  require_consistent(made.train, made.split.train, num_clients)
  require_consistent(made.test, made.split.test, num_clients)
  sides = np.concatenate([made.split.train, made.split.test])
  np.testing.assert_array_equal(np.sort(sides), np.arange(COUNT))
  assert made.train.counts.min() >= min_size
  num_test_units = len(np.unique(made.split.units[made.split.test]))
  if num_test_units >= num_clients:
    assert made.test.counts.min() >= 1
  assert len(set(made.names)) == num_clients
  # A unit names one place: the hospital and the side. A set of pairs has one pair a unit then.
  places = np.full(COUNT, -1)
  for side, table in enumerate((made.train, made.test)):
    for client, row in enumerate(client_rows(table)):
      places[row] = 2 * client + side
  for key in (made.split.units, DATASET.patients):
    assert key is not None
    pairs = np.unique(np.stack([key, places], 1), axis=0)
    assert len(pairs) == len(np.unique(key))
  assert same_hospitals(made, build(scheme, **fields))
  assert not same_hospitals(made, build(scheme, seed=1, **fields))


def test_near_duplicates_stay_in_one_hospital(monkeypatch):
  groups = np.arange(COUNT) // 4
  use_groups(monkeypatch, lambda images: groups)
  made = build("iid", dataclasses.replace(DATASET, patients=None), num_clients=20)
  for rows in (client_rows(made.train), client_rows(made.test)):
    held = [set(groups[row].tolist()) for row in rows]
    assert sum(map(len, held)) == len(set().union(*held))


def test_paper_split_partitions_single_examples():
  made = build("dirichlet", split="paper", num_clients=10)
  require_consistent(made.train, made.split.train, 10)
  assert len(made.split.test) == round(0.2 * COUNT)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
@pytest.mark.parametrize(("scheme", "num_clients"), [("dirichlet", 5), ("quantity", 8)])
def test_shares_have_the_moments_of_a_dirichlet(scheme, num_clients, alpha):
  seeds = 3000
  shares = np.stack(
    [
      proportions(scheme, 2, num_clients, alpha, 1, np.random.default_rng([seed, 2]))
      for seed in range(seeds)
    ]
  )
  np.testing.assert_allclose(shares.sum(2), 1)
  assert shares.min() >= 0
  centred = shares - 1 / num_clients
  variance = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
  # 4.5 standard errors, over at most 16 cells: once in ten thousand for sound code.
  assert (np.abs(centred.mean(0)) < 4.5 * np.sqrt(variance / seeds)).all()
  squares = np.square(centred)
  assert (np.abs(squares.mean(0) - variance) < 4.5 * squares.std(0) / np.sqrt(seeds)).all()
  between_classes = np.corrcoef(shares[:, 0, 0], shares[:, 1, 0])[0, 1]
  if scheme == "dirichlet":
    assert abs(between_classes) < 4.5 / np.sqrt(seeds)
  else:
    assert between_classes == pytest.approx(1)


def class_counts(made: Hospitals) -> np.ndarray:
  """[K, C] training examples."""
  labels = made.dataset.labels
  return np.stack([np.bincount(labels[row], minlength=CLASSES) for row in client_rows(made.train)])


def test_a_large_alpha_is_nearly_iid_and_a_small_one_is_not():
  def skew(scheme: str, alpha: float) -> float:
    counts = class_counts(build(scheme, num_clients=10, alpha=alpha))
    mixture = counts / counts.sum(1, keepdims=True)
    return float(np.abs(mixture - counts.sum(0) / counts.sum()).max())

  assert skew("iid", 1.0) < 0.02
  assert skew("dirichlet", 1e6) < 0.02
  assert skew("dirichlet", 0.05) > 0.3


def test_iid_gives_every_hospital_the_same_size_and_classes_within_a_unit():
  counts = class_counts(build("iid", num_clients=7))
  assert np.ptp(counts, axis=0).max() <= 3  # the largest patient


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_client", [1, 2, 3])
@pytest.mark.parametrize("num_clients", [3, 10, 37])
def test_shards_hold_exactly_k_classes_before_repair(num_clients, per_client, seed):
  rng = np.random.default_rng(seed)
  shares = proportions("shards", 3, num_clients, 0.5, per_client, rng)
  np.testing.assert_array_equal((shares > 0).sum(0), per_client)
  np.testing.assert_allclose(shares.sum(1), 1)
  holders = (shares > 0).sum(1)
  assert np.ptp(holders) <= 1
  classes, sizes = rng.integers(0, 3, 900), rng.integers(1, 4, 900)
  owner = apportion(classes, sizes, shares, rng)
  for client in range(num_clients):
    assert len(set(classes[owner == client].tolist())) <= per_client


def test_quantity_skew_keeps_the_class_shares():
  counts = class_counts(build("quantity", num_clients=6, alpha=1.0))
  sizes = counts.sum(1)
  assert sizes.max() > 2 * sizes.min()
  expected = sizes[:, None] * (counts.sum(0) / counts.sum())
  assert np.abs(counts - expected)[sizes > 50].max() <= 5


@pytest.mark.parametrize("seed", range(10))
def test_units_of_one_example_follow_the_shares_by_largest_remainder(seed):
  rng = np.random.default_rng(seed)
  classes = rng.integers(0, 3, 500)
  shares = rng.dirichlet(np.full(9, 0.4), size=3)
  owner = apportion(classes, np.ones(500, np.int64), shares, rng)
  for label in range(3):
    quota = shares[label] * (classes == label).sum()
    held = np.bincount(owner[classes == label], minlength=9)
    whole = np.floor(quota).astype(int)
    up = np.argsort(-(quota - whole))[: round(quota.sum()) - whole.sum()]
    whole[up] += 1
    np.testing.assert_array_equal(held, whole)


@pytest.mark.parametrize("seed", range(10))
def test_large_units_follow_the_shares_within_the_largest_unit(seed):
  rng = np.random.default_rng(seed)
  classes, sizes = rng.integers(0, 3, 400), rng.integers(1, 9, 400)
  shares = rng.dirichlet(np.full(9, 1.0), size=3)
  owner = apportion(classes, sizes, shares, rng)
  for label in range(3):
    of_class = classes == label
    quota = shares[label] * sizes[of_class].sum()
    held = np.bincount(owner[of_class], weights=sizes[of_class], minlength=9)
    assert np.abs(held - quota).max() <= sizes.max()


@pytest.mark.parametrize("seed", range(20))
def test_repair_reaches_the_minimum_and_moves_no_more_than_it_counts(seed):
  rng = np.random.default_rng(seed)
  classes, sizes = rng.integers(0, 3, 300), rng.integers(1, 4, 300)
  shares = rng.dirichlet(np.full(20, 0.1), size=3)
  owner = apportion(classes, sizes, shares, rng)
  before = np.bincount(owner, weights=sizes, minlength=20)
  mended, moved = repair(owner, classes, sizes, shares, 10)
  after = np.bincount(mended, weights=sizes, minlength=20)
  assert before.min() < 10 <= after.min()
  changed = mended != owner
  assert moved == sizes[changed].sum()
  assert (before[owner[changed]] > 10).all()  # only hospitals with enough give
  assert (before[mended[changed]] < 10).all()  # only those in need receive
  assert changed.sum() <= np.maximum(10 - before, 0).sum()
  again, moved_again = repair(mended, classes, sizes, shares, 10)
  np.testing.assert_array_equal(again, mended)
  assert moved_again == 0


def test_moved_examples_are_reported():
  assert build("iid", num_clients=5).num_moved == 0
  assert build("dirichlet", num_clients=100, alpha=0.05).num_moved > 0


def test_site_hospitals_are_the_sites():
  made = build("site", num_clients=4)
  assert made.names == DATASET.site_names
  assert DATASET.sites is not None
  for table, side in ((made.train, made.split.train), (made.test, made.split.test)):
    require_consistent(table, side, 4)
    for site, row in enumerate(client_rows(table)):
      np.testing.assert_array_equal(row, side[DATASET.sites[side] == site])
  held_out = made.test.counts / (made.test.counts + made.train.counts)
  np.testing.assert_allclose(held_out, 0.2, atol=0.02)
  assert same_hospitals(made, build("site", num_clients=0))
  assert made.num_moved == 0


def test_a_unit_of_two_sites_stays_whole_at_the_site_that_holds_most_of_it(monkeypatch):
  groups = np.arange(COUNT)
  assert DATASET.sites is not None
  first, second, third = [
    *np.flatnonzero(DATASET.sites == 0)[[0, 1]].tolist(),
    int(np.flatnonzero(DATASET.sites == 3)[0]),
  ]
  groups[[second, third]] = first
  use_groups(monkeypatch, lambda images: groups)
  made = build("site", dataclasses.replace(DATASET, patients=None), num_clients=4)
  north = np.concatenate([client_rows(made.train)[0], client_rows(made.test)[0]])
  assert {first, second, third} <= set(north.tolist())


def refused(expected: str, scheme: str, dataset: Dataset = DATASET, **fields) -> None:
  with pytest.raises(UserError, match=expected) as caught:
    build(scheme, dataset, **fields)
  assert "; " in str(caught.value) or "did you mean" in str(caught.value)


@pytest.mark.parametrize(
  ("expected", "scheme", "fields"),
  [
    (r"^partition\.scheme='dirichle' is unknown; did you mean 'dirichlet'\?$", "dirichle", {}),
    (r"^partition\.alpha=0 must be above 0 and finite; 0\.1 is", "dirichlet", {"alpha": 0}),
    (r"^partition\.alpha=-1 must be above 0", "quantity", {"alpha": -1}),
    (r"^partition\.alpha=inf must be above 0", "dirichlet", {"alpha": float("inf")}),
    (r"^partition\.alpha=nan must be above 0", "dirichlet", {"alpha": float("nan")}),
    (r"^partition\.num_clients=0 is under 1; use at least two", "iid", {"num_clients": 0}),
    (
      r"^partition\.classes_per_client=4 must be 1 to the number of classes, 3; lower it to 3",
      "shards",
      {"classes_per_client": 4},
    ),
    (r"^partition\.classes_per_client=0 must be 1 to", "shards", {"classes_per_client": 0}),
    (
      r"^partition\.num_clients=2 with partition\.classes_per_client=1 cannot hold all 3 .*; raise",
      "shards",
      {"num_clients": 2},
    ),
    (
      r"^partition\.num_clients=4000 exceeds the \d+ training units .*; lower",
      "iid",
      {"num_clients": 4000},
    ),
    (
      r"^partition\.num_clients=100 times partition\.min_client_size=40 exceeds the \d+ .*; lower",
      "iid",
      {"num_clients": 100, "min_client_size": 40},
    ),
    (
      r"^partition\.num_clients=3 contradicts the 4 sites; use 0 or 4 with",
      "site",
      {"num_clients": 3},
    ),
    (
      r"^site 'W' has \d+ training examples, under partition\.min_client_size=1000; lower it",
      "site",
      {"num_clients": 4, "min_client_size": 1000},
    ),
  ],
)
def test_a_request_that_cannot_be_met_is_refused_with_its_value_and_remedy(
  expected, scheme, fields
):
  refused(expected, scheme, **fields)


def test_sites_are_needed_for_scheme_site():
  dataset = dataclasses.replace(DATASET, sites=None, site_names=())
  refused(r"^partition\.scheme='site' needs a dataset that says .*; say", "site", dataset)


def test_units_too_large_to_move_are_refused():
  # Four units of 40 among three clients: 160 examples, yet only two can have 50.
  owner, ones = np.zeros(4, np.int32), np.zeros(4, np.int64)
  expected = (
    r"^partition\.min_client_size=50 cannot be reached by 3 clients: no unit kept together is"
    r" small enough to move to client 3, which has 0 examples; lower"
  )
  with pytest.raises(UserError, match=expected):
    repair(owner, ones, np.full(4, 40), np.full((1, 3), 1 / 3), 50)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity", "shards"])
def test_shares_of_a_class_sum_to_one_for_many_clients(scheme):
  for alpha in (1e-3, 0.05, 100.0):
    shares = proportions(scheme, 5, 1000, alpha, 2, np.random.default_rng(0))
    assert shares.shape == (5, 1000)
    assert np.isfinite(shares).all()
    np.testing.assert_allclose(shares.sum(1), 1)


def test_schemes_listed_are_the_schemes_drawn():
  for scheme in partitions.SCHEMES:
    proportions(scheme, 3, 5, 0.5, 1, np.random.default_rng(0))


def mixture_of(owner: np.ndarray, labels: np.ndarray, num_clients: int) -> np.ndarray:
  """[C, K] share of each class at each client, counted one by one."""
  held = np.array(
    [[np.sum((owner == k) & (labels == c)) for k in range(num_clients)] for c in set(labels)], float
  )
  return held / held.sum(0)


@pytest.mark.parametrize(
  ("counts", "num_clients", "alpha"),
  [([1200, 1200], 50, 0.1), ([1200, 1200], 20, 0.3), ([700] * 7, 60, 0.1), ([2500, 100], 40, 0.3)],
)
def test_small_hospitals_are_filled_with_the_classes_drawn_for_them(counts, num_clients, alpha):
  moved_right, expected, distances = [], [], []
  for seed in range(5):
    labels = np.repeat(np.arange(len(counts)), counts)
    ones = np.ones(len(labels), int)
    rng = np.random.default_rng(seed)
    shares = proportions("dirichlet", len(counts), num_clients, alpha, 1, rng)
    owner = apportion(labels, ones, shares, rng)
    drawn = shares * np.array(counts)[:, None]
    drawn = drawn / drawn.sum(0)
    small = np.bincount(owner, minlength=num_clients) < 8
    fixed, _ = repair(owner, labels, ones, shares, 8)
    moved = np.flatnonzero(fixed != owner)
    moved_right += drawn[labels[moved], fixed[moved]].tolist()
    expected += np.square(drawn[:, fixed[moved]]).sum(0).tolist()  # of draws from the mixture
    distance = np.abs(mixture_of(fixed, labels, num_clients) - drawn).sum(0) / 2
    np.testing.assert_allclose(mixture_shifts(fixed, labels, ones, shares), distance, atol=1e-12)
    np.testing.assert_allclose(drawn_mixture(labels, ones, shares), drawn, atol=1e-12)
    distances += distance[small].tolist()
  assert np.mean(distances) < 0.1  # eight examples follow a mixture to a sixteenth a class
  assert np.mean(moved_right) > 0.95 * np.mean(expected)


def test_a_hospital_is_filled_by_the_largest_that_holds_the_class():
  classes = np.repeat([0, 1, 0, 1, 1], [30, 5, 4, 20, 1])
  owner = np.repeat([0, 0, 1, 1, 2], [30, 5, 4, 20, 1])  # sizes 35, 24, 1
  shares = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1]])  # the third is of class 1 alone
  fixed, moved = repair(owner, classes, np.ones(60, int), shares, 5)
  assert moved == 4
  assert (classes[fixed == 2] == 1).all()
  # Client 0 is the largest and holds class 1: it gives as long as it has some.
  assert np.bincount(fixed[(owner == 0) & (classes == 1)], minlength=3).tolist() == [1, 0, 4]


def test_a_hospital_for_which_nothing_was_drawn_is_filled_as_others_were_drawn():
  labels = np.repeat([0, 1], 500)
  shares = proportions("dirichlet", 2, 60, 1e-4, 1, np.random.default_rng(0))
  assert (shares.sum(0) == 0).sum() > 30  # far below what floating point can hold
  owner = apportion(labels, np.ones(1000, int), shares, np.random.default_rng(1))
  fixed, _ = repair(owner, labels, np.ones(1000, int), shares, 6)
  assert mixture_of(fixed, labels, 60).max(0).mean() > 0.95  # one class each, as alpha asks


def test_what_was_moved_is_told_for_each_hospital():
  made = build("dirichlet", num_clients=25, alpha=0.1, min_client_size=6, seed=3)
  assert made.num_moved > 0
  assert set(made.mixture_shifts) <= set(made.names)
  assert len(made.mixture_shifts) > 0
  assert all(0 <= shift <= 1 for shift in made.mixture_shifts.values())
