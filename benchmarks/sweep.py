"""A sweep as one program against the same runs by themselves, results compared.

``processes_over_sweep``: wall time of one process of ``fedjax_med.train`` for every point, one
after the other, over that of one process of ``fedjax_med.sweep``; the compile cache is warm for
both. ``warm_over_sweep``: in one process, with nothing left to compile or to trace, the rounds of
every point by ``train_rounds`` with one program that all of them share, over the sweep's chunks and
files. ``full_over_sweep``: the same with what ``fedjax_med.train`` does of a run but for baselines.

Example: python -m benchmarks.sweep --json
"""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIGMAS = "0.5,0.7,1,1.4,2,2.8,4,5.6"


def process(module: str, *arguments: str, cache: str) -> float:
  """Seconds of a whole process, which must end with 0."""
  command = [sys.executable, "-m", module, *arguments]
  command.append(f"--config.execution.compilation_cache={cache}")
  environment = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "")}

  def run() -> None:
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)

  return common.seconds(run)


def metrics_of(folder: pathlib.Path) -> dict[str, Any]:
  summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
  return {**summary["test"], "epsilon": summary["epsilon_max"]}


def largest_gap(sweep: list[dict[str, Any]], alone: list[dict[str, Any]]) -> float:
  """Largest difference of a metric or of ε between the two."""
  gaps = [0.0]
  for ours, theirs in zip(sweep, alone, strict=True):
    for key in ours.keys() - {"n"}:
      if (ours[key] is None) != (theirs[key] is None):
        return float("inf")
      gaps.append(abs((ours[key] or 0.0) - (theirs[key] or 0.0)))
  return max(gaps)


class Workshop(NamedTuple):
  """Inputs of the comparison.

  Attributes:
    folder: folder of all workdirs.
    base: the config without a sweep.
    points: points of the sweep.
    configs: the config of each point.
  """

  folder: pathlib.Path
  base: Any
  points: list[dict[str, Any]]
  configs: list[Any]


def time_processes(shop: Workshop, preset: str, axes: Sequence[str]) -> dict[str, Any]:
  """Seconds of one process for the sweep, and of one process for each point; the cache is warm."""
  flags = [f"--config={preset}", "--config.privacy.target_epsilon=0"]
  swept = [*flags, *(f"--grid={axis}" for axis in axes)]
  folder, cache = shop.folder, str(shop.folder / "cache")

  def train(config: Any, *more: str) -> float:
    sigma = f"--config.privacy.noise_multiplier={config.privacy.noise_multiplier}"
    return process("fedjax_med.train", *flags, sigma, *more, cache=cache)

  common.say("fills the compile cache")
  train(shop.configs[0], f"--workdir={folder / 'first'}")
  process("fedjax_med.sweep", *swept, f"--workdir={folder / 'filling'}", cache=cache)
  common.say("one process for the sweep")
  sweep = process("fedjax_med.sweep", *swept, f"--workdir={folder / 'swept'}", cache=cache)
  common.say(f"{len(shop.points)} processes")
  processes = [
    train(config, f"--config.seed={config.seed}", f"--workdir={folder / f'process{number}'}")
    for number, config in enumerate(shop.configs)
  ]
  return {"sweep_process": sweep, "processes": processes}


def time_in_process(shop: Workshop, repeats: int) -> tuple[dict[str, Any], int]:
  """Seconds of the sweep and of the same runs in this process, and the sweep's compilations."""
  from fedjax_med.federated.algorithm import Pool
  from fedjax_med.prepare.experiment import make_experiment, make_shared_program
  from fedjax_med.run import training as runs
  from fedjax_med.run.single import train_rounds
  from fedjax_med.simulation.mesh import replicate
  from fedjax_med.sweep import programs, runner, table
  from fedjax_med.sweep.points import Key, groups, plan_points

  (group,) = groups(plan_points(shop.points, shop.configs, range(len(shop.points))))
  program, shapes = make_shared_program([run.case for run in group])
  mesh, dataset = program.devices.mesh, group[0].case.hospitals.dataset
  pool = Pool(replicate(dataset.inputs, mesh), replicate(dataset.labels, mesh))
  warm = programs.prepare(group, 0)
  turn = iter(range(1000))

  def in_one_program() -> float:
    workdir = shop.folder / f"sweep{next(turn)}"
    table.begin(workdir, shop.base, shop.points, ("init", "sampling"))

    def folder_of(key: Key) -> pathlib.Path:
      return table.folder_of(workdir, *key)

    def run() -> None:
      output = runner.Output(
        folder_of=folder_of, name="", command_of=lambda _: "", listen=lambda _: None
      )
      runner.run_group(warm, set(), output)

    return common.seconds(run)

  def in_turn() -> float:
    workdir = shop.folder / f"warm{next(turn)}"

    def run() -> None:
      for planned in group:
        folder = workdir / str(planned.key.number)
        folder.mkdir(parents=True)
        experiment = make_experiment(planned.case, program, shapes, pool, mesh)
        train_rounds(experiment, folder, compiling=lambda: 0)

    return common.seconds(run)

  def in_full() -> None:
    for number, config in enumerate(shop.configs):
      runs.run(config, shop.folder / f"full{number}", "", "", lambda: group[0].case.hospitals)

  common.say("the same in this process, in turns")
  times = common.alternate({"sweep": in_one_program, "warm": in_turn}, repeats)
  return {**times, "full": common.seconds(in_full)}, warm.compilations()


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("--config", default="configs/smoke.py")
  parser.add_argument("--sigmas", default=SIGMAS)
  parser.add_argument("--seeds", type=int, default=4)
  parser.add_argument("--skip_processes", action="store_true")
  options = parser.parse_args()

  from fedjax_med.core.config import declared
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.sweep import grid, table
  from fedjax_med.sweep.points import configure

  axes = [f"privacy.noise_multiplier={options.sigmas}", f"seed=0:{options.seeds}"]
  base = runpy.run_path(str(ROOT / options.config))["get_config"]()
  base.privacy.target_epsilon = 0.0  # σ is configured
  points = grid.points(base, list(declared()), grid=axes)
  configs = [configure(base, point, ("init", "sampling")) for point in points]
  folder = pathlib.Path(tempfile.mkdtemp(prefix="sweep"))
  shop = Workshop(folder=folder, base=base, points=points, configs=configs)
  use_compilation_cache(str(folder / "cache"))
  times = {} if options.skip_processes else time_processes(shop, options.config, axes)
  alike, compilations = time_in_process(shop, options.repeats)
  times |= alike
  ours = [metrics_of(table.folder_of(folder / "sweep0", k)) for k in range(len(points))]
  result = common.envelope("sweep") | {
    "config": options.config,
    "points": len(points),
    "programs": 1,
    "compilations_per_group": compilations,
    "warm_over_sweep": round(common.ratio(alike["warm"], alike["sweep"]), 3),
    "full_over_sweep": round(times["full"] / sorted(alike["sweep"])[len(alike["sweep"]) // 2], 3),
    "largest_gap": largest_gap(ours, [metrics_of(folder / f"full{k}") for k in range(len(points))]),
  }
  if "processes" in times:
    result["processes_over_sweep"] = round(sum(times["processes"]) / times["sweep_process"], 3)
  common.finish({**result, "seconds": times}, options)


if __name__ == "__main__":
  main()
