"""How a run is laid out on this machine, with the reason for each choice."""

from typing import NamedTuple

import jax

from fedjax_med.models.ops import Lowering


class Plan(NamedTuple):
  """Choices that change speed and memory, never results (but for rounding).

  Attributes:
    layout: vmap, chunk or scan.
    chunk: clients trained at once.
    lowering: matmul or native convolutions.
    clipping: two_pass, reference or none.
    reasons: a sentence for each choice.
  """

  layout: str
  chunk: int
  lowering: Lowering
  clipping: str
  reasons: tuple[str, ...]


MAX_AT_ONCE = 16  # clients at once where nobody said how many: weights and activations of each


def choose_layout(
  layout: str, chunk_size: int, cohort: int, backend: str | None = None
) -> tuple[str, int, str]:
  """Returns (layout, clients at once, reason) for a cohort of that many clients."""
  backend = backend or jax.default_backend()
  if layout == "chunk":
    chunk = min(chunk_size, cohort)
    return "chunk", chunk, f"layout chunk({chunk}): as configured"
  if layout == "vmap":
    return "vmap", cohort, f"layout vmap over {cohort} clients: as configured"
  if layout == "auto" and backend != "cpu":
    chunk = min(cohort, MAX_AT_ONCE)
    name = "vmap" if chunk == cohort else "chunk"
    return name, chunk, f"layout {name}, {chunk} clients at once: {backend} runs them in parallel"
  why = "as configured" if layout == "scan" else "on a CPU one client already fills the cores"
  return "scan", 1, f"layout scan, one client at a time: {why}"


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
