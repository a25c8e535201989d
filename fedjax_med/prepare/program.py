"""The compiled side of a run: model, algorithm and plan, made from shapes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_med.core.config import Config, algorithm_options, init_seed
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.data.dataset import Dataset
from fedjax_med.federated.algorithm import FederatedAlgorithm, ServerState
from fedjax_med.federated.local import (
  LocalTraining,
  local_training,
  plain_gradient,
  private_gradient,
  slots_at_once,
)
from fedjax_med.federated.losses import cross_entropy
from fedjax_med.federated.optimizers import client_optimizer, schedule, server_optimizer
from fedjax_med.federated.registry import create_algorithm
from fedjax_med.models.model import Model
from fedjax_med.models.networks.pretrained import Overlay, overlay
from fedjax_med.models.ops import Lowering
from fedjax_med.models.registry import create_model, has_remat, require_columns, require_read
from fedjax_med.prepare import memory, plan
from fedjax_med.prepare.layout import Choice, Plan, choose_lowering, describe_padding
from fedjax_med.prepare.probe import time_steps
from fedjax_med.prepare.protection import cohort_cap
from fedjax_med.privacy.banded import empty_memory
from fedjax_med.privacy.clipping import uncovered as clipping_problems
from fedjax_med.simulation.evaluation import make_evaluate, make_predict
from fedjax_med.simulation.mesh import Devices, client_mesh, cpu_cores, replicated
from fedjax_med.simulation.processes import least
from fedjax_med.simulation.rounds import (
  SimulationState,
  init_state,
  jit_block,
  make_block,
  make_round,
)


class Parts(NamedTuple):
  """Functions of one run on a single device, not jitted: programs of many runs are made of them.

  Attributes:
    initial: (seed, given params, given state) -> SimulationState before round 0.
    given: params and state that initial values are taken from, {} where all are drawn.
    block: (state, clients, pool, hyper, key, num_rounds) -> (state, BlockMetrics).
    evaluate: (weights, pool, batches) -> probabilities [b, size, classes].
    personal: whether clients predict with models of their own.
    message: float32 values that a client gets in a round, and those that it sends.
  """

  initial: Callable[..., SimulationState]
  given: tuple[Any, Any]
  block: Callable[..., Any]
  evaluate: Callable[..., jax.Array]
  personal: bool
  message: tuple[int, int]


class Program(NamedTuple):
  """The compiled side of a run: it knows shapes, not data.

  Attributes:
    plan: how it is laid out.
    devices: where it runs; what a block gets and returns lies whole on each of them.
    initial: SimulationState before round 0, made anew at each call; of a seed, or the config's.
    block: a jitted block of rounds.
    parts: what it is made of.
    needs: upper estimate from shapes of what one device needs in a round, bytes.
    predict: (weights, pool, groups of pool rows) -> class probabilities.
    lower_predict: lowers predict for a compiler, of the same arguments or their shapes.
    arguments: shapes of what a block is called with.
    budget: memory that the plan kept to.
    origin: where initial values are from; empty if all are drawn.
  """

  plan: Plan
  devices: Devices
  initial: Callable[..., SimulationState]
  block: jax.stages.Wrapped
  parts: Parts
  needs: float
  predict: Callable[..., np.ndarray]
  lower_predict: Callable[..., jax.stages.Lowered]
  arguments: tuple[Any, ...]
  budget: memory.Budget
  origin: str


class Shapes(NamedTuple):
  """Sizes that a program is made for; a run may be smaller, but for ``shared_steps``.

  Attributes:
    steps: [K] local steps a round.
    max_examples: slots of a client's index row.
    shared_steps: local steps a round where all clients take the same number, else None.
    batch_cap: slots of a truncated Poisson batch (private runs).
    counts: units (examples, patients) of each client of each run, for the microbatch.
    max_units: slots of a client's table of units that hold several rows; 0 without such.
    rows_per_unit: rows of a unit that a step looks at.
  """

  steps: np.ndarray
  max_examples: int
  shared_steps: int | None
  batch_cap: int
  counts: np.ndarray
  max_units: int
  rows_per_unit: int


def make_program(
  config: Config,
  dataset: Dataset,
  shapes: Shapes,
  *,
  devices: Devices,
  may_share_less: bool = False,
) -> Program:
  """Builds model, algorithm and compiled functions.

  Args:
    config: validated config.
    dataset: gives image shape and classes.
    shapes: largest sizes of the runs.
    devices: where it is to run, unless ``may_share_less``.
    may_share_less: whether fewer devices may be taken to save memory.

  Raises:
    UserError: the network lacks a setting that was given, does not return the columns that are due,
      or the rounds do not fit into the memory budget, whatever may be changed.
  """
  require_read(config.model)
  steps, max_examples, shared_steps, batch_cap, counts, max_units, rows_per_unit = shapes
  classes, private = len(dataset.class_names), config.privacy.mechanism != "none"
  image = jax.ShapeDtypeStruct((1, *dataset.inputs.shape[1:]), jnp.float32)
  num_clients = len(steps)
  most = cohort_cap(config, num_clients)
  cohort = most or num_clients
  cores = int(least(cpu_cores()))
  loss = cross_entropy(config.client.label_smoothing)
  client, server = config.client, config.server
  client_level = config.client_privacy.mechanism != "none"
  copies = config.privacy.augmentation_multiplicity if private else 1
  bands = config.privacy.bands if private else 1

  def init_memory(params: Any) -> Any:
    return empty_memory(params, bands) if bands > 1 else ()

  places = -(-counts // bands)  # a step draws from one of as many subsets
  rates = np.minimum(1, client.batch_size / places)

  def lowering_on(devices: int) -> tuple[Lowering, str]:
    training = max(1, min(devices, cohort) // jax.process_count())
    return choose_lowering(config.execution.lowering, cores // training)

  @functools.cache
  def model_of(remat: bool, devices: int) -> Model:
    return create_model(config.model, classes, lowering_on(devices)[0], remat=remat)

  @functools.cache
  def uncovered(remat: bool, microbatch: int) -> dict[str, tuple[str, ...]]:
    model = model_of(remat, devices.number)
    params, state = jax.eval_shape(model.init, base_key(0), image)
    rows = slots_at_once(microbatch, batch_cap) * rows_per_unit * copies
    return clipping_problems(model, params, state, image, rows, config.model.dtype)

  def train_as(choice: Choice, shared_steps: int | None) -> LocalTraining:
    shape = {
      "max_examples": max_examples,
      "normalisation": config.data.normalisation,
      "augmentation": client.augmentation,
      "microbatch": choice.microbatch,
    }
    model = model_of(choice.remat, choice.devices)
    if private:
      gradient = private_gradient(
        model,
        loss,
        clipping=choice.clipping,
        batch_cap=batch_cap,
        rows_per_unit=rows_per_unit,
        copies=copies,
        **shape,
      )
    else:
      gradient = plain_gradient(model, loss, batch_size=client.batch_size, **shape)
    return local_training(
      gradient,
      client_optimizer(client.optimizer, client.momentum, client.weight_decay),
      schedule(client.schedule, server.num_rounds, client.warmup_rounds),
      shared_steps,
    )

  def algorithm_as(choice: Choice) -> FederatedAlgorithm:
    return create_algorithm(
      server.algorithm,
      train_as(choice, shared_steps),
      server_optimizer(server.optimizer, server.momentum),
      average=server.ema_decay > 0,
      records=private,
      clients=client_level,
      init_memory=init_memory,
      options=algorithm_options(config, traced=False),
    )

  def rounds_as(choice: Choice, mesh: Mesh | None) -> Callable[..., Any]:
    run_round = make_round(
      algorithm_as(choice),
      num_clients=num_clients,
      cohort_cap=most,
      chunk=choice.chunk,
      mesh=mesh,
      client_level=client_level,
    )
    return make_block(run_round, num_clients, client_level)

  @functools.cache
  def block_as(choice: Choice) -> jax.stages.Wrapped:
    mesh = devices.mesh if choice.devices == devices.number else client_mesh(choice.devices)
    return jit_block(rounds_as(choice, mesh), mesh)

  require_columns(model_of(False, devices.number), image, classes)
  remat = config.execution.remat == "blocks"
  # What runs is settled by the plan: the clipping that covers a model depends on its rows.
  first = Choice(devices=devices.number, chunk=1, microbatch=0, remat=remat, clipping="none")

  given = Overlay({}, {}, "")
  if config.model.pretrained:
    fresh = jax.eval_shape(model_of(False, devices.number).init, base_key(0), image)
    given = overlay(config.model.pretrained, *fresh)

  def initial(seed: Any, given_params: Any, given_state: Any) -> SimulationState:
    key = key_for(base_key(seed), Stream.INIT)
    params, state = model_of(False, devices.number).init(key, jnp.zeros(image.shape, image.dtype))
    params, state = {**params, **given_params}, {**state, **given_state}
    clip_norm = config.client_privacy.clip_norm if client_level else None
    return init_state(algorithm_as(first), params, state, num_clients, clip_norm)

  # Given values are arguments: constants would be compiled into the program.
  values = given.params, given.state
  seed = np.int32(init_seed(config))
  arguments = memory.block_arguments(
    lambda: initial(seed, *values),
    num_clients,
    max_examples,
    dataset,
    memory.hyper_shapes(algorithm_options(config, traced=True), client_level),
    max_units=max_units,
    private=private,
    bands=bands,
  )
  # Products hold patches, native convolutions do not: the most that either needs.
  footprint = memory.footprint(create_model(config.model, classes, "matmul", remat=remat), image)
  footprint = footprint._replace(activations=rows_per_unit * copies * footprint.activations)
  subject = plan.Subject(
    cohort=cohort,
    steps=steps,
    counts=places,
    rates=rates,
    batch=batch_cap if private else client.batch_size,
    rows_per_unit=rows_per_unit * copies,
    model=footprint,
    arguments=arguments,
    may_remat=has_remat(config.model, classes),
    may_share_less=may_share_less,
    uncovered=uncovered,
  )

  def time_chunk(choice: Choice) -> float:
    return time_steps(
      train_as(choice, None).train,
      model_of(remat, choice.devices),
      image,
      choice.chunk,
      max_examples=max_examples,
      num_examples=int(np.median(counts)),
      rate=float(np.median(rates)),
      max_units=max_units,
      rows_per_unit=rows_per_unit,
      bands=bands,
    )

  budget = memory.memory_budget(config.execution.memory_gib)
  layout, choice, needs, reasons = plan.decide(config, subject, first, budget, block_as, time_chunk)
  if choice.devices < devices.number:
    devices = Devices(
      choice.devices,
      client_mesh(choice.devices),
      f"devices {choice.devices}: {devices.number} exceed the memory",
    )
  mesh = devices.mesh
  algorithm = algorithm_as(choice)
  evaluate = make_evaluate(
    model_of(False, choice.devices), config.data.normalisation, algorithm.personal
  )
  parts = Parts(
    initial,
    values,
    rounds_as(choice, None),
    evaluate,
    algorithm.personal is not None,
    _message(algorithm, arguments[0].server),
  )
  initial = jax.jit(initial) if mesh is None else jax.jit(initial, out_shardings=replicated(mesh))
  lowering, lowering_reason = lowering_on(choice.devices)
  rate = 1.0 if most is None else server.participation_rate
  padding_reason = describe_padding(steps, choice.chunk, devices.number, rate)
  reasons = [devices.reason, *reasons, padding_reason, lowering_reason]
  return Program(
    Plan(
      layout,
      choice.chunk,
      devices.number,
      lowering,
      choice.clipping,
      choice.microbatch,
      choice.remat,
      config.model.dtype,
      tuple(reasons),
    ),
    devices,
    lambda seed=seed: initial(seed, *values),
    block_as(choice),
    parts,
    needs,
    *make_predict(evaluate, batch_size=config.eval.batch_size, mesh=mesh),
    arguments,
    budget,
    given.origin,
  )


def _message(algorithm: FederatedAlgorithm, server: ServerState) -> tuple[int, int]:
  """Values that a client gets and sends in a round; non-trained state is not counted."""

  def size(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

  pairs = zip(
    jax.tree.leaves(server.params), jax.tree.leaves(algorithm.at_home(server.params)), strict=True
  )
  shared = size([leaf for leaf, own in pairs if not own])
  return shared + size(server.extra), shared + size(
    jax.eval_shape(algorithm.blank_extra, server.params)
  )
