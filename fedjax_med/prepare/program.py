"""The compiled program of a run, made from its recipe and its plan; it holds no data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.core.config import Config, init_seed
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.modality import preparation
from fedjax_med.federated.algorithm import Pool
from fedjax_med.federated.vector import NetworkSpec
from fedjax_med.models.networks.pretrained import Overlay, overlay
from fedjax_med.models.registry import create_model, has_remat, require_columns, require_read
from fedjax_med.prepare import plan_search
from fedjax_med.prepare.memory import (
  BlockArguments,
  Budget,
  Footprint,
  block_arguments,
  footprint,
  memory_budget,
)
from fedjax_med.prepare.plan import Choice, Plan, describe_padding
from fedjax_med.prepare.probe import Trial, time_steps
from fedjax_med.prepare.recipe import (
  Recipe,
  Shapes,
  clipping_problems,
  lowering_on,
  make_algorithm,
  make_initial,
  make_recipe,
  make_rounds,
  make_training,
  message_bytes,
)
from fedjax_med.simulation.evaluation import make_classify, make_evaluate, make_predict
from fedjax_med.simulation.mesh import Devices, client_mesh, replicated
from fedjax_med.simulation.rounds import SimulationState, jit_block


class Parts(NamedTuple):
  """Functions of one run on a single device, not jitted. A sweep makes its program of them.

  Attributes:
    initial: (seed, pretrained params, pretrained state) -> SimulationState before round 0.
    pretrained: parameters and state that replace the random initialisation; {} without any.
    block: (state, clients, pool, hyper, key, num_rounds) -> (state, BlockMetrics).
    evaluate: (weights, pool, batches) -> probabilities [b, size, classes].
    personal: as that of a ``FederatedAlgorithm``: makes the model that a client predicts with; None
      where all predict with the global one.
    message: bytes that a client gets in a round, and those that it sends.
    spec: spec of the network's vectors.
  """

  initial: Callable[..., SimulationState]
  pretrained: tuple[Any, Any]
  block: Callable[..., Any]
  evaluate: Callable[..., jax.Array]
  personal: Callable[..., tuple[jax.Array, jax.Array]] | None
  message: tuple[int, int]
  spec: NetworkSpec


class Program(NamedTuple):
  """The compiled functions of a run, and facts about them.

  Attributes:
    plan: plan of the program on this machine.
    devices: devices that it runs on; arguments and results of a block lie whole on each of them.
    initial: (seed=the config's) -> SimulationState before round 0, made anew at each call.
    block: a jitted block of rounds.
    parts: functions that the program is made of.
    needs: upper estimate from shapes of the memory of one device in a round, bytes.
    predict: (weights, pool, groups of pool rows) -> class probabilities.
    lower_predict: lowers predict for a compiler; takes the same arguments or their shapes.
    arguments: shapes of the arguments of a block.
    budget: memory that the layout was fitted to.
    origin: origin of pretrained values; empty if all are drawn.
  """

  plan: Plan
  devices: Devices
  initial: Callable[..., SimulationState]
  block: jax.stages.Wrapped
  parts: Parts
  needs: float
  predict: Callable[..., np.ndarray]
  lower_predict: Callable[..., jax.stages.Lowered]
  arguments: BlockArguments
  budget: Budget
  origin: str


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
    devices: devices to run on, unless ``may_share_less``.
    may_share_less: whether fewer devices may be taken to save memory.

  Raises:
    UserError: the network lacks a setting that was given, does not return the columns that are due,
      or the rounds do not fit into the memory budget in any layout that is allowed.
  """
  require_read(config.model)
  recipe = make_recipe(config, dataset, shapes)
  require_columns(recipe.network(False, devices.number), recipe.image, recipe.num_columns)
  # Which clipping covers a model depends on the rows of a batch, so the search settles it.
  remat = config.execution.remat == "blocks"
  first = Choice(devices=devices.number, chunk=1, microbatch=0, remat=remat, clipping="none")
  pretrained = _pretrained(recipe, devices.number)
  # Pretrained values are arguments: constants would be compiled into the program.
  values = pretrained.params, pretrained.state
  initial, seed = make_initial(recipe, first), np.int32(init_seed(config))
  arguments = block_arguments(recipe, dataset, lambda: initial(seed, *values))
  blocks = functools.cache(functools.partial(_jitted_block, recipe, devices))
  problem = _plan_problem(recipe, first, arguments, may_share_less)
  decision = plan_search.decide(
    problem, blocks, functools.partial(_time_chunk, recipe, arguments.pool)
  )
  choice = decision.choice
  devices = _fewer_devices(devices, choice.devices)
  algorithm = make_algorithm(recipe, choice)
  model = recipe.network(False, choice.devices)
  prepare = preparation(recipe.modality, config.data)
  classify = make_classify(model, prepare, recipe.task.predict)
  evaluate = make_evaluate(classify, recipe.spec, algorithm.personal)
  predict, lower_predict = make_predict(
    evaluate, batch_size=config.eval.batch_size, mesh=devices.mesh
  )
  parts = Parts(
    initial=initial,
    pretrained=values,
    block=make_rounds(recipe, choice, None),
    evaluate=evaluate,
    personal=algorithm.personal,
    message=message_bytes(recipe, algorithm, arguments.state.server),
    spec=recipe.spec,
  )
  jitted = jax.jit(initial)
  if devices.mesh is not None:
    jitted = jax.jit(initial, out_shardings=replicated(devices.mesh))
  return Program(
    plan=_plan(recipe, decision, devices),
    devices=devices,
    initial=lambda seed=seed: jitted(seed, *values),
    block=blocks(choice),
    parts=parts,
    needs=decision.needs,
    predict=predict,
    lower_predict=lower_predict,
    arguments=arguments,
    budget=problem.budget,
    origin=pretrained.origin,
  )


def _pretrained(recipe: Recipe, devices: int) -> Overlay:
  """The values of model.pretrained; none where all are drawn."""
  if not recipe.config.model.pretrained:
    return Overlay(params={}, state={}, origin="")
  model = recipe.network(False, devices)
  fresh = jax.eval_shape(model.init, base_key(0), recipe.image)
  return overlay(recipe.config.model.pretrained, *fresh)


def _plan_problem(
  recipe: Recipe, start: Choice, arguments: BlockArguments, may_share_less: bool
) -> plan_search.PlanProblem:
  config, shapes = recipe.config, recipe.shapes
  problems = functools.partial(clipping_problems, recipe, start.devices)
  return plan_search.PlanProblem(
    config=config,
    start=start,
    budget=memory_budget(config.execution.memory_gib),
    cohort=recipe.cohort,
    steps=shapes.steps,
    counts=_subset_sizes(recipe),
    rates=_rates(recipe),
    batch=shapes.batch_cap if recipe.private else config.client.batch_size,
    rows_per_unit=shapes.rows_per_unit * recipe.copies,
    model=_footprint(recipe, start.remat),
    arguments=arguments,
    may_remat=has_remat(config.model, recipe.num_columns),
    may_share_less=may_share_less,
    gathers=recipe.exchange.gathers,
    uncovered=functools.cache(problems),
  )


def _footprint(recipe: Recipe, remat: bool) -> Footprint:
  """Sizes of the model on all images of a unit."""
  # Products hold patches, native convolutions do not: the most that either needs.
  model = create_model(recipe.config.model, recipe.num_columns, "matmul", remat=remat)
  sizes = footprint(model, recipe.image)
  images = recipe.shapes.rows_per_unit * recipe.copies
  whole = sizes.whole_batch or recipe.task.joint != ""
  return sizes._replace(activations=images * sizes.activations, whole_batch=whole)


def _subset_sizes(recipe: Recipe) -> np.ndarray:
  """Units of each client that a step can draw: with correlated noise, those of one subset."""
  return -(-recipe.shapes.counts // recipe.bands)


def _rates(recipe: Recipe) -> np.ndarray:
  """Sampling probability of each client."""
  return np.minimum(1, recipe.config.client.batch_size / _subset_sizes(recipe))


def _jitted_block(recipe: Recipe, devices: Devices, choice: Choice) -> jax.stages.Wrapped:
  mesh = devices.mesh if choice.devices == devices.number else client_mesh(choice.devices)
  return jit_block(make_rounds(recipe, choice, mesh), mesh)


def _time_chunk(recipe: Recipe, pool: Pool, choice: Choice) -> float:
  """Seconds of a local step of one client under a choice, measured."""
  trial = Trial(
    local=make_training(recipe, choice, None),
    pool=pool,
    max_examples=recipe.shapes.max_examples,
    num_examples=int(np.median(recipe.shapes.counts)),
    rate=float(np.median(_rates(recipe))),
    max_units=recipe.shapes.max_units,
    rows_per_unit=recipe.shapes.rows_per_unit,
  )
  return time_steps(trial, choice.chunk)


def _fewer_devices(devices: Devices, number: int) -> Devices:
  """The first ``number`` of the devices."""
  if number == devices.number:
    return devices
  reason = f"devices {number}: {devices.number} exceed the memory"
  return Devices(number=number, mesh=client_mesh(number), reason=reason)


def _plan(recipe: Recipe, decision: plan_search.Decision, devices: Devices) -> Plan:
  choice, server = decision.choice, recipe.config.server
  lowering, lowering_reason = lowering_on(recipe, choice.devices)
  rate = 1.0 if recipe.cohort_cap is None else server.participation_rate
  padding_reason = describe_padding(recipe.shapes.steps, choice.chunk, devices.number, rate)
  return Plan(
    layout=decision.layout,
    chunk=choice.chunk,
    devices=devices.number,
    lowering=lowering,
    clipping=choice.clipping,
    microbatch=choice.microbatch,
    remat=choice.remat,
    dtype=recipe.config.model.dtype,
    reasons=(devices.reason, *decision.reasons, padding_reason, lowering_reason),
  )
