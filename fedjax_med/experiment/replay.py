"""A step of the run's own network, images, arrays and key, replayed: less its noise it is a sum.

The program that trains is compiled for one round of one local step at learning rate 1, with the
plan of the run; so what a hospital released is what the global weights moved by. The noise is
computed again from the key, and the sum of clipped gradients from the accounted mechanism, with one
gradient a unit. Any other sampling, clipping, noise, denominator, key or order of clients leaves a
difference.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import ClientPrivacyConfig, Config
from fedjax_med.core.keys import Stream, key_for
from fedjax_med.experiment.build import Case, Experiment, shapes_of
from fedjax_med.experiment.draw_checks import Check
from fedjax_med.experiment.program import make_program
from fedjax_med.federated.algorithm import Client, Units
from fedjax_med.federated.local import StepContext, private_gradient
from fedjax_med.federated.losses import cross_entropy
from fedjax_med.models.registry import create_model
from fedjax_med.privacy.banded import empty_memory
from fedjax_med.privacy.noise import gaussian_noise_like

# Units whose gradients the reference holds at once.
AT_ONCE = 8
# Of the larger of the sum and the clip norm: what rounding of two orders of adding may differ by.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.2}


def replay_checks(experiment: Experiment) -> list[Check]:
  """Whether a replayed step of every hospital, less its noise, is the accounted clipped sum."""
  local = experiment.local
  assert local is not None
  block, initial = _one_step(experiment)
  weights, network_state = initial.server.params, initial.server.state
  reference = _reference(experiment)
  tolerance = TOLERANCE[experiment.config.model.dtype]
  checks = []
  for k, (name, mechanism) in enumerate(zip(local.names, local.mechanisms, strict=True)):
    size, bound = mechanism.expected_batch_size, mechanism.clip_norm
    state, _ = block(k)
    where = key_for(experiment.key, Stream.NOISE, int(experiment.case.numbers[k]), 0, 0)
    noise = gaussian_noise_like(where, weights, 1.0)
    deviation = mechanism.noise_multiplier * bound / mechanism.coefficients[0]
    due = reference(k, weights, network_state)
    far, large, most = 0.0, 0.0, 0.0
    leaves = map(jax.tree.leaves, (weights, state.server.params, noise, due))
    for before, after, z, total in zip(*leaves, strict=True):
      before, after, z, total = (np.asarray(each, np.float64) for each in (before, after, z, total))
      far += float(((size * (before - after) - deviation * z - total * size) ** 2).sum())
      large += float(((total * size) ** 2).sum())
      most += float((np.maximum(np.abs(before), np.abs(after)) ** 2).sum())
    # Weights are float32: what they moved by is known to half a unit in the last place.
    allowed = tolerance * max(bound, math.sqrt(large)) + size * 2.0**-23 * math.sqrt(most)
    passed = math.sqrt(far) <= allowed
    words = f"{name}: a step of the run's program, less its noise, is the clipped sum of its draw"
    checks.append(Check(words, float(passed), passed))
  return checks


def _one_step(experiment: Experiment) -> tuple[Any, Any]:
  """(k -> (state, metrics) after one local step of hospital k alone, the state before it)."""
  case, plan = experiment.case, experiment.program.plan
  config = _config(experiment.config, plan)
  shapes = shapes_of([case])._replace(
    steps=np.ones(len(case.names), np.int64),
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

  def block(k: int) -> Any:
    alone = jnp.arange(len(case.names)) == k
    clients = experiment.clients._replace(
      weight=alone.astype(jnp.float32), num_steps=alone.astype(jnp.int32)
    )
    return program.block(
      program.initial(), clients, experiment.pool, hyper, experiment.key, jnp.int32(1)
    )

  return block, program.initial()


def _config(config: Config, plan: Any) -> Config:
  """The run's config with plain FedAvg around its private step, laid out as the run is."""
  return dataclasses.replace(
    config,
    client=dataclasses.replace(
      config.client,
      optimizer="sgd",
      momentum=0.0,
      weight_decay=0.0,
      schedule="constant",
      warmup_rounds=0,
      num_local_steps=1,
    ),
    server=dataclasses.replace(
      config.server,
      algorithm="fedavg",
      optimizer="sgd",
      momentum=0.0,
      participation="full",
      ema_decay=0.0,
    ),
    client_privacy=ClientPrivacyConfig(),
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
  """(k, params, state) -> clipped sum of the units drawn, over q·n, of the accounted mechanism."""
  case, config = experiment.case, experiment.config
  local, shapes = case.protection.local, shapes_of([case])
  assert local is not None
  # Draws of dropout differ between methods of clipping and between sizes of a microbatch.
  plan, dropout = experiment.program.plan, config.model.dropout > 0
  model = create_model(config.model, len(case.hospitals.dataset.class_names), "native")
  gradient = private_gradient(
    model,
    cross_entropy(config.client.label_smoothing),
    clipping=plan.clipping if dropout else "reference",
    batch_cap=shapes.batch_cap,
    max_examples=shapes.max_examples,
    normalisation=config.data.normalisation,
    augmentation=config.client.augmentation,
    rows_per_unit=shapes.rows_per_unit,
    copies=config.privacy.augmentation_multiplicity,
    microbatch=plan.microbatch if dropout else min(AT_ONCE, shapes.batch_cap),
  )

  @jax.jit
  def step(client, hyper, params, state):
    bands = client.coefficients
    memory = () if bands is None else empty_memory(params, len(bands))
    first = jnp.int32(0)
    context = StepContext(client, experiment.pool, hyper, experiment.key, first, first)
    return gradient(params, state, memory, context)[0]

  def run(k: int, params: Any, state: Any) -> Any:
    hyper = experiment.hyper._replace(clip_norm=jnp.float32(local.mechanisms[k].clip_norm))
    return step(accounted_client(case, k), hyper, params, state)

  return run


def accounted_client(case: Case, k: int) -> Client:
  """Hospital k as its accounted mechanism has it, without noise; of the program nothing is read."""
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
