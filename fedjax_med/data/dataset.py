"""Records of a dataset, its split and its partition, as NumPy arrays on the host."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.data.folder_patterns import LeftOut
from fedjax_med.data.grey import EIGHT_BITS, Grey
from fedjax_med.data.patients import PatientCounts
from fedjax_med.data.recordings import Series
from fedjax_med.data.table_manifest import Table
from fedjax_med.tasks.task import Targets


@dataclasses.dataclass(frozen=True)
class Dataset:
  """All examples of one source, in a fixed order that does not depend on the machine.

  Attributes:
    inputs: raw examples of the modality. Of pictures [N, H, W, C] of 1 or 3 channels, uint8 or,
      of files with more than 8 bits, uint16; of series [N, T, 1, C] float32, nan where there is no
      value; of others an array or a tree of dictionaries of arrays [N, ...].
    labels: [N] int32 class numbers, 0 .. len(class_names) - 1; with two classes 1 is the positive.
    names: N file names relative to the source, for reports and errors.
    class_names: name of each class.
    sites: [N] int32 hospital or scanner of origin, or None where the source does not say.
    site_names: name of each site (empty without sites).
    patients: [N] int32 patient number, or None where the source does not say.
    patient_counts: how many names say a patient; None if ``patients`` is None.
    skipped: every file left out, with the reason.
    notes: sentences that must stand beside every result on these data (leakage, licence).
    tumour_masks: [N, H, W] bool ground truth of the phantoms, else None.
    grey: rule by which grey values of the files became pixels.
    in_test: [N] bool, the test part that the source gives; None where it gives none.
    task: key of the kind of prediction in ``tasks.registry.TASKS``.
    modality: key of the kind of example in ``data.modality.MODALITIES``.
    kept_together: [N] int32 groups that stay on one side and in one hospital besides
      near-duplicates and patients, such as slices of a volume; None without.
    table: how records of a table became inputs; None of other examples.
    series: how windows were cut from recordings; None of other examples.
    unscaled: ``inputs`` before statistics of training records scaled them; None where nothing did.
    targets: numbers to predict, of tasks without classes; ``labels`` are then groups of like
      examples, and ``class_names`` name them.
    released: names of statistics of the training records that hospitals tell exactly, outside ε.
    num_synthetic: examples at the end that were made from training images of a hospital, and are in
      its training row only; sites, patients, groups, masks and sides end before them.
  """

  inputs: Any
  labels: np.ndarray
  names: tuple[str, ...]
  class_names: tuple[str, ...]
  sites: np.ndarray | None = None
  site_names: tuple[str, ...] = ()
  patients: np.ndarray | None = None
  patient_counts: PatientCounts | None = None
  skipped: tuple[LeftOut, ...] = ()
  notes: tuple[str, ...] = ()
  tumour_masks: np.ndarray | None = None
  grey: Grey = EIGHT_BITS
  in_test: np.ndarray | None = None
  task: str = "classification"
  modality: str = "pictures"
  kept_together: np.ndarray | None = None
  table: Table | None = None
  series: Series | None = None
  unscaled: np.ndarray | None = None
  targets: Targets | None = None
  released: tuple[str, ...] = ()
  num_synthetic: int = 0

  @property
  def num_real(self) -> int:
    """Examples that are not synthetic."""
    return len(self.labels) - self.num_synthetic


def array_leaves(values: Any) -> list[np.ndarray]:
  """The arrays of an array or a tree of dictionaries, by sorted keys, as ``jax.tree.leaves``."""
  if isinstance(values, dict):
    return [leaf for key in sorted(values) for leaf in array_leaves(values[key])]
  return [values]


def input_bytes(dataset: Dataset) -> int:
  """Bytes of the raw examples of a dataset."""
  return sum(leaf.nbytes for leaf in array_leaves(dataset.inputs))


class Contradictions(NamedTuple):
  """Pictures that stand in several classes, so that at least one of their labels is wrong.

  Attributes:
    identical: examples with a twin in another class that is equal pixel for pixel.
    similar: examples with a near-duplicate in another class, the identical ones among them.
    pairs: names of some of these: (one, a twin in another class), identical ones first.
  """

  identical: int
  similar: int
  pairs: tuple[tuple[str, str], ...]


NO_CONTRADICTIONS = Contradictions(identical=0, similar=0, pairs=())


@dataclasses.dataclass(frozen=True)
class Split:
  """Train and test examples of a dataset, and the units that were kept together.

  Attributes:
    train: [n_train] int32 example numbers, ascending.
    test: [n_test] int32 example numbers, ascending.
    units: [N] int32; examples of one unit (near-duplicate group or patient) never stand on
      two sides, unless these are given, nor in two hospitals. Under the paper's random split every
      example is its own unit.
    scheme: 'grouped', 'recording', 'paper', or 'given' where the source has a test part.
    num_duplicate_groups: near-duplicate groups of two or more examples found in the dataset.
    num_in_duplicate_groups: examples that belong to such a group.
    num_test_with_duplicate_in_train: test examples with a near-duplicate in train.
    num_test_of_train_patients: test examples of a patient who has an example in train.
    contradictions: pictures that stand in several classes.
  """

  train: np.ndarray
  test: np.ndarray
  units: np.ndarray
  scheme: str
  num_duplicate_groups: int
  num_in_duplicate_groups: int
  num_test_with_duplicate_in_train: int
  num_test_of_train_patients: int = 0
  contradictions: Contradictions = NO_CONTRADICTIONS


@dataclasses.dataclass(frozen=True)
class ClientTable:
  """Example numbers that each client holds, one row a client.

  Attributes:
    indices: [K, n_max] int32 example numbers; slots at or past ``counts`` hold 0.
    counts: [K] int32 examples of each client.
  """

  indices: np.ndarray
  counts: np.ndarray


def real_counts(table: ClientTable, num_real: int) -> np.ndarray:
  """[K] int32 examples of each row that are among the first ``num_real`` of the dataset."""
  held = np.arange(table.indices.shape[1]) < table.counts[:, None]
  return (held & (table.indices < num_real)).sum(axis=1, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Hospitals:
  """A dataset split and partitioned: everything the simulation needs of the data.

  Attributes:
    dataset: the examples.
    split: train and test sides.
    names: K hospital names.
    train: training table of the K hospitals; in a row synthetic examples come last.
    test: test table of the K hospitals; its rows together are the global test set.
    num_moved: examples moved from large to small clients to reach the minimum client size.
    num_elsewhere: under scheme=site examples at another hospital than their site, because they are
      kept together with near-duplicates or images of the patient there.
    mixture_shifts: of each hospital that was filled so the total variation distance, 0 to 1,
      between the class mixture that was drawn for it and the one that it holds.
    visiting: under scheme=site the sites that train nowhere, each of one unit that is in test, and
      the hospital that tests it.
    poisoned: of each hostile hospital that trains on wrong labels the number of them.
  """

  dataset: Dataset
  split: Split
  names: tuple[str, ...]
  train: ClientTable
  test: ClientTable
  num_moved: int = 0
  num_elsewhere: int = 0
  mixture_shifts: dict[str, float] = dataclasses.field(default_factory=dict)
  visiting: dict[str, str] = dataclasses.field(default_factory=dict)
  poisoned: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def by_site(self) -> bool:
    """Whether each hospital is a site of the dataset."""
    training = tuple(name for name in self.dataset.site_names if name not in self.visiting)
    return self.dataset.sites is not None and self.names == training

  @property
  def real_counts(self) -> np.ndarray:
    """[K] int32 real training examples, with which each training row begins."""
    return real_counts(self.train, self.dataset.num_real)


def client_table(rows: list[np.ndarray]) -> ClientTable:
  """Packs K ragged rows of example numbers into a ClientTable."""
  counts = np.array([len(row) for row in rows], np.int32)
  indices = np.zeros((len(rows), max(1, counts.max(initial=0))), np.int32)
  for client, row in enumerate(rows):
    indices[client, : len(row)] = row
  return ClientTable(indices, counts)


@dataclasses.dataclass(frozen=True)
class UnitTable:
  """Patients that each client holds: its rows, sorted so that those of a patient are adjacent.

  Attributes:
    rows: the clients' examples in that order.
    starts: [K, u_max] int32 slot of each unit's first example; 0 past ``counts``.
    sizes: [K, u_max] int32 examples of each unit; 1 past ``counts``.
    counts: [K] int32 units of each client.
  """

  rows: ClientTable
  starts: np.ndarray
  sizes: np.ndarray
  counts: np.ndarray


def unit_table(table: ClientTable, groups: np.ndarray) -> UnitTable:
  """Sorts every client's examples by their group; ``groups`` [N] numbers those of all examples."""
  rows = [row[np.argsort(groups[row], kind="stable")] for row in client_rows(table)]
  sizes = [np.unique(groups[row], return_counts=True)[1] for row in rows]
  counts = np.array([len(each) for each in sizes], np.int32)
  shape = len(sizes), max(1, counts.max(initial=0))
  starts, padded = np.zeros(shape, np.int32), np.ones(shape, np.int32)
  for k, each in enumerate(sizes):
    starts[k, : len(each)] = np.cumsum(each) - each
    padded[k, : len(each)] = each
  return UnitTable(rows=client_table(rows), starts=starts, sizes=padded, counts=counts)


def client_rows(table: ClientTable) -> list[np.ndarray]:
  """Inverse of ``client_table``: the K ragged rows."""
  return [row[:count] for row, count in zip(table.indices, table.counts, strict=True)]
