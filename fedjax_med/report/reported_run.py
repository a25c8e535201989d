"""A whole run with its report: trained or resumed, examples drawn, report.html written."""

import functools
import pathlib
from collections.abc import Callable

import numpy as np
from rich.console import Console

from fedjax_med.core.config import Config
from fedjax_med.data.dataset import Hospitals, client_rows
from fedjax_med.data.grey import to_eight_bits, without_channel
from fedjax_med.data.modality import modality_named
from fedjax_med.data.sources import source_named
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.report import figures
from fedjax_med.report.figure_labels import labels
from fedjax_med.report.run_page import write_report
from fedjax_med.run import training


def run(
  config: Config,
  folder: pathlib.Path,
  name: str,
  command: str,
  hospitals: Callable[[], Hospitals] | None = None,
  noise_key: pathlib.Path | None = None,
  console: Console | None = None,
) -> training.RunResult:
  """Trains as configured, or resumes, and writes the report; arguments as in ``training.run``."""
  finish = functools.partial(_report, folder)
  return training.run(config, folder, name, command, hospitals, noise_key, finish, console)


def _report(folder: pathlib.Path, experiment: Experiment) -> pathlib.Path:
  dataset = experiment.hospitals.dataset
  if not modality_named(dataset.modality).explain:
    return write_report(folder)  # there is nothing to look at
  if not experiment.guarantees or source_named(experiment.config.data.source).synthetic_people:
    _draw_examples(experiment, folder)  # pictures of patients are no private release
  return write_report(folder)


def _draw_examples(experiment: Experiment, folder: pathlib.Path) -> None:
  """Draws train images of each hospital and class, real and synthetic."""
  hospitals = experiment.hospitals
  dataset = hospitals.dataset
  class_names = labels(dataset.class_names, "class")
  names = labels(hospitals.names, "hospital")
  shown = min(len(hospitals.names), 8)
  classes = range(min(len(dataset.class_names), 4))

  def first(k: int, label: int, synthetic: bool, number: int) -> list[np.ndarray | None]:
    rows = client_rows(hospitals.train)[k]
    rows = rows[(dataset.labels[rows] == label) & ((rows >= dataset.num_real) == synthetic)]
    found = [to_eight_bits(without_channel(dataset.inputs[row])) for row in rows[:number]]
    return [*found, *[None] * (number - len(found))]

  figures.draw_examples(
    folder / "figures" / "examples.png",
    [[image for label in classes for image in first(k, label, False, 2)] for k in range(shown)],
    names[:shown],
    [class_names[label] for label in classes for _ in range(2)],
  )
  if not dataset.num_synthetic:
    return
  each = 3 if len(classes) <= 2 else 1
  columns = [(label, made) for label in classes for made in (False, True)]
  figures.draw_examples(
    folder / "figures" / "synthetic.png",
    [[image for column in columns for image in first(k, *column, each)] for k in range(shown)],
    names[:shown],
    [
      f"{class_names[label]}\n{'synthetic' if made else 'real'}"
      for label, made in columns
      for _ in range(each)
    ],
    "Real and synthetic train images",
  )
