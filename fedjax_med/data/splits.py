"""Train and test sides of a dataset: the paper's random split, or whole units stratified by class.

A unit is kept on one side: a near-duplicate group, a patient, or both joined.
"""

import numpy as np

from fedjax_med.core.errors import require, require_choice

SCHEMES = ("grouped", "recording", "paper")


def unit_classes(labels: np.ndarray, units: np.ndarray, num_classes: int) -> np.ndarray:
  """Majority class of every unit, the lowest class on a tie.

  Args:
    labels: [N] class numbers.
    units: [N] unit numbers 0 .. U - 1, every one in use.
    num_classes: number of classes C.

  Returns:
    [U] int32.
  """
  cells = np.bincount(units.astype(np.int64) * num_classes + labels, minlength=0)
  num_units = int(units.max(initial=-1)) + 1
  counts = np.zeros(num_units * num_classes, np.int64)
  counts[: len(cells)] = cells
  return counts.reshape(num_units, num_classes).argmax(1).astype(np.int32)


def largest_remainder(quotas: np.ndarray, total: int) -> np.ndarray:
  """Whole numbers that sum to ``total``, each within 1 of its quota (Hamilton's method).

  Args:
    quotas: [n] non-negative shares whose sum rounds to ``total``; ties go to the first.
    total: the sum to reach.
  """
  whole = np.floor(quotas + 1e-9).astype(np.int64)
  rest = total - int(whole.sum())
  order = np.argsort(-(quotas - whole), kind="stable")
  whole[order[:rest]] += 1
  return whole


