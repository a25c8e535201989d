"""The probe of a plan: whether to time local steps, of which chunks, and what they say."""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config, fingerprint, to_dict
from fedjax_med.core.keys import base_key
from fedjax_med.federated.algorithm import Client, Hyper, Pool, Units
from fedjax_med.folder.writing import write_text
from fedjax_med.models.model import Model
from fedjax_med.prepare.layout import MAX_AT_ONCE
from fedjax_med.privacy.banded import empty_memory
from fedjax_med.simulation.cohort import load

PROBE_STEPS = 2_000  # client-steps of a run from which a probe repays its compiles
PROBE_PARAMETERS = 2_000_000  # of a model on a CPU; a larger one fills the cores by itself


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
      found = json.loads(path.read_text(encoding="utf-8"))["seconds"]
      return {chunk: float(found[str(chunk)]) for chunk in chunks}
    except (OSError, ValueError, KeyError, TypeError):
      pass  # nothing there, or cut short
  seconds = {chunk: float(f"{measure(chunk):.3g}") for chunk in chunks}
  if folder:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      write_text(path, json.dumps({"about": about, "seconds": seconds}, indent=2) + "\n")
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
  bands: int = 1,
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
    bands: steps that noise is correlated over.
    clock: seconds.
  """

  def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

  key = base_key(0)
  params, state = zeros(jax.eval_shape(model.init, key, image))
  pool = Pool(jnp.zeros(image.shape, jnp.uint8), jnp.zeros((1,), jnp.int32))
  one, zero = jnp.float32(1), jnp.float32(0)
  hyper = Hyper(
    client_learning_rate=jnp.float32(0.01),
    server_learning_rate=one,
    proximal_weight=zero,
    clip_norm=one,
    ema_decay=zero,
    participation_rate=one,
    algorithm={},
  )
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
  memory = ()
  if bands > 1:
    clients = clients._replace(coefficients=jnp.full((chunk, bands), bands**-0.5))
    memory = empty_memory(params, bands)

  @jax.jit
  def run(params, state, pool, clients):  # as arguments: zeros that are constants would fold
    def one(client):
      return train(params, state, memory, client, pool, hyper, key, jnp.zeros((), jnp.int32))

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
