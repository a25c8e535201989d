"""A sweep before its points run: checked, its folder locked, its definition written.

The command line and ``fedjax_med.simulate_grid`` open sweeps by these functions, and run their
points by ``missing.run_missing``.
"""

import contextlib
import importlib.metadata
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.folder import secret as secrets
from fedjax_med.folder import writing as files
from fedjax_med.run import writer
from fedjax_med.sweep import table
from fedjax_med.sweep.grid import Point
from fedjax_med.sweep.points import configure, require_read

PACKAGES = ("jax", "flax", "dp-accounting")


class Sweep(NamedTuple):
  """A sweep whose settings were checked.

  Attributes:
    base: configuration that the points change.
    points: all of them.
    configs: of each point.
    seed_axes: the seeds that an axis named seed moves.
    command: starts the sweep.
  """

  base: Config
  points: Sequence[Point]
  configs: Sequence[Config]
  seed_axes: Sequence[str]
  command: str


def check(
  base: Config,
  points: Sequence[Point],
  seed_axes: Sequence[str],
  command: str,
  excused: Collection[str] = (),
) -> Sweep:
  """The sweep of these points; the arguments but the last are attributes of ``Sweep``.

  ``excused`` are settings of the base that may be without effect.

  Raises:
    UserError: a point breaks a rule, or no point reads an axis or a setting.
  """
  configs = [configure(base, point, seed_axes) for point in points]
  require_read(base, points, configs, seed_axes, excused)
  return Sweep(base=base, points=points, configs=configs, seed_axes=seed_axes, command=command)


@contextlib.contextmanager
def hold(
  console: Console,
  workdir: pathlib.Path,
  sweep: Sweep,
  noise_key: pathlib.Path | None = None,
  shard: tuple[int, int] = (0, 1),
) -> Iterator[bytes]:
  """Locks the folder of a sweep inside the block, writes its definition, and yields its secret.

  Args:
    console: where a file system without locks is reported.
    workdir: the folder, which is made if there is none.
    sweep: the sweep.
    noise_key: file with the secret of private points; None draws one for a new sweep.
    shard: number of this process and number of processes that run points beside each other.

  Raises:
    UserError: the folder is in use, lies in the data, or holds something else.
  """
  for place in {config.data.path for config in sweep.configs}:
    files.require_outside(workdir, place)
  files.prepare(workdir)
  # Before anything is written: a training that works in the folder must find it as it was.
  with writer.hold(workdir, lambda text: console.print(text, markup=False), *shard):
    secret = _secret(workdir, sweep.configs, noise_key)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    table.begin(
      workdir,
      sweep.base,
      sweep.points,
      sweep.seed_axes,
      command=sweep.command,
      versions=versions,
    )
    yield secret


def _secret(
  workdir: pathlib.Path, configs: Sequence[Config], noise_key: pathlib.Path | None
) -> bytes:
  """The secret of a sweep with private points, which its folder keeps; b"" without any."""
  if not any(secrets.is_private(config) for config in configs):
    require(
      noise_key is None,
      f"--noise_key={noise_key} is read with a private point only",
      "add that, or leave out --noise_key",
    )
    return b""
  if (workdir / "config.json").exists():  # a run, which ``table.begin`` refuses
    return b""
  # Before the definition: whoever finds that finds the secret, also another shard.
  return secrets.folder_secret(workdir, noise_key, (workdir / table.DEFINITION).exists())
