"""Files of tables: CSV with any of the usual separators, and Parquet, as cells of text."""

import csv
import io
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import readable
from fedjax_med.data.files import SYSTEM, SYSTEM_FILES
from fedjax_med.data.folder_patterns import LeftOut
from fedjax_med.data.table_manifest import Manifest

CSV, PARQUET = frozenset({".csv", ".tsv", ".txt"}), frozenset({".parquet", ".pq"})
SEPARATORS = ",;\t|"
NO_TABLE = "no table (CSV or Parquet)"


class Cells(NamedTuple):
  """The rows of one file.

  Attributes:
    name: of the file.
    header: names of its columns.
    rows: cells of each row, one a column.
    lines: [rows] line of each row in the file, for errors; rows of Parquet are counted from 1.
    comma: whether numbers may have a decimal comma.
  """

  name: str
  header: tuple[str, ...]
  rows: list[list[str]]
  lines: list[int]
  comma: bool


def table_files(root: pathlib.Path, manifest: Manifest) -> tuple[list[pathlib.Path], list[LeftOut]]:
  """The tables at ``data.path``, sorted by name, and the other files of the folder.

  Raises:
    UserError: there is nothing, no table, or not every file that the manifest names.
  """
  require(
    root.exists(),
    f"data.path={root} does not exist",
    "point --config.data.path at a table, or at a folder with the table of each hospital",
  )
  if root.is_file():
    return [root], []
  found, left = [], []
  for path in sorted(root.iterdir()):
    if manifest.sites:
      if path.name in manifest.sites:
        found.append(path)
      continue
    if path.is_file() and path.suffix.lower() in CSV | PARQUET and path.name[0] != ".":
      found.append(path)
    else:
      reason = SYSTEM if path.name.lower() in SYSTEM_FILES else NO_TABLE
      left.append(LeftOut(name=readable(path.name), reason=reason, class_name=""))
  absent = manifest.sites.keys() - {path.name for path in found}
  require(
    not absent,
    f"data.path={root} lacks {', '.join(sorted(absent))}",
    "point --config.data.path at the folder with all files that the manifest names",
  )
  require(
    bool(found),
    f"data.path={root} holds no table",
    "give a folder with files ending in .csv, .tsv, .txt or .parquet",
  )
  return found, left


def read_cells(path: pathlib.Path, names: tuple[str, ...] = ()) -> Cells:
  """Reads one table; ``names`` is the header of a file that has none.

  Raises:
    UserError: the file cannot be read, has no rows, a column twice, or rows of another length.
  """
  read = _parquet if path.suffix.lower() in PARQUET else _csv
  cells = read(path, names)
  twice = sorted({name for name in cells.header if cells.header.count(name) > 1})
  require(
    not twice,
    f"{path} has the column '{''.join(twice[:1])}' twice",
    "give each column a name of its own",
  )
  require(bool(cells.rows), f"{path} has no rows", "give a table with records")
  for row, line in zip(cells.rows, cells.lines, strict=True):
    require(
      len(row) == len(cells.header),
      f"{path}, line {line}: {len(row)} cells under a header of {len(cells.header)} columns",
      "correct the line, or put text with separators into quotes",
    )
  return cells


def _parquet(path: pathlib.Path, names: tuple[str, ...]) -> Cells:
  import pandas as pd

  try:
    frame = pd.read_parquet(path)
  except Exception as error:  # whatever pyarrow raises for a damaged file
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"{path} cannot be read as Parquet ({reason}); restore the file") from error
  texts = frame.astype(object).where(frame.notna(), "").map(str)
  rows = [list(row) for row in texts.itertuples(index=False, name=None)]
  return Cells(
    name=readable(path.name),
    header=names or tuple(map(str, frame.columns)),
    rows=rows,
    lines=list(range(1, len(rows) + 1)),
    comma=False,
  )


def _csv(path: pathlib.Path, names: tuple[str, ...]) -> Cells:
  try:
    text = path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 ({error}); save it as CSV in UTF-8") from error
  first = text.partition("\n")[0]
  # The separator that makes the most of the first line, in which few cells hold text.
  separator = max(SEPARATORS, key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
  rows = list(_lines(text, separator, path))
  require(bool(rows), f"{path} is empty", "give a table with a header and records")
  # A column without a name is that of row names, and is called as pandas calls it.
  header = names or tuple(
    cell.strip() or f"Unnamed: {place}" for place, cell in enumerate(rows.pop(0)[1])
  )
  return Cells(
    name=readable(path.name),
    header=header,
    rows=[cells for _, cells in rows],
    lines=[line for line, _ in rows],
    comma=separator == ";",
  )


def _lines(text: str, separator: str, path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
  """(line, cells) of every line that is not blank."""
  reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
  try:
    for cells in reader:
      if any(cell.strip() for cell in cells):
        yield reader.line_num, cells
  except csv.Error as error:
    raise UserError(f"{path}, line {reader.line_num}: {error}; correct the file") from error
