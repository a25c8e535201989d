"""Column manifests: a TOML file says what the columns of a table are.

Nothing is guessed from the values, so that equal values become equal inputs at every hospital, and
no range or category is a release.
"""

import math
import pathlib
import tomllib
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.core.errors import UserError, nearest, require, require_choice

KINDS = ("number", "category", "ignore")
MISSING = ("", "NA", "N/A", "nan", "NaN", "null")  # cells without a value, unless a manifest says
OTHER, NO_VALUE, ABSENT = "other", "missing", "is missing"  # names of added inputs
KEYS = (
  *("target", "above", "classes", "targets", "unit", "missing", "names", "site", "patient"),
  *("time", "event", "event_values", "horizon", "group", "sites", "join_sites_below"),
  *("site_required", "columns"),
)
EVENT_VALUES = ("0", "1")
COLUMN_KEYS = ("kind", "low", "high", "categories", "missing", "required")


class Column(NamedTuple):
  """A column of a table.

  Attributes:
    name: in the header of the files.
    kind: number, category, or ignore.
    low: least value of a number; lower ones become it. None where there is none.
    high: largest value of a number.
    categories: names of a category, as ``plain`` writes them.
    missing: cells that hold no value, as ``plain`` writes them.
    required: whether rows without a value are left out; else an added input says that it is
      missing.
  """

  name: str
  kind: str
  low: float | None = None
  high: float | None = None
  categories: tuple[str, ...] = ()
  missing: tuple[str, ...] = ()
  required: bool = False


class Manifest(NamedTuple):
  """The columns of a table and their roles.

  Attributes:
    target: column of the class; empty where ``targets``, or ``time`` and ``event``, are predicted.
    above: a number where classes are values up to it and values above it, None where values of the
      column are the classes.
    classes: names of the classes, of two the positive last; () takes the values that are found.
    columns: inputs and ignored columns, in the order of the inputs.
    targets: columns of the numbers that are predicted in place of classes.
    unit: of these numbers, for people.
    missing: cells of a target that hold no value.
    names: the header of files that have none; () where the first line is the header.
    site: column of the hospital; empty where each file is one, or where nothing says it.
    patient: column of the patient; empty without.
    group: column of whatever else has to stay on one side of the split; empty without.
    sites: hospital of each file by the file's name; {} takes names of files.
    join_sites_below: sites of fewer records are one together, the last, called other.
    site_required: whether rows without a site are left out; else they are an error.
    time: column of the time of the event, or of the end of observation.
    event: column that says which of the two it is.
    event_values: cells of ``event``: that of the end of observation, and that of the event.
    horizon: end of the last interval of equal widths; None where none is given.
  """

  target: str
  above: float | None
  classes: tuple[str, ...]
  targets: tuple[str, ...]
  unit: str
  columns: tuple[Column, ...]
  missing: tuple[str, ...]
  names: tuple[str, ...]
  site: str
  patient: str
  group: str
  sites: dict[str, str]
  join_sites_below: int
  site_required: bool = False
  time: str = ""
  event: str = ""
  event_values: tuple[str, ...] = EVENT_VALUES
  horizon: float | None = None

  @property
  def predicted(self) -> tuple[str, ...]:
    """Names of the columns that are predicted."""
    return tuple(filter(None, (self.target, *self.targets, self.time, self.event)))

  @property
  def inputs(self) -> tuple[Column, ...]:
    """The columns that the network sees."""
    return tuple(column for column in self.columns if column.kind != "ignore")

  @property
  def roles(self) -> tuple[str, ...]:
    """Names of columns that are read and are no inputs."""
    return tuple(filter(None, (*self.predicted, self.site, self.patient, self.group)))


class Survival(NamedTuple):
  """How times and events of a table became targets.

  Attributes:
    loss: of data.survival.
    early: records with a time of 0 or less, which became the smallest positive one.
    smallest: that time; 0 where there are no such records.
    late: records with an event after the horizon, which count as having had none.
  """

  loss: str
  early: int
  smallest: float
  late: int


class Table(NamedTuple):
  """How the records of a dataset became inputs of a network.

  Attributes:
    manifest: the columns.
    scaling: of data.scaling.
    features: name of each input of the network.
    missing: [N, columns] bool, cells without a value, of the columns that the network sees.
    outside: by column, numbers that were cut to its range.
    unknown: by column, categories that the manifest does not list.
    absent: by file, columns of the manifest that it has not.
    unlisted: columns of the files that the manifest does not name.
    shift: of each number column, subtracted from it; () unless data.scaling=federated.
    scale: of each number column, what it is then divided by.
    survival: how times and events became targets; None of tables with classes.
  """

  manifest: Manifest
  scaling: str
  features: tuple[str, ...]
  missing: np.ndarray
  outside: dict[str, int]
  unknown: dict[str, int]
  absent: dict[str, tuple[str, ...]]
  unlisted: tuple[str, ...]
  shift: tuple[float, ...] = ()
  scale: tuple[float, ...] = ()
  survival: Survival | None = None


