"""The memory of a device: its budget, and the estimated and the compiled size of a program."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.keys import base_key
from fedjax_med.federated.algorithm import Client, Hyper, Pool, Units
from fedjax_med.models.model import Model
from fedjax_med.prepare.layout import Choice
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.simulation.processes import least


class Budget(NamedTuple):
  """Memory that a plan may use on each device, bytes (None: unknown), and where that is from."""

  size: float | None
  reason: str


def memory_budget(gib: float) -> Budget:
  """The budget of ``execution.memory_gib``; the least of all processes, which must plan alike."""
  if gib:
    return Budget(gib * 2**30, "as configured")
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    free = free_memory()
    size, reason = (free and free / 2), "half of the free memory"
  else:
    limit = (device.memory_stats() or {}).get("bytes_limit")
    size, reason = (limit and 0.8 * limit), "80% of the device's memory"
  if jax.process_count() > 1:
    size = least(size or np.inf)
    size = size if np.isfinite(size) else None
  return Budget(size, reason) if size else Budget(None, "unknown on this machine")


def free_memory() -> float | None:
  """Bytes that a process can still get, inside the limit of its container; None if unknown."""
  known = []
  try:
    lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    known += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
  except (OSError, ValueError, IndexError):
    pass
  try:
    group = pathlib.Path("/sys/fs/cgroup")
    limit, used = (
      (group / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current")
    )
    known.append(int(limit) - int(used))
  except (OSError, ValueError):  # no limit reads "max"
    pass
  return float(max(0, min(known))) if known else None


def shared_devices(devices: int) -> int:
  """How many of ``devices`` divide one memory: those of a CPU, in each process."""
  return max(1, devices // jax.process_count()) if jax.default_backend() == "cpu" else 1


class Footprint(NamedTuple):
  """Sizes of a model, and whether its batch may be cut.

  Attributes:
    parameters: trained numbers.
    activations: bytes of the values of one example in a forward pass, before fusion.
    whole_batch: whether a microbatch changes results: state that training moves, dropout draws.
  """

  parameters: int
  activations: int
  whole_batch: bool


def footprint(model: Model, image: jax.ShapeDtypeStruct) -> Footprint:
  """Traces one training pass of ``image`` [1, H, W, C]; nothing is compiled."""
  key = jax.eval_shape(lambda: base_key(0))
  params, state = jax.eval_shape(model.init, key, image)

  def apply(key, state, params, image):
    return model.apply(params, state, image, key=key, train=True)

  program = jax.make_jaxpr(apply)(key, state, params, image).jaxpr
  number = len(jax.tree.leaves(state))
  moved = [
    before is not after
    for before, after in zip(program.invars[1 : 1 + number], program.outvars[1:], strict=True)
  ]
  draws = any(var is program.invars[0] for eqn in program.eqns for var in eqn.invars)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
  return Footprint(parameters, _values(program), draws or any(moved))


def _values(program: Any) -> int:
  """Bytes that operations which compute something write; views and copies of weights are not."""
  moves = ("squeeze", "reshape", "slice", "transpose", "broadcast_in_dim", "convert_element_type")
  total = 0
  for eqn in program.eqns:
    programs = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
    inner = [program for program in programs if hasattr(program, "eqns")]
    if inner:
      total += eqn.params.get("length", 1) * sum(map(_values, inner))
    elif eqn.primitive.name not in moves:
      total += sum(var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars)
  return total


def rough_bytes(
  choice: Choice, model: Footprint, num_clients: int, data: int, kept: int = 0
) -> float:
  """Upper estimate from shapes of what a device needs in a round, bytes.

  Args:
    choice: the layout.
    model: its sizes.
    num_clients: K.
    data: bytes of the pool and the index rows.
    kept: bytes of what a client keeps between rounds.
  """
  weights = 4 * model.parameters
  copies = 7  # local weights, gradient, noise and its sum, up to two moments, delta
  if choice.clipping == "reference":
    copies += 2 * choice.microbatch
  # Every value of the forward pass twice: fused kernels keep a fraction of them, which leaves room
  # for cotangents and for the records that clipping keeps.
  examples = 2 * choice.microbatch * model.activations
  # What is kept is there before and after the round, and twice more where a client trains.
  at_rest = data + 4 * weights + num_clients * (1024 + 2 * kept)
  return at_rest + choice.chunk * (copies * weights + examples + 2 * kept)


def hyper_shapes(options: Iterable[str], client_level: bool) -> Hyper:
  """Shapes of the traced hyperparameters.

  Args:
    options: names of the algorithm's traced options.
    client_level: whether the run protects whole hospitals.
  """
  scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)  # stands in for an array
  level = ClientLevel(**dict.fromkeys(ClientLevel._fields, scalar)) if client_level else None
  groups = {"algorithm": dict.fromkeys(options, scalar), "client_level": level}
  return Hyper(**{**dict.fromkeys(Hyper._fields, scalar), **groups})


def block_arguments(
  initial: Callable[[], Any],
  num_clients: int,
  max_examples: int,
  pool: Any,
  hyper: Hyper,
  max_units: int = 0,
  private: bool = False,
  bands: int = 1,
) -> tuple[Any, ...]:
  """Shapes of what ``block`` is called with; ``pool`` has inputs and labels."""
  shape: Any = jax.ShapeDtypeStruct  # stands in for an array
  number = shape((num_clients,), jnp.int32)
  real = shape((num_clients,), jnp.float32)
  clients = Client(
    number=number,
    indices=shape((num_clients, max_examples), jnp.int32),
    num_examples=number,
    weight=real,
    num_steps=number,
    sampling_probability=real,
    expected_batch_size=real,
    noise_multiplier=real,
  )
  if max_units:
    table = shape((num_clients, max_units), jnp.int32)
    clients = clients._replace(units=Units(starts=table, sizes=table, number=number))
  if private:
    clients = clients._replace(batch_cap=number)
  if bands > 1:
    clients = clients._replace(coefficients=shape((num_clients, bands), jnp.float32))
  data = Pool(*(shape(part.shape, part.dtype) for part in (pool.inputs, pool.labels)))
  key = jax.eval_shape(lambda: base_key(0))
  return jax.eval_shape(initial), clients, data, hyper, key, shape((), jnp.int32)


def block_memory(block: jax.stages.Wrapped, arguments: tuple[Any, ...]) -> dict[str, int] | None:
  """Bytes the compiled block needs on a device, by purpose; None if the backend does not say."""
  try:
    analysis = block.lower(*arguments).compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:  # an accelerator's compiler tries things out
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {"working memory": 2**62}
  if analysis is None:
    return None
  data = sum(leaf.size * leaf.dtype.itemsize for leaf in arguments[2])
  return {
    "data": data,
    "model and server state": analysis.argument_size_in_bytes - data,
    "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    "working memory": analysis.temp_size_in_bytes,
  }
