"""Baselines of a federation: a model of each hospital alone, and one on pooled data."""

import pathlib

from rich.console import Console

from fedjax_med.folder import writing as files
from fedjax_med.prepare.experiment import Experiment, build_baselines
from fedjax_med.run import console as terminal
from fedjax_med.run import writer
from fedjax_med.run.drive import Outcome
from fedjax_med.run.single import train_rounds
from fedjax_med.run.summaries import summary_record
from fedjax_med.tasks.registry import task_named


def run_baselines(
  federation: Experiment, folder: pathlib.Path | None, name: str, command: str, console: Console
) -> dict[str, Outcome]:
  """Trains the baselines: alone-1, alone-2, ... and pooled.

  Each is a run of its own under ``folder``/baselines, resumable like any run; without a folder
  nothing is written. ``name`` and ``command`` are those of the federation.
  """

  def tell(text: str) -> None:
    console.print(text, markup=False)

  outcomes = {}
  for baseline, run in build_baselines(federation).items():
    place = None if folder is None else folder / writer.BASELINES / baseline
    if place is not None:
      files.prepare(place)
    title = f"{run.names[0]} alone" if baseline != "pooled" else "pooled data"
    task = task_named(run.hospitals.dataset.task)
    with terminal.progress(console, title, run.config.server.num_rounds, task) as listen:
      outcome = train_rounds(run, place, listen, command=command, tell=tell)
    if place is not None:
      seconds = {**outcome.seconds, "total": sum(outcome.seconds.values())}
      writer.finish(place, summary_record(run, outcome, name), seconds)
    outcomes[baseline] = outcome
  return outcomes
