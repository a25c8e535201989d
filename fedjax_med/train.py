"""Trains one model across hospitals, privately if asked; a run that was stopped is resumed.

Example: python -m fedjax_med.train --config=configs/quickstart.py --workdir=runs/first
"""

import concurrent.futures
import functools
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from fedjax_med.core.errors import require
from fedjax_med.core.text import command_line
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.data.sources import source_named
from fedjax_med.flags import define_config, define_noise_key, load_config, noise_key, run_main

define_config()
define_noise_key()
flags.DEFINE_bool(
  "dry_run", False, "Print config, hospitals, plan, memory and the ε to be spent; train nothing."
)
flags.DEFINE_bool(
  "distributed", False, "One of several processes of a run; SLURM or a TPU pod says which."
)
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, without such a cluster.")
flags.DEFINE_integer("num_processes", None, "Processes that share the run.")
flags.DEFINE_integer("process_id", None, "Number of this process, from 0; process 0 writes.")


def _meanwhile(work: Callable[[], Any]) -> Callable[[], Any]:
  """Starts ``work``; the function returned waits for its result, or raises what it raised."""
  outcome = concurrent.futures.Future()

  def run() -> None:
    try:
      outcome.set_result(work())
    except BaseException as error:
      outcome.set_exception(error)

  # A daemon, so that Ctrl-C or an error elsewhere does not wait for it.
  threading.Thread(target=run, daemon=True).start()
  return outcome.result


def main(_: list[str]) -> None:
  config = load_config()
  values = flags.FLAGS
  require(
    bool(values.workdir) or values.dry_run,
    "--workdir is missing",
    "name the folder for results, such as --workdir=runs/first",
  )
  places = (values.coordinator_address, values.num_processes, values.process_id)
  together = values.distributed or any(place is not None for place in places)
  if together:
    from fedjax_med.simulation.processes import join

    join(*places)
  # Without jax, whose imports take as long.
  load: Callable[[], Any] = functools.partial(load_hospitals, config)
  hospitals = _meanwhile(load) if source_named(config.data.source).beside_jax else load
  from fedjax_med.report import reported_run  # after the flags: a typo must not wait for jax
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.run.training import dry_run
  from fedjax_med.simulation.mesh import split_cpu

  if not together:  # processes of one run have a core each, or are told how many devices they have
    split_cpu(config.execution.devices)
  use_compilation_cache(config.execution.compilation_cache)
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
  command = command_line(["python", "-m", "fedjax_med.train", *sys.argv[1:]])
  if values.dry_run:
    dry_run(config, hospitals)
  else:
    reported_run.run(
      config, pathlib.Path(values.workdir).expanduser(), name, command, hospitals, noise_key()
    )


if __name__ == "__main__":
  run_main(main)
