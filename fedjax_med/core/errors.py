"""The one error type a user sees: a value, the rule it breaks, and the remedy."""

import difflib
from collections.abc import Iterable

import numpy as np


class UserError(ValueError):
  """Something the user can put right; entry points print it and exit with code 2.

  The message is one sentence of the form ``value; remedy``:
  ``partition.alpha=-1 must be above 0; raise it (0.1 is strong skew, 100 is nearly IID)``.

  >>> require(5 < 3, "workers=5 exceeds the 3 cores", "lower it")
  Traceback (most recent call last):
  ...
  fedjax_med.core.errors.UserError: workers=5 exceeds the 3 cores; lower it
  """


def require(condition: bool, problem: str, remedy: str) -> None:
  """Raises ``UserError('problem; remedy')`` unless ``condition`` holds."""
  if not condition:
    raise UserError(f"{problem}; {remedy}")


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns ``did you mean 'x'?`` for the closest known name, or lists all of them."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(known)}"


def require_choice(field: str, value: str, known: Iterable[str]) -> None:
  """Raises ``UserError`` naming the nearest known choice unless ``value`` is one of them."""
  known = list(known)
  require(value in known, f"{field}='{value}' is unknown", nearest(value, known))


def require_whole(name: str, value: int | np.integer, lowest: int, remedy: str) -> None:
  """Raises UserError unless ``value`` is a whole number of at least ``lowest``."""
  whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
  rule = f"{name}={value} must be a whole number of at least {lowest}"
  require(whole and bool(value >= lowest), rule, remedy)
