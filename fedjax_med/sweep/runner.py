"""The host side of a sweep: groups and chunks run, and every point leaves what a run leaves."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.core.config import Config, to_dict
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import Dataset, Hospitals
from fedjax_med.folder import secret as secrets
from fedjax_med.folder import writing as files
from fedjax_med.prepare.experiment import Experiment, make_experiment
from fedjax_med.prepare.synthetic_images import image_keeper
from fedjax_med.privacy import ledger
from fedjax_med.run.baselines import write_baselines
from fedjax_med.run.loop import (
  LogPoint,
  Outcome,
  evaluation_groups,
  log_lines,
  measure,
  next_rounds,
  spent,
  train_line,
  write_privacy,
)
from fedjax_med.run.statement import write_statement
from fedjax_med.run.summaries import config_record, summary_record, write_hospitals
from fedjax_med.run.trackers import require_installed, track
from fedjax_med.simulation.evaluation import batches_of
from fedjax_med.simulation.rounds import NEVER
from fedjax_med.simulation.runs_axis import blank_states
from fedjax_med.sweep.points import Key, Planned, groups, images_of, shown
from fedjax_med.sweep.programs import (
  Layout,
  Prepared,
  compiled_ahead,
  make_group_program,
  pool_of,
  put,
  stack,
)
from fedjax_med.tasks.registry import task_named


class Progress(NamedTuple):
  """What a sweep says while it runs.

  Attributes:
    rounds: rounds done of all runs, by this process.
    runs: runs whose files are written.
    epsilon: largest ε of a written run so far; None if none has a guarantee.
    note: what goes on.
    failed: runs whose images could not be made, and why.
  """

  rounds: int
  runs: int
  epsilon: float | None
  note: str
  failed: tuple[tuple[Key, str], ...] = ()


Listener = Callable[[Progress], None]


def run_points(
  planned: Sequence[Planned],
  done: Set[Key],
  folder_of: Callable[[Key], pathlib.Path],
  name: str,
  command_of: Callable[[Planned], str],
  at_once: int,
  listen: Listener,
) -> None:
  """Runs every point and writes its folder; a chunk's folders are whole when it is done.

  Baselines are runs of their own, and join the results of their points at the end.

  Args:
    planned: the points. Programs are made for all of them, so that what is resumed is run by the
      program that would have run it.
    done: runs that are not to be run again.
    folder_of: the folder of a run.
    name: name of the config.
    command_of: the command that runs its point by itself.
    at_once: most runs in memory at once; 0 lets memory decide.
    listen: told of the progress.

  Raises:
    UserError: a point's folder holds another run, which is found before anything compiles; or the
      images of a point could not be made, and all others have run when it is raised.
  """
  for run in planned:  # before hours are spent: what is done must be of these runs too
    files.claim(folder_of(run.key), run.case.run_id)
  for name_of_tracker in {each.case.config.eval.tracker for each in planned}:
    require_installed(name_of_tracker)
  progress, complete = Progress(0, 0, None, ""), image_keeper()
  parts = [part for part in groups(planned) if not {each.key for each in part} <= done]
  plans = []
  for number, part in enumerate(parts, 1):
    listen(progress._replace(note=f"program {number} of {len(parts)}: planning"))
    plans.append(make_group_program(part, at_once))
  compiled = compiled_ahead(plans)
  for number in range(1, len(parts) + 1):
    progress = progress._replace(note=f"program {number} of {len(parts)}")
    listen(progress._replace(note=f"{progress.note}: compiling"))
    prepared = next(compiled)
    progress = run_group(prepared, done, folder_of, name, command_of, listen, progress, complete)
  failed = {key.number for key, _ in progress.failed}
  for each in planned:
    asked = each.case.config.eval.local_baselines and not each.key.baseline
    if asked and each.key.number not in failed:
      write_baselines(each.case, folder_of(each.key))
      write_statement(folder_of(each.key))  # it names the last line of the ledger
  if failed:
    _, first = progress.failed[0]
    more = f" (and {len(failed) - 1} more points)" if len(failed) > 1 else ""
    raise UserError(
      f"{first}{more}; all others have run: python -m fedjax_med.sweep merge makes their table"
    )


def run_group(
  prepared: Prepared,
  done: Set[Key],
  folder_of: Callable[[Key], pathlib.Path],
  name: str,
  command_of: Callable[[Planned], str],
  listen: Listener,
  progress: Progress,
  complete: Callable[[Config, Hospitals], Hospitals] | None = None,
) -> Progress:
  """Runs a group chunk by chunk; see ``run_points``. Returns the progress after it.

  ``complete`` makes synthetic images, or has made them for another group.
  """
  layout, complete = prepared.layout, complete or image_keeper()
  for whole in layout.chunks:
    chunk = [each for each in whole if each.key not in done]
    if not chunk:
      continue
    if any(each.case.hospitals.dataset.num_synthetic for each in chunk):
      listen(progress._replace(note=f"{progress.note}: synthetic images"))
    sets, errors = _images(chunk, complete)
    failed = [
      (each.key, f"point {shown(each.point)}: {errors[images_of(each)]}")
      for each in chunk
      if images_of(each) in errors
    ]
    progress = progress._replace(failed=(*progress.failed, *failed))
    chunk = [each for each in chunk if images_of(each) in sets]
    if not chunk:
      continue
    pool, starts = pool_of(list(sets.values()), prepared), _starts(chunk, sets)
    runs = []
    for each, start in zip(chunk, starts, strict=True):
      hospitals = dataclasses.replace(each.case.hospitals, dataset=sets[images_of(each)])
      case = each.case._replace(hospitals=hospitals)
      runs.append(make_experiment(case, prepared.program, prepared.shapes, pool, None, start))

    def told(rounds: int, so_far=progress, chunk=chunk) -> None:
      note = f"{so_far.note}: {len(chunk)} runs at once"
      listen(so_far._replace(rounds=so_far.rounds + rounds, note=note))

    outcomes, lines = _run_chunk(runs, starts, prepared, told)
    for each, experiment, outcome, metrics in zip(chunk, runs, outcomes, lines, strict=True):
      write_point(experiment, layout, folder_of(each.key), name, command_of(each), outcome, metrics)
      epsilons = [*outcome.last.epsilons, outcome.last.client_epsilon, progress.epsilon]
      progress = progress._replace(
        rounds=progress.rounds + outcome.last.rounds,
        runs=progress.runs + 1,
        epsilon=max((epsilon for epsilon in epsilons if epsilon is not None), default=None),
      )
    listen(progress)
  return progress


def _images(
  chunk: Sequence[Planned], complete: Callable[[Config, Hospitals], Hospitals]
) -> tuple[dict[tuple[Any, ...], Dataset], dict[tuple[Any, ...], UserError]]:
  """The sets of images of a chunk, and why others could not be made, by ``images_of``."""
  sets, errors = {}, {}
  for each in chunk:
    key = images_of(each)
    if key in sets or key in errors:
      continue
    try:
      sets[key] = complete(each.case.config, each.case.hospitals).dataset
    except UserError as error:
      errors[key] = error
  return sets, errors


def _starts(chunk: Sequence[Planned], sets: dict[tuple[Any, ...], Dataset]) -> list[int]:
  """The row of the pool at which the images of each run begin."""
  ends = np.cumsum([len(dataset.labels) for dataset in sets.values()])
  starts = dict(zip(sets, [0, *ends[:-1].tolist()], strict=True))
  return [starts[images_of(each)] for each in chunk]


def _run_chunk(
  runs: Sequence[Experiment],
  starts: Sequence[int],
  prepared: Prepared,
  told: Callable[[int], None],
) -> tuple[list[Outcome], list[list[dict[str, Any]]]]:
  """Trains the runs, whose images begin at ``starts``; where each ended, and its log's lines."""
  started = time.monotonic()
  first, layout = runs[0], prepared.layout
  tests = [
    [rows + start for rows in evaluation_groups(prepared.program.parts, run.hospitals)]
    for run, start in zip(runs, starts, strict=True)
  ]
  batches, places = zip(*(batches_of(each, prepared.batches) for each in tests), strict=True)
  missing = layout.size - len(runs)
  padded = [*runs, *[first] * missing]  # the empty places repeat the first
  points = stack(padded, [*batches, *[batches[0]] * missing])
  points = put(points, layout.mesh, dealt=True)
  parts = first.program.parts
  states = put(blank_states(parts.initial, parts.pretrained, layout.size), layout.mesh, dealt=True)
  fresh, lengths = True, np.zeros(layout.size, np.int32)
  stopped = ["" for _ in runs]
  lines: list[list[dict[str, Any]]] = [[] for _ in runs]
  last: list[LogPoint | None] = [None] * len(runs)
  while True:
    going = [fresh or length > 0 for length in lengths[: len(runs)]]
    states, metrics, found = prepared.sweep(
      states, np.bool_(fresh), lengths, points, first.pool, parts.pretrained
    )
    rounds, steps = jax.device_get((states.server.round, states.steps))
    metrics, found = jax.device_get((metrics, found))
    for k, run in enumerate(runs):
      if not going[k]:
        continue
      probabilities = found[k].reshape(-1, found.shape[-1])[places[k]]
      own = jax.tree.map(lambda leaf, k=k: leaf[k], metrics)
      bad = not run.central and (own.bad_round != NEVER).any()
      diverged = bool(bad or not np.isfinite(probabilities).all())
      if diverged:  # what it predicts is nothing, not even where it is finite
        probabilities = np.full_like(probabilities, np.nan)
      length = 0 if diverged else next_rounds(run, steps[k], int(rounds[k]))
      if diverged:
        stopped[k] = "diverged"
      elif not length:
        total = run.config.server.num_rounds
        stopped[k] = "completed" if rounds[k] == total else "budget"
      # ε costs more than a small run's training: it is worked out where the run ends.
      over = (steps[k], int(rounds[k])) if stopped[k] else None
      epsilons = spent(run, over[1], over[0]) if over else ((), None)
      point = measure(run, int(rounds[k]), probabilities, *epsilons)
      train = None if fresh else train_line(run, own)
      lines[k] += log_lines(run, point, train, time.monotonic() - started)
      lengths[k], last[k] = length, point
    fresh = False
    told(int(sum(rounds[: len(runs)])))
    if not lengths.any():
      break
  seconds = (time.monotonic() - started) / len(runs)
  spend = {"compile": 0.0, "train": seconds, "total": seconds}
  host = jax.device_get(states)
  outcomes = []
  for k, point in enumerate(last):
    assert point is not None
    state = jax.tree.map(lambda leaf, k=k: leaf[k], host)
    outcomes.append(Outcome(state, stopped[k], point, spend))
  return outcomes, lines


