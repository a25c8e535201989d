"""Presets: config files that are read, and values that are assigned to their fields.

The command line and ``fedjax_med.load_config`` read presets by the same functions. They name the
file and its fields differently: ``--config=FILE`` and ``--config.seed``, or ``preset=FILE`` and
``seed``.
"""

import dataclasses
import difflib
import pathlib
import runpy
import traceback
from collections.abc import Collection
from typing import Any

from fedjax_med.core.config import (
  OPTIONS,
  Config,
  Options,
  declared,
  get_field,
  sections,
  set_field,
)
from fedjax_med.core.errors import UserError, nearest, require
from fedjax_med.core.fields import Field
from fedjax_med.core.registered import heard
from fedjax_med.core.unread import default_of, drop_unread, shown, unmet

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def read_preset(argument: str, name: str = "preset") -> Config:
  """The Config that a preset returns by itself.

  Args:
    argument: path of the file, and after a colon the argument of its get_config(), if any.
    name: name of the argument, for errors.

  Raises:
    UserError: there is no such file, it cannot be run, or it returns something else.
  """
  place, *get_config_arguments = argument.split(":", 1)
  path = pathlib.Path(place)
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() and path.parent != pathlib.Path() else "configs"
    presets = [str(preset) for preset in pathlib.Path(folder).glob("*.py")]
    remedy = nearest(place, presets) if presets else "give the path of a preset, a .py file"
    raise UserError(f"{name}={argument} is not a file; {remedy}")
  try:
    functions = runpy.run_path(place, run_name="config")
    require(
      callable(functions.get("get_config")),
      f"{place} has no get_config()",
      "define get_config() so that it returns a fedjax_med.core.config.Config",
    )
    config = functions["get_config"](*get_config_arguments)
  except UserError:
    raise
  except SyntaxError as error:
    where = f"{place}, line {error.lineno}"
    raise UserError(f"{where}: {error.msg}; correct the config file") from error
  except Exception as error:
    frames = traceback.extract_tb(error.__traceback__)
    line = next((frame.lineno for frame in reversed(frames) if frame.filename == place), None)
    where = f"{place}, line {line}" if line else place
    text = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(f"{where}: {text}; correct the config file") from error
  require(
    isinstance(config, Config),
    f"get_config() of {place} returned {type(config).__name__}, not Config",
    "return a fedjax_med.core.config.Config",
  )
  return config


def register_parts(file: str) -> None:
  """Runs the Python file of --network, which registers parts of a run that are the user's own.

  An empty name does nothing.

  Raises:
    UserError: there is no such file, it cannot be run, or registers nothing.
  """
  if not file:
    return
  path = pathlib.Path(file).expanduser()
  require(
    path.is_file(),
    f"--network={file} is not a file",
    "give the Python file that registers what of the run is yours, usually its --config",
  )
  before = heard()
  try:
    runpy.run_path(str(path), run_name="fedjax_med_network")
  except UserError:
    raise
  except Exception as error:  # whatever the user's file raises
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    raise UserError(f"--network={file} cannot be run ({reason}); correct the file") from error
  require(
    heard() > before,
    f"--network={file} registers no network, task, source or other part of a run",
    "leave it out, or give the file that does, usually the --config of the run",
  )


def check_values(config: Config, setter: str = "", prefix: str = "") -> None:
  """Refuses unknown names and values of wrong types; whole numbers of number fields become float.

  A Config takes any assignment; wrong ones are found here.

  Args:
    config: the configuration.
    setter: origin of the names, for errors, such as ``the config file``.
    prefix: of a field in the remedy.
  """
  known = declared()
  for section, expected in sections().items():
    record = get_field(config, section) if section else config
    require(
      isinstance(record, expected),
      f"{section} is {type(record).__name__}, not {expected.__name__}",
      "assign to its fields instead of replacing it",
    )
    names = {part.name for part in dataclasses.fields(record)}
    for name in vars(record).keys() - names:
      _refuse_name(f"{section}.{name}".lstrip("."), known, setter, prefix)
  require(
    isinstance(config.options, Options),
    f"options is {type(config.options).__name__}, not Options",
    "assign to its fields instead of replacing it",
  )
  for name in vars(config.options).keys() - OPTIONS.keys():
    _refuse_name(f"options.{name}", known, setter, prefix)
  for path, field in known.items():
    value = get_field(config, path)
    if field.kind is float and type(value) is int:
      value = float(value)
      set_field(config, path, value)
    require(
      isinstance(value, field.kind) and not (field.kind is int and isinstance(value, bool)),
      f"{path}={value!r} is {type(value).__name__}",
      f"give {KINDS[field.kind]} such as {field.default!r}",
    )


def _refuse_name(path: str, known: dict[str, Field], setter: str, prefix: str) -> None:
  by = f", set by {setter}," if setter else ""
  remedy = nearest_field(path, known, prefix) or "see --help for all fields"
  raise UserError(f"{path}{by} is unknown; {remedy}")


def assign(config: Config, path: str, value: Any) -> None:
  """Assigns to the field at a dotted path; raises UserError where there is none."""
  known = declared()
  if path not in known:
    inside = [field for field in known if field.startswith(f"{path}.")]
    require(not inside, f"'{path}' is a section", f"set its fields: {', '.join(inside)}")
    remedy = nearest_field(path, known) or "see python -m fedjax_med.train --help for all fields"
    raise UserError(f"'{path}' is no field of a configuration; {remedy}")
  set_field(config, path, value)


def nearest_field(name: str, known: dict[str, Field], prefix: str = "") -> str:
  """Suggests the field that may be meant, first one of that name in another section; or ""."""
  section, _, leaf = name.rpartition(".")
  leaves = {path.rpartition(".")[2] for path in known}
  close = [other for other in leaves if leaf and other.startswith(leaf)]
  close = close or difflib.get_close_matches(leaf, leaves, 1, 0.7)
  same = [path for path in known if path.rpartition(".")[2] in close]
  if not section and len(same) > 1:
    return f"choose one of {', '.join(f'{prefix}{path}' for path in same)}"
  similar = difflib.get_close_matches(name, same or known, 1, 0.5)
  return f"did you mean '{prefix}{similar[0]}'?" if similar else ""


def inherited(preset: Config, given: Collection[str]) -> set[str]:
  """Fields that the preset reads as it is written, and that are not among the ``given`` ones."""
  return {path for path in declared() if path not in given and unmet(preset, path) is None}


def drop_inherited(config: Config, preset: Config, given: Collection[str], by: str) -> list[str]:
  """Sets back settings of a preset that changes of other fields leave without effect.

  Args:
    config: the preset with its changes; its fields are set back.
    preset: the preset as it is written.
    given: fields that were changed.
    by: origin of the changes, for people, such as ``these flags``.

  Returns:
    A sentence for each field that is back at its default.
  """
  values = {path: get_field(config, path) for path in declared()}
  return [
    f"{path}={shown(values[path])} of the preset is not read with {by}, and back at"
    f" {shown(default_of(path))}"
    for path in drop_unread(config, inherited(preset, given))
  ]
