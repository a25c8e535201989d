"""A whole run: data, rounds, baselines, and every file that a user gets where there is a folder."""

import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
from rich.console import Console

from fedjax_med.core.config import Config, to_dict
from fedjax_med.core.errors import require
from fedjax_med.data.dataset import Hospitals
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.exchange.ckks import measured, totals
from fedjax_med.folder import writing as files
from fedjax_med.prepare import synthetic_images
from fedjax_med.prepare.case import federation
from fedjax_med.prepare.experiment import Experiment, build
from fedjax_med.prepare.memory import block_memory, shared_devices
from fedjax_med.run import console as terminal
from fedjax_med.run import writer
from fedjax_med.run.baselines import run_baselines
from fedjax_med.run.budget import planned
from fedjax_med.run.drive import Outcome
from fedjax_med.run.measure import LogPoint, evaluated, test_line
from fedjax_med.run.single import start_compiling, train_rounds
from fedjax_med.run.summaries import deployment_of, num_parameters, summary_record
from fedjax_med.run.trackers import require_installed, track
from fedjax_med.simulation.evaluation import EvaluatedModel
from fedjax_med.simulation.processes import is_first, require_same_run
from fedjax_med.tasks.registry import task_named


class RunResult(NamedTuple):
  """A run that has ended, for the caller in the same process.

  Attributes:
    experiment: config, hospitals, mechanisms and compiled functions.
    outcome: final state, reason of the end, and the last log point: metrics of each hospital, and
      ε after all rounds.
    curve: every log point of this process; the first is the start, or where it resumed.
    baselines: outcome of each baseline by its name; {} where none was asked for.
  """

  experiment: Experiment
  outcome: Outcome
  curve: list[LogPoint]
  baselines: dict[str, Outcome]

  def weights(self) -> EvaluatedModel:
    """The weights that were measured last, on the host."""
    return jax.device_get(evaluated(self.experiment.program.parts, self.outcome.state))


class _Start(NamedTuple):
  """Arguments that a run was started with; see ``run``."""

  config: Config
  folder: pathlib.Path | None
  name: str
  command: str
  console: Console

  def tell(self, text: str) -> None:
    """Prints a sentence as it is."""
    self.console.print(text, markup=False)


