"""Predictions of a trained model on the records of a table: CSV or Parquet in, CSV out."""

import pathlib
from collections.abc import Sequence

import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.data.table_files import Cells, read_cells, table_files
from fedjax_med.data.table_manifest import Manifest, parse_manifest
from fedjax_med.data.tables import encode, scaled
from fedjax_med.folder.writing import write_csv
from fedjax_med.trained.loading import Trained
from fedjax_med.trained.predictions import make_probabilities, table_of


def predict_table(trained: Trained, place: pathlib.Path, output: pathlib.Path) -> tuple[int, str]:
  """Writes a row for each record of ``place`` to ``output``, a CSV file.

  Columns: file, line, predicted, and the probability of each class under 'probability of CLASS'.
  Of tasks without classes: record, which is the patient or else the file and the line, and the
  columns of ``Task.table``.
  Records are encoded as those of the run; the target may be missing, and is not read.

  Args:
    trained: the model.
    place: a table, or a folder of tables.
    output: the table of predictions; its folder is made.

  Returns:
    The number of records, and a sentence on values that the manifest does not foresee; empty if
    there are none.

  Raises:
    UserError: a file cannot be read or lacks a column, a required value is missing, or the run
      scaled each hospital by itself.
  """
  table = trained.table
  assert table is not None
  require(
    table["scaling"] != "hospital",
    f"run {trained.run_id} scaled numbers by statistics of each hospital (data.scaling=hospital),"
    " which stay there",
    "train with data.scaling=ranges or federated",
  )
  manifest = parse_manifest(table["manifest"], "the manifest of the run")
  paths, _ = table_files(place, manifest._replace(sites={}))
  files = [read_cells(path, manifest.names) for path in paths if path.resolve() != output.resolve()]
  require(bool(files), f"--table={place} holds predictions only", "give a table with records")
  for cells in files:
    absent = [c.name for c in manifest.inputs if c.name not in cells.header]
    require(
      not absent,
      f"{cells.name} has no column '{''.join(absent[:1])}', which the model reads; its columns are"
      f" {', '.join(cells.header)}",
      "add the column, with empty cells where nothing is known",
    )
  encoded = encode(files, manifest, table["scaling"])
  lines = [(cells.name, line) for cells in files for line in cells.lines]
  for place_of, column in enumerate(manifest.inputs):
    lacking = np.flatnonzero(encoded.missing[:, place_of]) if column.required else []
    first = lines[lacking[0]] if len(lacking) else ("", 0)
    require(
      not len(lacking),
      f"{first[0]}, line {first[1]}: no value of the required column '{column.name}'",
      "leave out such records",
    )
  inputs = encoded.inputs
  if table["scaling"] == "federated":
    numbers = [c.name for c in manifest.inputs if c.kind == "number"]
    places = np.array([encoded.features.index(name) for name in numbers], np.int64)
    inputs = scaled(inputs, places, np.array(table["shift"]), np.array(table["scale"]))
  told = table_of(trained, make_probabilities(trained)(inputs))
  first, places = ["file", "line"], [[name, str(line)] for name, line in lines]
  if not trained.predicts_classes:
    first, places = ["record"], [[name] for name in _records(files, manifest)]
  rows = [[*place, *cells] for place, own in zip(places, told.rows, strict=True) for cells in own]

  write_csv(output, [*first, *told.heading], rows)
  met = [f"{count} values of '{name}' outside its range" for name, count in encoded.outside.items()]
  met += [f"{count} unknown categories of '{name}'" for name, count in encoded.unknown.items()]
  return len(lines), "; ".join(met)


def _records(files: Sequence[Cells], manifest: Manifest) -> list[str]:
  """Name of each record: its patient, or file and line where none is named or one has several."""
  names = []
  for cells in files:
    place = cells.header.index(manifest.patient) if manifest.patient in cells.header else None
    for row, line in zip(cells.rows, cells.lines, strict=True):
      patient = "" if place is None else row[place].strip()
      names.append(f"{cells.name}:{line}" if patient in manifest.missing else patient)
  if len(set(names)) == len(names):
    return names
  return [f"{cells.name}:{line}" for cells in files for line in cells.lines]
