"""The recipe of a run: its computation, made from a config and shapes, without a plan.

The functions take the recipe and a ``Choice`` of the plan, and return parts of the compiled
program. Results depend on the recipe alone; the plan changes them by rounding only.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_med.core.config import Config, algorithm_options
from fedjax_med.core.errors import require
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.modality import Modality, modality_named, scaling_of
from fedjax_med.exchange.compression.registry import require_size
from fedjax_med.exchange.registry import Exchange, make_exchange
from fedjax_med.exchange.transform import Wire
from fedjax_med.federated.algorithm import FederatedAlgorithm, ServerState
from fedjax_med.federated.local import (
  BatchShape,
  Gradient,
  LocalTraining,
  local_training,
  plain_gradient,
  private_gradient,
  slots_at_once,
)
from fedjax_med.federated.optimizers import client_optimizer, schedule, server_optimizer
from fedjax_med.federated.registry import create_algorithm
from fedjax_med.federated.vector import NetworkSpec, network_spec, ravel
from fedjax_med.models.model import Model
from fedjax_med.models.ops import Lowering
from fedjax_med.models.registry import create_model, require_inputs
from fedjax_med.prepare.plan import Choice, choose_holding, choose_lowering
from fedjax_med.prepare.protection import cohort_cap
from fedjax_med.privacy.clipping import uncovered
from fedjax_med.simulation.mesh import cpu_cores
from fedjax_med.simulation.processes import least
from fedjax_med.simulation.rounds import SimulationState, init_state, make_block, make_round
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Task


class Shapes(NamedTuple):
  """Largest sizes of the runs that share a program; ``shared_steps`` is exact.

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


class Recipe(NamedTuple):
  """The computation of a run.

  Attributes:
    config: validated config.
    shapes: largest sizes of the runs that share the program.
    task: kind of prediction.
    modality: kind of example.
    num_columns: outputs of the network for an example.
    image: shape of one image [1, H, W, C] float32, as the network sees it.
    cohort_cap: most clients of a drawn cohort; None if everyone takes part.
    cores: cores of a CPU, the fewest of all processes.
    network: (remat, devices) -> Model. The lowering of convolutions depends on the devices.
    spec: spec of the network's vectors.
  """

  config: Config
  shapes: Shapes
  task: Task
  modality: Modality
  num_columns: int
  image: jax.ShapeDtypeStruct
  cohort_cap: int | None
  cores: int
  network: Callable[[bool, int], Model]
  spec: NetworkSpec

  @property
  def num_clients(self) -> int:
    """Number of clients, K."""
    return len(self.shapes.steps)

  @property
  def cohort(self) -> int:
    """Most clients that train in a round."""
    return self.cohort_cap or self.num_clients

  @property
  def private(self) -> bool:
    """Whether records or patients are protected (DP-SGD)."""
    return self.config.privacy.mechanism != "none"

  @property
  def exchange(self) -> Exchange:
    """Transforms and aggregator of updates."""
    return make_exchange(self.config, self.num_clients)

  @property
  def client_level(self) -> bool:
    """Whether whole hospitals are protected (DP-FedAvg)."""
    return self.config.client_privacy.mechanism != "none"

  @property
  def copies(self) -> int:
    """Random changes of an image that a private step sees."""
    return self.config.privacy.augmentation_multiplicity if self.private else 1

  @property
  def bands(self) -> int:
    """Steps that noise is correlated over; 1 if the noise of steps is independent."""
    return self.config.privacy.bands if self.private else 1


def make_recipe(config: Config, dataset: Dataset, shapes: Shapes) -> Recipe:
  """The recipe of runs of at most these shapes. The dataset gives image shape and classes."""
  cap, cores = cohort_cap(config, len(shapes.steps)), int(least(cpu_cores()))
  task, modality = task_named(dataset.task), modality_named(dataset.modality)
  num_columns, cohort = task.columns(dataset), cap or len(shapes.steps)
  require(
    config.client.augmentation == "none"
    or (modality.vary is not None and config.client.augmentation in modality.vary.kinds),
    f"client.augmentation={config.client.augmentation} changes no {modality.name}",
    "use client.augmentation=none",
  )

  require_inputs(config.model.name, dataset.inputs.shape[1:], modality.nouns)

  @functools.cache
  def network(remat: bool, devices: int) -> Model:
    lowering, _ = _lowering(config, cohort, cores, devices)
    return create_model(config.model, num_columns, lowering, remat=remat)

  image = jax.ShapeDtypeStruct((1, *dataset.inputs.shape[1:]), jnp.float32)
  fresh = jax.eval_shape(create_model(config.model, num_columns).init, base_key(0), image)
  spec = network_spec(*fresh)
  require_size(config.compression, spec.params.size)
  return Recipe(
    config=config,
    shapes=shapes,
    task=task,
    modality=modality,
    num_columns=num_columns,
    image=image,
    cohort_cap=cap,
    cores=cores,
    network=network,
    spec=spec,
  )


