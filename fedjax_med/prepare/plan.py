"""The rules that lay a run out on this machine, with a reason for each choice."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedjax_med.core.errors import UserError, require
from fedjax_med.federated.vector import ARRAYS, PIECES, Holding
from fedjax_med.models.ops import Lowering
from fedjax_med.simulation.cohort import best_chunk, load


class Plan(NamedTuple):
  """The layout of a run: choices that change speed and memory, and results by rounding only.

  Attributes:
    layout: vmap, chunk or scan.
    chunk: clients trained at once on a device.
    devices: devices that clients are dealt over.
    lowering: lowering of convolutions: auto, matmul or native.
    clipping: two_pass, book_keeping, reference or none.
    microbatch: examples of a client's batch in memory at once.
    remat: whether the backward pass computes the network's blocks a second time.
    dtype: dtype of activations.
    reasons: a sentence for each choice. They hold no times and no sizes of this machine, so that
      summaries of equal runs are equal.
  """

  layout: str
  chunk: int
  devices: int
  lowering: Lowering
  clipping: str
  microbatch: int
  remat: bool
  dtype: str
  reasons: tuple[str, ...]


MAX_AT_ONCE = 16  # clients at once where nobody said how many: weights and activations of each
MICROBATCH_OVERHEAD = 1.0  # examples: reading the weights, adding up the gradients
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
    backend: backend to lay out for; None is that of jax.
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
  why = "as configured" if layout == "scan" else "side by side they would not fill a CPU better"
  return "scan", 1, f"layout scan, a device trains one client at a time: {why}"


def describe_padding(
  steps: Sequence[int] | np.ndarray, chunk: int, devices: int, participation_rate: float = 1.0
) -> str:
  """A sentence on the arithmetic and the time that a round spends on waiting.

  Args:
    steps: [K] local steps a round.
    chunk: clients at once on a device.
    devices: devices that share the clients.
    participation_rate: rate of a Poisson cohort, which is then drawn a hundred times; 1 if everyone
      takes part.
  """
  if chunk == devices == 1:
    return "padding none: one client at a time waits for nobody"
  steps = np.asarray(steps)
  draws = 1 if participation_rate == 1 else 100
  present = np.random.default_rng(0).random((draws, len(steps))) < participation_rate
  loads = [load(steps[row], chunk, devices) for row in present]
  useful = max(1, sum(chunk_load.useful for chunk_load in loads))
  padding = sum(chunk_load.executed for chunk_load in loads) / useful - 1
  text = f"padding {padding:.0%} of the useful arithmetic"
  if devices > 1:
    time = devices * chunk * sum(chunk_load.longest for chunk_load in loads)
    text += f", {time / useful - 1:.0%} with devices that wait for the last"
  return text + ": clients of like step count share a chunk"


def choose_lowering(lowering: str, cores: int, backend: str | None = None) -> tuple[Lowering, str]:
  """Returns (lowering, reason).

  Args:
    lowering: auto, matmul or native.
    cores: cores of a device that trains, if it is a CPU.
    backend: backend to lay out for; None is that of jax.
  """
  if lowering == "native":
    return "native", "native convolutions: as configured"
  if lowering == "auto" and (backend or jax.default_backend()) != "cpu":
    # Native ones were not measured there; the algorithm they take may change with each start.
    return "matmul", (
      "convolutions as batched matrix products: native grouped ones are far slower, above all under"
      " a client axis"
    )
  if lowering == "auto" and cores > 1:
    return "matmul", (
      "convolutions as batched matrix products, which share the cores of a CPU device better than"
      " native ones"
    )
  if lowering == "auto":
    return "auto", (
      "convolutions native where one kernel serves all images, else as batched matrix products:"
      " grouped or under a client axis native ones are far slower"
    )
  return "matmul", "convolutions as batched matrix products: as configured"


def choose_holding(private: bool, backend: str | None = None) -> Holding:
  """How local steps hold weights: in pieces where noise or a device wants few arrays.

  A plain step on a CPU holds the tree, which has no copies (docs/performance.md has both measured).

  Args:
    private: whether a step releases a noisy gradient.
    backend: backend to hold them on; None is that of jax.
  """
  on_cpu = (backend or jax.default_backend()) == "cpu"
  return ARRAYS if on_cpu and not private else PIECES


def best_microbatch(
  counts: Sequence[int] | np.ndarray,
  rates: Sequence[float] | np.ndarray,
  cap: int,
  overhead: float,
) -> int:
  """The m that minimises E[ceil(N / m)] · (m + overhead), the cost of a step in examples.

  N is the size of a truncated Poisson batch, min(Binomial(n, q), cap), averaged over hospitals.
  Of equal ones the largest m is returned.

  Args:
    counts: [K] examples n of each hospital.
    rates: [K] sampling probabilities q, above 0 and at most 1.
    cap: examples a batch holds at most.
    overhead: cost of one more microbatch, in examples.
  """
  shape = np.zeros(cap + 1)
  pairs, hospitals = np.unique(np.column_stack([counts, rates]), axis=0, return_counts=True)
  for (n, q), number in zip(pairs, hospitals, strict=True):
    shape += number * _truncated_binomial(int(n), float(q), cap)
  shape /= shape.sum()
  sizes = np.arange(cap + 1)
  cost = {m: shape @ -(-sizes // m) * (m + overhead) for m in range(1, cap + 1)}
  least = min(cost.values()) * (1 + 1e-9)
  return max(m for m in cost if cost[m] <= least)


def _truncated_binomial(n: int, q: float, cap: int) -> np.ndarray:
  """[cap + 1] probabilities of min(Binomial(n, q), cap)."""
  result = np.zeros(cap + 1)
  if q >= 1:
    result[min(n, cap)] = 1
    return result
  k = np.arange(1, min(n, cap) + 1)
  steps = np.log((n - k + 1) / k) + np.log(q) - np.log1p(-q)
  pmf = np.exp(n * np.log1p(-q) + np.concatenate([[0.0], np.cumsum(steps)]))
  result[: len(pmf)] = pmf
  if n > cap:
    result[cap] += max(0.0, 1 - pmf.sum())
  return result


def choose_microbatch(
  requested: int,
  batch: int,
  chunk: int,
  *,
  private: bool,
  fixed: bool,
  counts: Sequence[int] | np.ndarray,
  rates: Sequence[float] | np.ndarray,
) -> tuple[int, str]:
  """Returns (examples in memory at once, reason), before memory is looked at.

  Args:
    requested: execution.microbatch.
    batch: slots of a batch: the batch size, or the cap of a Poisson batch.
    chunk: clients at once on a device.
    private: whether the batch is a Poisson draw, whose loop ends where the drawn examples do.
    fixed: whether another microbatch would change results (batch norm, dropout).
    counts: [K] examples of each hospital.
    rates: [K] its sampling probability.
  """
  if requested:
    require(
      not fixed or requested >= batch,
      f"execution.microbatch={requested} is under the {batch} slots of a batch, but dropout or"
      " batch norm makes results depend on it",
      "set execution.microbatch=0, or model.dropout=0 and model.norm=group",
    )
    m = min(requested, batch)
    return m, f"microbatch {m} of {batch} slots: as configured"
  if fixed:
    return batch, f"microbatch {batch}, the whole batch: the model's results depend on it"
  if not private:
    return batch, f"microbatch {batch}, the whole batch: nothing in it is padding"
  if chunk > 1:
    return batch, f"microbatch {batch}, the whole batch: the chunk waits for its largest draw"
  m = best_microbatch(counts, rates, batch, MICROBATCH_OVERHEAD)
  expected = float(np.mean(np.asarray(counts) * np.asarray(rates)))
  return m, f"microbatch {m} of {batch} slots: {expected:.3g} are drawn on average"


class Choice(NamedTuple):
  """The sizes of a program that its memory depends on.

  Attributes:
    devices: devices that clients are dealt over.
    chunk: clients at once on a device.
    microbatch: examples of each client in memory at once.
    remat: whether the backward pass computes blocks a second time.
    clipping: two_pass, book_keeping, reference or none.
  """

  devices: int
  chunk: int
  microbatch: int
  remat: bool
  clipping: str


class Freedom(NamedTuple):
  """Sizes of a choice that may be changed to save memory, since they were not configured."""

  devices: bool
  chunk: bool
  microbatch: bool
  remat: bool


def lighter(choice: Choice, free: Freedom) -> Choice | None:
  """The next choice that needs less memory, cheapest sacrifice first; None if there is none."""
  if free.chunk and choice.chunk > 1:
    return choice._replace(chunk=choice.chunk // 2)
  if free.devices and choice.devices > 1:
    return choice._replace(devices=choice.devices // 2)
  if free.microbatch and choice.microbatch > 1:
    return choice._replace(microbatch=choice.microbatch // 2)
  if free.remat and not choice.remat:
    return choice._replace(remat=True)
  return None


def fit_memory(
  choice: Choice,
  free: Freedom,
  budget: float,
  estimate: Callable[[Choice], float],
  measure: Callable[[Choice], float | None],
  settled: Callable[[Choice], Choice],
) -> Choice:
  """Finds the first choice, from ``choice`` on, that fits the budget.

  A choice is compiled only if its estimate leaves it open whether it fits.

  Args:
    choice: the preferred one.
    free: sizes that may be changed.
    budget: bytes of a device.
    estimate: bytes from shapes alone, rather too many; under half the budget it decides.
    measure: bytes of the compiled program, None where the backend does not say.
    settled: adds to a choice the method of clipping that follows from its sizes.

  Raises:
    UserError: nothing is left to change.
  """
  while estimate(choice) >= budget / 2:
    needed = measure(choice)
    if needed is None or needed <= budget:
      break
    ratio = needed / estimate(choice)
    following = lighter(choice, free)
    if following is None:
      raise UserError(
        f"the compiled rounds need {needed / 2**30:.3g} GiB, over the budget of"
        f" {budget / 2**30:.3g} GiB of a device; raise execution.memory_gib, or lower"
        " client.batch_size, data.image_size, execution.chunk_size or execution.microbatch"
      )
    # Each compile takes seconds to minutes: steps that are far from enough are passed over.
    while estimate(following) * ratio > 2 * budget and (further := lighter(following, free)):
      following = further
    choice = settled(following)
  return choice
