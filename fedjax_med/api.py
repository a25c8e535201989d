"""The public functions: configurations, runs and grids of runs from Python, without a terminal.

They call what ``python -m fedjax_med.train``, ``.sweep`` and ``.report`` call, so equal
configurations give equal results. jax is imported by the functions that need it.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import pathlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedjax_med.core.config import Config, declared, get_field
from fedjax_med.core.errors import UserError, require
from fedjax_med.core.presets import assign, check_values, drop_inherited, read_preset
from fedjax_med.core.validation import validate

if TYPE_CHECKING:
  import pandas as pd

  from fedjax_med.prepare.experiment import Experiment
  from fedjax_med.run.training import RunResult
  from fedjax_med.sweep.grid import Point
  from fedjax_med.tasks.task import Task

Path = str | pathlib.Path
PRESETS = pathlib.Path(__file__).resolve().parents[1] / "configs"
ALL = "all hospitals"  # stands for the test examples of all of them in ``Result.baselines``


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
  """Results of a run, as pandas frames and NumPy arrays.

  >>> config = load_config("smoke", {"model.name": "linear", "server.num_rounds": 2})
  >>> result = simulate(config)
  >>> result
  Result(2 rounds of fedavg at 3 hospitals: auroc ..., ε ...)
  >>> list(result.per_hospital.columns)[:3]
  ['n', 'auroc', 'accuracy']
  >>> result.curve["round"].tolist()
  [0, 2]
  >>> result.weights["params"]["head"]["kernel"].shape
  (256, 2)

  Attributes:
    config: the configuration, with the value that ``privacy.solve_for`` found.
    run_id: fingerprint of the run.
    class_names: in the order of the network's outputs; () of tasks without classes.
    rounds: finished rounds.
    stopped: completed, or budget where the next round would have crossed the ε budget.
    per_hospital: a row a hospital: n test examples, metrics on them, and ε of its records where
      these are protected. A metric that is not defined is nan.
    overall: n and metrics of the test examples of all hospitals together.
    curve: a row a log point: round, metrics of all test examples, and epsilon_max and
      client_epsilon where there is such a promise.
    epsilons: ε of each hospital's records or patients; {} where none protects them.
    epsilon_max: the largest of them, else client_epsilon; None without privacy.
    client_epsilon: ε of whole hospitals; None where none protects them.
    weights: the global model's arrays in nested dictionaries, as Flax calls a network's variables:
      "params", and collections such as "batch_stats" where the network has them. None where some
      layers never leave the hospitals, so that there is no such model.
    hospital_weights: the same of the model that each hospital predicts with, where these differ;
      {} where all use the global one.
    weights_sha256: digest of the arrays that predict, as in summary.json.
    baselines: a row a baseline and a set of test examples, where eval.local_baselines asks for
      them: baseline is alone-1, alone-2, ... or pooled, tested_on a hospital or "all hospitals".
      None without baselines.
    workdir: the folder of the run; None where nothing was written.
  """

  config: Config
  run_id: str
  class_names: tuple[str, ...]
  rounds: int
  stopped: str
  per_hospital: "pd.DataFrame"
  overall: dict[str, float]
  curve: "pd.DataFrame"
  epsilons: dict[str, float]
  epsilon_max: float | None
  client_epsilon: float | None
  weights: dict[str, Any] | None
  hospital_weights: dict[str, dict[str, Any]]
  weights_sha256: str
  baselines: "pd.DataFrame | None"
  workdir: pathlib.Path | None

  def __repr__(self) -> str:
    from fedjax_med.privacy.accounting import round_up

    algorithm, number = self.config.server.algorithm, len(self.per_hospital)
    _, headline, *_ = self.overall
    return (
      f"Result({self.rounds} rounds of {algorithm} at {number} hospitals:"
      f" {headline} {self.overall[headline]:.3f}, ε {round_up(self.epsilon_max)})"
    )


def load_config(preset: Path | Config, overrides: Mapping[str, Any] | None = None) -> Config:
  """The configuration of a preset with some fields changed, checked.

  A setting of the preset that the changes leave without effect falls back to its default, with a
  warning.

  >>> config = load_config("smoke", {"privacy.clip_norm": 0.5, "seed": 3})
  >>> config.privacy.clip_norm, config.seed, config.data.source
  (0.5, 3, 'phantoms')
  >>> load_config(config, {"privacy.clip_nrom": 1.0})
  Traceback (most recent call last):
  ...
  fedjax_med.core.errors.UserError: 'privacy.clip_nrom' is no field of a configuration; did you ...

  Args:
    preset: a Python file whose get_config() returns a Config, the name of one in the configs/ of
      this repository such as ``quickstart``, or a Config, which is copied.
    overrides: values by dotted field.

  Raises:
    UserError: there is no such file or field, or a value breaks a rule.
  """
  original = preset if isinstance(preset, Config) else read_preset(_place_of(preset))
  config, overrides = copy.deepcopy(original), overrides or {}
  check_values(config)
  for path, value in overrides.items():
    assign(config, path, value)
  check_values(config)
  notes = drop_inherited(config, original, overrides, "these overrides")
  validate(config)
  for sentence in notes:
    warnings.warn(sentence, stacklevel=2)
  return config


def _place_of(preset: Path) -> str:
  """The file of a preset that is given by its path, or by its name alone."""
  named = PRESETS / f"{preset}.py"
  path = pathlib.Path(preset).expanduser()
  return str(named if path.name == str(preset) and not path.exists() and named.is_file() else path)


def simulate(
  config: Config,
  workdir: Path | None = None,
  *,
  noise_key: Path | None = None,
  verbose: bool = False,
) -> Result:
  """Trains as configured and measures; with a workdir it resumes, and leaves files and a report.

  >>> result = simulate(load_config("smoke", {"model.name": "linear", "server.num_rounds": 1}))
  >>> sorted(result.epsilons)
  ['hospital 1', 'hospital 2', 'hospital 3']
  >>> f"{result.epsilon_max:.3f}"
  '3.514'

  Args:
    config: the configuration, which stays as it is.
    workdir: folder of the run, for the same files as ``python -m fedjax_med.train --workdir``
      writes; None writes nothing.
    noise_key: file with the secret of a private run (``--noise_key``): the same secret,
      configuration and data give the same noise. None draws one for a new run.
    verbose: whether to print what will run, progress and results.

  Raises:
    UserError: an error that the user can put right, as value, rule and remedy.
  """
  config = _checked(config)
  from fedjax_med.report import reported_run
  from fedjax_med.run import training
  from fedjax_med.run.console import make_console

  _use_machine(config)
  console, key = make_console(quiet=not verbose), _path(noise_key)
  folder = _path(workdir)
  if folder is None:
    return _result(training.run(config, noise_key=key, console=console), None)
  command = f"fedjax_med.simulate(config, {str(folder)!r})"
  ended = reported_run.run(
    config, folder, name="config", command=command, noise_key=key, console=console
  )
  return _result(ended, folder)


def simulate_grid(
  config: Config,
  axes: Mapping[str, Iterable[Any]],
  workdir: Path | None = None,
  *,
  seed_axes: Sequence[str] = ("init", "sampling"),
  noise_key: Path | None = None,
  verbose: bool = False,
) -> "pd.DataFrame":
  """Runs all combinations of some fields' values, those that can as one compiled program.

  >>> base = load_config("smoke", {"model.name": "linear", "server.num_rounds": 1})
  >>> frame = simulate_grid(base, {"privacy.noise_multiplier": [1.0, 2.0]})
  >>> frame.groupby("privacy.noise_multiplier")["epsilon_max"].first().round(2).to_dict()
  {1.0: 3.51, 2.0: 1.34}

  Args:
    config: the configuration that the points change; it stays as it is.
    axes: values by dotted field; the last field turns fastest. ``seed`` goes where ``seed_axes``
      say, and ``privacy.target_epsilon`` of infinity is training without privacy.
    workdir: folder of the sweep, for the same files as ``python -m fedjax_med.sweep`` writes, and
      to go on from; None keeps nothing.
    seed_axes: the seeds that an axis named seed moves: partition, init, sampling.
    noise_key: file with the secret of the private points.
    verbose: whether to print progress.

  Returns:
    A row a point and hospital, as ``fedjax_med.study.load`` gives it; ``study.aggregate`` and
    ``study.compare`` take it.

  Raises:
    UserError: an error that the user can put right, before anything compiles.
  """
  base = copy.deepcopy(config)
  check_values(base)  # the rules are those of the points
  from fedjax_med import study
  from fedjax_med.run.console import make_console
  from fedjax_med.sweep import opening, table
  from fedjax_med.sweep.grid import points
  from fedjax_med.sweep.missing import Selection, run_missing

  values = _as_lists(axes)
  command = f"fedjax_med.simulate_grid(config, {values!r}, WORKDIR)"
  listed = points(base, list(declared()), listed=_crossed(values))
  sweep = opening.check(base, listed, seed_axes, command)
  _use_machine(base)
  console = make_console(quiet=not verbose)

  def command_of(number: int) -> str:
    changes = {
      path: get_field(sweep.configs[number], path)
      for path in declared()
      if get_field(sweep.configs[number], path) != get_field(base, path)
    }
    return f"fedjax_med.simulate(fedjax_med.load_config(config, {changes!r}), WORKDIR)"

  with _folder(workdir) as folder:
    with opening.hold(console, folder, sweep, _path(noise_key)) as secret:
      run_missing(
        console,
        folder,
        Selection(points=sweep.points, configs=sweep.configs, numbers=range(len(sweep.points))),
        name="config",
        command_of=lambda planned: command_of(planned.key.number),
        secret=secret,
      )
      table.write(folder)
    return study.load(folder)


def write_report(workdir: Path | Sequence[Path], out: Path | None = None) -> pathlib.Path:
  """Writes report.html of a run or of a sweep again, or one on several runs; returns its path.

  >>> with tempfile.TemporaryDirectory() as folder:
  ...   config = load_config("smoke", {"model.name": "linear", "server.num_rounds": 1})
  ...   result = simulate(config, folder)
  ...   write_report(folder).name
  'report.html'

  Args:
    workdir: folder of a run or of a sweep, or several folders of runs.
    out: folder for the report on several runs.

  Raises:
    UserError: a folder does not hold what a run or a sweep leaves, or ``out`` is missing, or given
      for one folder.
  """
  several = not isinstance(workdir, str | pathlib.Path)
  folders = [pathlib.Path(folder).expanduser() for folder in (workdir if several else [workdir])]
  require(bool(folders), "workdir is empty", "give the folder of a run or of a sweep")
  require(
    out is None or len(folders) > 1,
    f"out={out} is read with several folders only",
    "leave it out: the report on one is in its folder",
  )
  if len(folders) == 1 and not (folders[0] / "sweep.json").exists():
    from fedjax_med.report import run_page

    return run_page.write_report(folders[0], papers=True)
  from fedjax_med.report import sweep_page

  if len(folders) == 1:
    return sweep_page.write(sweep_page.read_sweep(folders[0]), folders[0])
  target = _path(out)
  if target is None:
    raise UserError("out is missing; name a folder for the report on several runs")
  return sweep_page.write(sweep_page.read_runs(folders), target)


def _path(place: Path | None) -> pathlib.Path | None:
  return None if place is None else pathlib.Path(place).expanduser()


def _checked(config: Config) -> Config:
  """A copy of a configuration, whose fields have the right types and keep the rules."""
  config = copy.deepcopy(config)
  check_values(config)
  validate(config)
  return config


def _use_machine(config: Config) -> None:
  """Configures jax before it runs anything; settings of the caller's process stay."""
  import jax

  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.simulation.mesh import split_cpu

  with contextlib.suppress(RuntimeError):  # jax has run something: it keeps its devices
    split_cpu(config.execution.devices)
  if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
    use_compilation_cache(config.execution.compilation_cache)