def _lowering(config: Config, cohort: int, cores: int, devices: int) -> tuple[Lowering, str]:
  training = max(1, min(devices, cohort) // jax.process_count())
  return choose_lowering(config.execution.lowering, cores // training)


def lowering_on(recipe: Recipe, devices: int) -> tuple[Lowering, str]:
  """Returns (lowering of convolutions, reason) for clients that are dealt over ``devices``."""
  return _lowering(recipe.config, recipe.cohort, recipe.cores, devices)


def clipping_problems(recipe: Recipe, devices: int, remat: bool, microbatch: int) -> Any:
  """Reasons why a clipping method cannot be trusted with this network and batch, by method."""
  model, shapes = recipe.network(remat, devices), recipe.shapes
  params, state = jax.eval_shape(model.init, base_key(0), recipe.image)
  slots = slots_at_once(microbatch, shapes.batch_cap)
  rows = slots * shapes.rows_per_unit * recipe.copies
  return uncovered(model, params, state, recipe.image, rows, recipe.config.model.dtype)


def make_gradient(recipe: Recipe, choice: Choice) -> Gradient:
  """The gradient of a local step, private where the config says so."""
  config, shapes = recipe.config, recipe.shapes
  model = recipe.network(choice.remat, choice.devices)
  loss = recipe.task.loss(config.client.label_smoothing)
  shape = BatchShape(
    slots=shapes.batch_cap if recipe.private else config.client.batch_size,
    max_examples=shapes.max_examples,
    normalisation=scaling_of(recipe.modality, config.data),
    augmentation=config.client.augmentation,
    microbatch=choice.microbatch,
    rows_per_unit=shapes.rows_per_unit,
    copies=recipe.copies,
    modality=recipe.modality,
    task=recipe.task,
  )
  if not recipe.private:
    return plain_gradient(model, loss, shape)
  return private_gradient(model, loss, choice.clipping, shape)


def make_training(recipe: Recipe, choice: Choice, shared_steps: int | None) -> LocalTraining:
  """The local steps of a client in a round: ``shared_steps``, or the client's number if None."""
  client = recipe.config.client
  return local_training(
    make_gradient(recipe, choice),
    client_optimizer(client.optimizer, client.momentum, client.weight_decay),
    schedule(client.schedule, recipe.config.server.num_rounds, client.warmup_rounds),
    shared_steps,
    recipe.spec,
    bands=recipe.bands,
    holding=choose_holding(recipe.private),
  )


def make_algorithm(recipe: Recipe, choice: Choice) -> FederatedAlgorithm:
  """The federated algorithm of the config."""
  server = recipe.config.server
  return create_algorithm(
    server.algorithm,
    make_training(recipe, choice, recipe.shapes.shared_steps),
    server_optimizer(server.optimizer, server.momentum),
    average=server.ema_decay > 0,
    records=recipe.private,
    clients=recipe.client_level,
    options=algorithm_options(recipe.config, traced=False),
  )


def make_rounds(recipe: Recipe, choice: Choice, mesh: Mesh | None) -> Callable[..., Any]:
  """A block of rounds, not jitted; see ``simulation.rounds.make_block``."""
  run_round = make_round(
    make_algorithm(recipe, choice),
    num_clients=recipe.num_clients,
    cohort_cap=recipe.cohort_cap,
    chunk=choice.chunk,
    mesh=mesh,
    exchange=recipe.exchange,
  )
  goes_on = recipe.client_level or recipe.exchange.goes_on
  return make_block(run_round, recipe.num_clients, goes_on)


def make_initial(recipe: Recipe, choice: Choice) -> Callable[..., SimulationState]:
  """Builds ``initial(seed, pretrained params, pretrained state)``, the state before round 0."""
  model = recipe.network(False, choice.devices)

  def initial(seed: Any, pretrained_params: Any, pretrained_state: Any) -> SimulationState:
    key = key_for(base_key(seed), Stream.INIT)
    params, state = model.init(key, jnp.zeros(recipe.image.shape, recipe.image.dtype))
    if recipe.task.zero_head and "head" in params:
      params = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    params, state = {**params, **pretrained_params}, {**state, **pretrained_state}
    algorithm = make_algorithm(recipe, choice)
    return init_state(algorithm, ravel(params), ravel(state), recipe.num_clients, recipe.exchange)

  return initial


def message_bytes(
  recipe: Recipe, algorithm: FederatedAlgorithm, server: ServerState
) -> tuple[int, int]:
  """Bytes of the packed messages that a client gets and sends in a round."""

  def size(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

  def wire(tree: Any, apart: int = 0) -> Wire:
    numbers = size(tree)
    return Wire(dense=numbers, sent=numbers, apart=apart)

  exchange, sent = recipe.exchange, jax.eval_shape(algorithm.blank_delta, server)
  up = exchange.transform.wire(wire(sent, size((sent.state, sent.extra))))
  # What stays at a hospital is not sent down either.
  weights, rest = wire(sent.params), wire((sent.state, server.extra))
  if exchange.download is not None:
    weights = exchange.download.wire(weights)
  return weights.size + rest.size + up.answer, up.size
