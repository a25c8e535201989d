"""Axes of a sweep, as people write them, and the points that they span.

An axis is written ``NAME=VALUES``; NAME is a field of the configuration such as
``privacy.clip_norm``, or ``seed``. VALUES is a list ``0.5,1,2``, a range of whole numbers ``0:5``
(0 to 4) or ``0:10:2``, or so many numbers between two ends, both of them included:
``lin:0:1:5`` or, evenly spaced by ratio, ``log:1e-3:1e-1:5``. To draw at random the number of them
is left out.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_med.core.config import Config, get_field
from fedjax_med.core.errors import UserError, nearest, require

Point = dict[str, Any]  # dotted field -> value
Values = list[Any]

MAX_POINTS = 100_000
_TRUTH = {"true": True, "false": False}


def parse_axis(text: str, base: Config, known: Sequence[str]) -> tuple[str, Values]:
  """Field and values of ``NAME=VALUES``.

  Raises:
    UserError: the field is unknown, a value is not of its type, or there is none.
  """
  name, values = _split(text, known)
  kind, where = type(get_field(base, name)), f"{name}={values}"
  spread = re.fullmatch(r"(lin|log):([^:]*):([^:]*):([^:]*)", values)
  if spread:
    low, high = _ends(spread[1], spread[2], spread[3], where)
    count = _number(spread[4], int, where)
    require(count >= 1, f"{where} asks for {count} values", "ask for at least one")
    make = np.geomspace if spread[1] == "log" else np.linspace
    found = [_as(kind, value, where) for value in make(low, high, count).tolist()]
  elif kind is not str and ":" in values:
    found = list(_range(values, kind, where))
  else:
    found = [_value(part, kind, where) for part in values.split(",") if part.strip()]
  require(bool(found), f"{where} is empty", "give values such as 0.5,1,2 or 0:5")
  require(len(set(found)) == len(found), f"{where} holds a value twice", "give each of them once")
  return name, found


def draw_axis(
  text: str, base: Config, known: Sequence[str], trials: int, rng: np.random.Generator
) -> tuple[str, Values]:
  """Field and ``trials`` random values of ``NAME=VALUES``: of a list, a range or between two ends.

  Raises:
    UserError: as ``parse_axis``.
  """
  name, values = _split(text, known)
  kind, where = type(get_field(base, name)), f"{name}={values}"
  ends = re.fullmatch(r"(lin|log):([^:]*):([^:]*)", values)
  if ends is None:
    _, choices = parse_axis(text, base, known)
    return name, [choices[k] for k in rng.integers(len(choices), size=trials)]
  low, high = _ends(ends[1], ends[2], ends[3], where)
  share = rng.random(trials)
  drawn = low * (high / low) ** share if ends[1] == "log" else low + (high - low) * share
  return name, [_as(kind, value, where) for value in drawn.tolist()]


def points(
  base: Config,
  known: Sequence[str],
  *,
  grid: Sequence[str] = (),
  together: Sequence[str] = (),
  random: Sequence[str] = (),
  trials: int = 0,
  random_seed: int = 0,
  listed: Sequence[Point] = (),
) -> list[Point]:
  """All points, in the order in which they are numbered; the last axis turns fastest.

  Args:
    base: configuration that gives the fields their types.
    known: fields that may vary.
    grid: axes that are crossed.
    together: axes of one length that advance together, crossed with the others.
    random: axes drawn at random, ``trials`` times together, crossed with the others.
    trials: number of random draws.
    random_seed: of those.
    listed: points by themselves, such as those of a sweep file, crossed with the others.

  Raises:
    UserError: an axis breaks its rule, or a field has two axes.
  """
  parts: list[list[Point]] = [list(listed)] if listed else []
  for point in listed:
    for name, value in point.items():
      _require_known(name, known)
      _check_type(name, value, type(get_field(base, name)))
  if random:
    require(trials >= 1, f"--random needs --trials, which is {trials}", "use --trials=20")
    rng = np.random.default_rng(random_seed)
    drawn = [draw_axis(axis, base, known, trials, rng) for axis in random]
    parts.append(_beside(drawn))
  else:
    require(trials == 0, f"--trials={trials} without --random draws nothing", "add --random")
  if together:
    axes = [parse_axis(axis, base, known) for axis in together]
    lengths = {name: len(values) for name, values in axes}
    require(
      len(set(lengths.values())) == 1,
      "axes of --zip have " + ", ".join(f"{n} {name}" for name, n in lengths.items()),
      "give all of them the same number of values",
    )
    parts.append(_beside(axes))
  parts += [
    [{name: value} for value in values]
    for name, values in (parse_axis(axis, base, known) for axis in grid)
  ]
  require(bool(parts), "the sweep has no axis", "use --grid=privacy.noise_multiplier=0.5,1,2")
  names = [name for part in parts for name in part[0]]
  twice = sorted({name for name in names if names.count(name) > 1})
  require(not twice, f"{', '.join(twice)} has two axes", "leave one of them out")
  number = math.prod(len(part) for part in parts)
  require(number <= MAX_POINTS, f"the sweep has {number} points", f"stay under {MAX_POINTS}")
  return [
    {name: value for point in chosen for name, value in point.items()}
    for chosen in itertools.product(*parts)
  ]


def _beside(axes: list[tuple[str, Values]]) -> list[Point]:
  names = [name for name, _ in axes]
  require(len(set(names)) == len(names), f"{', '.join(names)} name a field twice", "leave one out")
  rows = zip(*(values for _, values in axes), strict=True)
  return [dict(zip(names, row, strict=True)) for row in rows]


def _split(text: str, known: Sequence[str]) -> tuple[str, str]:
  name, equals, values = text.partition("=")
  name, values = name.strip().removeprefix("config."), values.strip()
  require(bool(equals), f"axis '{text}' has no values", "write NAME=VALUES, such as seed=0:5")
  _require_known(name, known)
  return name, values


def _require_known(name: str, known: Sequence[str]) -> None:
  if name not in known:
    leaf = name.rpartition(".")[2]
    same = [path for path in known if path.rpartition(".")[2] == leaf]
    remedy = f"choose one of {', '.join(same)}" if len(same) > 1 else nearest(name, same or known)
    raise UserError(f"axis '{name}' is no field that can vary; {remedy}")


def _ends(scale: str, low: str, high: str, where: str) -> tuple[float, float]:
  first, last = (_number(text, float, where) for text in (low, high))
  require(
    math.isfinite(first) and math.isfinite(last) and first <= last,
    f"{where} does not rise from one number to another",
    "write the lower end first",
  )
  require(
    scale == "lin" or first > 0, f"{where} starts at {first:g}", "start log: above 0, or use lin:"
  )
  return first, last


def _range(values: str, kind: type, where: str) -> range:
  require(kind is int, f"{where} is a range of whole numbers", "use a list, lin:0:1:5 or log:1:9:5")
  parts = [_number(part, int, where) for part in values.split(":")]
  require(len(parts) in (2, 3), f"{where} has {len(parts)} parts", "write FIRST:END or with :STEP")
  require(len(parts) == 2 or parts[2] != 0, f"{where} has step 0", "use 1")
  return range(*parts)


def _number(text: str, kind: type, where: str) -> Any:
  try:
    return kind(text)
  except ValueError:
    what = "whole number" if kind is int else "number"
    raise UserError(f"{where}: '{text}' is no {what}; see --help for ranges") from None


def _as(kind: type, value: float, where: str) -> Any:
  require(kind in (int, float), f"{where}: the field holds {kind.__name__}", "use a list of values")
  return round(value) if kind is int else float(f"{value:.12g}")


def _value(text: str, kind: type, where: str) -> Any:
  text = text.strip()
  if kind is bool:
    require(text.lower() in _TRUTH, f"{where}: '{text}' is not true or false", "use true,false")
    return _TRUTH[text.lower()]
  value = text if kind is str else _number(text, kind, where)
  require(value == value, f"{where}: '{text}' is no number", "leave it out")
  return value


def _check_type(name: str, value: Any, kind: type) -> None:
  fits = type(value) is kind or (kind is float and type(value) is int)
  require(fits, f"{name}={value!r} of a point is no {kind.__name__}", "correct the point")