@contextlib.contextmanager
def _folder(workdir: Path | None) -> Iterator[pathlib.Path]:
  """The folder of a sweep; without one a folder that is removed afterwards."""
  if workdir is not None:
    yield pathlib.Path(workdir).expanduser()
    return
  with tempfile.TemporaryDirectory(prefix="fedjax_med_") as folder:
    yield pathlib.Path(folder)


def _as_lists(axes: Mapping[str, Iterable[Any]]) -> dict[str, list[Any]]:
  """Axes as lists of Python's own numbers; NumPy's become those."""
  return {
    name: [value.item() if hasattr(value, "item") else value for value in values]
    for name, values in axes.items()
  }


def _crossed(axes: dict[str, list[Any]]) -> "list[Point]":
  """The points of axes; raises UserError where there are none."""
  require(bool(axes), "axes is empty", 'give fields and values such as {"seed": [0, 1]}')
  for name, values in axes.items():
    require(bool(values), f"axis '{name}' has no values", "give a list such as [0.5, 1.0]")
  return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _result(ended: "RunResult", workdir: pathlib.Path | None) -> Result:
  """The public form of a run that has ended."""
  import jax

  from fedjax_med.federated.registry import ALGORITHMS
  from fedjax_med.folder.writing import read_metrics
  from fedjax_med.run.measure import test_line
  from fedjax_med.run.summaries import weights_digest
  from fedjax_med.tasks.registry import task_named

  experiment, last = ended.experiment, ended.outcome.last
  dataset, names = experiment.hospitals.dataset, experiment.hospitals.names
  task = task_named(dataset.task)
  evaluated, parts = ended.weights(), experiment.program.parts
  if workdir is None:
    lines = [test_line(experiment, point) for point in ended.curve]
  else:  # those of processes before this one are there too
    lines = [line for line in read_metrics(workdir) if line["split"] == "test"]
  own: dict[str, dict[str, Any]] = {}
  if parts.personal is not None:
    for k, name in enumerate(names):
      kept = jax.tree.map(lambda leaf, k=k: leaf[k], evaluated.client_states)
      own[name] = _variables(experiment, *parts.personal(evaluated.params, evaluated.state, kept))
  whole = ALGORITHMS[experiment.config.server.algorithm].has_global_model
  return Result(
    config=copy.deepcopy(experiment.config),
    run_id=experiment.run_id,
    class_names=dataset.class_names if task.has_classes else (),
    rounds=last.rounds,
    stopped=ended.outcome.stopped,
    per_hospital=_per_hospital(last.clients, task),
    overall=_row(last.test, task),
    curve=_curve(lines, task),
    epsilons=dict(zip(experiment.names, last.epsilons, strict=False)),
    epsilon_max=max(last.epsilons, default=last.client_epsilon),
    client_epsilon=last.client_epsilon,
    weights=_variables(experiment, evaluated.params, evaluated.state) if whole else None,
    hospital_weights=own,
    weights_sha256=weights_digest(parts, evaluated),
    baselines=_baselines(ended, task) if ended.baselines else None,
    workdir=workdir,
  )


