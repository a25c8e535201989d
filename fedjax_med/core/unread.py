"""Refuses settings that nothing reads, as the conditions of their fields say."""

from collections.abc import Iterable
from typing import Any

from fedjax_med.core.config import Config, declared, get_field, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.core.fields import Condition


def default_of(path: str) -> Any:
  """Value of a field that neither preset nor flag sets."""
  return declared()[path].default


def unmet(config: Config, path: str) -> Condition | None:
  """The first condition of a field that does not hold; None where the field is read."""
  return next((rule for rule in declared()[path].read if not rule.holds(config)), None)


def changed(config: Config) -> list[str]:
  """Fields with another value than the dataclass default."""
  return [path for path, one in declared().items() if get_field(config, path) != one.default]


def drop_unread(config: Config, fields: Iterable[str]) -> list[str]:
  """Sets those of ``fields`` that are not read back to their defaults; returns those it changed."""
  wanted = set(fields)
  dropped = [path for path in changed(config) if path in wanted and unmet(config, path)]
  for path in dropped:
    set_field(config, path, default_of(path))
  return dropped


def require_read(config: Config) -> None:
  """Raises UserError where a field has another value than its default and is not read.

  The sentence names every field that is not read for the same reason.
  """
  found = {path: rule for path in changed(config) if (rule := unmet(config, path)) is not None}
  if not found:
    return
  rule = next(iter(found.values()))
  paths = [path for path, other in found.items() if other is rule]
  values = _listed([f"{path}={shown(get_field(config, path))}" for path in paths])
  defaults = _listed([f"{path} at {shown(default_of(path))}" for path in paths])
  verb = "is" if len(paths) == 1 else "are"
  raise UserError(
    f"{values} {verb} read with {rule.wording} only, and {state(config, rule, short=True)};"
    f" {rule.remedy}, or leave {defaults}"
  )


def state(config: Config, rule: Condition, *, short: bool = False) -> str:
  """The fields of a rule with their values; with ``short`` a single field is called 'it'."""
  values = [(path, shown(get_field(config, path))) for path in rule.fields]
  if short and len(values) == 1 and values[0][0] in rule.wording:
    return f"it is {values[0][1]}"
  return _listed([f"{path} is {value}" for path, value in values])


def shown(value: Any) -> str:
  """A value for people: text in quotes, numbers short."""
  return f"{value:g}" if isinstance(value, float) else repr(value)


def _listed(parts: list[str]) -> str:
  *most, last = parts
  return f"{', '.join(most)} and {last}" if most else last
