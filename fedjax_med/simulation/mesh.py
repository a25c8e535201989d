"""Devices of a run: a mesh whose one axis clients are dealt over, and copies on every device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fedjax_med.core.errors import require

CLIENTS = "clients"  # the mesh axis


class Devices(NamedTuple):
  """Devices that the clients of a run are dealt over.

  Attributes:
    number: how many.
    mesh: one axis of them, or None for a single device, which needs no collectives.
    reason: why so many.
  """

  number: int
  mesh: Mesh | None
  reason: str


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
    number, reason = 1, "one CPU device already fills the cores"
  else:
    number = min(available, cohort)
    reason = f"jax sees {available}, and {cohort} clients at most train in a round"
  return Devices(number, client_mesh(number), f"devices {number}: {reason}")


def client_mesh(number: int) -> Mesh | None:
  """Mesh of the first ``number`` devices, or None for one of a single process."""
  if number == 1 and jax.process_count() == 1:
    return None
  return jax.make_mesh(
    (number,), (CLIENTS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:number]
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh | None) -> Any:
  """A copy of each array on every device of the mesh, or on the one device there is.

  Every process must pass the same values; that they do is for the caller to check.
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
