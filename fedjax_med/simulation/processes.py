"""Processes that share one run: they join, the first one writes, and all must agree."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from fedjax_med.core.errors import UserError, require


def join(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Connects this process to the others of its run; call it before anything else of jax.

  With all three None the cluster numbers the processes (SLURM, Open MPI, TPU pods).

  Raises:
    UserError: only some of the three are given, or nothing can be detected.
  """
  given = (coordinator_address is not None, num_processes is not None, process_id is not None)
  require(
    all(given) or not any(given),
    f"--coordinator_address={coordinator_address}, --num_processes={num_processes} and"
    f" --process_id={process_id} are not all given",
    "give all three, or --distributed alone where SLURM or a TPU pod starts the processes",
  )
  if process_id is not None and num_processes is not None:
    require(
      0 <= process_id < num_processes,
      f"--process_id={process_id} must be at least 0 and under --num_processes={num_processes}",
      "number the processes from 0",
    )
  try:
    jax.distributed.initialize(coordinator_address, num_processes, process_id)
  except (ValueError, RuntimeError) as error:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    raise UserError(
      f"the processes of this run cannot be joined ({reason}); give --coordinator_address=HOST:PORT"
      " and --num_processes, the same everywhere, and --process_id"
    ) from error


def least(value: float) -> float:
  """Smallest value of all processes, so that they plan alike."""
  if jax.process_count() == 1:
    return value
  return float(np.min(multihost_utils.process_allgather(np.float32(value))))


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def require_same_run(run_id: str) -> None:
  """Raises UserError, in every process, unless all prepared the same run from the same data."""
  if jax.process_count() == 1:
    return
  mine = np.frombuffer(run_id.encode(), np.uint8)
  found = np.asarray(multihost_utils.process_allgather(mine))
  ids = [bytes(row).decode() for row in found]
  require(
    len(set(ids)) == 1,
    f"the processes of this run prepared different ones ({', '.join(ids)})",
    "give every process the same flags and the same data",
  )
