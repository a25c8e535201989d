"""Drug response: log IC50 of cell lines (GDSC) beside the methylation of their genes (CCLE).

A record is a cell line: its methylation is the input, its responses are the targets. The four files
are those of the public code of DeepCDR (Liu et al. 2020); joined they are a table with a manifest.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import require
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.folder_patterns import LeftOut
from fedjax_med.data.table_files import Cells, read_cells
from fedjax_med.data.table_manifest import MISSING, OTHER, Column, Manifest
from fedjax_med.data.tables import dataset_of, numbers

RESPONSES = "GDSC_IC50.csv"
METHYLATION = "genomic_methylation_561celllines_808genes_demap_features.csv"
LINES = "Cell_lines_annotations_20181226.txt"
DRUGS = "drug_list.csv"
NAMES = "Unnamed: 0"  # the first column of two of the files
SITE = "Site_Primary"
PREFIX = "GDSC:"  # of a drug's number
SMALL = 20  # lines of a primary site, under which it is no hospital of its own
TISSUE, PAIRS = "tissue", "pairs"
NOTES = {
  TISSUE: "The test cell lines are of primary sites that no training side holds.",
  PAIRS: (
    "Leaks: pairs of cell line and drug are split at random, so that a test line's responses to"
    " other drugs are trained on. That flatters every model, and of the overall r most is that of"
    " the training mean of each drug, which knows nothing of a line ('r of means')."
  ),
}


def load_gdsc(folder: pathlib.Path, data: DataConfig) -> Dataset:
  """The cell lines of a folder, each with its responses.

  Args:
    folder: holds the four files as they were published.
    data: ``split``, ``test_fraction``, ``seed``, ``scaling`` and ``strict`` are read.

  Raises:
    UserError: a file is missing or is not as it must be.
  """
  cells, manifest, left = _joined(folder)
  unread = dataclasses.replace(data, positive="")  # there are no classes
  dataset = dataset_of([cells], left, folder, manifest, unread)
  lines = dict(zip(cells.lines, (row[0] for row in cells.rows), strict=True))
  names = tuple(lines[int(name.rpartition(":")[2])] for name in dataset.names)
  note = [NOTES[data.split]] if data.split in NOTES else []
  dataset = dataclasses.replace(dataset, names=names, class_names=("line",), notes=tuple(note))
  if data.split == TISSUE:
    assert dataset.sites is not None
    in_test = _whole_sites(dataset.sites, data.test_fraction, data.seed)
    return dataclasses.replace(dataset, in_test=in_test)
  return _by_pairs(dataset, data) if data.split == PAIRS else dataset


def _joined(folder: pathlib.Path) -> tuple[Cells, Manifest, list[LeftOut]]:
  """One table of the lines with inputs, its manifest, and the lines that only have responses."""
  inputs, told = _read(folder / METHYLATION), _read(folder / RESPONSES)
  places, listed = _read(folder / LINES), _read(folder / DRUGS)
  for cells in (inputs, told):
    _require_once(cells.name, [row[0] for row in cells.rows])
  known = zip(_column(places, "depMapID"), _column(places, SITE), strict=True)
  sites = {line: site for line, site in reversed(list(known)) if site not in MISSING}
  _require_numbers(told)
  drugs = _drug_names([row[0] for row in told.rows], listed)
  responses = dict(
    zip(told.header[1:], zip(*(row[1:] for row in told.rows), strict=True), strict=True)
  )
  common = set(responses) & {row[0] for row in inputs.rows}
  require(
    bool(common),
    f"no cell line of {folder / METHYLATION} is in {folder / RESPONSES}",
    "give the files as they were published",
  )
  nothing = ("",) * len(drugs)
  rows = [[*row, *responses.get(row[0], nothing), sites.get(row[0], OTHER)] for row in inputs.rows]
  without = sorted(set(responses) - common)
  left = [
    LeftOut(name=name, reason="a line without methylation", class_name="") for name in without
  ]
  features = inputs.header[1:]
  manifest = Manifest(
    target="",
    above=None,
    classes=(),
    targets=drugs,
    unit="log IC50",
    columns=tuple(
      Column(name=name, kind="number", low=0, high=1, missing=MISSING, required=True)
      for name in features
    ),
    missing=MISSING,
    names=(),
    site=SITE,
    patient=NAMES,
    group="",
    sites={},
    join_sites_below=SMALL,
  )
  header = (NAMES, *features, *drugs, SITE)
  return inputs._replace(header=header, rows=rows), manifest, left


def _read(path: pathlib.Path) -> Cells:
  require(
    path.is_file(),
    f"data.path={path.parent} has no {path.name}, which data.source='gdsc' needs",
    f"point --config.data.path at the folder with {METHYLATION}, {RESPONSES}, {LINES} and {DRUGS}",
  )
  return read_cells(path)


def _column(cells: Cells, name: str) -> list[str]:
  require(
    name in cells.header,
    f"{cells.name} has no column '{name}', but {', '.join(cells.header[:8])}",
    "give the file as it was published",
  )
  place = cells.header.index(name)
  return [row[place].strip() for row in cells.rows]


def _require_once(file: str, names: Sequence[str]) -> None:
  twice = sorted({name for name in names if names.count(name) > 1})
  require(not twice, f"{file} has the row '{''.join(twice[:1])}' twice", "remove one")


def _require_numbers(cells: Cells) -> None:
  """Raises UserError for text in place of a response, with its place in the file."""
  for place, name in enumerate(cells.header[1:], 1):
    try:
      for row in cells.rows:
        float(row[place])
    except ValueError:  # a missing value, or text that is refused
      numbers(cells, Column(name=name, kind="number", missing=MISSING))


def _drug_names(rows: Sequence[str], listed: Cells) -> tuple[str, ...]:
  """Names of drugs, with the number behind them where several drugs have one name."""
  keys = [name.removeprefix(PREFIX) for name in rows]
  known = dict(zip(_column(listed, "drug_id"), _column(listed, "Name"), strict=True))
  names = [known.get(key, f"{PREFIX}{key}") for key in keys]
  return tuple(
    name if names.count(name) == 1 else f"{name} ({key})"
    for name, key in zip(names, keys, strict=True)
  )


def _whole_sites(sites: np.ndarray, test_fraction: float, seed: int) -> np.ndarray:
  """[N] bool: sites drawn at random, as many as come nearest to the share of lines; at least 1."""
  order = np.random.default_rng([seed, 1]).permutation(int(sites.max()) + 1)
  require(len(order) > 1, "data.split='tissue' with one primary site", "use data.split=grouped")
  shares = np.cumsum(np.bincount(sites)[order]) / len(sites)
  number = 1 + int(np.abs(shares[:-1] - test_fraction).argmin())
  return np.isin(sites, order[:number])


def _by_pairs(dataset: Dataset, data: DataConfig) -> Dataset:
  """Each line twice: with the responses that are trained on, and with those that are tested."""
  targets, table, sites = dataset.targets, dataset.table, dataset.sites
  patients, counts, number = dataset.patients, dataset.patient_counts, len(dataset.names)
  assert targets is not None
  assert table is not None
  assert sites is not None
  assert patients is not None
  assert counts is not None
  held_out = _drawn_pairs(~np.isnan(targets.values), data.test_fraction, data.seed)
  parts = [np.where(side, np.nan, targets.values) for side in (held_out, ~held_out)]
  return dataclasses.replace(
    dataset,
    inputs=np.tile(dataset.inputs, (2, 1)),
    labels=np.tile(dataset.labels, 2),
    names=dataset.names * 2,
    sites=np.tile(sites, 2),
    patients=np.tile(patients, 2),
    patient_counts=counts._replace(named=2 * counts.named),
    in_test=np.arange(2 * number) >= number,
    targets=targets._replace(values=np.concatenate(parts).astype(np.float32)),
    table=table._replace(missing=np.tile(table.missing, (2, 1))),
  )


def _drawn_pairs(known: np.ndarray, test_fraction: float, seed: int) -> np.ndarray:
  """[N, M] bool: that share of the known values, drawn at random."""
  places = np.flatnonzero(known)
  order = np.random.default_rng([seed, 1]).permutation(len(places))
  held_out = np.zeros(known.size, bool)
  held_out[places[order[: round(test_fraction * len(places))]]] = True
  return held_out.reshape(known.shape)
