"""Runs a grid of configurations as one compiled program each group; a sweep that stopped goes on.

Example: python -m fedjax_med.sweep --config=configs/quickstart.py --workdir=runs/noise
  --grid=privacy.noise_multiplier=0.5,1,2,4 --grid=seed=0:5

An axis is NAME=VALUES: a list 0.5,1,2; whole numbers 0:5 (0 to 4) or 0:10:2; so many numbers
between two ends lin:0:1:5 or log:1e-3:1e-1:5. For --random the number of them is left out.
privacy.target_epsilon=inf is training without privacy.

Merge: python -m fedjax_med.sweep merge --workdir=runs/noise [other folders of the same sweep]
"""

import pathlib
import runpy
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.markup import escape

from fedjax_med.core.config import Config, declared, get_field
from fedjax_med.core.errors import UserError, require, require_choice
from fedjax_med.core.text import command_line
from fedjax_med.flags import (
  define_config,
  define_network,
  define_noise_key,
  inherited,
  load_config,
  noise_key,
  require_company,
  run_main,
)
from fedjax_med.sweep import grid

if TYPE_CHECKING:
  from fedjax_med.sweep.opening import Sweep


def _define() -> None:
  define_config()
  define_noise_key()
  flags.DEFINE_multi_string("grid", [], "An axis NAME=VALUES; all --grid are crossed.")
  flags.DEFINE_multi_string("zip", [], "An axis; all --zip advance together.")
  flags.DEFINE_multi_string("random", [], "An axis drawn at random, --trials times.")
  flags.DEFINE_integer("trials", 0, "Number of random draws.")
  flags.DEFINE_integer("random_seed", 0, "Seed of the random draws.")
  flags.DEFINE_string("sweep", None, "Python file whose get_sweep() returns a list of points.")
  flags.DEFINE_list(
    "seed_axes",
    ["init", "sampling"],
    "What an axis named seed moves: partition (data.seed: split and partition, and the images of"
    " phantoms), init (initial weights), sampling (sampling, noise, participation).",
  )
  flags.DEFINE_string("shard", "0/1", "I/N: this process runs every N-th point from the I-th on.")
  flags.DEFINE_string("submit", None, "slurm or local: run --shards jobs by submitit.")
  flags.DEFINE_integer("shards", 1, "Number of jobs of --submit.")
  flags.DEFINE_list(
    "submit_options", [], "NAME=VALUE of submitit, such as slurm_partition=gpu,gpus_per_node=1."
  )
  flags.DEFINE_bool("resume", False, "Finish what is missing of a sweep that was stopped.")
  flags.DEFINE_integer("points_at_once", 0, "Most runs in memory at once; 0 lets memory decide.")
  flags.DEFINE_bool("dry_run", False, "Print the points, the programs and the ε; train nothing.")


def _listed(path: str | None) -> list[grid.Point]:
  if path is None:
    return []
  require(pathlib.Path(path).is_file(), f"--sweep={path} is not a file", "give a .py file")
  try:
    get_sweep = runpy.run_path(path, run_name="sweep").get("get_sweep")
    if get_sweep is None:
      raise UserError(f"{path} has no get_sweep(); define it, it returns the points")
    found = get_sweep()
  except UserError:
    raise
  except Exception as error:
    raise UserError(f"{path}: {type(error).__name__}: {error}; correct the sweep file") from error
  right = isinstance(found, list) and all(isinstance(point, dict) and point for point in found)
  require(
    right and len({tuple(point) for point in found}) == 1,
    f"get_sweep() of {path} must return a list of dictionaries with the same fields",
    'return [{"seed": 0}, {"seed": 1}] for example',
  )
  return found


def _shard(text: str) -> tuple[int, int]:
  index, slash, number = text.partition("/")
  require(
    bool(slash) and index.isdigit() and number.isdigit() and int(index) < int(number),
    f"--shard={text} is not I/N with 0 ≤ I < N",
    "use 0/4 to 3/4 for four processes",
  )
  return int(index), int(number)


def _command(base: Config, config: Config) -> str:
  """The command that runs one point by itself."""
  flag = flags.FLAGS["config"]
  given = config_flags.get_override_values(flag)
  changed = {
    name: get_field(config, name)
    for name in declared()
    if get_field(config, name) != get_field(base, name)
  }
  fields = [f"--config.{name}={value}" for name, value in {**given, **changed}.items()]
  start = ["python", "-m", "fedjax_med.train", f"--config={config_flags.get_config_filename(flag)}"]
  return command_line([*start, "--workdir=DIR", *fields])


