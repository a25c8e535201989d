"""The memory of a device: its budget, and the estimated and the compiled size of a program."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import algorithm_options
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import Dataset
from fedjax_med.exchange.distributed_noise import is_distributed
from fedjax_med.exchange.registry import exchange_numbers
from fedjax_med.federated.algorithm import Client, Hyper, Pool, Units, plain_hyper
from fedjax_med.models.model import Model
from fedjax_med.prepare.plan import Choice
from fedjax_med.prepare.recipe import Recipe
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.privacy.distributed import share_shapes
from fedjax_med.simulation.processes import least
from fedjax_med.simulation.rounds import SimulationState

# All messages of a round: as they came, in order, as vectors, and sorted or forged.
GATHERED_COPIES = 4


class Budget(NamedTuple):
  """Memory that a program may use on each device.

  Attributes:
    size: bytes; None if unknown.
    reason: origin of the number.
  """

  size: float | None
  reason: str


def memory_budget(gib: float) -> Budget:
  """The budget of ``execution.memory_gib``: the least of all processes, which must decide alike."""
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
  """Bytes that a process can still get inside the limit of its container; None if unknown."""
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
  """Number of devices that share one memory: on a CPU all those of a process, else 1."""
  return max(1, devices // jax.process_count()) if jax.default_backend() == "cpu" else 1


class Footprint(NamedTuple):
  """Sizes of a model, and whether its batch may be cut.

  Attributes:
    parameters: number of trained values.
    activations: bytes of the values of one example in a forward pass, before fusion.
    whole_batch: whether a microbatch changes results, since training moves a state or draws
      dropout.
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
  return Footprint(
    parameters=parameters, activations=_values(program), whole_batch=draws or any(moved)
  )


def _values(program: Any) -> int:
  """Bytes that the operations of a program write, without views and copies of weights."""
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
  choice: Choice,
  model: Footprint,
  num_clients: int,
  data: int,
  client_state: int = 0,
  gathered: int = 0,
) -> float:
  """Upper estimate from shapes of the memory of one device in a round, bytes.

  Args:
    choice: the layout.
    model: its sizes.
    num_clients: K.
    data: bytes of the pool and the index rows.
    client_state: bytes of the persistent state of a client.
    gathered: bytes of all messages of a round, of a rule that needs them at once; else 0.
  """
  weights = 4 * model.parameters
  copies = 7  # local weights, gradient, noise and its sum, up to two moments, delta
  if choice.clipping == "reference":
    copies += 2 * choice.microbatch
  # Every value of the forward pass counts twice. Fused kernels store a fraction of them, which
  # leaves room for cotangents and for the factors that clipping stores.
  examples = 2 * choice.microbatch * model.activations
  # A client's state is there before and after the round, and twice more while the client trains.
  at_rest = data + 4 * weights + num_clients * (1024 + 2 * client_state)
  at_rest += GATHERED_COPIES * gathered
  return at_rest + choice.chunk * (copies * weights + examples + 2 * client_state)


class BlockArguments(NamedTuple):
  """Arguments of a block of rounds, or their shapes.

  Attributes:
    state: SimulationState before the block.
    clients: stacked over K clients.
    pool: all examples.
    hyper: traced hyperparameters.
    key: base key of the run.
    rounds: int32 rounds of the block.
  """

  state: SimulationState
  clients: Client
  pool: Pool
  hyper: Hyper
  key: jax.Array
  rounds: jax.Array


def block_arguments(
  recipe: Recipe, dataset: Dataset, initial: Callable[[], SimulationState]
) -> BlockArguments:
  """Shapes of the arguments of a block; ``initial`` makes the state, and is only traced."""
  shape: Any = jax.ShapeDtypeStruct  # stands in for an array
  number, sizes = shape((recipe.num_clients,), jnp.int32), recipe.shapes
  real, scalar = shape((recipe.num_clients,), jnp.float32), shape((), jnp.float32)
  clients = Client(
    number=number,
    indices=shape((recipe.num_clients, sizes.max_examples), jnp.int32),
    num_examples=number,
    weight=real,
    num_steps=number,
    sampling_probability=real,
    expected_batch_size=real,
    noise_multiplier=real,
  )
  if sizes.max_units:
    table = shape((recipe.num_clients, sizes.max_units), jnp.int32)
    clients = clients._replace(units=Units(starts=table, sizes=table, number=number))
  if recipe.private:
    clients = clients._replace(batch_cap=number)
  if recipe.bands > 1:
    clients = clients._replace(coefficients=shape((recipe.num_clients, recipe.bands), jnp.float32))
  if recipe.exchange.deadline:
    clients = clients._replace(late=shape((recipe.num_clients,), bool))
  numbers = exchange_numbers(recipe.config)
  if numbers:
    clients = clients._replace(hostile=shape((recipe.num_clients,), jnp.bool_))
  level, options = None, algorithm_options(recipe.config, traced=True)
  if recipe.client_level:
    level = ClientLevel(
      noise_multiplier=scalar,
      expected_cohort=scalar,
      count_noise=scalar,
      quantile=scalar,
      clip_learning_rate=scalar,
      shares=share_shapes() if is_distributed(recipe.config) else None,
    )
  pool = Pool(inputs=dataset.inputs, labels=recipe.task.targets(dataset))
  return BlockArguments(
    state=jax.eval_shape(initial),
    clients=clients,
    pool=jax.tree.map(lambda leaf: shape(leaf.shape, leaf.dtype), pool),
    hyper=jax.eval_shape(plain_hyper)._replace(
      algorithm=dict.fromkeys(options, scalar),
      client_level=level,
      exchange=dict.fromkeys(numbers, scalar),
    ),
    key=jax.eval_shape(lambda: base_key(0)),
    rounds=shape((), jnp.int32),
  )


def tree_bytes(tree: Any) -> int:
  """Bytes of the arrays of a tree, or of arrays of these shapes."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def block_memory(block: jax.stages.Wrapped, arguments: BlockArguments) -> dict[str, int] | None:
  """Bytes of the compiled block on a device, by purpose; None if the backend does not say."""
  try:
    analysis = block.lower(*arguments).compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:  # an accelerator's compiler tries things out
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return {"working memory": 2**62}
  if analysis is None:
    return None
  data = tree_bytes(arguments.pool)
  return {
    "data": data,
    "model and server state": analysis.argument_size_in_bytes - data,
    "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    "working memory": analysis.temp_size_in_bytes,
  }
