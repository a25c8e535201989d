"""Terminal output of a sweep: its points and programs, progress, results."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from fedjax_med.folder.data_notes import Note, data_notes
from fedjax_med.folder.secret import is_private
from fedjax_med.prepare.protection import Protection
from fedjax_med.privacy.accounting import round_up
from fedjax_med.privacy.guarantees import spent
from fedjax_med.run.console import make_console, number, shown_path
from fedjax_med.run.summaries import hospital_record
from fedjax_med.sweep.grid import Point
from fedjax_med.sweep.points import Planned, shown
from fedjax_med.sweep.runner import Listener, Progress
from fedjax_med.tasks.classification import NO_CLASS
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Place

if TYPE_CHECKING:
  import pandas as pd

MOST_NOTES = 12  # on the data of all points
MOST_ROWS = 40  # points in a table on the terminal; the files hold all of them

__all__ = ["describe", "describe_data", "make_console", "results", "show", "shown_path"]


def planned_epsilon(protection: Protection) -> float | None:
  """Largest ε of a hospital's records after all rounds; None without privacy of records."""
  if protection.local is None:
    return None
  rounds = protection.config.server.num_rounds
  return max(spent(protection.local, protection.steps * rounds))


def describe_data(console: Console, planned: Sequence[Planned]) -> None:
  """Prints the sentences about the data of the points, each of them once."""
  notes: dict[Note, None] = {}
  for run in planned:
    if not run.key.baseline:
      config = run.case.config
      held = hospital_record(run.case.hospitals)
      notes |= dict.fromkeys(data_notes(held, config.privacy.unit, not is_private(config)))
  for note in list(notes)[:MOST_NOTES]:
    console.print(f"[yellow]{escape(note.text)}[/]" if note.warning else escape(note.text))
  if len(notes) > MOST_NOTES:
    console.print(f"and {len(notes) - MOST_NOTES} more notes on the data, in the reports of points")


def describe(console: Console, groups: Sequence[Sequence[Planned]]) -> None:
  """Prints every point with the ε that it would spend, by the program that runs it."""
  for place, group in enumerate(groups, 1):
    table = Table(title=f"Program {place} of {len(groups)}", title_justify="left")
    for column in ("point", "values", "hospitals", "rounds", "ε planned"):
      table.add_column(column)
    for each in group[:MOST_ROWS]:
      epsilon = planned_epsilon(each.case.protection)
      table.add_row(
        "/".join(map(str, filter(None, [str(each.key.number), each.key.baseline]))),
        escape(shown(each.point)),
        str(len(each.case.names)),
        str(each.case.config.server.num_rounds),
        round_up(epsilon),
      )
    if len(group) > MOST_ROWS:
      table.caption = f"and {len(group) - MOST_ROWS} more points"
    console.print(table)


@contextlib.contextmanager
def show(console: Console, rounds: int, runs: int) -> Iterator[Listener]:
  """A listener: a live bar on a terminal, a line a log point elsewhere."""

  def status(progress: Progress) -> str:
    epsilon = "" if progress.epsilon is None else f"  ε up to {round_up(progress.epsilon)}"
    return f"{progress.runs}/{runs} runs{epsilon}  {progress.note}"

  if not console.is_terminal:
    started = time.monotonic()

    def line(progress: Progress) -> None:
      seconds = time.monotonic() - started
      left = ""
      if progress.rounds:
        left = f"  {seconds / progress.rounds * (rounds - progress.rounds):.0f} s left"
      console.print(f"round {progress.rounds}/{rounds}  {escape(status(progress))}{left}")

    yield line
    return
  columns = (
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("rounds  {task.description}", markup=False),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
  )
  with Bar(*columns, console=console) as bar:
    task = bar.add_task("", total=rounds)
    yield lambda progress: bar.update(task, completed=progress.rounds, description=status(progress))


def results(console: Console, frame: "pd.DataFrame", points: Sequence[Point]) -> None:
  """Prints a line a point: its values, and the results on all test images together."""
  if not len(frame):
    return
  positives = sorted(set(frame["positive_class"]))
  task = task_named(frame["task"].iloc[0])
  metrics = task.metrics_in(Place.PAPER)
  table = Table(title="Results on all test images", title_justify="left")
  for column in ("point", "values", "ended", "ε", *(metric.label for metric in metrics)):
    table.add_column(column)
  if len(positives) > 1:
    table.add_column("positive class")
  firsts = frame.groupby("point", sort=True).first().reset_index().to_dict("records")
  for row in firsts[:MOST_ROWS]:
    place = int(row["point"])
    values = [row.get(f"all.{metric.name}", math.nan) for metric in metrics]
    table.add_row(
      str(place),
      escape(shown(points[place])),
      f"{row['stopped']}, {row['rounds']} rounds",
      round_up(row["epsilon_max"]),
      *(number(None if value != value else value) for value in values),
      *([escape(row["positive_class"] or NO_CLASS)] if len(positives) > 1 else []),
    )
  more = f"and {len(firsts) - MOST_ROWS} more points\n" if len(firsts) > MOST_ROWS else ""
  table.caption = more + escape(task.about(positives))
  console.print(table)
