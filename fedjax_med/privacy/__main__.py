"""Recomputes ε of a run from its ledger alone: python -m fedjax_med.privacy --workdir=DIR.

Two accountants (PLD, and Rényi as an independent upper bound) and the curve ε(δ) of every hospital.
Refuses a ledger that was edited or that privacy.json does not agree with (exit code 2).
"""

import json
import math
import pathlib
from typing import Any

from absl import flags

from fedjax_med.core.errors import UserError, require
from fedjax_med.flags import run_main
from fedjax_med.privacy import ledger as ledgers
from fedjax_med.privacy.accounting import MIN_DELTA, check_delta, epsilon
from fedjax_med.privacy.guarantees import UNITS, Guarantee, privacy_record

_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
_DELTA = flags.DEFINE_float("delta", 0.0, "δ instead of each hospital's own; 0 keeps those.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")

CURVE = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
TOLERANCE = 1e-9  # relative, between privacy.json and what is computed here


def recompute(folder: pathlib.Path, delta: float = 0.0) -> dict[str, Any]:
  """What the ledger in ``folder`` adds up to.

  Args:
    folder: the workdir.
    delta: δ, or 0 for each party's own.

  Raises:
    UserError: the ledger is missing or was edited, privacy.json does not agree, δ is refused.
  """
  ledger = ledgers.read(folder)
  _require_agreement(folder, ledger)
  guarantees = [
    _recompute(guarantee, counts, delta)
    for guarantee, counts in zip(ledger.guarantees, ledger.counts, strict=True)
  ]
  return {
    "run_id": ledger.run_id,
    "rounds": ledger.rounds,
    "ledger": ledger.head,
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


def _require_agreement(folder: pathlib.Path, ledger: ledgers.Ledger) -> None:
  """privacy.json must claim what the ledger gives, party by party."""
  path = folder / "privacy.json"
  try:
    claimed = json.loads(path.read_text(encoding="utf-8"))
    head = claimed["ledger"]
    claims = {
      (guarantee["unit"], party["name"]): (party["steps"], party["delta"], party["epsilon"])
      for guarantee in claimed["guarantees"]
      for party in guarantee["parties"]
    }
    largest = claimed["epsilon_max"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} cannot be read ({error!r}); restore the file") from error
  remedy = "one of the two was edited or is of another run: restore it"
  rows = [
    ((guarantee.unit, name), mechanism, delta, count)
    for guarantee, counts in zip(ledger.guarantees, ledger.counts, strict=True)
    for name, mechanism, delta, count in zip(*guarantee[1:4], counts, strict=True)
  ]
  require(
    [row[0] for row in rows] == list(claims),
    f"{path} is about {len(claims)} parties, the ledger about {len(rows)}, or their names differ",
    remedy,
  )
  values = []
  for (unit, name), mechanism, delta, count in rows:
    claimed_count, claimed_delta, claimed_epsilon = claims[unit, name]
    values.append(epsilon(mechanism, count, delta))
    for what, claim, truth in (
      ("steps", claimed_count, count),
      ("δ", claimed_delta, delta),
      ("ε", claimed_epsilon, values[-1]),
    ):
      _require_equal(path, f"{what} at '{name}' (unit {unit})", claim, truth)
  first = len(ledger.guarantees[0].names)
  _require_equal(path, "the largest ε", largest, max(values[:first]))
  require(head == ledger.head, f"{path} names ledger {head}, the file is {ledger.head}", remedy)
  _require_words(path, claimed, privacy_record(ledger.guarantees, ledger.counts))


def _require_words(path: pathlib.Path, claimed: dict[str, Any], truth: dict[str, Any]) -> None:
  """What else privacy.json says, words and numbers, must follow from the ledger's guarantees."""
  remedy = "restore it; where it was not edited, use the version of fedjax_med that wrote it"
  same = ("unit", "protects", "adjacency", "mechanism", "holds_against", "not_against")
  for said, is_so in zip(claimed["guarantees"], truth["guarantees"], strict=True):
    for key in same:
      require(
        said.get(key) == is_so[key], f"{path} has another '{key}' than its ledger gives", remedy
      )
    for party, own in zip(said["parties"], is_so["parties"], strict=True):
      for key in own.keys() - {"epsilon", "delta", "steps"}:
        require(
          party.get(key) == own[key],
          f"{path} says {key} at '{own['name']}' is {party.get(key)}, the ledger {own[key]}",
          remedy,
        )
  missing = [gap for gap in truth["not_covered"] if gap not in claimed.get("not_covered", [])]
  require(not missing, f"{path} leaves out what is not covered: '{missing[:1]}'", remedy)


def _require_equal(path: pathlib.Path, what: str, claim: Any, truth: float) -> None:
  number = isinstance(claim, int | float) and not isinstance(claim, bool)
  near = number and math.isfinite(truth) and abs(claim - truth) <= TOLERANCE * abs(truth)
  require(
    number and (claim == truth or near),
    f"{path} says {what} is {claim}, the ledger gives {truth:.12g}",
    "one of the two was edited or is of another run: restore it",
  )


def _show(result: dict[str, Any]) -> None:
  print(f"Run {result['run_id']}, {result['rounds']} rounds; recomputed from its ledger:")
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
  result = recompute(pathlib.Path(_WORKDIR.value).expanduser(), _DELTA.value)
  if _JSON.value:
    print(json.dumps(result))
  else:
    _show(result)


if __name__ == "__main__":
  run_main(main)