def plain(value: Any) -> str:
  """The text of a cell, whole numbers without a fraction: 1, 1.0 and ' 1 ' are one category.

  >>> plain(" 1.0"), plain(-9), plain("a b"), plain(True)
  ('1', '-9', 'a b', 'true')
  """
  if isinstance(value, bool):
    return str(value).lower()
  text = str(value).strip()
  try:
    number = float(text)
  except ValueError:
    return text
  return str(int(number)) if math.isfinite(number) and number == int(number) else text


def read_manifest(path: pathlib.Path) -> Manifest:
  """Reads a manifest; raises UserError where there is none, or where it contradicts itself."""
  require(
    path.is_file(),
    f"data.columns={path} is not a file",
    "give the TOML file that says what the columns are (docs/data.md)",
  )
  try:
    values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
  except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{path} is no TOML ({error}); correct the file") from error
  return parse_manifest(values, str(path))


def parse_manifest(values: dict[str, Any], where: str) -> Manifest:
  """The manifest of the values of a TOML file; ``where`` is its name, for errors."""
  _require_keys(values, KEYS, where)
  texts = ("target", "unit", "site", "patient", "group", "time", "event")
  _require_kind(where, values, dict.fromkeys(texts, str))
  lists = ("classes", "targets", "missing", "names", "event_values")
  _require_kind(where, values, dict.fromkeys(lists, list) | {"sites": dict, "columns": dict})
  _require_kind(where, values, {"above": int | float, "join_sites_below": int})
  _require_kind(where, values, {"horizon": int | float, "site_required": bool})
  if "time" in values or "event" in values:
    _require_survival(where, values)
  else:
    _require_target(where, values)
  require("columns" in values, f"{where} has no 'columns'", "name it there (docs/data.md)")
  require(
    "site" in values or "site_required" not in values,
    f"{where}: site_required is not read without 'site'",
    "name the column of the site, or leave it out",
  )
  missing = tuple(plain(mark) for mark in values.get("missing", MISSING))
  columns = tuple(
    _column(name, column, missing, where) for name, column in values["columns"].items()
  )
  classes = tuple(plain(name) for name in values.get("classes", ()))
  _require_distinct(classes, f"{where}: class")
  above = values.get("above")
  require(
    above is None or len(classes) in (0, 2),
    f"{where}: above={above} makes two classes, and {len(classes)} are named",
    "name two, the one up to it first",
  )
  manifest = Manifest(
    target=values.get("target", ""),
    above=above,
    classes=classes or (() if above is None else (f"up to {above:g}", f"above {above:g}")),
    targets=tuple(map(str, values.get("targets", ()))),
    unit=values.get("unit", ""),
    columns=columns,
    missing=missing,
    names=tuple(map(str, values.get("names", ()))),
    site=values.get("site", ""),
    patient=values.get("patient", ""),
    group=values.get("group", ""),
    sites={str(file): str(site) for file, site in values.get("sites", {}).items()},
    join_sites_below=_count(values.get("join_sites_below", 0), f"{where}: join_sites_below"),
    site_required=values.get("site_required", False),
    time=values.get("time", ""),
    event=values.get("event", ""),
    event_values=tuple(plain(value) for value in values.get("event_values", EVENT_VALUES)),
    horizon=values.get("horizon"),
  )
  require(
    bool(manifest.inputs),
    f"{where} has no column of kind number or category",
    "name at least one that the network is to see",
  )
  _require_distinct(manifest.names, f"{where}: name")
  _require_distinct(manifest.targets, f"{where}: target")
  both = {column.name for column in manifest.inputs} & set(manifest.roles)
  words = "time, event" if manifest.time else "target"
  require(
    not both,
    f"{where}: '{min(both, default='')}' is an input, and {words}, site, patient or group as well",
    "give it kind='ignore', or leave it out of the columns",
  )
  return manifest


def _require_survival(where: str, values: dict[str, Any]) -> None:
  """Raises UserError unless time and event are both named, without classes or numbers."""
  for key in ("time", "event"):
    require(bool(values.get(key)), f"{where} has no '{key}'", "name it there (docs/data.md)")
  for key in ("target", "above", "classes", "targets", "unit"):
    require(key not in values, f"{where}: {key} is not read beside time and event", "leave it out")
  codes = [plain(value) for value in values.get("event_values", EVENT_VALUES)]
  require(
    len(codes) == 2 and codes[0] != codes[1],
    f"{where}: event_values={values.get('event_values')} are not two different values",
    "give that of records without the event first, such as event_values = [1, 2]",
  )
  horizon = values.get("horizon", 1)
  require(
    math.isfinite(horizon) and horizon > 0,
    f"{where}: horizon={horizon} is no time above 0",
    "give the end of the last interval, in units of the time column",
  )


def _count(value: int, where: str) -> int:
  require(value >= 0, f"{where} = {value} is under 0", "give a number of records")
  return value


