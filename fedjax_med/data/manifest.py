"""A table of pictures with their labels, sites, patients and sides: data.source=manifest."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import tomllib
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError, nearest, require
from fedjax_med.core.text import readable
from fedjax_med.data.classes import order_classes
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.duplicates import join_groups
from fedjax_med.data.files import File
from fedjax_med.data.folder_patterns import Placed
from fedjax_med.data.grey import parse_window
from fedjax_med.data.images import Read, gather
from fedjax_med.data.patients import number_patients
from fedjax_med.data.slices import parse_slices
from fedjax_med.data.target_columns import group_names, require_no_positive, with_targets
from fedjax_med.data.volumes import FileValues, read_file

if TYPE_CHECKING:
  import pandas as pd

ENDINGS = (".csv", ".tsv", ".parquet")
DELIMITERS = ",;\t"
SIDES = {"train": False, "test": True}
SHOWN = 5  # rows or names that a sentence shows of many
MOST_MISSING = 100  # files that are not there and are all named
# Roles of columns; a manifest may lack those from the third on.
ROLES = ("path", "label", "patient", "site", "split")
NEEDED = ROLES[:2]
LISTS = {"groups": "family", "targets": "age"}  # keys of several columns, with an example
SAME_PATIENT = "All DICOM files name one PatientID, which then says nothing of patients."


class Columns(NamedTuple):
  """Names of the columns of a manifest.

  Attributes:
    roles: name of the column of each of ``ROLES``.
    groups: names of further columns whose equal values keep rows together.
    targets: names of columns that are predicted in place of a class.
    asked: roles whose column somebody named, so that it has to be there.
  """

  roles: dict[str, str]
  groups: tuple[str, ...]
  targets: tuple[str, ...]
  asked: frozenset[str]


class Rows(NamedTuple):
  """The rows of a manifest, R of them.

  Attributes:
    files: R files.
    labels: R names of classes, or of groups of like examples where ``targets`` are predicted.
    patients: R names, None where the cell is empty; None without such a column.
    sites: R names; None without such a column.
    in_test: R values; None without a split column, or where the split is drawn anew.
    groups: of each further column R names, None where the cell is empty.
    targets: [R, M] float32, nan where the cell is empty; None where a class is predicted.
  """

  files: list[File]
  labels: list[str]
  patients: list[str | None] | None
  sites: list[str] | None
  in_test: list[bool] | None
  groups: dict[str, list[str | None]]
  targets: np.ndarray | None


class Example(NamedTuple):
  """An example of a manifest: a picture, or a slice of a volume.

  Attributes:
    row: number of its row.
    patient: digest of the patient's name in the file; None where it holds none.
    read: the example after reading.
  """

  row: int
  patient: str | None
  read: Read


def load_manifest(path: pathlib.Path, data: DataConfig) -> Dataset:
  """Reads the pictures that a table lists; every file that is left out is named in ``skipped``.

  Args:
    path: a .csv, .tsv or .parquet file; paths in it are relative to its folder. A file beside it
      with the ending .toml may name its columns.
    data: the fields of pictures and of manifests are read.

  Raises:
    UserError: the table is not as it must be (columns, cells, files, sides), or see
      ``images.gather``.
  """
  parse_window(data.window)  # before anything is read
  parse_slices(data.slices)
  require(
    path.is_file(),
    f"data.path={path} is not a file",
    f"point --config.data.path at the manifest, a file ending in {', '.join(ENDINGS)}",
  )
  columns = columns_of(path, data)
  rows = read_rows(path, columns, data)
  names: tuple[str, ...] = tuple(sorted(set(rows.labels)))
  if rows.targets is None:
    names = order_classes(names, data.positive)
  require(
    len(names) > 1 or rows.targets is not None,
    f"{path} lists one class only ('{''.join(names)}')",
    "add rows of a second class, or name another column with --config.data.label_column",
  )
  placed = [
    Placed(
      file=file,
      class_name=label,
      site=rows.sites[number] if rows.sites else None,
      patient=None,
      in_test=rows.in_test[number] if rows.in_test else None,
    )
    for number, (file, label) in enumerate(zip(rows.files, rows.labels, strict=True))
  ]
  contents = _read_all(placed, data)
  _require_slices_read(path, contents, data)
  reads = _examples(placed, contents)
  dataset = gather(
    [example.read for example in reads],
    (),
    names,
    root=path,
    data=data,
    notes=_notes(contents, data),
    listed=True,
  )
  examples = {each.read.placed.file.name: each for each in reads}
  if rows.targets is not None:
    values = {name: rows.targets[one.row] for name, one in examples.items()}
    dataset = with_targets(dataset, values, columns.targets)
  return _with_people(dataset, rows, examples, path)


def _read_all(placed: Sequence[Placed], data: DataConfig) -> list[FileValues]:
  """Reads files in order, two at a time."""

  colour = data.channels == "3" or (data.channels == "auto" and _all_coloured(placed, data))

  def read(picture: Placed) -> FileValues:
    return read_file(picture.file.path, picture.file.name, data, colour)

  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    return list(threads.map(read, placed))


def _all_coloured(placed: Sequence[Placed], data: DataConfig) -> bool:
  """Whether every picture that can be read has colours; looks no further than the first without."""
  known = False
  small = dataclasses.replace(data, image_size=8)  # of the picture itself, before it is resized
  for picture in placed:
    content = read_file(picture.file.path, picture.file.name, small, colour=True)
    values = [values for _, values in content.values if not isinstance(values, str)]
    if any(each.pixels.ndim == 2 for each in values):
      return False
    known = known or bool(values)
  return known


def _examples(placed: Sequence[Placed], contents: Sequence[FileValues]) -> list[Example]:
  """The examples of all files in order, each slice of a volume under a name of its own."""
  found = []
  for row, (picture, content) in enumerate(zip(placed, contents, strict=True)):
    *folders, last = picture.file.parts
    for ending, values in content.values:
      file = picture.file._replace(parts=(*folders, last + ending))
      read = Read(picture._replace(file=file), values)
      found.append(Example(row=row, patient=content.patient, read=read))
  return found


def _require_slices_read(
  path: pathlib.Path, contents: Sequence[FileValues], data: DataConfig
) -> None:
  require(
    data.slices == DataConfig().slices or any(content.total > 1 for content in contents),
    f"data.slices='{data.slices}' is not read: no file that {path} lists has several slices",
    "leave it at its default",
  )
  require(
    data.volume == DataConfig().volume or any(content.volumes for content in contents),
    f"data.volume={data.volume} is not read: no file that {path} lists has several volumes (4-D)",
    "leave it at its default",
  )


def _notes(contents: Sequence[FileValues], data: DataConfig) -> tuple[str, ...]:
  several = [content for content in contents if content.total > 1]
  if not several:
    return ()
  read, total = sum(len(c.values) for c in several), sum(c.total for c in several)
  return (
    f"{_counted(len(several), 'file')} of {len(contents)} with several slices: {read} of {total}"
    f" slices are examples (data.slices={data.slices}).",
  )


def columns_of(path: pathlib.Path, data: DataConfig) -> Columns:
  """Names of the columns: flags, then the .toml beside the manifest, then their usual names.

  Raises:
    UserError: the .toml cannot be read, has an unknown key, or a value that is no text.
  """
  usual, beside = DataConfig(), path.with_suffix(".toml")
  told = _read_toml(beside) if beside.is_file() else {}
  roles, asked = {}, set()
  for role in ROLES:
    flag, default = (getattr(config, f"{role}_column") for config in (data, usual))
    roles[role] = flag if flag != default else told.get(role, default)
    if flag != default or role in told or role in NEEDED:
      asked.add(role)

  def several(flag: str, key: str) -> tuple[str, ...]:
    names = flag.split(",") if flag else told.get(key, [])
    return tuple(name.strip() for name in names if name.strip())

  targets = several(data.target_columns, "targets")
  others = [name for role, name in roles.items() if role != "label"]
  twice = sorted({name for name in targets if targets.count(name) > 1 or name in others})
  require(
    not twice,
    f"column {_shown(twice)} is named as a target and once more",
    "name each column for one thing",
  )
  if targets:
    usual_label = data.label_column == usual.label_column and "label" not in told
    require(
      usual_label,
      f"column '{roles['label']}' is named as the class, and {_shown(targets)} as targets, which"
      " are predicted in place of a class",
      "name one or the other",
    )
    require_no_positive(data.positive)
    asked.discard("label")
  return Columns(
    roles=roles,
    groups=several(data.group_columns, "groups"),
    targets=targets,
    asked=frozenset(asked),
  )


def _read_toml(path: pathlib.Path) -> dict[str, Any]:
  try:
    told = tomllib.loads(path.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read as TOML ({error}); mend or remove it") from error
  for key, value in told.items():
    if key not in (*ROLES, *LISTS):
      raise UserError(f"{path}: '{key}' is unknown; {nearest(key, (*ROLES, *LISTS))}")
    several = isinstance(value, list) and all(isinstance(name, str) for name in value)
    require(
      several if key in LISTS else isinstance(value, str),
      f"{path}: {key} = {value!r} names no column",
      f'write {key} = ["{LISTS[key]}"]' if key in LISTS else f'write {key} = "name of the column"',
    )
  return told


def read_cells(path: pathlib.Path) -> "pd.DataFrame":
  """The cells of a table as text without spaces around it, its columns named by the first row.

  Empty cells and those that Parquet has no value for are "". A CSV is UTF-8, separated by commas,
  semicolons or tabs.

  Raises:
    UserError: it cannot be read, has no row, or two columns of one name.
  """
  import pandas as pd

  ending = path.suffix.lower()
  require(
    ending in ENDINGS,
    f"data.path={path} ends in '{ending}', which is no manifest",
    f"give a file ending in {', '.join(ENDINGS)}",
  )
  try:
    if ending == ".parquet":
      frame = pd.read_parquet(path).map(_text)
    else:
      with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
      # Without a header pandas counts fields: a row with one too many is an error, not an index.
      cells = pd.read_csv(
        path,
        sep=max(DELIMITERS, key=first.count),
        header=None,
        dtype=str,
        keep_default_na=False,  # a class may be called NA or None
        encoding="utf-8-sig",
        skip_blank_lines=True,
      ).fillna("")
      frame = cells.iloc[1:].reset_index(drop=True)
      frame.columns = [str(name) for name in cells.iloc[0]]
  except (OSError, ValueError) as error:  # pandas' and pyarrow's errors are ValueErrors
    reason = " ".join(str(error).split())[:160]
    raise UserError(
      f"{path} cannot be read ({reason}); save it as CSV (UTF-8, one header row) or Parquet"
    ) from error
  frame.columns = [name.strip() for name in frame.columns.astype(str)]
  twice = sorted(set(frame.columns[frame.columns.duplicated()]))
  require(not twice, f"{path} has several columns named {_shown(twice)}", "rename all but one")
  require(len(frame) > 0, f"{path} has no rows below its header", "list the pictures in it")
  return frame.map(str.strip)


def _text(value: Any) -> str:
  """A cell of a typed table as text: 1.0 is 1, what has no value is empty."""
  if value is None or value != value or str(value) == "<NA>":
    return ""
  if isinstance(value, float | np.floating) and float(value).is_integer():
    return str(int(value))
  return str(value)


def read_rows(path: pathlib.Path, columns: Columns, data: DataConfig) -> Rows:
  """The rows of a manifest, checked; see ``load_manifest``."""
  frame = read_cells(path)
  found = [role for role in ROLES if columns.roles[role] in frame.columns]
  named = [columns.roles[role] for role in ROLES if role in columns.asked]
  several = (*columns.groups, *columns.targets)
  absent = [name for name in (*named, *several) if name not in frame.columns]
  require(
    not absent,
    f"{path} has no column {_shown(absent)} but {', '.join(frame.columns)}",
    "name its columns with --config.data.path_column, label_column, patient_column, site_column,"
    " split_column, group_columns and target_columns, or in"
    f" {path.with_suffix('.toml').name} beside it",
  )

  def cells(role: str) -> list[str] | None:
    return frame[columns.roles[role]].tolist() if role in found else None

  targets, sites = _targets(path, frame, columns.targets), None
  labels = _full(path, columns, "label", cells) if targets is None else group_names(targets)
  if "site" in found:
    sites = _full(path, columns, "site", cells)
  rows = Rows(
    files=_files(path, _full(path, columns, "path", cells)),
    labels=labels,
    patients=_names(cells("patient")),
    sites=sites,
    in_test=_sides(path, columns, cells) if "split" in found and data.given_split else None,
    groups={name: _names(frame[name].tolist()) or [] for name in columns.groups},
    targets=targets,
  )
  require(
    data.given_split or "split" in found,
    f"data.given_split=False with {path}, which has no column '{columns.roles['split']}'",
    "leave it at True: the split is drawn anyway",
  )
  if rows.in_test is not None:
    require_undrawn(data, f"column '{columns.roles['split']}' of {path}")
    people = {columns.roles["patient"]: rows.patients} if rows.patients else {}
    for name, keys in (people | rows.groups).items():
      places = [file.name for file in rows.files]
      require_one_side(path, f"column '{name}'", keys, rows.sites, rows.in_test, places)
  for name, keys in ({columns.roles["patient"]: rows.patients} | rows.groups).items():
    require(
      keys is None or any(keys),
      f"column '{name}' of {path} is empty in every row",
      "fill it, or remove it",
    )
  return rows


def _targets(path: pathlib.Path, frame: "pd.DataFrame", names: Sequence[str]) -> np.ndarray | None:
  """The values [R, M] of the target columns, nan in empty cells; None without such columns."""
  if not names:
    return None
  values = np.full((len(frame), len(names)), np.nan, np.float32)
  for place, name in enumerate(names):
    for row, cell in enumerate(frame[name].tolist()):
      values[row, place] = _number(cell, f"{path}: column '{name}', row {row + 1} below the header")
  nothing = np.flatnonzero(np.isnan(values).all(axis=1))
  require(
    not len(nothing),
    f"{path}: {_counted(len(nothing), 'row')} without a value of any target (row"
    f" {_shown((nothing + 1).tolist())} below the header)",
    "fill these cells or remove the rows",
  )
  return values


def _number(cell: str, where: str) -> float:
  """A target as a number, nan where the cell is empty."""
  try:
    value = float(cell) if cell else math.nan
  except ValueError:
    value = math.inf
  require(
    not abs(value) > float(np.finfo(np.float32).max),
    f"{where}: '{cell}' is no number that float32 holds",
    "write numbers, or 1 and 0 for labels, and leave unknown cells empty",
  )
  return value


def require_undrawn(data: DataConfig, where: str) -> None:
  """Raises UserError where settings of a drawn split stand beside one that the data give."""
  usual = DataConfig()
  values = {
    f"data.{name}": (getattr(data, name), getattr(usual, name))
    for name in ("split", "test_fraction", "fold")
  }
  told = [f"{name}={value}" for name, (value, default) in values.items() if value != default]
  require(
    not told,
    f"{' and '.join(told)} {'is' if len(told) == 1 else 'are'} not read: {where} gives the sides",
    "leave them at their defaults, or set --config.data.given_split=False to split anew",
  )


def _full(path: pathlib.Path, columns: Columns, role: str, cells: Any) -> list[str]:
  """The cells of a column that may have no empty one."""
  values = [readable(unicodedata.normalize("NFC", cell)) for cell in cells(role)]
  values = cells(role) if role == "path" else values
  empty = [number for number, value in enumerate(values, 1) if not value]
  require(
    not empty,
    f"{path}: {_counted(len(empty), 'row')} without a {role} in column '{columns.roles[role]}'"
    f" (row {_shown(empty)} below the header)",
    "fill these cells or remove the rows",
  )
  return values


def _names(cells: list[str] | None) -> list[str | None] | None:
  return None if cells is None else [cell or None for cell in cells]


def _sides(path: pathlib.Path, columns: Columns, cells: Any) -> list[bool]:
  values = [value.casefold() for value in _full(path, columns, "split", cells)]
  other = [value for value in dict.fromkeys(values) if value not in SIDES]
  require(
    not other,
    f"column '{columns.roles['split']}' of {path} holds {_shown(other)} in"
    f" {_counted(sum(value not in SIDES for value in values), 'row')}, which is neither train nor"
    " test",
    "write train or test (validation belongs to train), or set --config.data.given_split=False to"
    " split anew",
  )
  return [SIDES[value] for value in values]


def _files(path: pathlib.Path, cells: Sequence[str]) -> list[File]:
  """The files that a manifest lists, in its order."""
  root = pathlib.Path(os.path.abspath(path.parent))
  places = [_place(root, cell) for cell in cells]
  outside = [cell for cell, place in zip(cells, places, strict=True) if not _inside(root, place)]
  require(
    not outside,
    f"{path} lists {_counted(len(outside), 'path')} outside of its folder: {_shown(outside)}",
    "move the files, or a link to them, below the folder of the manifest",
  )
  missing = [cell for cell, place in zip(cells, places, strict=True) if not place.is_file()]
  verb, more = "is" if len(missing) == 1 else "are", len(missing) - MOST_MISSING
  require(
    not missing,
    f"{_counted(len(missing), 'file')} of {len(cells)} that {path} lists {verb} not there:"
    f" {', '.join(map(readable, missing[:MOST_MISSING]))}"
    + (f" and {more} more" if more > 0 else ""),
    "put them there, mend the paths (they are relative to the manifest) or remove the rows",
  )
  _require_once(path, cells, places)
  return [
    File(
      path=place,
      parts=tuple(
        readable(unicodedata.normalize("NFC", name)) for name in place.relative_to(root).parts
      ),
      reason="",
    )
    for place in places
  ]


def _place(root: pathlib.Path, cell: str) -> pathlib.Path:
  """Where a path of a manifest leads; one from Windows has backslashes."""
  place = pathlib.Path(os.path.normpath(root / cell))
  other = pathlib.Path(os.path.normpath(root / cell.replace("\\", "/")))
  return place if place.is_file() or not other.is_file() else other


def _inside(root: pathlib.Path, place: pathlib.Path) -> bool:
  return root in place.parents


def _require_once(path: pathlib.Path, cells: Sequence[str], places: Sequence[pathlib.Path]) -> None:
  seen: dict[tuple[int, int], str] = {}
  twice = []
  for cell, place in zip(cells, places, strict=True):
    stat = place.stat()
    key = stat.st_dev, stat.st_ino
    if key in seen:
      twice.append(cell if cell == seen[key] else f"{cell} (also {seen[key]})")
    seen.setdefault(key, cell)
  require(
    not twice,
    f"{path} lists {_counted(len(twice), 'file')} more than once: {_shown(twice)}",
    "keep one row a file",
  )


def require_one_side(
  path: pathlib.Path,
  source: str,
  keys: Sequence[str | None],
  sites: Sequence[str] | None,
  in_test: Sequence[bool],
  names: Sequence[str],
) -> None:
  """Raises UserError where rows of one patient or group stand in train and in test.

  Equal names at two sites may be two people: they are counted beside the results instead.

  Args:
    path: the manifest, for the sentence.
    source: what names the patients, for the sentence.
    keys: R names, None where there is none.
    sites: R names, or None.
    in_test: R sides.
    names: R files, one of which is shown.
  """
  seen: dict[tuple[str, str], bool] = {}
  both: dict[tuple[str, str], str] = {}
  for number, key in enumerate(keys):
    if key is None:
      continue
    person = sites[number] if sites else "", unicodedata.normalize("NFC", key).casefold()
    if seen.setdefault(person, in_test[number]) != in_test[number]:
      both.setdefault(person, names[number])
  require(
    not both,
    f"{path} puts rows of one name of {source} in train and in test: {_counted(len(both), 'name')},"
    f" such as that of {next(iter(both.values()), '')}",
    "give each of them one side, or set --config.data.given_split=False to split anew",
  )


def _with_people(
  dataset: Dataset, rows: Rows, examples: dict[str, Example], path: pathlib.Path
) -> Dataset:
  """The dataset with its patients, and with what else stays together: volumes and groups.

  Args:
    dataset: as it was gathered; examples that could not be read are missing.
    rows: the manifest.
    examples: by name.
    path: the manifest.
  """
  chosen = [examples[name] for name in dataset.names]
  parts = [number_names([keys[one.row] for one in chosen]) for keys in rows.groups.values()]
  if len({one.row for one in chosen}) < len(chosen):
    parts.append(number_names([str(one.row) for one in chosen]))
  kept = functools.reduce(join_groups, parts) if parts else None
  dataset = dataclasses.replace(dataset, kept_together=kept)
  require(
    rows.patients is None or dataset.patients is None,
    f"data.patient_pattern is read where no column names the patients, and {path} has one",
    "leave it empty, or name no such column",
  )
  if dataset.patients is not None:
    return dataset
  sites = rows.sites and [rows.sites[one.row] for one in chosen]
  if rows.patients is not None:
    people = number_patients([rows.patients[one.row] for one in chosen], "the manifest", sites)
    return dataclasses.replace(dataset, patients=people.numbers, patient_counts=people.counts)
  keys = [one.patient for one in chosen]
  if len(set(keys) - {None}) < 2:  # no name at all, or the same one after anonymisation
    told = (SAME_PATIENT,) if any(keys) else ()
    return dataclasses.replace(dataset, notes=(*dataset.notes, *told))
  if dataset.in_test is not None:
    sides = dataset.in_test.tolist()
    require_one_side(path, "PatientID of DICOM", keys, sites, sides, dataset.names)
  people = number_patients(keys, "PatientID of DICOM", sites)
  return dataclasses.replace(dataset, patients=people.numbers, patient_counts=people.counts)


def number_names(keys: Sequence[str | None]) -> np.ndarray:
  """[N] int32 groups of equal names; what has none is a group of its own."""
  folded = [key and unicodedata.normalize("NFC", key).casefold() for key in keys]
  known: dict[Any, int] = {}
  return np.array(
    [
      known.setdefault(number if key is None else key, len(known))
      for number, key in enumerate(folded)
    ],
    np.int32,
  )


def _counted(count: int, noun: str) -> str:
  return f"{count} {noun}{'' if count == 1 else 's'}"


def _shown(values: Sequence[Any]) -> str:
  """The first few of some values, and how many more there are."""
  more = len(values) - SHOWN
  shown = ", ".join(readable(str(value)) for value in values[:SHOWN])
  return shown + (f" and {more} more" if more > 0 else "")
