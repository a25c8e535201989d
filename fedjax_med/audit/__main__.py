"""Attacks a run's privacy mechanism as it is executed, and prints lower bounds on its ε.

With --attack=inversion it shows instead what one update tells without such a mechanism: records of
the first hospital are made again from its first step of SGD, as it is, compressed, summed with
those of the other hospitals, and under DP-SGD.

Examples:
  python -m fedjax_med.audit --config=configs/quickstart.py --workdir=runs/quickstart
  python -m fedjax_med.audit --config=configs/quickstart.py --config.model.name=cnn_small \
    --attack=inversion --out=inversion
"""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require, require_choice
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.flags import (
  define_config,
  define_noise_key,
  load_config,
  noise_key,
  require_company,
  run_main,
)
from fedjax_med.privacy.statement import no_power

if TYPE_CHECKING:
  from fedjax_med.data.dataset import Hospitals
  from fedjax_med.prepare.experiment import Experiment

define_config()
define_noise_key()
_ATTACK = flags.DEFINE_string(
  "attack",
  "planted",
  "planted (records whose gradients are known, to bound ε), or inversion (records made again from a"
  " hospital's first update).",
)
_TRIALS = flags.DEFINE_integer(
  "trials", 40_000, "Runs of each hospital at most; a tenth as many more have a planted record."
)
_SHADOWS = flags.DEFINE_integer(
  "shadow_runs", 0, "Also train this many models on halves of the data and tell members by them."
)
_SEED = flags.DEFINE_integer("audit_seed", 0, "Seed of the audit's own draws.")
_JSON = flags.DEFINE_bool(
  "json", False, "Print the result as one JSON object; progress goes to stderr anyway."
)
_RECORDS = flags.DEFINE_integer(
  "records", 8, "Inversion: training records of the first hospital that are attacked."
)
_BATCHES = flags.DEFINE_list(
  "batch_sizes", ["1", "2", "4", "8"], "Inversion: records of an unprotected step, several sizes."
)
_STEPS = flags.DEFINE_integer(
  "steps",
  1500,
  "Inversion: steps of the search for pictures; 0 leaves it out. linear and mlp need none.",
)
_RESTARTS = flags.DEFINE_integer(
  "restarts", 4, "Inversion: searches from random pictures, of which the best counts."
)
_OUT = flags.DEFINE_string(
  "out", "", "Inversion: folder of inversion.json and inversion.png; empty is the --workdir."
)
_SHOW = flags.DEFINE_bool(
  "show_patients",
  False,
  "Inversion: draw reconstructed pictures of patients; the figure is then not for release.",
)
_OF_PLANTED = ("trials", "shadow_runs")
_OF_INVERSION = ("records", "batch_sizes", "steps", "restarts", "out", "show_patients")


def main(_: list[str]) -> None:
  require_choice("--attack", _ATTACK.value, ("planted", "inversion"))
  for name in (*_OF_PLANTED, *_OF_INVERSION):
    attack = "planted" if name in _OF_PLANTED else "inversion"
    require_company(name, _ATTACK.value == attack, f"--attack={attack}")
  config = load_config()
  require(0 <= _SEED.value < 2**31, f"--audit_seed={_SEED.value} must be in [0, 2^31)", "use 0")
  if _ATTACK.value == "inversion":
    _invert(config)
    return
  require(
    config.privacy.mechanism != "none" or config.client_privacy.mechanism != "none",
    "privacy.mechanism='none' and client_privacy.mechanism='none' leave nothing to audit",
    "give a config with privacy.mechanism=dp_sgd",
  )
  require(_TRIALS.value >= 1000, f"--trials={_TRIALS.value} is under 1000", "use 40000")
  with _workdir() as folder:
    result = _audit(config, folder)
  if _JSON.value:
    print(json.dumps(result))
  else:
    _show(result)
  if not result["passed"]:
    sys.exit(1)


@contextlib.contextmanager
def _workdir() -> Iterator[pathlib.Path | None]:
  """The --workdir, locked; None without one."""
  from fedjax_med.folder import lock

  folder = pathlib.Path(flags.FLAGS.workdir).expanduser() if flags.FLAGS.workdir else None
  if folder is None:
    yield None
    return
  require(
    folder.is_dir(),
    f"--workdir={folder} is not a folder",
    "give the --workdir of a run that was trained, or none",
  )
  with lock.hold(folder, _tell):
    yield folder


def _built(config: Config, folder: pathlib.Path | None, hospitals: "Hospitals") -> "Experiment":
  """The run of the config; UserError if ``folder`` is that of another one."""
  from fedjax_med.folder import reading
  from fedjax_med.folder import secret as secrets
  from fedjax_med.prepare.experiment import build
  from fedjax_med.run.compilation_cache import use_compilation_cache

  use_compilation_cache(config.execution.compilation_cache)
  secret = None if noise_key() is None else secrets.read(pathlib.Path(str(noise_key())))
  if folder is not None and secrets.is_private(config):
    secret = secrets.folder_secret(folder, noise_key(), begun=True)
  experiment = build(config, hospitals, secret)
  if folder is not None:
    reading.require_run(folder, experiment.run_id)
  return experiment


