"""Replayed steps of a run: minus their noise they must be the accounted sums of clipped gradients.

Network, images, arrays and key are those of the run. Its program is compiled for rounds at learning
rate 1, in the same layout, so that the global weights move by the release of a hospital. The noise
is computed a second time from the key, and the sum of clipped gradients from the accounted
mechanism, with one gradient a unit. Any other sampling, clipping, noise, denominator, key or order
of clients leaves a difference.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.audit.execution_checks import Check
from fedjax_med.core.config import Config
from fedjax_med.core.keys import Stream, key_for
from fedjax_med.data.modality import modality_named, scaling_of
from fedjax_med.federated.algorithm import Client, Units
from fedjax_med.federated.local import BatchShape, StepContext, private_gradient
from fedjax_med.models.registry import create_model
from fedjax_med.prepare.case import Case, with_plain_server
from fedjax_med.prepare.experiment import Experiment, shapes_of
from fedjax_med.prepare.plan import Plan
from fedjax_med.prepare.program import make_program
from fedjax_med.privacy.banded import empty_memory
from fedjax_med.privacy.noise import gaussian_noise_like, grain_of
from fedjax_med.tasks.registry import task_named

# Units whose gradients the reference holds at once.
AT_ONCE = 8
# Largest difference between two orders of adding, over the larger of the sum and the clip norm.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.2}
# (round, steps of it): the last step is looked at. A key without the round, or without the step,
# shows in the second or the third.
REPLAYED = ((0, 1), (0, 2), (1, 1))


def replay_checks(experiment: Experiment) -> list[Check]:
  """Checks that replayed steps of every hospital, minus their noise, are the accounted sums."""
  local = experiment.local
  assert local is not None
  block, initial = _block(experiment)
  reference = _reference(experiment)
  checks = []
  for k, name in enumerate(local.names):
    places = {(round, 0): (initial.server.params, ()) for round, _ in REPLAYED}
    for round, steps in REPLAYED:
      before, memory = places[round, steps - 1]
      after = block(k, round, steps).server.params
      where = jnp.int32(round), jnp.int32(steps - 1)
      due, noise, memory = reference(k, where, before, initial.server.state, memory)
      places[round, steps] = after, memory
      passed = _agree(experiment, k, (before, after, noise, due))
      words = f"{name}: step {steps} of round {round + 1} of the run's program, less its noise, is"
      checks.append(
        Check(name=f"{words} the clipped sum of its draw", p_value=float(passed), passed=passed)
      )
  return checks


def _agree(experiment: Experiment, k: int, vectors: tuple[Any, Any, Any, Any]) -> bool:
  """Whether weights moved by the accounted mean gradient with its noise, up to rounding.

  Args:
    experiment: the run.
    k: hospital.
    vectors: weights before and after, noise of standard deviation 1, mean gradient without noise.
  """
  assert experiment.local is not None
  mechanism = experiment.local.mechanisms[k]
  size, bound = mechanism.expected_batch_size, mechanism.clip_norm
  before, after, z, mean = (np.asarray(vector, np.float64) for vector in vectors)
  released = size * (before - after) - mechanism.noise_multiplier * bound * z
  far = float(np.square(released - size * mean).sum())
  large = float(np.square(size * mean).sum())
  most = float(np.square(np.maximum(np.abs(before), np.abs(after))).sum())
  # Weights are float32: what they moved by is known to half a unit in the last place. And a release
  # is a whole number of grains.
  tolerance = TOLERANCE[experiment.config.model.dtype]
  grain = bound * float(grain_of(mechanism.noise_multiplier, size))
  rounding = size * 2.0**-23 * math.sqrt(most) + grain * math.sqrt(before.size)
  return math.sqrt(far) <= tolerance * max(bound, math.sqrt(large)) + rounding


def _block(experiment: Experiment) -> tuple[Any, Any]:
  """((k, round, steps) -> state after so many local steps of hospital k alone, state before)."""
  case = experiment.case
  config = _config(experiment.config, experiment.program.plan)
  shapes = shapes_of([case])._replace(
    steps=np.full(len(case.names), max(steps for _, steps in REPLAYED)),
    shared_steps=None,  # so that hospitals may take none
  )
  devices = experiment.program.devices
  program = make_program(config, case.hospitals.dataset, shapes, devices=devices)
  one, none = jnp.float32(1), jnp.float32(0)
  hyper = experiment.hyper._replace(
    client_learning_rate=one,
    server_learning_rate=one,
    proximal_weight=none,
    ema_decay=none,
    client_level=None,
  )

  def block(k: int, round: int, steps: int) -> Any:
    alone = jnp.arange(len(case.names)) == k
    clients = experiment.clients._replace(
      weight=alone.astype(jnp.float32), num_steps=steps * alone.astype(jnp.int32)
    )
    state = program.initial()
    state = state._replace(server=state.server._replace(round=jnp.int32(round)))
    return program.block(state, clients, experiment.pool, hyper, experiment.key, jnp.int32(1))[0]

  return block, program.initial()


def _config(config: Config, plan: Plan) -> Config:
  """The run's config with plain FedAvg around its private step, laid out as the run is."""
  plain = with_plain_server(config)
  return dataclasses.replace(
    plain,
    client=dataclasses.replace(
      config.client,
      optimizer="sgd",
      momentum=0.0,
      weight_decay=0.0,
      schedule="constant",
      warmup_rounds=0,
    ),
    server=dataclasses.replace(plain.server, momentum=0.0, ema_decay=0.0),
    privacy=dataclasses.replace(config.privacy, clipping=plan.clipping),
    execution=dataclasses.replace(
      config.execution,
      layout=plan.layout,
      chunk_size=plan.chunk if plan.layout == "chunk" else 0,
      lowering=plan.lowering,
      microbatch=plan.microbatch,
      remat="blocks" if plan.remat else "off",
      probe="off",
    ),
  )


