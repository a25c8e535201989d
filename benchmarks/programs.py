"""Blocks of rounds on random images, compiled and ready to be timed or weighed."""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import (
  ClientConfig,
  Config,
  DataConfig,
  ExecutionConfig,
  ModelConfig,
  PrivacyConfig,
)
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import Dataset
from fedjax_med.federated.algorithm import Client, Pool, plain_hyper
from fedjax_med.prepare.program import make_program
from fedjax_med.prepare.recipe import Shapes
from fedjax_med.simulation.mesh import choose_devices, replicate

POOL = 512  # images; clients share them, so that memory shows the program and not the data


@dataclasses.dataclass(frozen=True)
class Setting:
  """A block to compile: the federation, the network and their layout.

  Attributes:
    model: name in the registry.
    image_size: pixels a side.
    clients: K, all alike.
    batch_size: examples of a local step; expected, if it is private.
    examples: examples of a client, at least the batch; a private batch of them all has no padding.
    steps: local steps a round.
    private: DP-SGD instead of SGD.
    clipping: privacy.clipping.
    remat: execution.remat.
    dtype: dtype of activations.
    chunk: clients at once on a device; 0 leaves the layout to the plan.
    devices: execution.devices.
  """

  model: str
  image_size: int
  clients: int
  batch_size: int
  examples: int
  steps: int
  private: bool = False
  clipping: str = "auto"
  remat: str = "auto"
  dtype: str = "float32"
  chunk: int = 0
  devices: int = 0


class Measured(NamedTuple):
  """A compiled block.

  Attributes:
    run: (number of rounds) -> seconds.
    chunk: clients at once on a device.
    compile_seconds: to trace and compile.
    temporary_bytes: working memory by the compiler's account, None where it does not say.
  """

  run: Callable[[int], float]
  chunk: int
  compile_seconds: float
  temporary_bytes: int | None


def prepare(setting: Setting) -> Measured:
  """Compiles the block."""
  config = Config(
    data=DataConfig(image_size=setting.image_size),
    model=ModelConfig(name=setting.model, dtype=setting.dtype),
    client=ClientConfig(batch_size=setting.batch_size),
    privacy=PrivacyConfig(
      mechanism="dp_sgd" if setting.private else "none", clipping=setting.clipping
    ),
    execution=ExecutionConfig(
      layout="chunk" if setting.chunk else "auto", chunk_size=setting.chunk, remat=setting.remat
    ),
  )
  random = np.random.default_rng(0)
  inputs = random.integers(0, 256, (POOL, setting.image_size, setting.image_size, 1), np.uint8)
  labels = random.integers(0, 2, POOL).astype(np.int32)
  dataset = Dataset(inputs, labels, names=(), class_names=("a", "b"))
  clients, examples = setting.clients, setting.examples
  devices = choose_devices(setting.devices, clients)
  steps = np.full(clients, setting.steps, np.int64)
  counts = np.full(clients, examples, np.int64)
  shapes = Shapes(
    steps=steps,
    max_examples=examples,
    shared_steps=setting.steps,
    batch_cap=examples,
    counts=counts,
    max_units=0,
    rows_per_unit=1,
  )
  program = make_program(config, dataset, shapes, devices=devices)
  q = min(1.0, setting.batch_size / examples)
  ones = np.ones(clients, np.float32)
  data = (
    Client(
      number=jnp.arange(clients),
      indices=jnp.asarray(random.integers(0, POOL, (clients, examples)), jnp.int32),
      num_examples=jnp.full((clients,), examples, jnp.int32),
      weight=jnp.asarray(ones / clients),
      num_steps=jnp.asarray(steps, jnp.int32),
      sampling_probability=jnp.asarray(ones * q),
      expected_batch_size=jnp.asarray(ones * q * examples),
      noise_multiplier=jnp.asarray(ones),
      batch_cap=jnp.asarray(counts, jnp.int32) if setting.private else None,
    ),
    Pool(jnp.asarray(inputs), jnp.asarray(labels)),
    plain_hyper(),
    base_key(0),
  )
  data = replicate(data, devices.mesh)
  state = program.initial()
  started = time.perf_counter()
  compiled = program.block.lower(state, *data, jnp.asarray(1)).compile()
  compile_seconds = time.perf_counter() - started
  analysis = compiled.memory_analysis()
  current = [state]

  def run(rounds: int) -> float:
    number = replicate(jnp.asarray(rounds), devices.mesh)
    started = time.perf_counter()
    current[0], _ = jax.block_until_ready(compiled(current[0], *data, number))
    return time.perf_counter() - started

  run(1)  # the first call also loads
  return Measured(
    run=run,
    chunk=program.plan.chunk,
    compile_seconds=compile_seconds,
    temporary_bytes=None if analysis is None else analysis.temp_size_in_bytes,
  )