def _require_target(where: str, values: dict[str, Any]) -> None:
  """Raises UserError unless a manifest names either a class or numbers that are predicted."""
  given = [key for key in ("target", "targets") if values.get(key)]
  require(bool(given), f"{where} has no 'target'", "name it there (docs/data.md)")
  require(
    len(given) == 1,
    f"{where} names a target, whose values are classes, and targets, which are numbers",
    "leave out one of the two",
  )
  unread = [key for key in ("above", "classes") if key in values]
  require(
    given == ["target"] or not unread,
    f"{where}: {', '.join(unread)} is not read of targets, which are numbers",
    "leave it out",
  )
  require(
    given == ["targets"] or "unit" not in values,
    f"{where}: unit is not read of a target, whose values are classes",
    "leave it out",
  )
  for key in ("event_values", "horizon"):
    require(key not in values, f"{where}: {key} is read with time and event only", "leave it out")


def _column(name: str, values: Any, missing: tuple[str, ...], where: str) -> Column:
  """One entry of [columns]."""
  place = f"{where}: column '{name}'"
  require(isinstance(values, dict), f"{place} is {values!r}", "write kind='number' below its name")
  _require_keys(values, COLUMN_KEYS, place)
  _require_kind(place, values, {"kind": str, "categories": list, "missing": list})
  _require_kind(place, values, {"low": int | float, "high": int | float, "required": bool})
  require("kind" in values, f"{place} has no kind", f"choose one of {', '.join(KINDS)}")
  require_choice(f"{place}: kind", values["kind"], KINDS)
  low, high = values.get("low"), values.get("high")
  require(
    (low is None) == (high is None),
    f"{place} has {'low' if high is None else 'high'} and not the other end of its range",
    "give low and high",
  )
  require(
    low is None or high is None or (math.isfinite(low) and math.isfinite(high) and low < high),
    f"{place}: low={low} is not under high={high}",
    "give a range of finite numbers",
  )
  categories = tuple(plain(category) for category in values.get("categories", ()))
  _require_distinct(categories, f"{place}: category")
  kind = values["kind"]
  require(
    kind != "category" or bool(categories),
    f"{place} lists no categories",
    "list them; any other value becomes 'other'",
  )
  unread = [key for key in ("low", "high") if key in values and kind != "number"]
  unread += [key for key in ("categories",) if key in values and kind != "category"]
  unread += [key for key in ("missing", "required") if key in values and kind == "ignore"]
  require(not unread, f"{place}: {', '.join(unread)} is not read of a {kind}", "leave it out")
  return Column(
    name=name,
    kind=kind,
    low=None if low is None else float(low),
    high=None if high is None else float(high),
    categories=categories,
    missing=tuple(dict.fromkeys((*missing, *map(plain, values.get("missing", ()))))),
    required=values.get("required", False),
  )


def manifest_record(manifest: Manifest) -> dict[str, Any]:
  """The manifest as ``parse_manifest`` reads it back, for hospitals.json."""
  record = {
    **({"targets": list(manifest.targets), "unit": manifest.unit} if manifest.targets else {}),
    **({"target": manifest.target} if manifest.target else {}),
    **(_survival_record(manifest) if manifest.time else {}),
    "above": manifest.above,
    **({"classes": list(manifest.classes)} if manifest.target else {}),
    "missing": list(manifest.missing),
    "names": list(manifest.names),
    "site": manifest.site,
    "patient": manifest.patient,
    "group": manifest.group,
    "sites": manifest.sites,
    "join_sites_below": manifest.join_sites_below,
    **({"site_required": True} if manifest.site_required else {}),
    "columns": {column.name: _column_record(column) for column in manifest.columns},
  }
  return {key: value for key, value in record.items() if value is not None}


def _survival_record(manifest: Manifest) -> dict[str, Any]:
  horizon = {} if manifest.horizon is None else {"horizon": manifest.horizon}
  codes = list(manifest.event_values)
  return {"time": manifest.time, "event": manifest.event, "event_values": codes, **horizon}


def _column_record(column: Column) -> dict[str, Any]:
  if column.kind == "ignore":
    return {"kind": column.kind}
  record: dict[str, Any] = {"kind": column.kind, "required": column.required}
  if column.kind == "category":
    record["categories"] = list(column.categories)
  elif column.low is not None:
    record |= {"low": column.low, "high": column.high}
  return {**record, "missing": list(column.missing)}


def _require_keys(values: dict[str, Any], known: Collection[str], where: str) -> None:
  for key in values:
    require(key in known, f"{where}: '{key}' is unknown", nearest(key, known))


def _require_kind(where: str, values: dict[str, Any], kinds: dict[str, Any]) -> None:
  for key, kind in kinds.items():
    value = values.get(key)
    right = value is None or (isinstance(value, kind) and (kind is bool or value is not True))
    name = getattr(kind, "__name__", "number")
    name = {"str": "text", "list": "list", "dict": "section", "bool": "true or false"}.get(
      name, "number"
    )
    require(right, f"{where}: {key}={value!r} is no {name}", "correct it")


def _require_distinct(names: tuple[str, ...], what: str) -> None:
  twice = sorted({name for name in names if names.count(name) > 1})
  require(not twice, f"{what} '{''.join(twice[:1])}' is listed twice", "list it once")
