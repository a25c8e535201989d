"""The plan of a run on this machine: the memory budget, sizes of programs, what fits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.prepare.layout import Choice, Freedom, choose_layout, choose_microbatch, fit_memory
from fedjax_med.prepare.memory import Budget, Footprint, block_memory, rough_bytes, shared_devices
from fedjax_med.prepare.probe import kept_seconds, probe_candidates, probed_chunk, wants_probe
from fedjax_med.privacy.clipping import resolve_method
from fedjax_med.simulation.mesh import cpu_cores


class LayoutProblem(NamedTuple):
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
  subject: LayoutProblem,
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
  states = jax.tree.leaves(subject.arguments[0].client_states)
  kept = sum(leaf.size * leaf.dtype.itemsize for leaf in states)

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