def _reference(experiment: Experiment) -> Any:
  """(k, (round, step), params, state, memory) -> the release of the accounted mechanism there.

  That is the mean gradient without noise, the noise of standard deviation 1, and the memory that
  the next step goes on from; () is the memory before the first.
  """
  case, config = experiment.case, experiment.config
  local, shapes = case.protection.local, shapes_of([case])
  assert local is not None
  # Draws of dropout differ between methods of clipping and between sizes of a microbatch.
  plan, dropout = experiment.program.plan, config.model.dropout > 0
  dataset = case.hospitals.dataset
  task, modality = task_named(dataset.task), modality_named(dataset.modality)
  model = create_model(config.model, task.columns(dataset), "native")
  shape = BatchShape(
    slots=shapes.batch_cap,
    max_examples=shapes.max_examples,
    normalisation=scaling_of(modality, config.data),
    augmentation=config.client.augmentation,
    microbatch=plan.microbatch if dropout else min(AT_ONCE, shapes.batch_cap),
    rows_per_unit=shapes.rows_per_unit,
    copies=config.privacy.augmentation_multiplicity,
    modality=modality,
    task=task,
  )
  loss, method = task.loss(config.client.label_smoothing), plan.clipping
  gradient = private_gradient(model, loss, method if dropout else "reference", shape)
  spec = experiment.program.parts.spec

  @jax.jit  # key and images are arguments: constants are written into the compiler's cache
  def step(client, hyper, where, weights, memory, pool, key):
    (round, place), (params, state) = where, weights
    context = StepContext(client=client, pool=pool, hyper=hyper, key=key, round=round, step=place)
    mean, _, memory, _ = gradient(*spec.trees(params, state), memory, context)
    if client.coefficients is None:
      noise_key = key_for(key, Stream.NOISE, client.number, *where)
      return mean, gaussian_noise_like(noise_key, params, 1.0), memory
    return mean, memory.noise[0], memory

  def run(k: int, where: Any, params: Any, state: Any, memory: Any) -> Any:
    client = accounted_client(case, k)
    if memory == () and client.coefficients is not None:
      memory = empty_memory(params.size, len(client.coefficients))
    hyper = experiment.hyper._replace(clip_norm=jnp.float32(local.mechanisms[k].clip_norm))
    return step(client, hyper, where, (params, state), memory, experiment.pool, experiment.key)

  return run


def accounted_client(case: Case, k: int) -> Client:
  """Hospital k by its accounted mechanism, without noise. Nothing of the program is read."""
  protection = case.protection
  assert protection.local is not None
  mechanism, table = protection.local.mechanisms[k], protection.units
  units = None
  if table is not None:
    units = Units(
      starts=jnp.asarray(table.starts[k], jnp.int32),
      sizes=jnp.asarray(table.sizes[k], jnp.int32),
      number=jnp.int32(mechanism.num_units),
    )
  coefficients = None
  if mechanism.bands > 1:
    coefficients = jnp.asarray(mechanism.coefficients, jnp.float32)
  return Client(
    number=jnp.int32(case.numbers[k]),
    indices=jnp.asarray(case.rows.indices[k], jnp.int32),
    num_examples=jnp.int32(case.rows.counts[k]),
    weight=jnp.float32(1),
    num_steps=jnp.int32(1),
    sampling_probability=jnp.float32(mechanism.sampling_probability),
    expected_batch_size=jnp.float32(mechanism.expected_batch_size),
    noise_multiplier=jnp.float32(0),
    units=units,
    coefficients=coefficients,
    batch_cap=jnp.int32(mechanism.batch_cap),
  )
