"""How a run is laid out on this machine, with the reason for each choice."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedjax_med.models.ops import Lowering
from fedjax_med.simulation.cohort import best_chunk, load


class Plan(NamedTuple):
  """Choices that change speed and memory, never results (but for rounding).

  Attributes:
    layout: vmap, chunk or scan.
    chunk: clients trained at once on a device.
    devices: devices that clients are dealt over.
    lowering: matmul or native convolutions.
    clipping: two_pass, reference or none.
    reasons: a sentence for each choice.
  """

  layout: str
  chunk: int
  devices: int
  lowering: Lowering
  clipping: str
  reasons: tuple[str, ...]


MAX_AT_ONCE = 16  # clients at once where nobody said how many: weights and activations of each
MAX_WASTE = 0.25  # of the arithmetic, where nobody said how many clients train at once


def choose_layout(
  layout: str,
  chunk_size: int,
  cohort: int,
  backend: str | None = None,
  *,
  devices: int = 1,
  steps: Sequence[int] | np.ndarray = (),
) -> tuple[str, int, str]:
  """Returns (layout, clients at once on a device, reason).

  Args:
    layout: auto, vmap, chunk or scan.
    chunk_size: clients at once under layout=chunk.
    cohort: most clients that train in a round.
    backend: of jax where it is not given.
    devices: devices that share the clients.
    steps: local steps of each client, where they are known.
  """
  backend = backend or jax.default_backend()
  share = -(-cohort // devices)  # clients of one device
  if layout == "chunk":
    chunk = min(chunk_size, share)
    return "chunk", chunk, f"layout chunk({chunk}): as configured"
  if layout == "vmap":
    return "vmap", share, f"layout vmap over {share} clients: as configured"
  if layout == "auto" and backend != "cpu":
    known = np.sort(np.asarray(steps)) if len(steps) else np.ones(cohort, int)
    typical = known[np.linspace(0, len(known) - 1, cohort).round().astype(int)]
    chunk = best_chunk(typical, devices, MAX_AT_ONCE, MAX_WASTE)
    name = "vmap" if chunk == share else "chunk"
    return name, chunk, f"layout {name}, {chunk} clients at once: {backend} runs them in parallel"
  why = "as configured" if layout == "scan" else "on a CPU one client already fills the cores"
  return "scan", 1, f"layout scan, one client at a time: {why}"


def describe_padding(
  steps: Sequence[int] | np.ndarray, chunk: int, devices: int, participation_rate: float = 1.0
) -> str:
  """The arithmetic and the time that a round spends on waiting, as a sentence of the plan.

  Args:
    steps: [K] local steps a round.
    chunk: clients at once on a device.
    devices: devices that share the clients.
    participation_rate: of a Poisson cohort, which is then drawn a hundred times; 1 for everyone.
  """
  if chunk == devices == 1:
    return "padding none: one client at a time waits for nobody"
  steps = np.asarray(steps)
  draws = 1 if participation_rate == 1 else 100
  present = np.random.default_rng(0).random((draws, len(steps))) < participation_rate
  loads = [load(steps[row], chunk, devices) for row in present]
  useful = max(1, sum(each.useful for each in loads))
  padding = sum(each.executed for each in loads) / useful - 1
  text = f"padding {padding:.0%} of the useful arithmetic"
  if devices > 1:
    time = devices * chunk * sum(each.longest for each in loads)
    text += f", {time / useful - 1:.0%} with devices that wait for the last"
  return text + ": clients of like step count share a chunk"


def choose_lowering(lowering: str) -> tuple[Lowering, str]:
  """Returns (lowering, reason)."""
  if lowering == "native":
    return "native", "native convolutions: as configured"
  if lowering == "auto":
    return "matmul", (
      "convolutions as batched matrix products: native grouped convolutions are far slower,"
      " above all under a client axis"
    )
  return "matmul", "convolutions as batched matrix products: as configured"