def _points(base: Config) -> list[grid.Point]:
  """The points that the command line spans; UserError for flags that contradict or do nothing."""
  values = flags.FLAGS
  require(
    bool(values.workdir) or values.dry_run,
    "--workdir is missing",
    "name the folder for results, such as --workdir=runs/sweep",
  )
  require_company("random_seed", bool(values.random), "--random")
  for name in ("shards", "submit_options"):
    require_company(name, bool(values.submit), "--submit")
  if values.submit:
    require(
      not values["shard"].present,
      f"--shard={values.shard} with --submit, whose jobs are the shards",
      "give their number as --shards, or leave out --submit",
    )
    require_choice("--submit", values.submit, ("slurm", "local"))
  points = grid.points(
    base,
    list(declared()),
    grid=values.grid,
    together=values.zip,
    random=values.random,
    trials=values.trials,
    random_seed=values.random_seed,
    listed=_listed(values.sweep),
  )
  require_company("seed_axes", "seed" in points[0], "an axis named seed")
  return points


def main(_: list[str]) -> None:
  base, values = load_config(whole=False), flags.FLAGS  # the points are checked
  index, number = _shard(values.shard)
  points = _points(base)

  from fedjax_med.run.compilation_cache import use_compilation_cache  # jax takes seconds to import
  from fedjax_med.simulation.mesh import split_cpu
  from fedjax_med.sweep import opening, progress
  from fedjax_med.sweep.points import groups, plan_points

  command = command_line(["python", "-m", "fedjax_med.sweep", *sys.argv[1:]])
  sweep = opening.check(base, points, values.seed_axes, command, inherited())
  numbers = range(index, len(points), number)
  require(
    bool(numbers), f"--shard={values.shard} has none of {len(points)} points", "use fewer shards"
  )
  split_cpu(base.execution.devices)
  use_compilation_cache(base.execution.compilation_cache)
  console = progress.make_console()
  if values.dry_run:
    planned = plan_points(points, sweep.configs, numbers)
    progress.describe_data(console, planned)
    progress.describe(console, groups(planned))
    return
  workdir = pathlib.Path(values.workdir).expanduser()
  with opening.hold(console, workdir, sweep, noise_key(), (index, number)) as secret:
    if not values.submit:
      _run(console, workdir, sweep, numbers, secret)
  if values.submit:
    _submit(workdir, min(values.shards, len(points)))


def _submit(workdir: pathlib.Path, shards: int) -> None:
  """Submits the jobs, which lock the folder themselves; with local it waits and merges."""
  from fedjax_med.sweep import merge, submit

  values = flags.FLAGS
  submit.submit(values.submit, shards, sys.argv[1:], workdir, values.submit_options)
  if values.submit == "local":
    merge.join(workdir, [])


def _run(
  console: Console, workdir: pathlib.Path, sweep: "Sweep", numbers: Sequence[int], secret: bytes
) -> None:
  """Runs the points ``numbers`` that have not ended, and writes the table if they are all."""
  from fedjax_med.sweep import progress, table
  from fedjax_med.sweep.missing import Selection, run_missing

  values, started, points = flags.FLAGS, time.monotonic(), sweep.points
  finished = {k for k in numbers if table.done(workdir, k)}
  require(
    not finished or values.resume,
    f"--workdir={workdir} has {len(finished)} finished points of this sweep",
    "add --resume to finish what is missing, or use another --workdir",
  )
  run_missing(
    console,
    workdir,
    Selection(points=points, configs=sweep.configs, numbers=numbers),
    name=pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem,
    command_of=lambda each: _command(sweep.base, sweep.configs[each.key.number]),
    secret=secret,
    at_once=values.points_at_once,
  )
  seconds = f"{time.monotonic() - started:.1f} s"
  # Of several shards that end at the same time the last could write less than is there.
  if len(numbers) < len(points):
    merge = command_line(["python", "-m", "fedjax_med.sweep", "merge", f"--workdir={workdir}"])
    ended = f"{len(numbers)} points of shard {values.shard}, {seconds}; {merge}"
    console.print(escape(ended), soft_wrap=True)
    return
  frame = table.write(workdir)
  progress.results(console, frame, points)
  there = f"{frame['point'].nunique()} points, {seconds}"
  results = progress.shown_path(workdir / table.RESULTS)
  console.print(f"Results: {results}   ({there})", soft_wrap=True)


if __name__ == "__main__":
  if sys.argv[1:2] == ["merge"]:
    from fedjax_med.sweep import merge

    merge.define()
    define_network()
    run_main(merge.main)
  else:
    _define()
    run_main(main)
