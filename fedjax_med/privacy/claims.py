"""Claims that the ledger of a run allows, and checks that its other files claim only those.

privacy.json is a function of the ledger: ``record_of`` is the only place where it is made. Files
that repeat its numbers are held against the same record, so an edit of one of them is found by
whoever reads it.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from fedjax_med import __version__
from fedjax_med.core.errors import UserError, require
from fedjax_med.privacy import ledger
from fedjax_med.privacy.clipping import TWO_PASS_GAP
from fedjax_med.privacy.guarantees import (
  NO_PRIVACY,
  accountant_version,
  baseline_gaps,
  privacy_record,
  spent,
  statistics_gap,
)

FILE = "privacy.json"
TOLERANCE = 1e-9  # relative, between numbers of two files
REMEDY = "one of the two was edited or is of another run: restore it"


def record_of(book: ledger.Ledger, folder: pathlib.Path) -> dict[str, Any]:
  """privacy.json of a run, made from its ledger ``book`` in ``folder`` and from nothing else.

  Raises:
    UserError: the ledger is of a version that did not write down all that is claimed.
  """
  if not book.ran or book.spent.epsilons is None:
    raise UserError(
      f"{folder / ledger.FILE} is of the release 0.2.0 of fedjax_med or an older one, and does not"
      " say how gradients were clipped nor which ε were told: privacy.json does not follow from it;"
      " use the version that wrote it"
    )
  gaps = [TWO_PASS_GAP] if any(ran.clipping == "two_pass" for ran in book.ran) else []
  if any(ran.baselines for ran in book.ran):
    gaps += baseline_gaps(book.guarantees)
  # Of all starts, in the order in which they were told first.
  gaps += filter(None, [statistics_gap(ledger.statistics_of(book))])
  version = book.ran[-1].dp_accounting
  record = privacy_record(book.guarantees, book.counts, gaps, book.spent.epsilons, version)
  if book.baselines:
    largest = {name: _largest(own) for name, own in book.baselines.items()}
    record = {**record, "baselines_epsilon": largest}
  return {**record, "ledger": book.head}


def _largest(own: ledger.Spent) -> float | None:
  """ε of the first guarantee; None where there is none."""
  return max(own.epsilons[0]) if own.epsilons else None


def read(folder: pathlib.Path) -> dict[str, Any]:
  """Claims of a run by its ledger. privacy.json must hold all of them, and no others.

  ε is not computed again: it stands in the ledger beside the releases. See ``require_epsilons``.

  Raises:
    UserError: a file is missing, unreadable or was edited, with what differs.
  """
  path = folder / FILE
  try:
    said = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); restore the file") from error
  if isinstance(said, dict) and not (folder / ledger.FILE).exists():
    promised = {key: said.get(key, value) for key, value in NO_PRIVACY.items()}
    if promised == NO_PRIVACY:
      return said
  book = ledger.read(folder)
  record = record_of(book, folder)
  require_same(path, said, record, f"; where neither was, use {_versions(book)}")
  return record


def require_same(where: object, said: Any, truth: Any, otherwise: str = "") -> None:
  """Raises UserError unless a file says what the ledger gives, and nothing else.

  Args:
    where: the file.
    said: content of the file, or the part of it that is compared.
    truth: the same, made from the ledger.
    otherwise: ends the remedy.
  """
  found = difference(said, json.loads(json.dumps(truth)))
  if found:
    raise UserError(f"{where}: {found}; {REMEDY}{otherwise}")


def difference(said: Any, truth: Any, path: str = "") -> str:
  """The first place where two values of JSON differ, and how; empty where they are the same.

  Numbers may differ by ``TOLERANCE``; a truth value is no number.
  """
  name = path or "the file"
  if isinstance(said, dict) and isinstance(truth, dict):
    for key in (*truth, *said):
      inner = f"{path}.{key}" if path else str(key)
      if key not in said:
        return f"{inner} is missing, the ledger gives {_short(truth[key])}"
      if key not in truth:
        return f"{inner} is {_short(said[key])}, which the ledger does not give"
      if found := difference(said[key], truth[key], inner):
        return found
    return ""
  if isinstance(said, list) and isinstance(truth, list):
    if len(said) != len(truth):
      missing = [item for item in truth if item not in said]
      which = f", among them {_short(missing[0])}" if missing else ""
      return f"{name} has {len(said)} entries, the ledger gives {len(truth)}{which}"
    pairs = enumerate(zip(said, truth, strict=True))
    found = (difference(*pair, f"{path}[{number}]") for number, pair in pairs)
    return next(filter(None, found), "")
  kinds = isinstance(said, bool), isinstance(truth, bool)
  if kinds[0] == kinds[1] and (said == truth or _equal_numbers(said, truth)):
    return ""
  return f"{name} is {_short(said)}, the ledger gives {_short(truth)}"


def _equal_numbers(said: Any, truth: Any) -> bool:
  """Whether two values are numbers that differ by no more than rounding."""
  if not (isinstance(said, int | float) and isinstance(truth, int | float)):
    return False
  near = math.isfinite(said) and math.isfinite(truth)
  return said == truth or (near and abs(said - truth) <= TOLERANCE * abs(truth))


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 120 else f"{text[:117]}..."


def ledger_of(folder: pathlib.Path) -> ledger.Ledger | None:
  """The ledger of a workdir; None where it has none."""
  return ledger.read(folder) if (folder / ledger.FILE).exists() else None


def require_told(
  where: object, said: dict[str, Any], rounds: int, book: ledger.Ledger | None
) -> None:
  """Raises UserError unless results tell the ε that the ledger gives for so many rounds.

  A run that was resumed may tell results of rounds that its ledger has no line for, since it has
  one for more: their ε lie between those of the lines around them.

  Args:
    where: the file, or a line of one.
    said: summary.json or a line of metrics.jsonl.
    rounds: finished rounds that the results are of.
    book: the ledger; None without one.
  """
  clients = said.get("clients", [])
  least, most = ({}, {}) if book is None else _bounds(where, rounds, book)
  values = {
    ("epsilon_max", "first"): said.get("epsilon_max"),
    ("client_epsilon", "client"): said.get("client_epsilon"),
  }
  values |= {
    (f"clients[{number}].epsilon", f"at {client.get('name')}"): client.get("epsilon")
    for number, client in enumerate(clients)
  }
  for (path, whose), value in values.items():
    low, high = least.get(whose), most.get(whose)
    if low is None or high is None:
      require_same(where, {path: value}, {path: None})
      continue
    within = (
      isinstance(value, int | float)
      and not isinstance(value, bool)
      and low * (1 - TOLERANCE) <= value <= high * (1 + TOLERANCE)
    )
    truth = f"{high:.12g}" if low == high else f"from {low:.12g} to {high:.12g}"
    require(within, f"{where}: {path} is {_short(value)}, the ledger gives {truth}", REMEDY)


def _bounds(
  where: object, rounds: int, book: ledger.Ledger
) -> tuple[dict[str, float], dict[str, float]]:
  """Least and largest ε after so many rounds: of the first guarantee, hospitals and records."""
  require(
    0 <= rounds <= book.rounds,
    f"{where} is of {rounds} rounds, the ledger counts {book.rounds}",
    REMEDY,
  )
  before = max(each for each in book.told if each <= rounds)
  after = min(each for each in book.told if each >= rounds)
  return _told_epsilons(book, book.told[before]), _told_epsilons(book, book.told[after])


def _told_epsilons(book: ledger.Ledger, epsilons: ledger.Epsilons) -> dict[str, float]:
  """``epsilons`` by the names that they have in results; see ``require_told``."""
  found = {"first": max(epsilons[0])}
  for guarantee, own in zip(book.guarantees, epsilons, strict=True):
    if guarantee.unit == "client":
      found["client"] = own[0]
    else:
      found |= {f"at {name}": value for name, value in zip(guarantee.names, own, strict=True)}
  return found


def require_logged(
  path: pathlib.Path, lines: Sequence[dict[str, Any]], book: ledger.Ledger | None
) -> None:
  """Raises UserError unless a log tells the ε of the ledger; see ``require_told``.

  Args:
    path: metrics.jsonl.
    lines: lines of the log.
    book: the ledger; None without one.
  """
  tests = [number for number, line in enumerate(lines) if line.get("split") == "test"]
  for number, line in enumerate(lines):
    if line.get("epsilon_max") is None and number not in tests[-1:]:
      continue  # a point of a sweep tells ε at its end alone
    own = line if number in tests else {**line, "clients": []}
    require_told(f"{path}, line {number + 1}", own, line.get("round", -1), book)


def require_epsilons(folder: pathlib.Path, book: ledger.Ledger) -> None:
  """Computes every ε of a ledger again, its baselines' too; UserError where one does not follow.

  Numbers of another version of the accountant may do: they are compared, not the versions.
  """
  for name, own in {"": book.spent, **book.baselines}.items():
    told: Sequence[tuple[float, ...]] = own.epsilons or ()
    whose = f" of the baseline '{name}'" if name else ""
    for guarantee, counts, epsilons in zip(own.guarantees, own.counts, told, strict=True):
      for party, said, truth in zip(
        guarantee.names, epsilons, spent(guarantee, counts), strict=True
      ):
        require(
          _equal_numbers(said, truth),
          f"{folder / ledger.FILE} tells ε {said:.12g} at '{party}' (unit {guarantee.unit}){whose},"
          f" its mechanisms give {truth:.12g}",
          f"restore the file; where it was not edited, use {_versions(book)}",
        )


def _versions(book: ledger.Ledger) -> str:
  """The versions that wrote a ledger, and the installed ones."""
  wrote = book.ran[-1]
  return (
    f"fedjax_med {wrote.fedjax_med} with dp-accounting {wrote.dp_accounting}, which wrote it (here:"
    f" {__version__} with {accountant_version()})"
  )


def version_note(book: ledger.Ledger) -> str:
  """A sentence if the run's ε are of another accountant than the installed one; else empty."""
  wrote, here = book.ran[-1].dp_accounting, accountant_version()
  if wrote == here:
    return ""
  return f"ε was told by dp-accounting {wrote}; {here}, which is installed, gives the same."
