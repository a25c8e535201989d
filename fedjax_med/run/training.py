"""A whole run in a workdir: train or resume, baselines, and every file a user gets."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from fedjax_med.core.config import Config, to_dict
from fedjax_med.core.errors import UserError, require
from fedjax_med.data.dataset import Hospitals
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder import lock
from fedjax_med.folder import secret as secrets
from fedjax_med.folder import writing as files
from fedjax_med.prepare import synthetic_images
from fedjax_med.prepare.case import federation
from fedjax_med.prepare.experiment import Experiment, build
from fedjax_med.prepare.memory import block_memory, shared_devices
from fedjax_med.run import console as terminal
from fedjax_med.run.baselines import run_baselines
from fedjax_med.run.loop import (
  LogPoint,
  planned_rounds,
  spent,
  start_compiling,
  test_line,
  train_rounds,
)
from fedjax_med.run.statement import write_statement
from fedjax_med.run.summaries import config_record, num_parameters, summary_record, write_hospitals
from fedjax_med.run.trackers import require_installed, track
from fedjax_med.simulation.processes import is_first, least, require_same_run
from fedjax_med.tasks.registry import task_named


def planned(experiment: Experiment) -> tuple[int, tuple[float, ...], float | None]:
  """Rounds that the budgets allow, and after them each hospital's ε and that of whole hospitals."""
  rounds = planned_rounds(experiment)
  return rounds, *spent(experiment, rounds, experiment.steps * rounds)


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


def run(
  config: Config,
  folder: pathlib.Path,
  name: str,
  command: str,
  hospitals: Callable[[], Hospitals] | None = None,
  noise_key: pathlib.Path | None = None,
  write_report: Callable[[Experiment], pathlib.Path] | None = None,
) -> None:
  """Trains as configured, or resumes, and leaves every result in ``folder``.

  Args:
    config: validated config.
    folder: the workdir.
    name: name of the config for the summary.
    command: the command line, for the report.
    hospitals: waits for data that are being loaded; None loads them.
    noise_key: file with the secret of a private run; None draws one for a new run.
    write_report: called when all other files are written; gives the path of the report.

  Raises:
    UserError: whatever the user can put right, always before a finished round is lost. A folder
      that another process works in is refused before the data are waited for.
  """
  console = terminal.make_console()
  files.require_outside(folder, config.data.path)
  files.prepare(folder)
  require_installed(config.eval.tracker)
  with _locked(folder, console):
    secret = _secret(config, folder, noise_key)
    _run(config, folder, name, command, hospitals, secret, console, write_report)


@contextlib.contextmanager
def _locked(folder: pathlib.Path, console: Console) -> Iterator[None]:
  """Keeps other runs out of ``folder``; of several processes of one run the first does it."""
  with contextlib.ExitStack() as stack:
    refused = None
    if is_first():
      try:
        stack.enter_context(lock.hold(folder, lambda text: console.print(text, markup=False)))
      except UserError as error:
        refused = error
    if least(float(refused is None)) < 1:  # none waits for one that was refused
      raise refused or UserError(
        f"--workdir={folder} is in use, as the first process of this run says; wait until it is"
        " free, or use another --workdir"
      )
    yield


def _secret(config: Config, folder: pathlib.Path, noise_key: pathlib.Path | None) -> bytes:
  """The secret of a private run, which its folder keeps; of several processes the first makes it.

  b"" without privacy.
  """
  if not secrets.is_private(config):
    require(
      noise_key is None,
      f"--noise_key={noise_key} without privacy: there is no noise",
      "leave it out, or set --config.privacy.mechanism=dp_sgd",
    )
    return b""
  begun = (folder / "config.json").exists() or (folder / "checkpoints").exists()
  first, refused = b"", None
  if is_first():
    try:
      first = secrets.folder_secret(folder, noise_key, begun)
    except UserError as error:
      refused = error
  if least(float(refused is None)) < 1:  # none waits for one that was refused
    raise refused or UserError("the first process of this run was refused; see what it says")
  return first or secrets.read(folder / secrets.FILE)


def _run(
  config: Config,
  folder: pathlib.Path,
  name: str,
  command: str,
  hospitals: Callable[[], Hospitals] | None,
  secret: bytes,
  console: Console,
  write_report: Callable[[Experiment], pathlib.Path] | None,
) -> None:
  """Trains in a folder that is locked; see ``run``."""
  started = time.monotonic()
  seconds: dict[str, float] = {}
  data = synthetic_images.reserve_synthetic(
    config, hospitals() if hospitals else load_hospitals(config)
  )
  if data.dataset.num_synthetic:  # GANs take long: a folder of another run is refused before
    files.claim(folder, federation(config, data, secret).run_id)
    begun = time.monotonic()
    data = synthetic_images.completed(config, data, folder, console.print)
    seconds["synthetic"] = time.monotonic() - begun
  experiment = build(config, data, secret)
  require_same_run(experiment.run_id)
  files.claim(folder, experiment.run_id)
  compiling = start_compiling(experiment)
  terminal.describe(console, experiment, *planned(experiment), num_parameters(experiment))

  def begin() -> None:
    """Replaces what an earlier start has left; a start that is refused leaves it."""
    if is_first():
      for stale in ("summary.json", "report.html", "privacy_statement.md"):
        (folder / stale).unlink(missing_ok=True)
    files.write_json(folder / "config.json", config_record(experiment, command))
    write_hospitals(folder, experiment)

  values, run_id = to_dict(experiment.config), experiment.run_id
  task = task_named(experiment.hospitals.dataset.task)
  with (
    terminal.progress(console, "federation", experiment.config.server.num_rounds, task) as listen,
    track(config.eval.tracker if is_first() else "none", folder, run_id, values, task) as record,
  ):

    def log(point: LogPoint) -> None:
      listen(point)
      record(test_line(experiment, point))

    outcome = train_rounds(experiment, folder, log, compiling, begin)
  seconds |= {**outcome.seconds, "total": time.monotonic() - started}
  files.write_json(folder / "timing.json", {k: round(v, 3) for k, v in seconds.items()})
  files.write_json(folder / "summary.json", summary_record(experiment, outcome, name))
  if config.eval.local_baselines:
    run_baselines(experiment, folder, console)

  if not is_first():
    return
  write_statement(folder)
  terminal.results(console, experiment, outcome)
  if write_report is None:
    return
  report = write_report(experiment)
  console.print(
    f"Report: {terminal.shown_path(report)}   (compile {seconds['compile']:.1f} s, train"
    f" {seconds['train']:.1f} s, all {time.monotonic() - started:.1f} s)"
  )
