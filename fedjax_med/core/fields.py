"""Declarations of configuration fields: all that is known of a field stands in one place."""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

_KEY = "declared"  # of the metadata of a dataclass field


class Condition(NamedTuple):
  """A rule that has to hold for a field to be read.

  Attributes:
    wording: the rule for people, such as ``client.optimizer=adamw``.
    holds: whether a config keeps it.
    fields: fields that it looks at.
    remedy: how to keep it, an imperative without its object.
  """

  wording: str
  holds: Callable[[Any], bool]
  fields: tuple[str, ...]
  remedy: str


def one_of(path: str, *values: Any) -> Condition:
  """The condition that the field at ``path`` has one of these values."""
  *most, last = (str(value) for value in values)
  text = f"{', '.join(most)} or {last}" if most else last
  remedy = f"use one of those with --config.{path}" if most else f"use --config.{path}={last}"
  value_of = operator.attrgetter(path)
  return Condition(
    wording=f"{path}={text}",
    holds=lambda config: value_of(config) in values,
    fields=(path,),
    remedy=remedy,
  )


class Bounds(NamedTuple):
  """The range of a number.

  Attributes:
    low: lower end.
    high: highest value, finite values only if this is infinite.
    low_allowed: whether the lower end belongs to the range.
    remedy: what to use instead of a value outside, an imperative.
  """

  low: float
  high: float
  low_allowed: bool
  remedy: str


def above(low: float, most: float = math.inf, *, remedy: str) -> Bounds:
  """The range from ``low``, without it, to ``most``."""
  return Bounds(low=low, high=most, low_allowed=False, remedy=remedy)


def least(low: float, most: float = math.inf, *, remedy: str) -> Bounds:
  """The range from ``low`` to ``most``, both of them included."""
  return Bounds(low=low, high=most, low_allowed=True, remedy=remedy)


def always(config: Any) -> bool:
  """True: the field is part of every run id."""
  return True


def never(config: Any) -> bool:
  """False: the field is part of no run id."""
  return False


class Field(NamedTuple):
  """One field of the configuration.

  Attributes:
    section: dotted name of the section that holds it; empty for a field of ``Config`` itself.
    name: its name in the section.
    kind: declared type: str, int, float or bool.
    default: value of the dataclass; a preset may set another.
    doc: sentence of --help.
    choices: names that it may hold; () where every value of the type may stand.
    bounds: range of a number.
    traced: whether a program takes it as data, or the host alone reads it: points of a sweep that
      differ in nothing else share a program.
    read: conditions that have to hold for it to be read, outermost first; () is always read.
    shapes_run: config -> whether its value is part of the run id.
  """

  section: str
  name: str
  kind: type
  default: Any
  doc: str
  choices: tuple[str, ...]
  bounds: Bounds | None
  traced: bool
  read: tuple[Condition, ...]
  shapes_run: Callable[[Any], bool]

  @property
  def path(self) -> str:
    """Dotted name, such as ``privacy.clip_norm``."""
    return f"{self.section}.{self.name}".lstrip(".")


def field(
  default: Any,
  *,
  doc: str,
  choices: tuple[str, ...] = (),
  bounds: Bounds | None = None,
  traced: bool = False,
  read: tuple[Condition, ...] = (),
  shapes_run: Callable[[Any], bool] = always,
) -> Any:
  """A dataclass field with its declaration; the arguments are the attributes of ``Field``.

  >>> @dataclasses.dataclass
  ... class Options:
  ...   pull: float = field(0.1, doc="pull to the global model.", traced=True)
  >>> Options().pull
  0.1
  >>> fields_of(Options, "options.mine")[0].path
  'options.mine.pull'
  """
  declared = {
    "default": default,
    "doc": doc,
    "choices": choices,
    "bounds": bounds,
    "traced": traced,
    "read": read,
    "shapes_run": shapes_run,
  }
  return dataclasses.field(default=default, metadata={_KEY: declared})


def undeclared(record: type) -> list[str]:
  """Names of the fields of a dataclass that ``field`` did not make."""
  return [part.name for part in dataclasses.fields(record) if _KEY not in part.metadata]


def fields_of(
  record: type, section: str = "", read: tuple[Condition, ...] = ()
) -> tuple[Field, ...]:
  """The declared fields of a config dataclass, in order.

  Args:
    record: the dataclass.
    section: dotted name of the section that the dataclass is.
    read: conditions of all of its fields, before those of each.
  """
  fields = []
  for part in dataclasses.fields(record):
    if _KEY not in part.metadata:
      continue
    declared = {**part.metadata[_KEY]}
    declared["read"] = read + declared["read"]
    kind = type(declared["default"])
    fields.append(Field(section=section, name=part.name, kind=kind, **declared))
  return tuple(fields)
