"""Sets lines of a ledger apart that do not follow from the others, where that hides no release.

Such lines come from a second process, a damaged disk or an editor. They are set apart when a run is
resumed from a checkpoint whose line is intact, and with it every line before. No ε is understated:

- The run id and the mechanisms are those of this run, so a round that it repeats is the release
  that it was, with the same sample and the same noise.
- Before anything of a round leaves the process, privacy.json and then the log are written. The most
  rounds that one of them, or a line that is set apart, speaks of, are therefore the most that were
  given out. A line for so many takes the place of the others in the same moment, and stays also
  where this run ends earlier or is killed.
- This run must be one that goes as far, and every hospital must take part in each round: otherwise
  the releases of those rounds are known from the broken lines alone, and the ledger is refused.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fedjax_med.core.errors import UserError
from fedjax_med.folder import writing as files
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.privacy import ledger
from fedjax_med.privacy.ledger import Counts, Split


def mend(
  experiment: Experiment, folder: pathlib.Path, head: str | None, tell: Callable[[str], Any]
) -> None:
  """Sets broken lines of a resumed run's ledger apart; does nothing where none can be.

  What is said of a run that has ended is taken away before: it is of the older ledger.

  Args:
    experiment: the run.
    folder: its workdir.
    head: digest of the line that the checkpoint was saved after.
    tell: called with a sentence on the repair.

  Raises:
    UserError: the lines come after the checkpoint's, and releases might be hidden.
  """
  parts = ledger.split(folder)
  if parts is None or head not in parts.intact.digests:
    return
  book = parts.intact
  if (book.run_id, book.guarantees) != (experiment.run_id, tuple(experiment.guarantees)):
    return
  rounds = _given_out(experiment, folder, parts)
  files.withdraw(folder)
  beside = ledger.set_apart(folder, parts, rounds, _counts(experiment, rounds))
  path = folder / ledger.FILE
  tell(
    f"{path}: {len(parts.broken)} lines, the first of them line {parts.first}, do not follow from"
    f" those before them and are in {beside.name} now. The checkpoint's line is intact; the ledger"
    f" counts the {rounds} rounds of which anything can have been given out."
  )


def _given_out(experiment: Experiment, folder: pathlib.Path, parts: Split) -> int:
  """The most rounds of which results can have been given out; UserError where that is not known."""
  said = ledger.edited(folder / ledger.FILE, parts.first)
  claimed = _claimed_rounds(experiment, folder, parts)
  if claimed is None:
    raise UserError(
      f"{said}, and {folder / 'privacy.json'} does not say how many rounds were given out;"
      f" {ledger.RESTORE}"
    )
  logged = [line.get("round", 0) for line in files.read_metrics(folder)]
  rounds = max(parts.intact.rounds, claimed, *logged, *map(_rounds_of, parts.broken))
  server = experiment.config.server
  if rounds > server.num_rounds:
    raise UserError(
      f"{said}, and files of the run speak of {rounds} rounds where this start ends after"
      f" server.num_rounds={server.num_rounds}; restore the file, or ask for {rounds} rounds if the"
      " run had as many"
    )
  if rounds > parts.intact.rounds and server.participation != "full":
    raise UserError(
      f"{said}, and which hospitals took part in the {rounds - parts.intact.rounds} rounds after"
      f" the lines before it is not known; {ledger.RESTORE}"
    )
  return rounds


def _counts(experiment: Experiment, rounds: int) -> Counts:
  """Releases of each party of each guarantee after so many rounds of all hospitals."""
  return tuple(
    (rounds,) if guarantee is experiment.central else _steps(experiment, rounds)
    for guarantee in experiment.guarantees
  )


def _steps(experiment: Experiment, rounds: int) -> tuple[int, ...]:
  return tuple(int(steps) * rounds for steps in np.asarray(experiment.steps))


def _claimed_rounds(experiment: Experiment, folder: pathlib.Path, parts: Split) -> int | None:
  """Rounds that privacy.json is about; None where it cannot be read or does not say."""
  try:
    record = json.loads((folder / "privacy.json").read_text(encoding="utf-8"))
    if record["ledger"] in parts.intact.digests:  # no more than the intact lines are
      return 0
    releases = [
      [party["steps"] for party in guarantee["parties"]] for guarantee in record["guarantees"]
    ]
    one_round = _counts(experiment, 1)
    if experiment.config.server.participation != "full":
      return None
    return max(
      -(-count // max(1, steps))
      for counts, all_steps in zip(releases, one_round, strict=True)
      for count, steps in zip(counts, all_steps, strict=True)
    )
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _rounds_of(text: bytes) -> int:
  """Rounds that a broken line speaks of; 0 where it speaks of none."""
  try:
    rounds = json.loads(text)["rounds"]
  except (ValueError, KeyError, TypeError):
    return 0
  return rounds if isinstance(rounds, int) else 0
