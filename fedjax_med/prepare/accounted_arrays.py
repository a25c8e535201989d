"""Comparison of a program's arrays with those of the mechanisms that ε is computed from."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedjax_med.data.dataset import ClientTable
from fedjax_med.federated.algorithm import Client, Hyper
from fedjax_med.prepare.protection import Protection
from fedjax_med.privacy.distributed import DistributedGaussian, make_shares
from fedjax_med.privacy.mechanism import Mechanism

# Field of Client -> what a party's mechanism says of it.
_FIELDS: dict[str, Callable[[Mechanism], Any]] = {
  "sampling_probability": lambda mechanism: mechanism.sampling_probability,
  "expected_batch_size": lambda mechanism: mechanism.expected_batch_size,
  "noise_multiplier": lambda mechanism: mechanism.noise_multiplier,
  "batch_cap": lambda mechanism: mechanism.batch_cap,
}


def differences(
  protection: Protection,
  numbers: np.ndarray,
  rows: ClientTable,
  clients: Client,
  hyper: Hyper,
  start: int = 0,
) -> list[str]:
  """Sentences about every array that differs from its accounted value in float32 (or int32).

  Args:
    protection: the accounted mechanisms.
    numbers: [K] number of each client in random keys; no two are alike.
    rows: examples of each client.
    clients: stacked over K clients.
    hyper: traced hyperparameters.
    start: row of the pool that the images begin at.
  """
  clients, hyper = jax.device_get((clients, hyper))
  found: list[str] = []

  def compare(what: str, held: Any, due: Any) -> None:
    held = np.asarray(held)
    due = np.asarray(due, held.dtype)
    if held.shape != due.shape or not np.array_equal(held, due):
      found.append(f"{what} is {held.tolist()} on the device and {due.tolist()} in the account")

  local, central = protection.local, protection.central
  if local is not None:
    if len(set(np.asarray(clients.number).tolist())) != len(local.names):
      found.append(f"clients share the numbers {np.asarray(clients.number).tolist()}, and noise")
    compare("number", clients.number, numbers)
    compare("num_steps", clients.num_steps, protection.steps)
    held = clients.num_examples if clients.units is None else clients.units.number
    for k, (name, mechanism) in enumerate(zip(local.names, local.mechanisms, strict=True)):
      count = int(rows.counts[k])
      if not np.array_equal(clients.indices[k][:count] - start, rows.indices[k][:count]):
        found.append(f"'{name}' has other images on the device than in the account")
      if (clients.units is None) != (protection.units is None) or not _same_units(
        protection, clients, k
      ):
        found.append(f"'{name}' has other units on the device than in the account")
      compare(f"units of '{name}'", held[k], mechanism.num_units)
      for field, value in _FIELDS.items():
        compare(f"{field} of '{name}'", getattr(clients, field)[k], value(mechanism))
      own = np.ones(1) if clients.coefficients is None else clients.coefficients[k]
      compare(f"coefficients of '{name}'", np.asarray(own, np.float32), mechanism.coefficients)
      compare(f"clip_norm of '{name}'", hyper.clip_norm, mechanism.clip_norm)
  if central is not None:
    (mechanism,), level = central.mechanisms, hyper.client_level
    if level is None:
      return [*found, "the server's noise is not on the device"]
    compare("the server's noise_multiplier", level.noise_multiplier, mechanism.sum_noise_multiplier)
    compare("the server's denominator", level.expected_cohort, mechanism.expected_batch_size)
    compare("the server's count_noise", level.count_noise, mechanism.count_noise)
    due, own = None, level.shares
    if isinstance(mechanism, DistributedGaussian):
      due = jax.device_get(make_shares(mechanism))
    if due is None or own is None:
      if due is not own:
        found.append("the hospitals' own noise is not on the device as in the account")
    else:
      compare("scale of the hospitals' whole numbers", own.scale, due.scale)
      for name, drawn in due.sampler._asdict().items():
        if not np.array_equal(getattr(own.sampler, name), drawn):
          found.append(f"the hospitals' noise has another {name} on the device than accounted for")
    if mechanism.sampling_probability < 1:  # with full participation it is not read
      compare("participation_rate", hyper.participation_rate, mechanism.sampling_probability)
  return found


def larger_updates(protection: Protection, size: int) -> list[str]:
  """A sentence where updates have more numbers than ε counts the rounding of.

  Args:
    protection: the accounted mechanisms.
    size: numbers of an update.
  """
  central = protection.central
  if central is None or not isinstance(central.mechanisms[0], DistributedGaussian):
    return []
  due = central.mechanisms[0].num_parameters
  return [f"updates have {size} numbers and {due} in the account"] if size > due else []


def _same_units(protection: Protection, clients: Client, k: int) -> bool:
  """Whether client k's units begin and end on the device where they do in the account."""
  table, held = protection.units, clients.units
  if table is None or held is None:
    return True
  count = int(table.counts[k])
  pairs = ((held.starts, table.starts), (held.sizes, table.sizes))
  return all(np.array_equal(one[k][:count], other[k][:count]) for one, other in pairs)


def require_accounted(found: list[str]) -> None:
  """Raises RuntimeError where a run would execute another mechanism than ε is computed from.

  Args:
    found: of ``differences``.
  """
  if found:
    raise RuntimeError(
      f"the program would not run what ε is computed from: {'; '.join(found[:4])}. This is a fault"
      " of the program: report it, and publish nothing of this run."
    )
