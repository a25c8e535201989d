"""Train and test sides of a dataset: the paper's random split, or whole units stratified by class.

A unit is kept on one side: a near-duplicate group, a patient, or both joined.
"""

import numpy as np

from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.source_facts import DRAWN_SPLITS
from fedjax_med.core.validation import parse_fold


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
  fold: str = "",
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
    fold: 'K/F' for the K-th of F parts as the test side, in place of ``test_fraction``: over the F
      parts of a seed every example is tested once. Parts of 'grouped' hold whole units, and their
      shares of a class (and site) differ by one unit's size at most.

  Returns:
    (train, test), ascending int32 example numbers; every class stands on both sides.

  Raises:
    UserError: a class would be missing on one side.
  """
  require_choice("data.split", scheme, DRAWN_SPLITS)
  part, parts = parse_fold(fold)
  require(
    0 < test_fraction < 1,
    f"data.test_fraction={test_fraction} must be above 0 and under 1",
    "use 0.2",
  )
  rng = np.random.default_rng([seed, 1])
  in_test = np.zeros(len(labels), bool)
  numbers = np.unique(units, return_inverse=True)[1].astype(np.int64)
  if scheme == "paper" and fold:
    in_test[rng.permutation(len(labels))[part - 1 :: parts]] = True
  elif scheme == "paper":
    in_test[rng.permutation(len(labels))[: round(test_fraction * len(labels))]] = True
  elif fold:
    in_test = _folds_of_units(labels, numbers, num_classes, parts, rng, sites)[numbers] == part
  else:
    in_test = _test_units(labels, numbers, num_classes, test_fraction, rng, sites)[numbers]
  _require_both_sides(labels, numbers, in_test, _held_out(test_fraction, fold), num_classes)
  return np.flatnonzero(~in_test).astype(np.int32), np.flatnonzero(in_test).astype(np.int32)


def split_people(
  labels: np.ndarray,
  units: np.ndarray,
  num_classes: int,
  test_fraction: float,
  seed: int,
  sites: np.ndarray | None = None,
  fold: str = "",
) -> tuple[np.ndarray, np.ndarray]:
  """Example numbers of a train and a test side of whole units that hold several classes each.

  Units are drawn in random order while their examples fit into ``test_fraction``, then one more if
  that comes closer; at least one in all. With ``sites`` that is done at each site. Arguments as
  those of ``split_dataset``.

  Raises:
    UserError: a class would be missing on one side.
  """
  rng, (part, parts) = np.random.default_rng([seed, 1]), parse_fold(fold)
  numbers = np.unique(units, return_inverse=True)[1].astype(np.int64)
  sizes = np.bincount(numbers)
  if fold:
    same = np.zeros(len(labels), np.int64)
    in_test = _folds_of_units(same, numbers, 1, parts, rng, sites)[numbers] == part
  else:
    places = np.zeros(len(labels), np.int32) if sites is None else sites
    homes = unit_classes(places, numbers, int(places.max(initial=0)) + 1)
    order, chosen = rng.permutation(len(sizes)), []
    for site in range(int(homes.max(initial=0)) + 1):
      there = order[homes[order] == site]
      chosen += _fill(there, sizes, round(test_fraction * float(sizes[there].sum())))
    in_test = np.isin(numbers, chosen or order[:1])
  _require_both_sides(labels, numbers, in_test, _held_out(test_fraction, fold), num_classes)
  return np.flatnonzero(~in_test).astype(np.int32), np.flatnonzero(in_test).astype(np.int32)


def _held_out(test_fraction: float, fold: str) -> str:
  return f"data.fold={fold}" if fold else f"data.test_fraction={test_fraction}"


def _require_both_sides(
  labels: np.ndarray, units: np.ndarray, in_test: np.ndarray, held_out: str, num_classes: int
) -> None:
  """Raises UserError where a class would be missing on one side; ``held_out`` says what did it."""
  for label in range(num_classes):
    of_class = labels == label
    for side, chosen in (("test", in_test), ("train", ~in_test)):
      num_units = len(np.unique(units[of_class]))
      require(
        bool((of_class & chosen).any()),
        f"{held_out} leaves class {label} ({int(of_class.sum())} examples in {num_units} separable"
        f" units) without a {side} example",
        "every class needs at least two units: add examples of that class, leave the class out,"
        " or change data.test_fraction or data.fold",
      )


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


def _folds_of_units(
  labels: np.ndarray,
  units: np.ndarray,
  num_classes: int,
  parts: int,
  rng: np.random.Generator,
  sites: np.ndarray | None,
) -> np.ndarray:
  """[U] part 1 .. ``parts`` of every unit, dealt class by class and, within a class, site by site.

  The largest units are dealt first, each to the part that has the fewest examples: of the class
  and site, then of the class, then of all.
  """
  sizes = np.bincount(units)
  classes = unit_classes(labels, units, num_classes)
  num_sites = 1 if sites is None else int(sites.max(initial=0)) + 1
  of_site = np.zeros_like(classes) if sites is None else unit_classes(sites, units, num_sites)
  found, in_all = np.zeros(len(sizes), np.int64), np.zeros(parts, np.int64)
  for label in range(num_classes):
    of_class = np.zeros(parts, np.int64)
    for site in range(num_sites):
      cell = rng.permutation(np.flatnonzero((classes == label) & (of_site == site)))
      of_cell = np.zeros(parts, np.int64)
      for unit in cell[np.argsort(-sizes[cell], kind="stable")]:
        part = np.lexsort((in_all, of_class, of_cell))[0]
        found[unit] = part + 1
        for count in (of_cell, of_class, in_all):
          count[part] += sizes[unit]
  return found


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