def dry_run(config: Config, hospitals: Callable[[], Hospitals] | None = None) -> None:
  """Prints config, hospitals, plan, memory estimate and planned ε; trains nothing."""
  data = hospitals() if hospitals else load_hospitals(config)  # its readers may silence stdout
  data = synthetic_images.reserve_synthetic(config, data)
  console = terminal.make_console()
  experiment = build(config, data)
  console.print_json(data=to_dict(experiment.config))  # with what privacy.solve_for found
  terminal.describe(console, experiment, *planned(experiment), num_parameters(experiment))
  program = experiment.program
  devices = shared_devices(program.devices.number)
  memory = block_memory(program.block, program.arguments) or {}
  memory = {name: devices * size for name, size in memory.items()}
  budget = program.budget
  console.print(
    "Memory estimate of the compiled rounds: "
    + (", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in memory.items()) or "unknown")
    + f"; together {sum(memory.values()) / 2**20:,.0f} MiB"
    + (f" on {devices} CPU devices" if devices > 1 else "")
    + " of a budget of "
    + (f"{budget.size / 2**20:,.0f} MiB" if budget.size else "unknown size")
    + f" ({budget.reason})"
  )
  terminal.encryption_estimate(console, experiment)


def run(
  config: Config,
  folder: pathlib.Path | None = None,
  name: str = "",
  command: str = "",
  hospitals: Callable[[], Hospitals] | None = None,
  noise_key: pathlib.Path | None = None,
  write_report: Callable[[Experiment], pathlib.Path] | None = None,
  console: Console | None = None,
) -> RunResult:
  """Trains as configured, or resumes, and leaves every result in ``folder``.

  Args:
    config: validated config.
    folder: the workdir; None writes nothing, and nothing can be resumed.
    name: name of the config for the summary.
    command: the command line, for the report.
    hospitals: waits for data that are being loaded; None loads them.
    noise_key: file with the secret of a private run; None draws one for a new run.
    write_report: called when all other files are written; gives the path of the report.
    console: where progress goes; None is the terminal, ``make_console(quiet=True)`` nowhere.

  Raises:
    UserError: an error that the user can put right, before a finished round is lost. A folder
      that another process works in is refused before the data are waited for.
  """
  begun = time.monotonic()
  start = _Start(
    config=config,
    folder=folder,
    name=name,
    command=command,
    console=console or terminal.make_console(),
  )
  require_installed(config.eval.tracker)
  if folder is None:
    require(
      config.eval.tracker == "none",
      f"eval.tracker={config.eval.tracker} without a workdir: it writes there",
      "give a workdir, or set eval.tracker=none",
    )
    secret = writer.secret_of(config, None, noise_key)
    return _train_in_folder(start, *_build_experiment(start, hospitals, secret), begun)
  files.require_outside(folder, config.data.path)
  files.prepare(folder)
  with writer.hold(folder, start.tell):
    secret = writer.secret_of(config, folder, noise_key)
    result = _train_in_folder(start, *_build_experiment(start, hospitals, secret), begun)
    if write_report is not None and is_first():
      report, seconds = write_report(result.experiment), result.outcome.seconds
      start.console.print(
        f"Report: {terminal.shown_path(report)}   (compile {seconds['compile']:.1f} s, train"
        f" {seconds['train']:.1f} s, all {time.monotonic() - begun:.1f} s)"
      )
  return result


def _build_experiment(
  start: _Start, hospitals: Callable[[], Hospitals] | None, secret: bytes
) -> tuple[Experiment, dict[str, float]]:
  """The experiment, and the seconds that its synthetic images took."""
  config, folder, seconds = start.config, start.folder, {}
  data = hospitals() if hospitals else load_hospitals(config)
  data = synthetic_images.reserve_synthetic(config, data)
  if data.dataset.num_synthetic:
    begun = time.monotonic()
    if folder is None:
      data = synthetic_images.image_keeper()(config, data)
    else:  # GANs take long: a folder of another run is refused before
      files.claim(folder, federation(config, data, secret).run_id)
      data = synthetic_images.completed(config, data, folder, start.console.print)
    seconds["synthetic"] = time.monotonic() - begun
  experiment = build(config, data, secret)
  require_same_run(experiment.run_id)
  if folder is not None:
    files.claim(folder, experiment.run_id)
  return experiment, seconds


def _train_in_folder(
  start: _Start, experiment: Experiment, seconds: dict[str, float], begun: float
) -> RunResult:
  """Trains in a folder that is locked, if there is one; see ``run``."""
  console, folder, config = start.console, start.folder, experiment.config
  compiling = start_compiling(experiment)
  terminal.describe(console, experiment, *planned(experiment), num_parameters(experiment))
  curve: list[LogPoint] = []
  tracker = config.eval.tracker if is_first() else "none"
  task = task_named(experiment.hospitals.dataset.task)
  encrypted_before = len(measured())
  with (
    terminal.progress(console, "federation", config.server.num_rounds, task) as listen,
    track(tracker, folder or pathlib.Path(), experiment.run_id, to_dict(config), task) as record,
  ):

    def log(point: LogPoint) -> None:
      listen(point)
      record(test_line(experiment, point))
      curve.append(point)

    outcome = train_rounds(
      experiment, folder, log, compiling=compiling, command=start.command, tell=start.tell
    )
  seconds |= {**outcome.seconds, "total": time.monotonic() - begun}
  encryption = totals(measured()[encrypted_before:])
  baselines = {}
  if config.eval.local_baselines:
    baselines = run_baselines(experiment, folder, start.name, start.command, console)
  if folder is not None:
    summary = summary_record(experiment, outcome, start.name)
    federation = experiment.case if baselines else None
    deployment = deployment_of(experiment, outcome, encryption)
    times = {**seconds, **({"encryption": encryption} if encryption else {})}
    writer.finish(folder, summary, times, federation, deployment)
  terminal.results(console, experiment, outcome)
  terminal.encryption(console, encryption)
  return RunResult(experiment=experiment, outcome=outcome, curve=curve, baselines=baselines)