def split_dataset(
  labels: np.ndarray,
  units: np.ndarray,
  num_classes: int,
  test_fraction: float,
  scheme: str,
  seed: int,
  sites: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Example numbers of the train side and the test side; a function of the arguments alone.

  Args:
    labels: [N] class numbers 0 .. num_classes - 1.
    units: [N] unit numbers; only read under 'grouped'.
    num_classes: number of classes.
    test_fraction: share of the examples held out.
    scheme: 'paper' draws round(test_fraction * N) examples at random, whatever their unit or
      class; the others draw whole units so that, class by class (majority class of the unit), the
      test share is within one unit's size of ``test_fraction``.
    seed: any non-negative number.
    sites: [N] site numbers or None; whole units also keep the share within every (class, site).

  Returns:
    (train, test), ascending int32 example numbers; every class stands on both sides.

  Raises:
    UserError: a class would be missing on one side.
  """
  require_choice("data.split", scheme, SCHEMES)
  require(
    0 < test_fraction < 1,
    f"data.test_fraction={test_fraction} must be above 0 and under 1",
    "use 0.2",
  )
  rng = np.random.default_rng([seed, 1])
  in_test = np.zeros(len(labels), bool)
  if scheme == "paper":
    in_test[rng.permutation(len(labels))[: round(test_fraction * len(labels))]] = True
  else:
    numbers = np.unique(units, return_inverse=True)[1].astype(np.int64)
    in_test = _test_units(labels, numbers, num_classes, test_fraction, rng, sites)[numbers]
  return _both_with_every_class(labels, units, num_classes, test_fraction, in_test)


def split_people(
  labels: np.ndarray,
  units: np.ndarray,
  num_classes: int,
  test_fraction: float,
  seed: int,
  sites: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Example numbers of a train and a test side of whole units that hold several classes each.

  Units are drawn in random order while their examples fit into ``test_fraction``, then one more if
  that comes closer; at least one in all. With ``sites`` that is done at each site. Arguments as
  those of ``split_dataset``.

  Raises:
    UserError: a class would be missing on one side.
  """
  rng = np.random.default_rng([seed, 1])
  numbers = np.unique(units, return_inverse=True)[1]
  sizes = np.bincount(numbers)
  places = np.zeros(len(labels), np.int32) if sites is None else sites
  homes = unit_classes(places, numbers, int(places.max(initial=0)) + 1)
  order, chosen = rng.permutation(len(sizes)), []
  for site in range(int(homes.max(initial=0)) + 1):
    there = order[homes[order] == site]
    chosen += _fill(there, sizes, round(test_fraction * float(sizes[there].sum())))
  in_test = np.isin(numbers, chosen or order[:1])
  return _both_with_every_class(labels, units, num_classes, test_fraction, in_test)


def _both_with_every_class(
  labels: np.ndarray,
  units: np.ndarray,
  num_classes: int,
  test_fraction: float,
  in_test: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of the examples of both sides; UserError unless each has examples of every class."""
  for label in range(num_classes):
    of_class = labels == label
    for side, chosen in (("test", in_test), ("train", ~in_test)):
      num_units = len(np.unique(units[of_class]))
      require(
        bool((of_class & chosen).any()),
        f"data.test_fraction={test_fraction} leaves class {label} ({int(of_class.sum())} examples"
        f" in {num_units} separable units) without a {side} example",
        "every class needs at least two units: add examples of that class, leave the class out,"
        " or change data.test_fraction",
      )
  return np.flatnonzero(~in_test).astype(np.int32), np.flatnonzero(in_test).astype(np.int32)


def given_split(labels: np.ndarray, in_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Example numbers of a train and a test side that the source names; see ``split_dataset``.

  Args:
    labels: [N] class numbers.
    in_test: [N] bool.

  Raises:
    UserError: a class stands on one side only.
  """
  for label in np.unique(labels):
    for side, chosen in (("test", in_test), ("train", ~in_test)):
      require(
        bool((chosen & (labels == label)).any()),
        f"the given {side} part has no example of class {label} ({int((labels == label).sum())}"
        " examples in all)",
        "add some, or split anew: * in place of {split} in data.layout, or data.given_split=False",
      )
  return np.flatnonzero(~in_test).astype(np.int32), np.flatnonzero(in_test).astype(np.int32)


def _test_units(
  labels: np.ndarray,
  units: np.ndarray,
  num_classes: int,
  test_fraction: float,
  rng: np.random.Generator,
  sites: np.ndarray | None,
) -> np.ndarray:
  """[U] bool: units of the test side, drawn class by class and, within a class, site by site."""
  sizes = np.bincount(units)
  classes = unit_classes(labels, units, num_classes)
  num_sites = 1 if sites is None else int(sites.max(initial=0)) + 1
  of_site = np.zeros_like(classes) if sites is None else unit_classes(sites, units, num_sites)
  chosen = np.zeros(len(sizes), bool)
  for label in range(num_classes):
    cells = [np.flatnonzero((classes == label) & (of_site == site)) for site in range(num_sites)]
    quotas = np.array([test_fraction * sizes[cell].sum() for cell in cells])
    goals = largest_remainder(quotas, round(float(quotas.sum())))
    for cell, goal in zip(cells, goals, strict=True):
      chosen[_fill(rng.permutation(cell), sizes, int(goal))] = True
    _both_sides(np.concatenate(cells), sizes, chosen)
  return chosen


def _fill(shuffled: np.ndarray, sizes: np.ndarray, goal: int) -> list[int]:
  """Units in order while they fit in ``goal`` examples, then one more if that comes closer."""
  taken, missing = [], goal
  for unit in shuffled:
    if sizes[unit] <= missing:
      taken.append(int(unit))
      missing -= int(sizes[unit])
  rest = np.setdiff1d(shuffled, taken)
  if missing and len(rest):
    smallest = rest[np.argmin(sizes[rest])]
    if sizes[smallest] - missing < missing:
      taken.append(int(smallest))
  return taken


def _both_sides(members: np.ndarray, sizes: np.ndarray, chosen: np.ndarray) -> None:
  """Flips the smallest unit of a class of two or more units that stands on one side only."""
  if len(members) >= 2 and len(set(chosen[members].tolist())) == 1:
    smallest = members[np.argmin(sizes[members])]
    chosen[smallest] = not chosen[smallest]
