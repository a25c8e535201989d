"""Runs what a sweep's folder lacks, with progress on the terminal."""

import pathlib
from collections.abc import Callable, Collection, Sequence

from rich.console import Console

from fedjax_med.core.config import Config
from fedjax_med.folder import secret as secrets
from fedjax_med.sweep import image_sets, progress, table
from fedjax_med.sweep.grid import Point
from fedjax_med.sweep.points import Planned, plan_points
from fedjax_med.sweep.runner import run_points


def run_missing(
  console: Console,
  workdir: pathlib.Path,
  points: Sequence[Point],
  configs: Sequence[Config],
  own: Collection[int],
  *,
  name: str,
  command_of: Callable[[Planned], str],
  secret: bytes = b"",
  at_once: int = 0,
) -> None:
  """Trains those of the points ``own`` that have not ended; what is done stays as it is.

  Args:
    console: where progress goes.
    workdir: of the sweep, which ``table.begin`` has made.
    points: all of the sweep.
    configs: of each point, from ``points.configure``.
    own: numbers of the points that this process sees to.
    name: of the config.
    command_of: the command that runs a point by itself.
    secret: of the sweep, from which those of its private points follow.
    at_once: most runs in memory at once; 0 lets memory decide.

  Raises:
    UserError: the data are not those that the sweep began with, or a point cannot be run, which is
      found before anything compiles; or the synthetic images of one could not be made, when all
      others have run.
  """
  if all(table.done(workdir, number) for number in own):
    return

  def secret_of(number: int) -> bytes:
    """What the point began with, here or where it was merged from."""
    path = table.folder_of(workdir, number) / secrets.FILE
    return secrets.read(path) if path.exists() else secrets.derived(secret, f"point {number}")

  planned = plan_points(points, configs, list(own), secret_of)
  image_sets.bind(workdir, planned)
  progress.describe_data(console, planned)
  done = {each.key for each in planned if table.has_run(workdir, *each.key)}
  left = [each.case.config.server.num_rounds for each in planned if each.key not in done]
  with progress.show(console, sum(left), len(left)) as listen:
    run_points(
      planned,
      done,
      lambda key: table.folder_of(workdir, *key),
      name,
      command_of,
      at_once,
      listen,
    )
