"""Shards of a sweep as jobs of a scheduler, by submitit."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import command_line, visible

# Flags of the sweep that its jobs do not get, or get otherwise.
OWN = ("submit", "submit_options", "shards", "shard", "resume", "noresume")


def submit(
  cluster: str,
  shards: int,
  arguments: Sequence[str],
  workdir: pathlib.Path,
  options: Sequence[str],
) -> None:
  """Submits ``shards`` jobs, each of which runs its share of the sweep; logs lie in the workdir.

  Jobs have --resume, so that a requeued one goes on. With local it waits for all of them and
  raises their errors.

  Args:
    cluster: slurm, or local for processes of this machine.
    shards: number of jobs.
    arguments: of the sweep, after the program's name.
    workdir: of the sweep.
    options: NAME=VALUE parameters of submitit's AutoExecutor, such as slurm_partition=gpu.

  Raises:
    UserError: submitit is not installed, or an option is none of its.
  """
  try:
    import submitit
    from submitit.core.utils import FailedJobError
  except ImportError as error:
    raise UserError(
      "--submit needs the package submitit; run python -m pip install -e '.[submit]'"
    ) from error
  require(shards >= 1, f"--shards={shards} is under 1", "give the number of jobs")
  executor = submitit.AutoExecutor(folder=workdir / "submitit", cluster=cluster)
  given = {name: _value(value) for name, _, value in (text.partition("=") for text in options)}
  try:
    executor.update_parameters(**{"timeout_min": 24 * 60, **given})
  except (NameError, TypeError) as error:
    sentence = " ".join(str(error).split())
    raise UserError(f"--submit_options: {sentence}; see submitit's AutoExecutor") from error
  kept = _without_own(arguments)
  jobs = []
  with executor.batch():
    for index in range(shards):
      command = [sys.executable, "-m", "fedjax_med.sweep", *kept, "--resume"]
      function = submitit.helpers.CommandFunction([*command, f"--shard={index}/{shards}"])
      jobs.append(executor.submit(function))
  logs = visible(str(workdir / "submitit"))
  print("jobs " + ", ".join(job.job_id for job in jobs) + f"; logs in {logs}")
  if cluster == "local":
    try:
      for job in jobs:
        job.result()
    except FailedJobError as error:
      logs = sorted(str(path) for path in (workdir / "submitit").glob("*_log.err"))
      raise UserError(
        f"a job failed; {', '.join(logs)} say why, and what they ask for is to be put right"
      ) from error
  else:
    merge = command_line(["python", "-m", "fedjax_med.sweep", "merge", f"--workdir={workdir}"])
    print(f"when they have ended: {merge}")


def _without_own(arguments: Sequence[str]) -> list[str]:
  """The arguments but for the flags of OWN, written --name=value or --name value."""
  kept, skip = [], False
  for text in arguments:
    name, equals, _ = text.lstrip("-").partition("=")
    is_own = text.startswith("-") and name in OWN
    if not (is_own or (skip and not text.startswith("-"))):
      kept.append(text)
    skip = is_own and not equals and name not in ("resume", "noresume")
  return kept


def _value(text: str) -> Any:
  return int(text) if text.isdigit() else text