def write_point(
  experiment: Experiment,
  layout: Layout,
  folder: pathlib.Path,
  name: str,
  command: str,
  outcome: Outcome,
  lines: list[dict[str, Any]],
) -> None:
  """Writes what a run leaves, but for its weights; summary.json is the last: with it, it is done.

  Raises:
    UserError: the folder holds another run, or its ledger was edited.
  """
  folder.mkdir(parents=True, exist_ok=True)
  files.claim(folder, experiment.run_id)
  if experiment.guarantees and folder.parent.name != "baselines":
    secrets.keep(folder, experiment.case.secret)
  files.write_json(folder / "config.json", config_record(experiment, command))
  write_hospitals(folder, experiment)
  book = None
  if experiment.guarantees:
    book = ledger.start(folder, experiment.run_id, experiment.guarantees)
  # Before any result: what is on disk never understates ε.
  write_privacy(experiment, folder, book, outcome.last.rounds, np.asarray(outcome.state.steps))
  (folder / "metrics.jsonl").unlink(missing_ok=True)
  files.append_metrics(folder, lines)
  tracker = experiment.config.eval.tracker
  task = task_named(experiment.hospitals.dataset.task)
  with track(tracker, folder, experiment.run_id, to_dict(experiment.config), task) as record:
    for line in lines:
      if line["split"] == "test":
        record(line)
  seconds = {key: round(value, 3) for key, value in outcome.seconds.items()}
  files.write_json(folder / "timing.json", seconds)
  write_statement(folder)
  summary = summary_record(experiment, outcome, name)
  summary["plan"]["devices"] = 1
  summary["plan"]["reasons"].append(
    f"sweep: up to {layout.size} runs in one program, {layout.at_once} side by side on each of"
    f" {layout.mesh.size if layout.mesh else 1} devices"
  )
  files.write_json(folder / "summary.json", summary)
