"""Makes hospitals of a dataset: near-duplicate groups, train and test sides, partition."""

import dataclasses
from typing import NamedTuple

import numpy as np

from fedjax_med.core.config import Config, DataConfig, PartitionConfig
from fedjax_med.core.errors import require
from fedjax_med.core.source_facts import SOURCE_FACTS
from fedjax_med.data import partitions, splits
from fedjax_med.data.dataset import Dataset, Hospitals, Split, client_rows, client_table
from fedjax_med.data.duplicates import find_contradictions, join_groups
from fedjax_med.data.modality import modality_named
from fedjax_med.data.patients import apart_by_site
from fedjax_med.data.poisoning import poisoned
from fedjax_med.data.sources import load_dataset
from fedjax_med.tasks.registry import task_named


def load_hospitals(config: Config) -> Hospitals:
  """Reads the data and deals them to the hospitals; raises UserError for anything amiss."""
  dealt = build_hospitals(load_dataset(config.data), config.data, config.partition)
  return poisoned(config, dealt)


def build_hospitals(dataset: Dataset, data: DataConfig, partition: PartitionConfig) -> Hospitals:
  """Splits and partitions a dataset; a function of the arguments alone (``data.seed``).

  Every example stands in exactly one row of the train or the test table. Under
  ``data.split='grouped'`` no near-duplicate group and no patient stands on two sides or in two
  hospitals. Every hospital has ``partition.min_client_size`` training examples; it has a test
  example where there are as many test units as hospitals and the scheme is not ``site``.

  Raises:
    UserError: a class is missing on one side, or the request does not fit the data.
  """
  if partition.scheme == "auto":
    scheme = "dirichlet" if dataset.sites is None else "site"
    told = SOURCE_FACTS[data.source].has_sites or "{site}" in data.layout
    require(  # what the data alone tell, the rules of the configuration cannot refuse
      told or scheme != "site" or partition.alpha == PartitionConfig().alpha,
      f"partition.alpha={partition.alpha:g} is not read: partition.scheme=auto is site, for the"
      " data name sites",
      "use partition.scheme=dirichlet, or leave it at its default",
    )
    partition = dataclasses.replace(partition, scheme=scheme)
  split = split_with_duplicates(dataset, data, by_site=partition.scheme == "site")
  numbers = np.unique(split.units, return_inverse=True)[1]
  if partition.scheme == "site":
    places = _by_site(dataset, split, numbers, partition)
    names, visiting = places.names, places.visiting
    owner_train, owner_test = (places.owners[side] for side in (split.train, split.test))
    assert dataset.sites is not None
    num_elsewhere = int((places.owners != places.of_sites[dataset.sites]).sum())
    num_moved, shifts = 0, np.full(len(names), np.nan)
  else:
    names = tuple(f"hospital {client + 1}" for client in range(partition.num_clients))
    train, test = _by_shares(dataset, split, numbers, partition, data.seed)
    (owner_train, num_moved, shifts), (owner_test, *_) = train, test
    num_elsewhere, visiting = 0, {}
  hospitals = Hospitals(
    dataset=dataset,
    split=split,
    names=names,
    train=client_table([split.train[owner_train == k] for k in range(len(names))]),
    test=client_table([split.test[owner_test == k] for k in range(len(names))]),
    num_moved=num_moved,
    num_elsewhere=num_elsewhere,
    mixture_shifts={
      name: float(shift) for name, shift in zip(names, shifts, strict=True) if shift == shift
    },
    visiting=visiting,
  )
  fit = modality_named(dataset.modality).fit
  return _with_fitted_targets(hospitals if fit is None else fit(hospitals))


def _with_fitted_targets(hospitals: Hospitals) -> Hospitals:
  """The hospitals with targets that know what their task takes from the training side."""
  dataset = hospitals.dataset
  task = task_named(dataset.task)
  if task.fit is None or dataset.targets is None:
    return hospitals
  targets = task.fit(dataset.targets, client_rows(hospitals.train))
  if targets is dataset.targets:  # nothing is told
    return hospitals
  released = (*dataset.released, *filter(None, [task.releases]))
  dataset = dataclasses.replace(dataset, targets=targets, released=released)
  return dataclasses.replace(hospitals, dataset=dataset)


