"""The plan of a run on this machine: the memory budget, sizes of programs, what fits."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.keys import base_key
from fedjax_med.experiment.probing import (
  kept_seconds,
  probe_candidates,
  probed_chunk,
  wants_probe,
)
from fedjax_med.experiment.processes import least
from fedjax_med.federated.algorithm import Client, Hyper, Pool, Units
from fedjax_med.models.model import Model
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.privacy.clipping import resolve_method
from fedjax_med.simulation.mesh import cpu_cores
from fedjax_med.simulation.plan import (
  Choice,
  Freedom,
  choose_layout,
  choose_microbatch,
  fit_memory,
)


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


def block_arguments(
  initial: Callable[[], Any],
  num_clients: int,
  max_examples: int,
  pool: Any,
  max_units: int = 0,
  private: bool = False,
  client_level: bool = False,
  bands: int = 1,
) -> tuple[Any, ...]:
  """Shapes of what ``block`` is called with; ``pool`` has inputs and labels."""
  shape: Any = jax.ShapeDtypeStruct  # stands in for an array
  number = shape((num_clients,), jnp.int32)
  real = shape((num_clients,), jnp.float32)
  clients = Client(
    number, shape((num_clients, max_examples), jnp.int32), number, real, number, real, real, real
  )
  if max_units:
    table = shape((num_clients, max_units), jnp.int32)
    clients = clients._replace(units=Units(table, table, number))
  if private:
    clients = clients._replace(batch_cap=number)
  if bands > 1:
    clients = clients._replace(coefficients=shape((num_clients, bands), jnp.float32))
  data = Pool(*(shape(part.shape, part.dtype) for part in (pool.inputs, pool.labels)))
  scalar = shape((), jnp.float32)
  level = ClientLevel(*(scalar for _ in ClientLevel._fields)) if client_level else None
  hyper = Hyper(*(scalar for _ in Hyper._fields[:-1]), client_level=level)
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


class Subject(NamedTuple):
  """What a plan is made for.

  Attributes:
    cohort: most clients that train in a round.
    steps: [K] local steps a round.
    counts: [K] examples of each client, or fewer where they are alike.
    rates: its sampling probability, as many.
    batch: slots of a batch.
    rows_per_unit: images in a slot.
    model: sizes of the model.
    arguments: shapes of what a block is called with.
    may_remat: whether the network has blocks to compute again.
    may_share_less: whether fewer devices may be used than the plan begins with.
    uncovered: (remat, microbatch) -> why each clipping method cannot be trusted, by method.
  """

  cohort: int
  steps: np.ndarray
  counts: np.ndarray
  rates: np.ndarray
  batch: int
  rows_per_unit: int
  model: Footprint
  arguments: tuple[Any, ...]
  may_remat: bool
  may_share_less: bool
  uncovered: Callable[[bool, int], dict[str, tuple[str, ...]]]


def decide(
  config: Config,
  subject: Subject,
  start: Choice,
  budget: Budget,
  block: Callable[[Choice], jax.stages.Wrapped],
  time_chunk: Callable[[Choice], float],
) -> tuple[str, Choice, float, list[str]]:
  """Returns (layout, choice, bytes that a device needs, reasons).

  How gradients are clipped is settled for the rows that each choice has at once. Raises UserError
  where no allowed choice fits the budget, or the method that is asked for does not cover it.

  Args:
    config: validated config.
    subject: what is planned.
    start: devices and remat to begin with.
    budget: memory of a device.
    block: the jitted rounds under a choice.
    time_chunk: seconds of a client-step under a choice.
  """
  execution, private = config.execution, config.privacy.mechanism != "none"
  fixed = config.model.norm == "batch" or subject.model.whole_batch
  num_clients = len(subject.steps)
  data = sum(leaf.size * leaf.dtype.itemsize for leaf in subject.arguments[2])
  data += 4 * subject.arguments[1].indices.size
  kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(subject.arguments[0].kept))

  def method(choice: Choice) -> tuple[str, str]:
    problems = subject.uncovered(choice.remat, choice.microbatch)
    return resolve_method(config.privacy.clipping, problems)

  def settled(choice: Choice) -> Choice:
    return choice._replace(clipping=method(choice)[0]) if private else choice

  def with_chunk(chunk: int) -> tuple[Choice, str]:
    microbatch, reason = choose_microbatch(
      execution.microbatch,
      subject.batch,
      chunk,
      private=private,
      fixed=fixed,
      counts=subject.counts,
      rates=subject.rates,
    )
    return settled(start._replace(chunk=chunk, microbatch=microbatch)), reason

  def needs(choice: Choice) -> float:
    return rough_bytes(choice, subject.model, num_clients, data, kept // num_clients)

  def estimate(choice: Choice) -> float:
    return shared_devices(choice.devices) * needs(choice)

  def measure(choice: Choice) -> float | None:
    parts = block_memory(block(choice), subject.arguments)
    return None if parts is None else float(shared_devices(choice.devices) * sum(parts.values()))

  devices = start.devices
  share = -(-subject.cohort // devices)
  layout, chunk, layout_reason = choose_layout(
    execution.layout, execution.chunk_size, subject.cohort, devices=devices, steps=subject.steps
  )
  backend = jax.default_backend()
  if wants_probe(config, subject.steps, subject.model.parameters, backend):
    room = budget.size or np.inf
    chunks = [
      c for c in probe_candidates(share, chunk) if c == 1 or estimate(with_chunk(c)[0]) <= room
    ]
    candidates = [with_chunk(c)[0] for c in chunks]
    about = {
      "image": list(subject.arguments[2].inputs.shape[1:]),
      "batch": [config.client.batch_size, subject.batch],
      "microbatches": [each.microbatch for each in candidates],
      "remat": start.remat,
      "clipping": [each.clipping for each in candidates],
      "optimizer": config.client.optimizer,
      "lowering": execution.lowering,
      "devices": devices,
      "cores": cpu_cores(),
      "rows": subject.rows_per_unit,
      "examples": [int(np.median(subject.counts)), subject.arguments[1].indices.shape[1]],
      "cohort": subject.cohort,
      "bands": config.privacy.bands,
    }
    seconds = kept_seconds(config, about, lambda c: time_chunk(with_chunk(c)[0]), chunks)
    chunk, why = probed_chunk(seconds, subject.steps, devices)
    layout_reason = f"layout {_layout(chunk, share)}, {why}"
  preferred, microbatch_reason = with_chunk(chunk)
  choice = preferred
  if budget.size is not None and estimate(preferred) >= budget.size / 2:
    remat = execution.remat == "auto" and subject.may_remat
    if remat and private and preferred.clipping != "reference":
      remat = not subject.uncovered(True, preferred.microbatch)[preferred.clipping]
    free = Freedom(
      devices=subject.may_share_less and execution.layout in ("auto", "scan"),
      chunk=execution.layout == "auto",
      microbatch=execution.microbatch == 0 and not fixed,
      remat=remat,
    )
    choice = fit_memory(preferred, free, budget.size, estimate, measure, settled)
  share = -(-subject.cohort // choice.devices)
  if choice.chunk != chunk:
    name = _layout(choice.chunk, share)
    layout_reason = f"layout {name}, {choice.chunk} clients at once: {chunk} exceed the memory"
  if choice.microbatch != preferred.microbatch:
    microbatch_reason = f"microbatch {choice.microbatch} of {subject.batch} slots: to save memory"
  layout = _layout(choice.chunk, share) if execution.layout == "auto" else execution.layout
  remat_reason = "as configured" if execution.remat != "auto" else "to save memory"
  reasons = [
    layout_reason,
    microbatch_reason,
    f"remat of blocks: {remat_reason}" if choice.remat else "remat off: activations are kept",
    f"activations in {config.model.dtype}: as configured",
  ]
  if private:
    reasons.append(f"clipping {choice.clipping}: {method(choice)[1]}")
  return layout, choice, needs(choice), reasons


def _layout(chunk: int, share: int) -> str:
  if chunk == 1:
    return "scan"
  return "vmap" if chunk == share else "chunk"