def _row(line: Mapping[str, Any], task: "Task") -> dict[str, Any]:
  """n and the metrics of a line of results; a metric that is not defined is nan."""
  names = [metric.name for metric in task.shown]
  return {"n": line["n"], **{name: _number(line.get(name)) for name in names}}


def _number(value: float | None) -> float:
  return math.nan if value is None else float(value)


def _per_hospital(lines: Sequence[Mapping[str, Any]], task: "Task") -> "pd.DataFrame":
  import pandas as pd

  rows = [_row(line, task) for line in lines]
  if any("epsilon" in line for line in lines):
    rows = [
      {**row, "epsilon": _number(line.get("epsilon"))}
      for row, line in zip(rows, lines, strict=True)
    ]
  return pd.DataFrame(rows, index=pd.Index([line["name"] for line in lines], name="hospital"))


def _curve(lines: Sequence[Mapping[str, Any]], task: "Task") -> "pd.DataFrame":
  import pandas as pd

  promised = [name for name in ("epsilon_max", "client_epsilon") if lines[-1].get(name) is not None]
  names = [*(metric.name for metric in task.shown), *promised]
  rows = [
    {"round": line["round"], **{name: _number(line.get(name)) for name in names}} for line in lines
  ]
  return pd.DataFrame(rows)


def _baselines(ended: "RunResult", task: "Task") -> "pd.DataFrame":
  import pandas as pd

  rows = []
  for name, outcome in ended.baselines.items():
    tested = [(line["name"], line) for line in outcome.last.clients]
    for place, line in [*tested, (ALL, outcome.last.test)]:
      rows.append({"baseline": name, "tested_on": place, **_row(line, task)})
  return pd.DataFrame(rows)


def _variables(experiment: "Experiment", params: Any, state: Any) -> dict[str, Any]:
  """A network's variables as NumPy arrays, unravelled from its two vectors."""
  import jax
  import numpy as np

  params, state = experiment.program.parts.spec.trees(params, state)
  return jax.tree.map(np.array, {"params": params, **state})