def _invert(config: Config) -> None:
  """Inverts first updates; prints a table, and writes numbers and figure to a folder."""
  from fedjax_med.audit import inversion, inversion_output
  from fedjax_med.audit.gradient_inversion import Search
  from fedjax_med.models.registry import ROWS
  from fedjax_med.simulation.mesh import split_cpu

  exact = config.model.name in ROWS
  search = Search(steps=_STEPS.value, restarts=_RESTARTS.value)
  for name, given in (("steps", search.steps), ("restarts", search.restarts)):
    require_company(name, not exact, "a network whose inputs are searched for (not linear, mlp)")
    least = int(name == "restarts")
    require(given >= least, f"--{name}={given} is under {least}", "use 4, or 1500 steps")
  settings = inversion.Settings(
    records=_RECORDS.value,
    batches=_sizes(_BATCHES.value),
    search=search,
    seed=_SEED.value,
  )
  split_cpu(1)
  hospitals = load_hospitals(config)
  inversion.require_attackable(config, hospitals, settings)
  shown = inversion_output.may_show(config, hospitals, _SHOW.value)
  with _workdir() as workdir:
    folder = pathlib.Path(_OUT.value).expanduser() if _OUT.value else workdir
    require(
      folder is not None or not _SHOW.value,
      "--show_patients draws a figure, and there is no folder for it",
      "add --out=FOLDER, or leave out --show_patients",
    )
    found = inversion.invert(_built(config, workdir, hospitals), settings, _tell)
    if folder is not None:
      inversion_output.write(folder, found, shown)
  if _JSON.value:
    print(json.dumps(found.result))
  else:
    inversion_output.show(found.result)
    if folder is not None and not shown:
      print(inversion_output.NOT_DRAWN)


def _sizes(texts: Sequence[str]) -> tuple[int, ...]:
  """Batch sizes of a list of texts; UserError for one that is no whole number."""
  require(
    all(text.strip().isdecimal() for text in texts),
    f"--batch_sizes={','.join(texts)} must be whole numbers",
    "use 1,2,4,8",
  )
  return tuple(sorted({int(text) for text in texts}))


def _audit(config: Config, folder: pathlib.Path | None) -> dict[str, Any]:
  """Builds the run and attacks it; writes the result to ``folder`` too, if there is one."""
  from fedjax_med.audit import shadow_models, verdict
  from fedjax_med.simulation.mesh import split_cpu

  split_cpu(config.execution.devices)
  hospitals = load_hospitals(config)
  experiment = _built(config, folder, hospitals)
  halves = None
  if _SHADOWS.value:
    halves = shadow_models.prepare(config, hospitals, _SHADOWS.value, _SEED.value)
  result = verdict.audit_run(experiment, _TRIALS.value, _SEED.value, _tell)
  result["membership"] = None
  _keep(folder, result)  # before the shadow runs too: if they fail, the audit is not lost
  if halves is not None:
    _tell(f"Training {_SHADOWS.value} models on halves of the data ...")
    result["membership"] = shadow_models.attack(halves)
    _keep(folder, result)
  return result


def _tell(text: str) -> None:
  """Prints progress to stderr: stdout may be one JSON object."""
  print(text, file=sys.stderr, flush=True)


def _keep(folder: pathlib.Path | None, result: dict[str, Any]) -> None:
  """Writes audit.json, and renews the privacy statement and the report."""
  from fedjax_med.folder.writing import write_json
  from fedjax_med.report import run_page
  from fedjax_med.run import statement

  if folder is not None:
    write_json(folder / "audit.json", result)
    statement.write_statement(folder)
    if (folder / "summary.json").exists():
      run_page.write_report(folder)


def _show(result: dict[str, Any]) -> None:
  for audit in result["audits"]:
    failed = [check for check in audit["checks"] if not check["passed"]]
    if audit["checks"]:
      print(f"{len(audit['checks']) - len(failed)} of {len(audit['checks'])} checks hold")
    for check in failed:
      print(f"  FAILED: {check['name']} (p = {check['p_value']:.1e})")
    print(
      f"Unit {audit['unit']}: {audit['epsilon_lower']:.3f} ≤ ε ≤ {audit['epsilon']:.3f} with"
      f" {100 * result['confidence']:g}% confidence; without noise the audit would have shown"
      f" {audit['epsilon_lower_without_noise']:.3f}"
    )
    if no_power(audit):
      print(no_power(audit))
  member = result["membership"]
  for name in ("loss", "likelihood_ratio") if member else ():
    attack, alarms = member[name], f"{100 * member['false_positive_rate']:g}%"
    print(
      f"Telling members by the {name.replace('_', ' ')}: {100 * attack['tpr']:.2f}% found at"
      f" {alarms} false alarms (chance: {alarms}), balanced accuracy"
      f" {attack['balanced_accuracy']:.3f} (chance: 0.5)"
    )
  powerless = [audit["unit"] for audit in result["audits"] if no_power(audit)]
  if not result["passed"]:
    print("The audit REFUTES THE CLAIM.")
  elif powerless:
    print(
      "The audit does not contradict the claim, but its attack could not have refuted it (unit"
      f" {', '.join(powerless)})."
    )
  else:
    print("The audit agrees with the claim.")


if __name__ == "__main__":
  run_main(main)