def split_with_duplicates(dataset: Dataset, data: DataConfig, by_site: bool = False) -> Split:
  """Finds near-duplicates, splits, and counts what leaks from train to test.

  Args:
    dataset: the examples.
    data: ``split``, ``test_fraction``, ``fold`` and ``seed`` are read.
    by_site: keep the test share within every site too (``data.split='grouped'`` only).
  """
  how = "grouped" if data.test_persons else data.split  # named people are whole, whatever it says
  modality, strata = modality_named(dataset.modality), task_named(dataset.task).strata(dataset)
  groups = modality.copies(dataset.inputs)
  if how == "paper":
    units = np.arange(len(groups), dtype=np.int32)
  else:
    units, patients = groups if modality.keeps_copies else np.arange(len(groups)), dataset.patients
    patients = None if how == "recording" else patients
    if patients is not None and by_site and dataset.sites is not None:
      patients = apart_by_site(patients, dataset.sites)
    units = units if patients is None else join_groups(units, patients)
    if dataset.series is not None:
      units = join_groups(units, dataset.series.recordings)
  if dataset.kept_together is not None:
    require(
      how != "paper",
      "data.split='paper' deals slices of one volume, or rows of one group, to both sides",
      "use data.split=grouped, which keeps them together",
    )
    units = join_groups(units, dataset.kept_together)
  if dataset.in_test is None:
    scheme = data.split
    train, test = _drawn_split(dataset, data, units, strata, by_site)
  else:
    # FLamby's split of heart_disease is data.split=paper, and gdsc has some of its own; folders
    # that give one leave that unread.
    scheme = "given" if how == "grouped" else how
    train, test = splits.given_split(strata, dataset.in_test)
  sizes = np.bincount(groups)
  return Split(
    train=train,
    test=test,
    units=units,
    scheme=scheme,
    num_duplicate_groups=int((sizes > 1).sum()),
    num_in_duplicate_groups=int(sizes[sizes > 1].sum()),
    num_test_with_duplicate_in_train=int(np.isin(groups[test], groups[train]).sum()),
    num_test_of_train_patients=_shared_patients(dataset, train, test),
    contradictions=find_contradictions(dataset, groups, modality.similar),
  )


