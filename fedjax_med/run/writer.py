"""The one order in which a run is written, be it a run by itself, a baseline or a point of a sweep.

1. ``begin``: the claim of the folder, the secret, the first line of the ledger or its check,
   config.json and hospitals.json.
2. ``log``, at a log point: ledger, privacy.json, metrics.jsonl. A checkpoint comes after it.
3. ``finish``: timing.json, results of the baselines, privacy_statement.md, summary.json.

So a folder keeps two promises at any moment, also after a kill. Results are never of a release that
ledger and privacy.json lack. With summary.json the run is done, and its privacy statement is there
and of the same ledger: ``files.withdraw`` takes the summary away before anything else changes.

Where several processes share a run, the first one writes.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fedjax_med import __version__
from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError, require
from fedjax_med.folder import lock
from fedjax_med.folder import secret as secrets
from fedjax_med.folder import writing as files
from fedjax_med.prepare.case import Case
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.privacy import claims, ledger
from fedjax_med.privacy.guarantees import NO_PRIVACY, SYNTHETIC_GAP, accountant_version
from fedjax_med.run import ledger_repair
from fedjax_med.run.budget import releases
from fedjax_med.run.statement import write_statement
from fedjax_med.run.summaries import config_record, write_hospitals
from fedjax_med.simulation.processes import is_first, least

BASELINES = "baselines"  # the folder of them, and the file of their curves


@contextlib.contextmanager
def hold(
  folder: pathlib.Path, tell: Callable[[str], Any], index: int = 0, number: int = 1
) -> Iterator[None]:
  """Holds the lock of a workdir; of several processes of one run the first one does.

  Arguments as those of ``lock.hold``.

  Raises:
    UserError: the folder is in use, in every process of the run.
  """
  with contextlib.ExitStack() as stack:
    _as_first(
      lambda: stack.enter_context(lock.hold(folder, tell, index, number)),
      f"--workdir={folder} is in use, as the first process of this run says; wait until it is"
      " free, or use another --workdir",
    )
    yield


def secret_of(config: Config, folder: pathlib.Path | None, noise_key: pathlib.Path | None) -> bytes:
  """The secret of a private run, which its folder keeps; b"" without privacy.

  It is that of the folder, else that of the file ``noise_key``, else a new one.

  Raises:
    UserError: the secret is lost, another one is given, or the folder is that of a sweep.
  """
  if not secrets.is_private(config):
    require(
      noise_key is None,
      f"--noise_key={noise_key} without privacy: there is no noise",
      "leave it out, or set --config.privacy.mechanism=dp_sgd",
    )
    return b""
  if folder is None:
    return secrets.draw() if noise_key is None else secrets.read(noise_key)
  files.refuse_sweep(folder)
  begun = (folder / "config.json").exists() or (folder / "checkpoints").exists()
  _as_first(
    lambda: secrets.folder_secret(folder, noise_key, begun),
    "the first process of this run was refused; see what it says",
  )
  return secrets.read(folder / secrets.FILE)


def _as_first(work: Callable[[], Any], otherwise: str) -> None:
  """Does ``work`` in the first process; a UserError there ends all, which would wait otherwise.

  Raises:
    UserError: of ``work`` in the first process, with the sentence ``otherwise`` in the others.
  """
  refused = None
  if is_first():
    try:
      work()
    except UserError as error:
      refused = error
  if least(float(refused is None)) < 1:
    raise refused or UserError(otherwise)


def begin(
  experiment: Experiment,
  folder: pathlib.Path,
  command: str,
  saved: int | None = None,
  head: str | None = None,
  tell: Callable[[str], Any] = print,
) -> ledger.Ledger | None:
  """Begins or resumes a run in its folder; a start that is refused changes nothing there.

  Args:
    experiment: the run.
    folder: its workdir.
    command: command that starts it.
    saved: rounds of the checkpoint that it goes on from; None where it begins.
    head: digest of the ledger's line that the checkpoint was saved after.
    tell: called with a sentence on each repair.

  Returns:
    The ledger; None where nothing is protected, and in all processes but the first.

  Raises:
    UserError: the folder holds another run, or its ledger does not cover the checkpoint.
  """
  files.claim(folder, experiment.run_id)
  if not is_first():
    return None
  folder.mkdir(parents=True, exist_ok=True)
  book = None
  if experiment.guarantees:
    if experiment.guarantees[0].place == "federation":  # baselines lie in the folder of their run
      secrets.keep(folder, experiment.case.secret)
    if saved is not None:
      ledger.require_there(folder)
      ledger_repair.mend(experiment, folder, head, tell)
    book = ledger.start(folder, experiment.run_id, experiment.guarantees)
    if saved is not None:
      ledger.require_covers(book, folder, head, saved)
  files.withdraw(folder)
  files.write_json(folder / "config.json", config_record(experiment, command))
  write_hospitals(folder, experiment)
  files.keep_metrics_to(folder, -1 if saved is None else saved)
  return book


def log(
  experiment: Experiment,
  folder: pathlib.Path,
  book: ledger.Ledger | None,
  rounds: int,
  steps: np.ndarray,
  lines: list[dict[str, Any]],
) -> ledger.Ledger | None:
  """Writes down releases up to ``rounds`` and ``steps`` [K], and after them lines of the log.

  privacy.json follows the ledger, which for a resumed run counts also the rounds it does again.

  Args:
    experiment: the run.
    folder: its workdir.
    book: the ledger, from ``begin`` or the last ``log``.
    rounds: finished rounds.
    steps: [K] local steps executed by each client.
    lines: of metrics.jsonl.

  Returns:
    The ledger with these releases.
  """
  if not is_first():
    return None
  if book is not None:
    ran = ledger.Ran(
      fedjax_med=__version__,
      dp_accounting=accountant_version(),
      clipping=experiment.program.plan.clipping,
      baselines=experiment.config.eval.local_baselines or (folder / BASELINES).exists(),
      statistics=experiment.hospitals.dataset.released,
    )
    book = ledger.record(folder, book, rounds, releases(experiment, rounds, steps), ran)
    record = claims.record_of(book, folder)
  else:
    record = dict(NO_PRIVACY)
    if experiment.hospitals.dataset.num_synthetic:
      record["not_covered"] = [SYNTHETIC_GAP]
    if experiment.config.partition.num_clients == 1:
      record["pooled"] = True
  files.write_json(folder / claims.FILE, record)
  if lines:
    files.append_metrics(folder, list(lines))
  return book


def finish(
  folder: pathlib.Path,
  summary: dict[str, Any],
  seconds: dict[str, Any],
  federation: Case | None = None,
  deployment: dict[str, Any] | None = None,
) -> None:
  """Writes the end of a run.

  Args:
    folder: the workdir.
    summary: from ``summaries.summary_record``.
    seconds: of timing.json; measurements of encryption are a dictionary of their own.
    federation: the run, where its baselines have ended too and join its results; None leaves them
      out.
    deployment: of deployment.json; None without links between hospitals and server.
  """
  rounded = {
    name: value if isinstance(value, dict) else round(value, 3) for name, value in seconds.items()
  }
  files.write_json(folder / "timing.json", rounded)
  if is_first():
    if deployment is not None:  # times of this machine are no results, so it stands apart
      files.write_json(folder / files.DEPLOYMENT, deployment)
    baselines = None if federation is None else _read_baselines(federation, folder)
    _publish(folder, summary, baselines)


def add_baselines(federation: Case, folder: pathlib.Path) -> None:
  """Adds the baselines, all of which have ended, to the results of a run that has ended before.

  Raises:
    UserError: a ledger was edited, the run's own or that of a baseline; nothing changes then.
  """
  summary = json.loads((folder / files.SUMMARY).read_text(encoding="utf-8"))
  baselines = _read_baselines(federation, folder)
  files.withdraw(folder)
  _publish(folder, summary, baselines)


class _Baselines(NamedTuple):
  """Baselines that have ended, as their folders and that of their run have them.

  Attributes:
    names: of the hospitals.
    book: ledger of the run; None without privacy.
    ledgers: ledger of each baseline by its name, None of one that nothing protects.
    curves: test lines of the log of each baseline by its name.
  """

  names: tuple[str, ...]
  book: ledger.Ledger | None
  ledgers: dict[str, ledger.Ledger | None]
  curves: dict[str, list[dict[str, Any]]]


def _read_baselines(federation: Case, folder: pathlib.Path) -> _Baselines:
  """Reads what the baselines in ``folder`` left; UserError where a ledger was edited."""
  names = federation.hospitals.names
  runs = [*(f"alone-{k + 1}" for k in range(len(names))), "pooled"]
  places = {name: folder / BASELINES / name for name in runs}
  book, ledgers = None, {}
  if federation.guarantees:
    book = ledger.read(folder)
    claims.record_of(book, folder)  # refuses a ledger that says too little
    ledgers = {name: claims.ledger_of(place) for name, place in places.items()}
  curves = {name: _curve(place) for name, place in places.items()}
  return _Baselines(names=names, book=book, ledgers=ledgers, curves=curves)


def _publish(folder: pathlib.Path, summary: dict[str, Any], baselines: _Baselines | None) -> None:
  if baselines is not None:
    summary = {**summary, "baselines": _write_baselines(baselines, folder)}
  write_statement(folder)
  files.write_json(folder / files.SUMMARY, summary)


def _write_baselines(baselines: _Baselines, folder: pathlib.Path) -> dict[str, Any]:
  """Writes the releases and the curves of baselines; returns their last metrics.

  Their releases are in the ledger, and so their ε in privacy.json; the curves are in
  baselines.json.
  """
  names, curves = baselines.names, baselines.curves
  if baselines.book is not None:
    book = ledger.record_baselines(folder, baselines.book, baselines.ledgers)
    files.write_json(folder / claims.FILE, claims.record_of(book, folder))
  solo = []
  for k, hospital in enumerate(names):
    curve = [
      {"round": line["round"], "own": line["clients"][k], "all": _overall(line)}
      for line in curves[f"alone-{k + 1}"]
    ]
    solo.append({"name": hospital, "curve": curve})
  together = [
    {"round": line["round"], "all": _overall(line), "clients": line["clients"]}
    for line in curves["pooled"]
  ]
  record = {"alone": solo, "pooled": {"curve": together}}
  files.write_json(folder / f"{BASELINES}.json", record)
  last = [entry["curve"][-1] for entry in solo]
  alone = [{"own": point["own"], "all": point["all"]} for point in last]
  return {"alone": alone, "pooled": together[-1]["all"]}


def _curve(folder: pathlib.Path) -> list[dict[str, Any]]:
  return [line for line in files.read_metrics(folder) if line["split"] == "test"]


def _overall(line: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in line.items() if key not in ("clients", "seconds", "split")}
