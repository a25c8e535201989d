"""What federation is measured against: each hospital alone, and one model on pooled data."""

import json
import pathlib
from typing import Any

from rich.console import Console

from fedjax_med.folder import writing as files
from fedjax_med.prepare.case import Case
from fedjax_med.prepare.experiment import Experiment, build_baselines
from fedjax_med.privacy import claims, ledger
from fedjax_med.run import console as terminal
from fedjax_med.run.loop import train_rounds
from fedjax_med.simulation.processes import is_first
from fedjax_med.tasks.registry import task_named


def _curve(folder: pathlib.Path) -> list[dict[str, Any]]:
  return [line for line in files.read_metrics(folder) if line["split"] == "test"]


def _overall(line: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in line.items() if key not in ("clients", "seconds", "split")}


def run_baselines(federation: Experiment, folder: pathlib.Path, console: Console) -> None:
  """Trains the baselines under ``folder``/baselines, each resumable like any run."""
  for name, run in build_baselines(federation).items():
    place = folder / "baselines" / name
    files.prepare(place)
    title = f"{run.names[0]} alone" if name != "pooled" else "pooled data"
    task = task_named(run.hospitals.dataset.task)
    with terminal.progress(console, title, run.config.server.num_rounds, task) as listen:
      train_rounds(run, place, listen)
  if is_first():
    write_baselines(federation.case, folder)


def write_baselines(federation: Case, folder: pathlib.Path) -> None:
  """Adds the baselines, all of which have run, to the results of ``folder``.

  Their curves are in baselines.json, their last metrics in summary.json, what they have spent in
  the ledger and so their ε in privacy.json.
  """
  names = federation.hospitals.names
  runs = [*(f"alone-{k + 1}" for k in range(len(names))), "pooled"]
  curves = {name: _curve(folder / "baselines" / name) for name in runs}
  if federation.guarantees:
    places = {name: folder / "baselines" / name for name in runs}
    ended = {
      name: ledger.read(place) if (place / ledger.FILE).exists() else None
      for name, place in places.items()
    }
    book = ledger.record_baselines(folder, ledger.read(folder), ended)
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
  files.write_json(folder / "baselines.json", {"alone": solo, "pooled": {"curve": together}})
  last = [entry["curve"][-1] for entry in solo]
  alone = [{"own": point["own"], "all": point["all"]} for point in last]
  path = folder / "summary.json"
  summary = json.loads(path.read_text(encoding="utf-8"))
  files.write_json(path, {**summary, "baselines": {"alone": alone, "pooled": together[-1]["all"]}})
