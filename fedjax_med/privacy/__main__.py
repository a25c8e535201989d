"""Recomputes ε of a run from its ledger alone: python -m fedjax_med.privacy --workdir=DIR.

Two accountants (PLD, and Rényi as an independent upper bound) and the curve ε(δ) of every hospital.
Refuses (exit code 2) a ledger that was edited or whose ε do not follow from its mechanisms, weights
of rounds that it does not count, and a privacy.json, summary, log, statement or report that says
anything else than the ledger. The report of a run with a task of your own is compared with
--network=FILE.py, the file that registers it.
"""

import json
import pathlib
from typing import Any

import jax
from absl import flags

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.presets import register_parts
from fedjax_med.flags import define_network, run_main
from fedjax_med.privacy import claims, ledger
from fedjax_med.privacy.accounting import MIN_DELTA, check_delta, epsilon
from fedjax_med.privacy.guarantees import UNITS, Guarantee
from fedjax_med.tasks.registry import is_known

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
_DELTA = flags.DEFINE_float("delta", 0.0, "δ instead of each hospital's own; 0 keeps those.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
define_network()

CURVE = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


def recompute(folder: pathlib.Path, delta: float = 0.0) -> dict[str, Any]:
  """Guarantees and ε that the ledger in ``folder`` adds up to.

  Args:
    folder: the workdir.
    delta: δ, or 0 for each party's own.

  Raises:
    UserError: the ledger is missing or was edited, another file does not agree, δ is refused.
  """
  book = ledger.read(folder)
  claims.read(folder)
  claims.require_epsilons(folder, book)
  weights = _require_covered(folder, book)
  not_compared = _require_files(folder, book, weights)
  guarantees = [
    _recompute(guarantee, counts, delta)
    for guarantee, counts in zip(book.guarantees, book.counts, strict=True)
  ]
  return {
    "run_id": book.run_id,
    "rounds": book.rounds,
    "rounds_of_weights": weights,
    "ledger": book.head,
    "note": claims.version_note(book),
    "not_compared": not_compared,
    "epsilon_max": guarantees[0]["epsilon_max"],
    "guarantees": guarantees,
  }


def _recompute(guarantee: Guarantee, counts: tuple[int, ...], delta: float) -> dict[str, Any]:
  parties = []
  rows = zip(guarantee.names, guarantee.mechanisms, guarantee.deltas, counts, strict=True)
  for name, mechanism, own, count in rows:
    check_delta(delta or own, mechanism.num_units)
    points = [p for p in CURVE if MIN_DELTA <= p < 1 / mechanism.num_units]
    parties.append(
      {
        "name": name,
        "steps": count,
        "delta": delta or own,
        "epsilon": epsilon(mechanism, count, delta or own),
        "epsilon_rdp": epsilon(mechanism, count, delta or own, "rdp"),
        "curve": [[point, epsilon(mechanism, count, point)] for point in points],
      }
    )
  return {
    "unit": guarantee.unit,
    "epsilon_max": max(party["epsilon"] for party in parties),
    "parties": parties,
  }


def _require_covered(folder: pathlib.Path, book: ledger.Ledger) -> int | None:
  """Holds the newest checkpoint against the ledger; returns its rounds, None where there is none.

  UserError where the ledger does not count the rounds of its weights.
  """
  from fedjax_med.run import checkpoints  # orbax takes a while

  found = checkpoints.covered(folder, book.run_id)
  if found is None:
    return None
  ledger.require_covers(book, folder, *found)
  return found[1]


def _require_files(folder: pathlib.Path, book: ledger.Ledger, weights: int | None) -> str:
  """Holds results, log, statement and report against the ledger; UserError where one differs.

  ``weights`` are the rounds of the newest checkpoint, None where there is none. Returns a sentence
  where the report could not be compared, as only its task could make it again.
  """
  from fedjax_med.folder import writing
  from fedjax_med.report import run_page

  summary, config = folder / "summary.json", folder / "config.json"
  if summary.exists():
    said = _read(summary)
    claims.require_same(summary, {"run_id": said.get("run_id")}, {"run_id": book.run_id})
    rounds = said.get("rounds", -1)
    require(
      weights in (None, rounds),
      f"{summary}: rounds is {rounds}, the weights of the newest checkpoint are of round {weights}",
      claims.REMEDY,
    )
    claims.require_told(summary, said, rounds, book)
  claims.require_logged(folder / "metrics.jsonl", writing.read_metrics(folder), book)
  if config.exists():  # of a baseline up to 0.2.0 there is none, nor a statement
    said, own = {"run_id": _read(config).get("run_id")}, {"run_id": book.run_id}
    claims.require_same(config, said, own)
    run_page.require_statement(folder)
    page, record = folder / writing.REPORT, _read(config)
    if page.exists() and not is_known(record):
      return (
        f"{page} was not compared: the run's task '{record['task']}' is not part of this package;"
        " give --network=FILE.py, the file that registers it, to compare it too."
      )
    run_page.require_page(folder)
  return ""


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"{path} cannot be read ({error}); restore the file") from error


def _show(result: dict[str, Any]) -> None:
  print(f"Run {result['run_id']}, {result['rounds']} rounds; recomputed from its ledger:")
  weights = result["rounds_of_weights"]
  print(
    f"The weights of the newest checkpoint are of round {weights}, which the ledger counts."
    if weights is not None
    else "No checkpoint holds weights and ledger together: lines cut off its end would not show."
  )
  for note in filter(None, (result["note"], result["not_compared"])):
    print(note)
  for guarantee in result["guarantees"]:
    print(f"Unit {guarantee['unit']}: {UNITS[guarantee['unit']].protects}")
    for row in guarantee["parties"]:
      print(
        f"  {row['name']}: ε = {row['epsilon']:.4f} (Rényi bound {row['epsilon_rdp']:.4f}) at"
        f" δ = {row['delta']:.3g}, {row['steps']} releases"
      )
      print(
        "    ε(δ): " + ", ".join(f"{value:.3f} at {point:.0e}" for point, value in row["curve"])
      )
    print(f"  Largest ε: {guarantee['epsilon_max']:.4f}; a unit lies at one party: never a sum.")


def main(argv: list[str]) -> None:
  require(len(argv) == 1, f"'{' '.join(argv[1:])}' is not a flag", "give --workdir=DIR")
  require(_WORKDIR.value != "", "--workdir is empty", "give the folder of a private run")
  register_parts(flags.FLAGS["network"].value or "")
  jax.config.update("jax_platforms", "cpu")  # a run may keep the accelerator busy
  result = recompute(pathlib.Path(_WORKDIR.value).expanduser(), _DELTA.value)
  if _JSON.value:
    print(json.dumps(result))
  else:
    _show(result)


if __name__ == "__main__":
  run_main(main)
