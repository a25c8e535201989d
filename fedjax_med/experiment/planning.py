"""What a plan needs from the machine: the memory budget, sizes of programs, timed steps."""

import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config, fingerprint, to_dict
from fedjax_med.core.keys import base_key
from fedjax_med.experiment.processes import least
from fedjax_med.federated.algorithm import Client, Hyper, Pool, Units
from fedjax_med.models.model import Model
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.simulation.cohort import load
from fedjax_med.simulation.mesh import cpu_cores
from fedjax_med.simulation.plan import (
  MAX_AT_ONCE,
  Choice,
  Freedom,
  choose_layout,
  choose_microbatch,
  fit_memory,
)

PROBE_STEPS = 2_000  # client-steps of a run from which a probe repays its compiles
PROBE_PARAMETERS = 2_000_000  # of a model on a CPU; a larger one fills the cores by itself


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
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    known += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
  except (OSError, ValueError, IndexError):
    pass
  try:
    group = pathlib.Path("/sys/fs/cgroup")
    limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
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


def rough_bytes(choice: Choice, model: Footprint, num_clients: int, data: int) -> float:
  """Upper estimate from shapes of what a device needs in a round, bytes.

  Args:
    choice: the layout.
    model: its sizes.
    num_clients: K.
    data: bytes of the pool and the index rows.
  """
  weights = 4 * model.parameters
  copies = 7  # local weights, gradient, noise and its sum, up to two moments, delta
  if choice.clipping == "reference":
    copies += 2 * choice.microbatch
  # Every value of the forward pass twice: fused kernels keep a fraction of them, which leaves room
  # for cotangents and for the records that clipping keeps.
  examples = 2 * choice.microbatch * model.activations
  return data + 4 * weights + 1024 * num_clients + choice.chunk * (copies * weights + examples)


