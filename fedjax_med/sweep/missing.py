"""Runs the points that a sweep's folder lacks, with progress on the terminal."""

import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from rich.console import Console

from fedjax_med.core.config import Config
from fedjax_med.folder import secret as secrets
from fedjax_med.sweep import image_sets, progress, table
from fedjax_med.sweep.grid import Point
from fedjax_med.sweep.points import Planned, plan_points
from fedjax_med.sweep.runner import Output, run_points


class Selection(NamedTuple):
  """Points of a sweep that one process sees to.

  Attributes:
    points: all of the sweep.
    configs: of each point, from ``points.configure``.
    numbers: of the points that this process sees to.
  """

  points: Sequence[Point]
  configs: Sequence[Config]
  numbers: Collection[int]


def run_missing(
  console: Console,
  workdir: pathlib.Path,
  selection: Selection,
  *,
  name: str,
  command_of: Callable[[Planned], str],
  secret: bytes = b"",
  at_once: int = 0,
) -> None:
  """Trains those of the selected points that have not ended. The others stay as they are.

  Args:
    console: where progress goes.
    workdir: of the sweep, which ``table.begin`` has made.
    selection: the points.
    name: of the config.
    command_of: the command that runs a point by itself.
    secret: of the sweep, from which those of its private points follow.
    at_once: most runs in memory at once; 0 lets memory decide.

  Raises:
    UserError: the data are not those that the sweep began with, or a point cannot be run, which is
      found before anything compiles; or the synthetic images of one could not be made, when all
      others have run.
  """
  numbers = list(selection.numbers)
  if all(table.done(workdir, number) for number in numbers):
    return

  def secret_of(number: int) -> bytes:
    """The secret that the point began with, here or in the folder it was merged from."""
    path = table.folder_of(workdir, number) / secrets.FILE
    return secrets.read(path) if path.exists() else secrets.derived(secret, f"point {number}")

  planned = plan_points(selection.points, selection.configs, numbers, secret_of)
  image_sets.bind(workdir, planned)
  progress.describe_data(console, planned)
  done = {run.key for run in planned if table.has_run(workdir, *run.key)}
  left = [run.case.config.server.num_rounds for run in planned if run.key not in done]
  with progress.show(console, sum(left), len(left)) as listen:
    output = Output(
      folder_of=lambda key: table.folder_of(workdir, *key),
      name=name,
      command_of=command_of,
      listen=listen,
    )
    run_points(planned, done, output, at_once)
