"""The search for the fastest layout that fits into the memory of this machine."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.prepare.memory import (
  BlockArguments,
  Budget,
  Footprint,
  block_memory,
  rough_bytes,
  shared_devices,
  tree_bytes,
)
from fedjax_med.prepare.plan import Choice, Freedom, choose_layout, choose_microbatch, fit_memory
from fedjax_med.prepare.probe import cached_seconds, probe_candidates, probed_chunk, wants_probe
from fedjax_med.privacy.clipping import resolve_method
from fedjax_med.simulation.mesh import cpu_cores


class PlanProblem(NamedTuple):
  """Everything that a layout depends on.

  Attributes:
    config: validated config.
    start: devices and remat to begin with.
    budget: memory of a device.
    cohort: most clients that train in a round.
    steps: [K] local steps a round.
    counts: [K] examples that a step of each client draws from, or fewer where clients are alike.
    rates: sampling probabilities, one for each count.
    batch: slots of a batch.
    rows_per_unit: images in a slot.
    model: sizes of the model.
    arguments: shapes of the arguments of a block.
    may_remat: whether the network has blocks to compute again.
    may_share_less: whether fewer devices may be used than ``start`` names.
    gathers: whether all messages of a round are in memory at once.
    uncovered: (remat, microbatch) -> reasons not to trust each clipping method, by method.
  """

  config: Config
  start: Choice
  budget: Budget
  cohort: int
  steps: np.ndarray
  counts: np.ndarray
  rates: np.ndarray
  batch: int
  rows_per_unit: int
  model: Footprint
  arguments: BlockArguments
  may_remat: bool
  may_share_less: bool
  gathers: bool
  uncovered: Callable[[bool, int], dict[str, tuple[str, ...]]]

  @property
  def private(self) -> bool:
    """Whether gradients are clipped."""
    return self.config.privacy.mechanism != "none"

  @property
  def fixed_batch(self) -> bool:
    """Whether another microbatch would change results."""
    return self.config.model.norm == "batch" or self.model.whole_batch


class Decision(NamedTuple):
  """The layout that was found.

  Attributes:
    layout: vmap, chunk or scan.
    choice: sizes of the program.
    needs: upper estimate of the memory of one device in a round, bytes.
    reasons: a sentence for each part of the choice.
  """

  layout: str
  choice: Choice
  needs: float
  reasons: tuple[str, ...]


def decide(
  problem: PlanProblem,
  blocks: Callable[[Choice], jax.stages.Wrapped],
  time_chunk: Callable[[Choice], float],
) -> Decision:
  """Finds a layout that fits the budget.

  The method of clipping is settled for the number of rows that each choice has at once.

  Args:
    problem: everything that the layout depends on.
    blocks: the jitted rounds of a choice.
    time_chunk: measures the seconds of a client-step of a choice.

  Raises:
    UserError: no allowed choice fits the budget, or the method of clipping that is asked for does
      not cover it.
  """
  execution, steps = problem.config.execution, problem.steps
  _require_room(problem)
  _, chunk, layout_reason = choose_layout(
    execution.layout,
    execution.chunk_size,
    problem.cohort,
    devices=problem.start.devices,
    steps=steps,
  )
  backend = jax.default_backend()
  if wants_probe(problem.config, steps, problem.model.parameters, backend):
    chunk, layout_reason = _probe(problem, chunk, time_chunk)
  preferred, microbatch_reason = _with_chunk(problem, chunk)
  choice = _fitted(problem, preferred, blocks)
  if choice.chunk != chunk:
    name = _layout_name(problem, choice)
    layout_reason = f"layout {name}, {choice.chunk} clients at once: {chunk} exceed the memory"
  if choice.microbatch != preferred.microbatch:
    microbatch_reason = f"microbatch {choice.microbatch} of {problem.batch} slots: to save memory"
  return Decision(
    layout=_layout_name(problem, choice) if execution.layout == "auto" else execution.layout,
    choice=choice,
    needs=_needs(problem, choice),
    reasons=(layout_reason, microbatch_reason, *_other_reasons(problem, choice)),
  )


def _other_reasons(problem: PlanProblem, choice: Choice) -> list[str]:
  """Sentences on remat, dtype and clipping."""
  config = problem.config
  remat_reason = "as configured" if config.execution.remat != "auto" else "to save memory"
  reasons = [
    f"remat of blocks: {remat_reason}" if choice.remat else "remat off: activations are kept",
    f"activations in {config.model.dtype}: as configured",
  ]
  if problem.private:
    reasons.append(f"clipping {choice.clipping}: {_clipping(problem, choice)[1]}")
  return reasons


def _layout_name(problem: PlanProblem, choice: Choice) -> str:
  """The layout of a chunk size: scan, vmap (all clients of a device at once) or chunk."""
  if choice.chunk == 1:
    return "scan"
  return "vmap" if choice.chunk == _share(problem, choice.devices) else "chunk"


def _share(problem: PlanProblem, devices: int) -> int:
  """Clients of one device."""
  return -(-problem.cohort // devices)


def _clipping(problem: PlanProblem, choice: Choice) -> tuple[str, str]:
  """Returns (method, reason) of clipping for the rows that the choice has at once."""
  problems = problem.uncovered(choice.remat, choice.microbatch)
  return resolve_method(problem.config.privacy.clipping, problems)


def _settled(problem: PlanProblem, choice: Choice) -> Choice:
  """The choice with the method of clipping that follows from the rest of it."""
  return choice._replace(clipping=_clipping(problem, choice)[0]) if problem.private else choice


def _with_chunk(problem: PlanProblem, chunk: int) -> tuple[Choice, str]:
  """Returns the choice of so many clients at once, and the reason of its microbatch."""
  microbatch, reason = choose_microbatch(
    problem.config.execution.microbatch,
    problem.batch,
    chunk,
    private=problem.private,
    fixed=problem.fixed_batch,
    counts=problem.counts,
    rates=problem.rates,
  )
  choice = problem.start._replace(chunk=chunk, microbatch=microbatch)
  return _settled(problem, choice), reason


def _needs(problem: PlanProblem, choice: Choice) -> float:
  """Upper estimate from shapes of the memory of one device, bytes."""
  arguments, num_clients = problem.arguments, len(problem.steps)
  data = tree_bytes(arguments.pool) + 4 * arguments.clients.indices.size
  state = arguments.state
  kept = tree_bytes((state.client_states, state.transform_states)) // num_clients
  return rough_bytes(choice, problem.model, num_clients, data, kept, _gathered(problem, choice))


def _gathered(problem: PlanProblem, choice: Choice) -> int:
  """Bytes of all messages of a round where they are in memory at once, else 0."""
  if not problem.gathers:
    return 0
  slots = choice.devices * choice.chunk
  return 4 * problem.model.parameters * (problem.cohort + -problem.cohort % slots)


def _require_room(problem: PlanProblem) -> None:
  """Raises UserError where the messages of a round alone are over the budget."""
  size, needed = problem.budget.size, _gathered(problem, problem.start)
  config = problem.config
  encrypted = config.secure.protocol == "ckks"
  remedy = "secure.he=model" if encrypted else "server.aggregator=mean without robust.pre or attack"
  what = f"server.aggregator='{config.server.aggregator}' with attack.kind='{config.attack.kind}'"
  require(
    size is None or needed <= size,
    f"{'secure.he=run' if encrypted else what} needs the updates of {problem.cohort} hospitals"
    f" at once, {needed / 2**30:.3g} GiB, over the budget of {(size or 0) / 2**30:.3g} GiB of a"
    " device",
    f"use {remedy}, a smaller model, or raise execution.memory_gib",
  )


def _estimate(problem: PlanProblem, choice: Choice) -> float:
  """Upper estimate of the bytes that all devices with a common memory need."""
  return shared_devices(choice.devices) * _needs(problem, choice)


def _measure(
  problem: PlanProblem, blocks: Callable[[Choice], jax.stages.Wrapped], choice: Choice
) -> float | None:
  """The same bytes, measured of the compiled program; None if the backend does not say."""
  parts = block_memory(blocks(choice), problem.arguments)
  return None if parts is None else float(shared_devices(choice.devices) * sum(parts.values()))


def _probe(
  problem: PlanProblem, preferred: int, time_chunk: Callable[[Choice], float]
) -> tuple[int, str]:
  """Returns (clients at once, reason) by the times of local steps, measured or read back."""
  devices = problem.start.devices
  share = _share(problem, devices)
  room = problem.budget.size or np.inf
  choices = {chunk: _with_chunk(problem, chunk)[0] for chunk in probe_candidates(share, preferred)}
  choices = {
    chunk: choice
    for chunk, choice in choices.items()
    if chunk == 1 or _estimate(problem, choice) <= room
  }
  seconds = cached_seconds(
    problem.config,
    _circumstances(problem, list(choices.values())),
    lambda chunk: time_chunk(choices[chunk]),
    list(choices),
  )
  chunk, reason = probed_chunk(seconds, problem.steps, devices)
  name = _layout_name(problem, choices[chunk])
  return chunk, f"layout {name}, {reason}"


def _circumstances(problem: PlanProblem, choices: list[Choice]) -> dict[str, Any]:
  """Everything besides the model that the time of a local step depends on."""
  arguments, config = problem.arguments, problem.config
  return {
    "image": list(arguments.pool.inputs.shape[1:]),
    "batch": [config.client.batch_size, problem.batch],
    "microbatches": [choice.microbatch for choice in choices],
    "remat": problem.start.remat,
    "clipping": [choice.clipping for choice in choices],
    "optimizer": config.client.optimizer,
    "lowering": config.execution.lowering,
    "devices": problem.start.devices,
    "cores": cpu_cores(),
    "rows": problem.rows_per_unit,
    "examples": [int(np.median(problem.counts)), arguments.clients.indices.shape[1]],
    "cohort": problem.cohort,
    "bands": config.privacy.bands,
  }


def _fitted(
  problem: PlanProblem, preferred: Choice, blocks: Callable[[Choice], jax.stages.Wrapped]
) -> Choice:
  """The preferred choice, or one that needs less memory where the budget asks for it."""
  size, execution = problem.budget.size, problem.config.execution
  if size is None or _estimate(problem, preferred) < size / 2:
    return preferred
  remat = execution.remat == "auto" and problem.may_remat
  if remat and problem.private and preferred.clipping != "reference":
    remat = not problem.uncovered(True, preferred.microbatch)[preferred.clipping]
  free = Freedom(
    devices=problem.may_share_less and execution.layout in ("auto", "scan"),
    chunk=execution.layout == "auto",
    microbatch=execution.microbatch == 0 and not problem.fixed_batch,
    remat=remat,
  )
  return fit_memory(
    preferred,
    free,
    size,
    functools.partial(_estimate, problem),
    functools.partial(_measure, problem, blocks),
    functools.partial(_settled, problem),
  )
