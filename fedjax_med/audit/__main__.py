"""Attacks a run's privacy mechanism as it is executed, and prints lower bounds on its ε.

Example: python -m fedjax_med.audit --config=configs/quickstart.py --workdir=runs/quickstart
"""

import contextlib
import json
import pathlib
import sys
from typing import Any

from absl import flags

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.flags import define_config, define_noise_key, load_config, noise_key, run_main
from fedjax_med.privacy.statement import no_power

define_config()
define_noise_key()
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


def main(_: list[str]) -> None:
  config = load_config()
  require(
    config.privacy.mechanism != "none" or config.client_privacy.mechanism != "none",
    "privacy.mechanism='none' and client_privacy.mechanism='none' leave nothing to audit",
    "give a config with privacy.mechanism=dp_sgd",
  )
  require(_TRIALS.value >= 1000, f"--trials={_TRIALS.value} is under 1000", "use 40000")
  require(0 <= _SEED.value < 2**31, f"--audit_seed={_SEED.value} must be in [0, 2^31)", "use 0")
  from fedjax_med.folder import lock

  folder = pathlib.Path(flags.FLAGS.workdir).expanduser() if flags.FLAGS.workdir else None
  with contextlib.ExitStack() as stack:
    if folder is not None:
      require(
        folder.is_dir(),
        f"--workdir={folder} is not a folder",
        "give the --workdir of a run that was trained, or none",
      )
      stack.enter_context(lock.hold(folder, _tell))
    result = _audit(config, folder)
  if _JSON.value:
    print(json.dumps(result))
  else:
    _show(result)
  if not result["passed"]:
    sys.exit(1)


def _audit(config: Config, folder: pathlib.Path | None) -> dict[str, Any]:
  """Builds the run and attacks it; writes the result to ``folder`` too, if there is one."""
  from fedjax_med.audit import shadow_models, verdict
  from fedjax_med.folder import reading
  from fedjax_med.folder import secret as secrets
  from fedjax_med.prepare.experiment import build
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.simulation.mesh import split_cpu

  split_cpu(config.execution.devices)
  use_compilation_cache(config.execution.compilation_cache)
  hospitals = load_hospitals(config)
  secret = None if noise_key() is None else secrets.read(pathlib.Path(str(noise_key())))
  if folder is not None:
    secret = secrets.folder_secret(folder, noise_key(), begun=True)
  experiment = build(config, hospitals, secret)
  if folder is not None:
    reading.require_run(folder, experiment.run_id)
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