def block_arguments(
  initial: Callable[[], Any],
  num_clients: int,
  max_examples: int,
  pool: Any,
  max_units: int = 0,
  client_level: bool = False,
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


def wants_probe(config: Config, steps: np.ndarray, parameters: int, backend: str) -> bool:
  """Whether timing steps is asked for, or repays itself and its outcome can be kept.

  A run that is resumed must find the layout it began with, so 'auto' needs the cache's folder;
  several processes must plan alike, so they never time anything.
  """
  execution, server = config.execution, config.server
  if execution.layout != "auto" or execution.probe == "off" or jax.process_count() > 1:
    return False
  if execution.probe == "on":
    return True
  rate = server.participation_rate if server.participation == "poisson" else 1.0
  long = server.num_rounds * rate * float(np.sum(steps)) > PROBE_STEPS
  small = backend != "cpu" or parameters < PROBE_PARAMETERS
  return long and small and execution.compilation_cache != ""


def probe_candidates(share: int, preferred: int) -> list[int]:
  """Chunks worth timing for ``share`` clients of a device; ``preferred`` is the rule's choice."""
  return sorted({min(chunk, share) for chunk in (1, 4, MAX_AT_ONCE, preferred)})


def probed_chunk(seconds: dict[int, float], steps: np.ndarray, devices: int) -> tuple[int, str]:
  """Returns (chunk, reason): least time a client-step, waiting for longer clients included.

  Args:
    seconds: of a client-step, by chunk.
    steps: [K] local steps a round.
    devices: devices that share the clients.
  """
  cost = {
    chunk: value * (1 + load(steps, chunk, devices).waste) for chunk, value in seconds.items()
  }
  best = min(cost, key=lambda chunk: (cost[chunk], chunk))
  text = ", ".join(f"{1000 * cost[chunk]:.3g} ms at {chunk}" for chunk in sorted(cost))
  return best, f"{best} clients at once: a probe took {text}, for each client-step"


def kept_seconds(
  config: Config, about: dict[str, Any], measure: Callable[[int], float], chunks: Sequence[int]
) -> dict[int, float]:
  """Seconds of a client-step by chunk, from the cache's folder or else measured and kept there.

  Args:
    config: names the model and the cache's folder.
    about: all else that the time depends on.
    measure: times a chunk.
    chunks: candidates.
  """
  about = {
    **about,
    "model": to_dict(config)["model"],
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "chunks": list(chunks),
  }
  folder = config.execution.compilation_cache
  path = pathlib.Path(folder).expanduser() / "plans" / f"{fingerprint(about)}.json"
  if folder:
    try:
      found = json.loads(path.read_text())["seconds"]
      return {chunk: float(found[str(chunk)]) for chunk in chunks}
    except (OSError, ValueError, KeyError, TypeError):
      pass  # nothing there, or cut short
  seconds = {chunk: float(f"{measure(chunk):.3g}") for chunk in chunks}
  if folder:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      temporary = path.with_suffix(f".{os.getpid()}")
      temporary.write_text(json.dumps({"about": about, "seconds": seconds}, indent=2) + "\n")
      os.replace(temporary, path)
    except OSError:
      pass  # kept for next time only
  return seconds


def time_steps(
  train: Callable[..., Any],
  model: Model,
  image: jax.ShapeDtypeStruct,
  chunk: int,
  *,
  max_examples: int,
  num_examples: int,
  rate: float,
  max_units: int = 0,
  rows_per_unit: int = 1,
  clock: Callable[[], float] = time.perf_counter,
) -> float:
  """Seconds of one local step of one of ``chunk`` clients, on zeros and a key of its own.

  Nothing of the run is read: neither its records nor its random draws, so no ε is spent.

  Args:
    train: local training whose number of steps is traced.
    model: gives the shapes of the weights.
    image: [1, H, W, C].
    chunk: clients at once.
    max_examples: slots of an index row.
    num_examples: n of each client.
    rate: q of each client.
    max_units: slots of a client's table of units that hold several rows; 0 without such.
    rows_per_unit: rows of such a unit.
    clock: seconds.
  """

  def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

  key = base_key(0)
  params, state = zeros(jax.eval_shape(model.init, key, image))
  pool = Pool(jnp.zeros(image.shape, jnp.uint8), jnp.zeros((1,), jnp.int32))
  hyper = Hyper(*(jnp.float32(value) for value in (0.01, 1, 0, 1, 0, 1)))
  each = jnp.ones((chunk,), jnp.float32)
  clients = Client(
    number=jnp.arange(chunk),
    indices=jnp.zeros((chunk, max_examples), jnp.int32),
    num_examples=jnp.full((chunk,), num_examples, jnp.int32),
    weight=each,
    num_steps=jnp.ones((chunk,), jnp.int32),
    sampling_probability=each * rate,
    expected_batch_size=each * (rate * num_examples),
    noise_multiplier=each,
  )
  if max_units:
    table = jnp.zeros((chunk, max_units), jnp.int32)
    units = Units(table, table + rows_per_unit, clients.num_examples)
    clients = clients._replace(units=units)

  @jax.jit
  def run(params, state, pool, clients):  # as arguments: zeros that are constants would fold
    def one(client):
      return train(params, state, client, pool, hyper, key, jnp.zeros((), jnp.int32))

    if chunk == 1:
      return one(jax.tree.map(lambda leaf: leaf[0], clients))
    return jax.vmap(one)(clients)

  def seconds(steps: int) -> float:
    several = clients._replace(num_steps=jnp.full((chunk,), steps, jnp.int32))
    started = clock()
    jax.block_until_ready(run(params, state, pool, several))
    return clock() - started

  seconds(1)  # compiles
  steps = int(np.clip(0.05 / max(seconds(1), 1e-9), 1, 50))
  return statistics.median(seconds(steps) for _ in range(3)) / (steps * chunk)


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
    uncovered: (remat) -> why each clipping method cannot be trusted, by method.
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
  uncovered: Callable[[bool], dict[str, tuple[str, ...]]]


def decide(
  config: Config,
  subject: Subject,
  start: Choice,
  budget: Budget,
  block: Callable[[Choice], jax.stages.Wrapped],
  time_chunk: Callable[[Choice], float],
) -> tuple[str, Choice, list[str]]:
  """Returns (layout, choice, reasons); raises UserError where no allowed choice fits the budget.

  Args:
    config: validated config.
    subject: what is planned.
    start: devices, remat and clipping to begin with.
    budget: memory of a device.
    block: the jitted rounds under a choice.
    time_chunk: seconds of a client-step under a choice.
  """
  execution, private = config.execution, config.privacy.mechanism != "none"
  fixed = config.model.norm == "batch" or subject.model.whole_batch
  num_clients = len(subject.steps)
  data = sum(leaf.size * leaf.dtype.itemsize for leaf in subject.arguments[2])
  data += 4 * subject.arguments[1].indices.size

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
    return start._replace(chunk=chunk, microbatch=microbatch), reason

  def estimate(choice: Choice) -> float:
    shared = shared_devices(choice.devices)
    return shared * rough_bytes(choice, subject.model, num_clients, data)

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
    about = {
      "image": list(subject.arguments[2].inputs.shape[1:]),
      "batch": [config.client.batch_size, subject.batch],
      "microbatches": [with_chunk(c)[0].microbatch for c in chunks],
      "remat": start.remat,
      "clipping": start.clipping,
      "optimizer": config.client.optimizer,
      "lowering": execution.lowering,
      "devices": devices,
      "cores": cpu_cores(),
      "rows": subject.rows_per_unit,
      "examples": [int(np.median(subject.counts)), subject.arguments[1].indices.shape[1]],
      "cohort": subject.cohort,
    }
    seconds = kept_seconds(config, about, lambda c: time_chunk(with_chunk(c)[0]), chunks)
    chunk, why = probed_chunk(seconds, subject.steps, devices)
    layout_reason = f"layout {_layout(chunk, share)}, {why}"
  preferred, microbatch_reason = with_chunk(chunk)
  choice = preferred
  if budget.size is not None and estimate(preferred) >= budget.size / 2:
    remat = execution.remat == "auto" and subject.may_remat
    if remat and private and start.clipping != "reference":
      remat = not subject.uncovered(True)[start.clipping]
    free = Freedom(
      devices=subject.may_share_less and execution.layout in ("auto", "scan"),
      chunk=execution.layout == "auto",
      microbatch=execution.microbatch == 0 and not fixed,
      remat=remat,
    )
    choice = fit_memory(preferred, free, budget.size, estimate, measure)
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
  return layout, choice, reasons


def _layout(chunk: int, share: int) -> str:
  if chunk == 1:
    return "scan"
  return "vmap" if chunk == share else "chunk"
