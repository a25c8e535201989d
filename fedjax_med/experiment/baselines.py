"""What federation is measured against: each hospital alone, and one model on pooled data."""

import json
import pathlib
from typing import Any

from rich.console import Console

from fedjax_med.experiment import console as terminal
from fedjax_med.experiment import workdir as files
from fedjax_med.experiment.build import Case, Experiment, build_baselines
from fedjax_med.experiment.loop import train_rounds
from fedjax_med.experiment.processes import is_first


def _curve(folder: pathlib.Path) -> list[dict[str, Any]]:
  return [line for line in files.read_metrics(folder) if line["split"] == "test"]


def _overall(line: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in line.items() if key not in ("clients", "seconds", "split")}


def run_baselines(federation: Experiment, folder: pathlib.Path, console: Console) -> dict[str, Any]:
  """Trains the baselines under ``folder``/baselines, each resumable like any run.

  Returns:
    'curves': test metrics at every log point, for baselines.json; 'summary': the last ones. Both
    are empty in all processes of a run but the first.
  """
  for name, run in build_baselines(federation).items():
    place = folder / "baselines" / name
    files.prepare(place)
    title = f"{run.names[0]} alone" if name != "pooled" else "pooled data"
    with terminal.progress(console, title, run.config.server.num_rounds) as listen:
      train_rounds(run, place, listen)
  return gather(federation.case, folder) if is_first() else {"curves": {}, "summary": {}}


def gather(federation: Case, folder: pathlib.Path) -> dict[str, Any]:
  """Results of the baselines under ``folder``/baselines; privacy.json of ``folder`` names them.

  Returns:
    As ``run_baselines``.
  """
  names = federation.hospitals.names
  runs = [*(f"alone-{k + 1}" for k in range(len(names))), "pooled"]
  curves = {name: _curve(folder / "baselines" / name) for name in runs}
  if federation.guarantees:
    _note_releases(folder, curves)
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
  last = [entry["curve"][-1] for entry in solo]
  return {
    "curves": {"alone": solo, "pooled": {"curve": together}},
    "summary": {
      "alone": [{"own": point["own"], "all": point["all"]} for point in last],
      "pooled": together[-1]["all"],
    },
  }


def _note_releases(folder: pathlib.Path, curves: dict[str, list[dict[str, Any]]]) -> None:
  """Writes the ε of the baselines into privacy.json, which says already what they are."""
  path = folder / "privacy.json"
  spent = {name: curve[-1]["epsilon_max"] for name, curve in curves.items()}
  files.write_json(path, {**json.loads(path.read_text()), "baselines_epsilon": spent})
