"""Devices of a run: a mesh whose one axis clients are dealt over, and copies on every device."""

import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_med.core.errors import require

CLIENTS = "clients"  # the mesh axis
MAX_CPU_DEVICES = 16  # where nobody said how many: each holds weights and activations of a client

# Whole runs side by side on an accelerator; a core of a CPU is full with one.
RUNS_AT_ONCE = 8


class Devices(NamedTuple):
  """Devices that the clients of a run are dealt over.

  Attributes:
    number: number of devices.
    mesh: one axis of them, or None for a single device, which needs no collectives.
    reason: reason for that number, for people.
  """

  number: int
  mesh: Mesh | None
  reason: str


def cpu_cores() -> int:
  """Cores that this process may use, whole ones of a container's share."""
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # not Linux
    cores = os.cpu_count() or 1
  try:
    quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
    return max(1, min(cores, round(int(quota) / int(period))))
  except (OSError, ValueError):  # no share reads "max"
    return cores


def split_cpu(devices: int) -> None:
  """Lets jax see the CPU as ``devices`` devices, or with 0 as one for each core.

  A client on a core of its own wastes less of it than operations that are cut over all cores. Call
  it before jax runs anything; it leaves XLA_FLAGS and JAX_NUM_CPU_DEVICES as they are.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" in flags or _is_split():
    return
  jax.config.update("jax_num_cpu_devices", devices or min(cpu_cores(), MAX_CPU_DEVICES))


def _is_split() -> bool:
  # -1 where nobody said
  return jax.config.jax_num_cpu_devices > 0  # pyright: ignore[reportAttributeAccessIssue]


def choose_devices(devices: int, cohort: int) -> Devices:
  """Devices for ``execution.devices`` and the clients of a round.

  Raises:
    UserError: more devices than there are, or not all of them where several processes share a run.
  """
  available, processes = jax.device_count(), jax.process_count()
  if processes > 1:
    require(
      devices in (0, available),
      f"execution.devices={devices} leaves out some of the {available} devices of {processes}"
      " processes",
      "use execution.devices=0 where several processes share a run",
    )
    number, reason = available, f"all that {processes} processes see"
  elif devices:
    require(
      devices <= available,
      f"execution.devices={devices} exceeds the {available} devices that jax sees",
      f"use at most {available}, or start with more (a CPU passes for several under"
      f" XLA_FLAGS=--xla_force_host_platform_device_count={devices})",
    )
    number, reason = devices, "as configured"
  elif jax.default_backend() == "cpu":
    # Devices that XLA_FLAGS made up are for tests.
    number = min(available, cohort) if _is_split() else 1
    reason = "clients of a round take a CPU core each" if number > 1 else "one for all CPU cores"
  else:
    number = min(available, cohort)
    reason = f"jax sees {available}, and {cohort} clients at most train in a round"
  return Devices(number=number, mesh=client_mesh(number), reason=f"devices {number}: {reason}")


def client_mesh(number: int) -> Mesh | None:
  """Mesh of the first ``number`` devices, or None for one of a single process."""
  if number == 1 and jax.process_count() == 1:
    return None
  return jax.make_mesh(
    (number,), (CLIENTS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:number]
  )


def map_rows(fn: Callable[[Any], Any], rows: Any, batch_size: int) -> Any:
  """Applies ``fn`` to every row, ``batch_size`` rows side by side."""
  # A batch of one would be a vmap, which costs convolutions dearly.
  return jax.lax.map(fn, rows, batch_size=None if batch_size == 1 else batch_size)


def map_over_devices(one: Callable[[Any, Any], Any], devices: int, at_once: int) -> Callable:
  """Compiles ``several(shared, rows)``: ``one(shared, row)`` of every row, on the host.

  Args:
    one: function of a row: ``rows`` without their leading axis. ``shared`` lies whole on
      every device.
    devices: of this process, that rows are dealt over.
    at_once: rows that a device works on side by side.
  """

  def run(shared, rows):
    return map_rows(lambda row: one(shared, row), rows, at_once)

  if devices > 1:
    whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
    run = jax.shard_map(
      run, mesh=client_mesh(devices), in_specs=(whole, dealt), out_specs=dealt, check_vma=False
    )
  compiled = jax.jit(run)

  def several(shared, rows):
    number = len(jax.tree.leaves(rows)[0])
    filled = np.arange(number + -number % devices) % number  # every device has as many
    results = compiled(shared, jax.tree.map(lambda leaf: leaf[filled], rows))
    return jax.tree.map(lambda leaf: leaf[:number], jax.device_get(results))

  return several


def local_devices() -> int:
  """Devices that independent work may be dealt over: one where several processes share a run."""
  return jax.local_device_count() if jax.process_count() == 1 else 1


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh | None) -> Any:
  """A copy of each array on every device of the mesh, or on the one device there is.

  Every process must pass the same values, which the caller checks.
  """

  def put(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = put(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if mesh is None:
      return jnp.asarray(leaf)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

  return jax.tree.map(put, tree)
