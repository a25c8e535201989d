"""Runs the groups and chunks of a sweep; every point leaves the files of a run."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.core.config import Config, to_dict
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import Dataset, Hospitals
from fedjax_med.folder import writing as files
from fedjax_med.prepare.experiment import Experiment, make_experiment
from fedjax_med.prepare.synthetic_images import image_keeper
from fedjax_med.run import writer
from fedjax_med.run.drive import Outcome, Reached, drive
from fedjax_med.run.measure import LogPoint, log_lines
from fedjax_med.run.summaries import deployment_of, summary_record
from fedjax_med.run.trackers import require_installed, track
from fedjax_med.sweep.points import Key, Planned, groups, images_of, shown
from fedjax_med.sweep.programs import (
  Placement,
  Prepared,
  advance_together,
  compiled_ahead,
  make_group_program,
  pool_of,
)
from fedjax_med.tasks.registry import task_named


class Progress(NamedTuple):
  """Progress of a sweep, for the terminal.

  Attributes:
    rounds: rounds done of all runs, by this process.
    runs: runs whose files are written.
    epsilon: largest ε of a written run so far; None if none has a guarantee.
    note: current activity.
    failed: runs whose images could not be made, with the reasons.
  """

  rounds: int
  runs: int
  epsilon: float | None
  note: str
  failed: tuple[tuple[Key, str], ...] = ()


Listener = Callable[[Progress], None]
NOTHING_DONE = Progress(rounds=0, runs=0, epsilon=None, note="")


class Output(NamedTuple):
  """Folders and names under which the runs of a sweep are written.

  Attributes:
    folder_of: the folder of a run.
    name: name of the config.
    command_of: the command that runs a point by itself.
    listen: called with the progress.
  """

  folder_of: Callable[[Key], pathlib.Path]
  name: str
  command_of: Callable[[Planned], str]
  listen: Listener


class EndedRun(NamedTuple):
  """A run of a sweep that has ended: its outcome, and the lines of its metrics.jsonl."""

  outcome: Outcome
  lines: list[dict[str, Any]]


def run_points(
  planned: Sequence[Planned], done: Set[Key], output: Output, at_once: int = 0
) -> None:
  """Runs every point and writes its folder; a chunk's folders are whole when it is done.

  Baselines are runs of their own, and join the results of their points at the end.

  Args:
    planned: the points. Programs are made for all of them, so that a resumed point is run by the
      program that would have run it.
    done: runs that are not to be run again.
    output: where they are written.
    at_once: most runs in memory at once; 0 lets memory decide.

  Raises:
    UserError: a point's folder holds another run, which is found before anything compiles; or the
      images of a point could not be made, and all others have run when it is raised.
  """
  listen = output.listen
  for run in planned:  # before hours are spent: what is done must be of these runs too
    files.claim(output.folder_of(run.key), run.case.run_id)
  for tracker in {run.case.config.eval.tracker for run in planned}:
    require_installed(tracker)
  progress, complete = NOTHING_DONE, image_keeper()
  parts = [part for part in groups(planned) if not {run.key for run in part} <= done]
  plans = []
  for number, part in enumerate(parts, 1):
    listen(progress._replace(note=f"program {number} of {len(parts)}: planning"))
    plans.append(make_group_program(part, at_once))
  compiled = compiled_ahead(plans)
  for number in range(1, len(parts) + 1):
    progress = progress._replace(note=f"program {number} of {len(parts)}")
    listen(progress._replace(note=f"{progress.note}: compiling"))
    progress = run_group(next(compiled), done, output, progress, complete)
  failed = {key.number for key, _ in progress.failed}
  for run in planned:
    asked = run.case.config.eval.local_baselines and not run.key.baseline
    if asked and run.key.number not in failed:
      writer.add_baselines(run.case, output.folder_of(run.key))
  if failed:
    _, first = progress.failed[0]
    more = f" (and {len(failed) - 1} more points)" if len(failed) > 1 else ""
    raise UserError(
      f"{first}{more}; all others have run: python -m fedjax_med.sweep merge makes their table"
    )


def run_group(
  prepared: Prepared,
  done: Set[Key],
  output: Output,
  progress: Progress = NOTHING_DONE,
  complete: Callable[[Config, Hospitals], Hospitals] | None = None,
) -> Progress:
  """Runs a group chunk by chunk; see ``run_points``. Returns the progress after it.

  ``complete`` makes synthetic images, or has made them for another group.
  """
  complete, listen = complete or image_keeper(), output.listen
  for whole in prepared.placement.chunks:
    chunk = [run for run in whole if run.key not in done]
    if any(run.case.hospitals.dataset.num_synthetic for run in chunk):
      listen(progress._replace(note=f"{progress.note}: synthetic images"))
    sets, errors = _images(chunk, complete)
    failed = [
      (run.key, f"point {shown(run.point)}: {errors[images_of(run)]}")
      for run in chunk
      if images_of(run) in errors
    ]
    progress = progress._replace(failed=(*progress.failed, *failed))
    chunk = [run for run in chunk if images_of(run) in sets]
    if not chunk:
      continue

    def tell(rounds: int, so_far=progress, chunk=chunk) -> None:
      note = f"{so_far.note}: {len(chunk)} runs at once"
      listen(so_far._replace(rounds=so_far.rounds + rounds, note=note))

    runs, starts = _placed(chunk, sets, prepared)
    trained = _train_chunk(runs, starts, prepared, tell)
    for planned, experiment, ended in zip(chunk, runs, trained, strict=True):
      folder, command = output.folder_of(planned.key), output.command_of(planned)
      write_point(experiment, prepared.placement, ended, folder, output.name, command)
      last = ended.outcome.last
      epsilons = [*last.epsilons, last.client_epsilon, progress.epsilon]
      progress = progress._replace(
        rounds=progress.rounds + last.rounds,
        runs=progress.runs + 1,
        epsilon=max((epsilon for epsilon in epsilons if epsilon is not None), default=None),
      )
    listen(progress)
  return progress


def _images(
  chunk: Sequence[Planned], complete: Callable[[Config, Hospitals], Hospitals]
) -> tuple[dict[tuple[Any, ...], Dataset], dict[tuple[Any, ...], UserError]]:
  """The sets of images of a chunk, and reasons why others could not be made, by ``images_of``."""
  sets, errors = {}, {}
  for run in chunk:
    key = images_of(run)
    if key in sets or key in errors:
      continue
    try:
      sets[key] = complete(run.case.config, run.case.hospitals).dataset
    except UserError as error:
      errors[key] = error
  return sets, errors


def _placed(
  chunk: Sequence[Planned], sets: dict[tuple[Any, ...], Dataset], prepared: Prepared
) -> tuple[list[Experiment], list[int]]:
  """The runs on the devices with all images in one pool, and the rows at which theirs begin."""
  pool = pool_of(list(sets.values()), prepared)
  ends = np.cumsum([len(dataset.labels) for dataset in sets.values()])
  first_rows = dict(zip(sets, [0, *ends[:-1].tolist()], strict=True))
  starts, runs = [first_rows[images_of(run)] for run in chunk], []
  for run, start in zip(chunk, starts, strict=True):
    hospitals = dataclasses.replace(run.case.hospitals, dataset=sets[images_of(run)])
    case = run.case._replace(hospitals=hospitals)
    runs.append(make_experiment(case, prepared.program, prepared.shapes, pool, None, start))
  return runs, starts


def _train_chunk(
  runs: Sequence[Experiment],
  starts: Sequence[int],
  prepared: Prepared,
  tell: Callable[[int], None],
) -> list[EndedRun]:
  """Trains the runs, whose images begin at ``starts``."""
  started = time.monotonic()
  advance, states_now = advance_together(runs, starts, prepared, tell)
  lines: list[list[dict[str, Any]]] = [[] for _ in runs]
  last: dict[int, LogPoint] = {}

  def log(k: int, point: LogPoint, reached: Reached) -> None:
    lines[k] += log_lines(runs[k], point, reached.metrics, time.monotonic() - started)
    last[k] = point

  stopped = drive(runs, advance, log, epsilon_at_end=True)
  seconds = (time.monotonic() - started) / len(runs)
  spend = {"compile": 0.0, "train": seconds, "total": seconds}
  return [
    EndedRun(Outcome(state=state, stopped=stopped[k], last=last[k], seconds=spend), lines[k])
    for k, state in enumerate(states_now())
  ]


def write_point(
  experiment: Experiment,
  placement: Placement,
  trained: EndedRun,
  folder: pathlib.Path,
  name: str,
  command: str,
) -> None:
  """Writes the files of a run, but for its weights.

  Raises:
    UserError: the folder holds another run, or its ledger was edited.
  """
  outcome, lines = trained
  book = writer.begin(experiment, folder, command)
  steps = np.asarray(outcome.state.steps)
  writer.log(experiment, folder, book, outcome.last.rounds, steps, lines)
  tracker = experiment.config.eval.tracker
  task = task_named(experiment.hospitals.dataset.task)
  with track(tracker, folder, experiment.run_id, to_dict(experiment.config), task) as record:
    for line in lines:
      if line["split"] == "test":
        record(line)
  summary = summary_record(experiment, outcome, name)
  summary["plan"]["devices"] = 1
  summary["plan"]["reasons"].append(
    f"sweep: up to {placement.size} runs in one program, {placement.at_once} side by side on each"
    f" of {placement.mesh.size if placement.mesh else 1} devices"
  )
  writer.finish(folder, summary, outcome.seconds, deployment=deployment_of(experiment, outcome))
