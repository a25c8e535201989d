"""The probe: times local steps of several chunk sizes, and chooses the fastest."""

import json
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
from fedjax_med.federated.algorithm import Client, Pool, Units, plain_hyper
from fedjax_med.federated.local import LocalTraining, StepContext, Weights
from fedjax_med.folder.writing import write_text
from fedjax_med.prepare.plan import MAX_AT_ONCE
from fedjax_med.simulation.cohort import load

PROBE_STEPS = 2_000  # client-steps of a run from which a probe repays its compiles
PROBE_PARAMETERS = 2_000_000  # of a model on a CPU; a larger one fills the cores by itself


def wants_probe(config: Config, steps: np.ndarray, parameters: int, backend: str) -> bool:
  """Whether to time steps: if asked for, or if the run is long and the times can be stored.

  A resumed run must find the layout that it began with, so 'auto' needs the cache's folder. Several
  processes must decide alike, so they never time anything.
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
  """Chunk sizes to time for ``share`` clients of a device, the preferred one among them."""
  return sorted({min(chunk, share) for chunk in (1, 4, MAX_AT_ONCE, preferred)})


def probed_chunk(seconds: dict[int, float], steps: np.ndarray, devices: int) -> tuple[int, str]:
  """Returns (chunk, reason): the least time of a client-step, with waiting for longer clients.

  Args:
    seconds: time of a client-step, by chunk.
    steps: [K] local steps a round.
    devices: devices that share the clients.
  """
  cost = {
    chunk: value * (1 + load(steps, chunk, devices).waste) for chunk, value in seconds.items()
  }
  best = min(cost, key=lambda chunk: (cost[chunk], chunk))
  text = ", ".join(f"{1000 * cost[chunk]:.3g} ms at {chunk}" for chunk in sorted(cost))
  return best, f"{best} clients at once: a probe took {text}, for each client-step"


def cached_seconds(
  config: Config, about: dict[str, Any], measure: Callable[[int], float], chunks: Sequence[int]
) -> dict[int, float]:
  """Seconds of a client-step by chunk, read from the cache's folder or measured and stored there.

  Args:
    config: names the model and the cache's folder.
    about: everything else that the time depends on.
    measure: measures the seconds of a chunk.
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
      stored = json.loads(path.read_text(encoding="utf-8"))["seconds"]
      return {chunk: float(stored[str(chunk)]) for chunk in chunks}
    except (OSError, ValueError, KeyError, TypeError):
      pass  # no file, or one that was cut short
  seconds = {chunk: float(f"{measure(chunk):.3g}") for chunk in chunks}
  if folder:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      write_text(path, json.dumps({"about": about, "seconds": seconds}, indent=2) + "\n")
    except OSError:
      pass  # the file only saves time
  return seconds


class Trial(NamedTuple):
  """A local step to be timed: on zeros, with a key of its own, by clients that are all alike.

  Nothing of the run is read: neither its records nor its random draws, so no ε is spent.

  Attributes:
    local: local training whose number of steps is traced.
    pool: shapes of the examples and their targets, of which one is made of zeros.
    max_examples: slots of an index row.
    num_examples: n of each client.
    rate: q of each client.
    max_units: slots of a client's table of units that hold several rows; 0 without such.
    rows_per_unit: rows of such a unit.
  """

  local: LocalTraining
  pool: Pool
  max_examples: int
  num_examples: int
  rate: float
  max_units: int = 0
  rows_per_unit: int = 1


def time_steps(trial: Trial, chunk: int, clock: Callable[[], float] = time.perf_counter) -> float:
  """Seconds of one local step of one client, of ``chunk`` clients that train at once."""
  key, local, zero = base_key(0), trial.local, jnp.zeros((), jnp.int32)
  params = jnp.zeros((local.spec.params.size,), jnp.float32)
  state = jnp.zeros((local.spec.state.size,), jnp.float32)
  pool = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), trial.pool)
  clients, hyper = _alike(trial, chunk), plain_hyper()

  @jax.jit
  def run(params, state, pool, clients):  # as arguments: zeros that are constants would fold
    def train(client):
      context = StepContext(client=client, pool=pool, hyper=hyper, key=key, round=zero, step=zero)
      start = Weights(params=params, state=state, memory=local.init_memory())
      return local.train(start, context)

    if chunk == 1:
      return train(jax.tree.map(lambda leaf: leaf[0], clients))
    return jax.vmap(train)(clients)

  def seconds(steps: int) -> float:
    several = clients._replace(num_steps=jnp.full((chunk,), steps, jnp.int32))
    started = clock()
    jax.block_until_ready(run(params, state, pool, several))
    return clock() - started

  seconds(1)  # compiles
  steps = int(np.clip(0.05 / max(seconds(1), 1e-9), 1, 50))
  return statistics.median(seconds(steps) for _ in range(3)) / (steps * chunk)


def _alike(trial: Trial, number: int) -> Client:
  """Clients of a trial, stacked: all have the same examples, batch size and noise."""
  ones, count = jnp.ones((number,), jnp.float32), trial.num_examples
  clients = Client(
    number=jnp.arange(number),
    indices=jnp.zeros((number, trial.max_examples), jnp.int32),
    num_examples=jnp.full((number,), count, jnp.int32),
    weight=ones,
    num_steps=jnp.ones((number,), jnp.int32),
    sampling_probability=ones * trial.rate,
    expected_batch_size=ones * (trial.rate * count),
    noise_multiplier=ones,
  )
  if trial.max_units:
    table = jnp.zeros((number, trial.max_units), jnp.int32)
    units = Units(starts=table, sizes=table + trial.rows_per_unit, number=clients.num_examples)
    clients = clients._replace(units=units)
  bands = trial.local.bands
  if bands > 1:
    strategy = jnp.full((number, bands), bands**-0.5)
    clients = clients._replace(coefficients=strategy)
  return clients