def _drawn_split(
  dataset: Dataset, data: DataConfig, units: np.ndarray, strata: np.ndarray, by_site: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Train and test examples as ``data.split`` draws them."""
  classes, sites = len(dataset.class_names), dataset.sites if by_site else None
  share, seed, fold = data.test_fraction, data.seed, data.fold
  if dataset.series is not None and dataset.patients is not None and data.split == "grouped":
    whole = sites is not None and _units_of(units, sites).max() == 1  # each person is a site
    return splits.split_people(strata, units, classes, share, seed, None if whole else sites, fold)
  if dataset.series is not None and sites is not None:
    # One recording of each kind and person cannot be shared out: then over all people together.
    cells = _units_of(units, strata.astype(np.int64) * (int(sites.max()) + 1) + sites)
    sites = sites if share * cells[cells > 0].min() >= 0.5 else None
  return splits.split_dataset(strata, units, classes, share, data.split, seed, sites, fold)


def _units_of(units: np.ndarray, sites: np.ndarray) -> np.ndarray:
  """[sites] int, units that have examples at each site."""
  pairs = np.unique(np.stack([sites, units]), axis=1)
  return np.bincount(pairs[0])


def _shared_patients(dataset: Dataset, train: np.ndarray, test: np.ndarray) -> int:
  """Test examples of patients who have an example in train, as far as patients are known."""
  if dataset.patients is None:
    return 0
  return int(np.isin(dataset.patients[test], dataset.patients[train]).sum())


def _by_shares(
  dataset: Dataset, split: Split, numbers: np.ndarray, partition: PartitionConfig, seed: int
) -> list[tuple[np.ndarray, int, np.ndarray]]:
  """Clients of the train and of the test examples, number moved, shifts of filled clients.

  The shift of a client that needed no examples is nan.
  """
  num_classes, num_clients = len(dataset.class_names), partition.num_clients
  strata = task_named(dataset.task).strata(dataset)
  require(
    num_clients >= 1,
    f"partition.num_clients={num_clients} is under 1",
    "use at least two hospitals, or 1 for pooled data",
  )
  num_train_units = len(np.unique(numbers[split.train]))
  partitions.require_clients_fit(
    num_clients, num_train_units, len(split.train), partition.min_client_size
  )
  rng = np.random.default_rng([seed, 2])
  shares = partitions.proportions(
    partition.scheme,
    num_classes,
    num_clients,
    partition.alpha,
    partition.classes_per_client,
    rng,
  )
  sides = []
  for side, min_size in ((split.train, partition.min_client_size), (split.test, 1)):
    units = np.unique(numbers[side], return_inverse=True)[1]
    classes = splits.unit_classes(strata[side], units, num_classes)
    sizes = np.bincount(units)
    owner = partitions.apportion(classes, sizes, shares, rng)
    small = np.bincount(owner, weights=sizes, minlength=num_clients) < min_size
    num_moved = 0
    if len(sizes) >= num_clients:  # fewer test units than hospitals: some test sets stay empty
      owner, num_moved = partitions.repair(owner, classes, sizes, shares, min_size)
    shifts = partitions.mixture_shifts(owner, classes, sizes, shares)
    sides.append((owner[units], num_moved, np.where(small, shifts, np.nan)))
  return sides


class _Places(NamedTuple):
  """Hospitals of ``scheme='site'``.

  Attributes:
    names: of the hospitals: sites that train.
    owners: [N] hospital of each example.
    of_sites: [sites] hospital of each site.
    visiting: sites that train nowhere, and the name of the hospital that tests each.
  """

  names: tuple[str, ...]
  owners: np.ndarray
  of_sites: np.ndarray
  visiting: dict[str, str]


def _by_site(
  dataset: Dataset, split: Split, numbers: np.ndarray, partition: PartitionConfig
) -> _Places:
  """Deals whole units to the site that holds most of them.

  A site of one unit that is on the test side, such as a person whom nobody trains on, is no
  hospital: the hospitals test such sites in turn.
  """
  require(
    dataset.sites is not None,
    "partition.scheme='site' needs a dataset that says where each example comes from, which this"
    " one does not",
    "say with data.layout which folders are the sites, such as '{site}/{class}/*', or with a column"
    " of a manifest, or use partition.scheme=dirichlet",
  )
  assert dataset.sites is not None
  site_names, num_sites = dataset.site_names, len(dataset.site_names)
  home = splits.unit_classes(dataset.sites, numbers, num_sites)[numbers]
  counts = np.bincount(home[split.train], minlength=num_sites)
  trained = np.bincount(dataset.sites[split.train], minlength=num_sites)  # wherever they are dealt
  tested = (counts == 0) & (trained == 0) & (_units_of(numbers, dataset.sites) == 1)
  hospitals, visitors = np.flatnonzero(~tested), np.flatnonzero(tested)
  require(
    partition.num_clients in (0, len(hospitals)),
    f"partition.num_clients={partition.num_clients} contradicts the {len(hospitals)} sites"
    + (" that train" if len(visitors) else ""),
    f"use 0 or {len(hospitals)} with partition.scheme=site",
  )
  smallest = hospitals[counts[hospitals].argmin()]
  require(
    bool(counts[smallest] >= max(1, partition.min_client_size)),
    f"site '{site_names[smallest]}' has {counts[smallest]} training examples, under"
    f" partition.min_client_size={partition.min_client_size}",
    "lower it (1 is the least), leave the site out, or use another partition.scheme",
  )
  of_sites = np.zeros(num_sites, np.int32)
  of_sites[hospitals] = np.arange(len(hospitals))
  of_sites[visitors] = np.arange(len(visitors)) % len(hospitals)
  for site in visitors:  # its unit may be that of a larger site
    of_sites[site] = of_sites[home[dataset.sites == site][0]]
  names = tuple(site_names[site] for site in hospitals)
  return _Places(
    names=names,
    owners=of_sites[home],
    of_sites=of_sites,
    visiting={site_names[site]: names[of_sites[site]] for site in visitors},
  )
