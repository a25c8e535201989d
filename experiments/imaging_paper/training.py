"""Trains the systems that a folder lacks, and reads what they reached as one table."""

import importlib.metadata
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence

import pandas as pd
from absl import flags
from rich.console import Console

from experiments.imaging_paper.systems import SCALES, SETS, SYSTEMS, Row, base_config, rows
from fedjax_med.core.config import Config
from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.metrics import METRICS

# A seed draws split, partition, initial weights, sampling and phantoms.
SEED_AXES = ("partition", "init", "sampling")

HERE = pathlib.Path(__file__).parent
RESULTS = "imaging_paper.csv"


def define_flags() -> None:
  """Defines what all commands of this experiment take."""
  flags.DEFINE_string("scale", "smoke", f"Size of everything: {', '.join(SCALES)}.")
  flags.DEFINE_string("set", "phantoms", f"Whose images: {', '.join(SETS)}.")
  flags.DEFINE_string("path", "", "Folder with the class folders of the set; phantoms need none.")
  flags.DEFINE_string(
    "workdir", "", "Where runs are kept and resumed; empty is runs/imaging_paper/SET_SCALE."
  )
  flags.DEFINE_list("only", [], "Systems to look at; none looks at all.")
  flags.DEFINE_bool(
    "committed",
    False,
    "Take the committed results, and train nothing; tables and figures are written beside them.",
  )


def chosen() -> list[str]:
  """The systems that --only names, or all."""
  for name in flags.FLAGS.only:
    require_choice("--only", name, SYSTEMS)
  return [name for name in SYSTEMS if name in flags.FLAGS.only or not flags.FLAGS.only]


def workdir() -> pathlib.Path:
  """The folder of the runs."""
  values = flags.FLAGS
  folder = values.workdir or f"runs/imaging_paper/{values.set}_{values.scale}"
  return pathlib.Path(folder).expanduser()


def committed() -> pathlib.Path:
  """The committed results of the set and scale."""
  return HERE / f"{flags.FLAGS.set}_{flags.FLAGS.scale}" / RESULTS


def results(systems: Sequence[str]) -> pd.DataFrame:
  """A row a training: system, split, seed, size, and the metrics of all test images.

  Systems that have not been trained are, unless --committed; a training that was stopped goes on.

  Raises:
    UserError: a flag is wrong, the folder holds another scale or set, or results are missing.
  """
  values = flags.FLAGS
  require_choice("--scale", values.scale, SCALES)
  require_choice("--set", values.set, SETS)
  if values.committed:
    require(committed().exists(), f"{committed()} is missing", "leave out --committed, and train")
    frame = pd.read_csv(committed())
    return frame[frame["system"].isin(systems)].reset_index(drop=True)
  base, every = _base(), every_row()
  own = [number for number, row in enumerate(every) if row.system in systems]
  folder = workdir()
  train(folder, base, every, own)
  return collect(folder, every, own)


def every_row() -> list[Row]:
  """Every training of the set and scale, in the order of the sweep's points."""
  return rows(_base(), SCALES[flags.FLAGS.scale])


def _base() -> Config:
  values = flags.FLAGS
  return base_config(values.scale, values.set, values.path)


def train(folder: pathlib.Path, base: Config, every: Sequence[Row], own: Sequence[int]) -> None:
  """Trains what is missing of ``own`` in ``folder``."""
  from fedjax_med.run import writer
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.simulation.mesh import split_cpu
  from fedjax_med.sweep import table
  from fedjax_med.sweep.missing import Selection, run_missing
  from fedjax_med.sweep.points import configure

  points = [row.point for row in every]
  configs = [configure(base, point, SEED_AXES) for point in points]
  split_cpu(0)
  use_compilation_cache(base.execution.compilation_cache)
  command = shlex.join(["python", "-m", "experiments.imaging_paper.tables", *sys.argv[1:]])
  versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
  table.begin(folder, base, points, SEED_AXES, command=command, versions=versions)
  console = Console(stderr=True, highlight=False)
  with writer.hold(folder, lambda text: console.print(text, markup=False)):
    run_missing(
      console,
      folder,
      Selection(points=points, configs=configs, numbers=own),
      name="imaging_paper",
      command_of=lambda each: f"{command} --only={every[each.key.number].system}",
    )


def collect(folder: pathlib.Path, every: Sequence[Row], own: Sequence[int]) -> pd.DataFrame:
  """What the trainings ``own`` reached; see ``results``."""
  from fedjax_med import study
  from fedjax_med.sweep import table

  frame = table.collect(folder)
  frame = study.by_point(frame[frame["point"].isin(own)])
  labels = pd.DataFrame(
    [(number, *every[number][:3], *_summary(table.folder_of(folder, number))) for number in own],
    columns=["point", "system", "split", "seed", "parameters", "predicts"],
  )
  metrics = [f"{part}.{metric}" for part in ("all", "worst") for metric in METRICS]
  kept = frame[["point", "megabytes", *metrics]]
  return labels.merge(kept, on="point").drop(columns="point")


def _summary(folder: pathlib.Path) -> tuple[int, str]:
  found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
  return found["num_parameters"], found["predicts"]
