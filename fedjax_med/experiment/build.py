"""From a validated config to what a run needs: data, model, mechanisms, compiled functions."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config, fingerprint, to_dict
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.data.dataset import ClientTable, Dataset, Hospitals, client_rows, client_table
from fedjax_med.experiment import planning
from fedjax_med.experiment.processes import least
from fedjax_med.federated.algorithm import Client, FederatedAlgorithm, Hyper, Pool
from fedjax_med.federated.local import (
  cross_entropy,
  local_training,
  plain_gradient,
  private_gradient,
)
from fedjax_med.federated.optimizers import client_optimizer, schedule, server_optimizer
from fedjax_med.federated.registry import create_algorithm
from fedjax_med.models.model import Model
from fedjax_med.models.ops import Lowering
from fedjax_med.models.pretrained import Overlay, load_safetensors, overlay
from fedjax_med.models.registry import create_model, has_remat
from fedjax_med.privacy.accounting import resolve_deltas
from fedjax_med.privacy.clipping import resolve_method
from fedjax_med.privacy.clipping import uncovered as clipping_problems
from fedjax_med.privacy.mechanism import PoissonGaussian, batch_size_bound, plan_mechanisms
from fedjax_med.simulation.evaluation import make_predict
from fedjax_med.simulation.mesh import (
  Devices,
  choose_devices,
  client_mesh,
  cpu_cores,
  replicate,
  replicated,
)
from fedjax_med.simulation.plan import Choice, Plan, choose_lowering, describe_padding
from fedjax_med.simulation.rounds import SimulationState, init_state, make_block, make_round


class Program(NamedTuple):
  """The compiled side of a run: it knows shapes, not data.

  Attributes:
    plan: how it is laid out.
    devices: where it runs; what a block gets and returns lies whole on each of them.
    initial: SimulationState before round 0, made anew at each call.
    block: a jitted block of rounds.
    predict: class probabilities of given pool rows.
    lower_predict: lowers predict for a compiler, of the same arguments or their shapes.
    arguments: shapes of what a block is called with.
    budget: memory that the plan kept to.
    origin: where initial values are from; empty if all are drawn.
  """

  plan: Plan
  devices: Devices
  initial: Callable[[], SimulationState]
  block: jax.stages.Wrapped
  predict: Callable[..., np.ndarray]
  lower_predict: Callable[..., jax.stages.Lowered]
  arguments: tuple[Any, ...]
  budget: planning.Budget
  origin: str


class Experiment(NamedTuple):
  """One training run, ready to start: the federation itself or one of its baselines.

  Attributes:
    config: the validated config.
    hospitals: the data; its test table is what every run is measured on.
    names: names of the training clients.
    clients: stacked Client records of the training clients.
    mechanisms: privacy mechanism of each training client, or None without privacy.
    deltas: δ of each training client (empty without privacy).
    steps: [K] int64 local steps a round of each training client.
    hyper: traced hyperparameters.
    pool: all examples on the device.
    key: base key of every random draw but the initial weights.
    program: compiled functions.
    run_id: fingerprint of all that shapes the trajectory; a checkpoint of another one is refused.
  """

  config: Config
  hospitals: Hospitals
  names: tuple[str, ...]
  clients: Client
  mechanisms: tuple[PoissonGaussian, ...] | None
  deltas: tuple[float, ...]
  steps: np.ndarray
  hyper: Hyper
  pool: Pool
  key: jax.Array
  program: Program
  run_id: str


def local_steps(config: Config, counts: np.ndarray) -> np.ndarray:
  """[K] local steps a round: as configured, or epochs · n / batch size, at least 1."""
  client = config.client
  if client.num_local_steps:
    return np.full(len(counts), client.num_local_steps, np.int64)
  batches = client.num_local_epochs * counts / client.batch_size
  # Without privacy an epoch ends with a partial batch; a Poisson epoch is 1/q expected draws.
  steps = np.ceil(batches) if config.privacy.mechanism == "none" else np.round(batches)
  return np.maximum(1, steps).astype(np.int64)


def _mechanisms(
  config: Config, counts: np.ndarray, steps: np.ndarray
) -> tuple[tuple[PoissonGaussian, ...] | None, tuple[float, ...]]:
  privacy = config.privacy
  if privacy.mechanism == "none":
    return None, ()
  mechanisms = plan_mechanisms(
    counts,
    config.client.batch_size,
    steps=steps * config.server.num_rounds,
    clip_norm=privacy.clip_norm,
    batch_cap=privacy.batch_cap,
    noise_multiplier=privacy.noise_multiplier,
    target_epsilon=privacy.target_epsilon,
    delta=privacy.delta,
  )
  return mechanisms, resolve_deltas(counts, privacy.delta)


def _run_id(config: Config, hospitals: Hospitals, rows: ClientTable, names: tuple[str, ...]) -> str:
  """Fingerprint of the trajectory: equal ids mean equal weights after equal rounds.

  To rounding; bit for bit with the same layout, package versions and machine.
  """
  values: dict[str, Any] = to_dict(config)
  # Neither what is measured, nor the layout, nor where files lie changes the trajectory.
  for section, name in (("data", "path"), ("data", "cache_dir"), ("data", "strict")):
    del values[section][name]
  del values["execution"], values["eval"]
  path = values["model"].pop("pretrained")  # its content counts, not its name
  if path:
    values["model"]["pretrained_sha256"] = load_safetensors(path).sha256
  calibrated = config.privacy.target_epsilon > 0 and config.privacy.noise_multiplier == 0
  if config.client.schedule == "constant" and not calibrated:
    del values["server"]["num_rounds"]  # so that 5 rounds and 5 more equal 10
  if not calibrated:
    del values["privacy"]["target_epsilon"]  # a budget: it ends a run, it does not change it
  sha = hashlib.sha256()
  for array in (hospitals.dataset.inputs, hospitals.dataset.labels, rows.indices, rows.counts):
    sha.update(np.ascontiguousarray(array).tobytes())
  return fingerprint({"config": values, "data": sha.hexdigest(), "names": names})


def make_program(
  config: Config,
  dataset: Dataset,
  *,
  devices: Devices,
  steps: np.ndarray,
  max_examples: int,
  shared_steps: int | None,
  batch_cap: int,
  counts: np.ndarray | None = None,
  may_share_less: bool = False,
) -> Program:
  """Builds model, algorithm and compiled functions for clients of at most ``max_examples``.

  Args:
    config: validated config.
    dataset: gives image shape and classes.
    devices: where it is to run, unless ``may_share_less``.
    steps: [K] local steps a round.
    max_examples: slots of a client's index row.
    shared_steps: local steps a round where all clients take the same number, else None.
    batch_cap: slots of a truncated Poisson batch (private runs).
    counts: examples of each client, for the microbatch; None if all hold ``max_examples``.
    may_share_less: whether fewer devices may be taken to save memory.

  Raises:
    UserError: the rounds do not fit into the memory budget, whatever may be changed.
  """
  classes, private = len(dataset.class_names), config.privacy.mechanism != "none"
  image = jax.ShapeDtypeStruct((1, *dataset.inputs.shape[1:]), jnp.float32)
  num_clients = len(steps)
  cohort_cap = _cohort_cap(config, num_clients)
  cohort = cohort_cap or num_clients
  cores = int(least(cpu_cores()))
  loss = cross_entropy(config.client.label_smoothing)
  client, server = config.client, config.server
  counts = np.full(1, max_examples) if counts is None else counts
  rates = np.minimum(1, client.batch_size / counts)

  def lowering_on(devices: int) -> tuple[Lowering, str]:
    training = max(1, min(devices, cohort) // jax.process_count())
    return choose_lowering(config.execution.lowering, cores // training)

  @functools.cache
  def model_of(remat: bool, devices: int) -> Model:
    return create_model(config.model, classes, lowering_on(devices)[0], remat=remat)

  @functools.cache
  def uncovered(remat: bool) -> dict[str, tuple[str, ...]]:
    model = model_of(remat, devices.number)
    params, state = jax.eval_shape(model.init, base_key(0), image)
    return clipping_problems(model, params, state, image, config.model.dtype)

  def train_as(choice: Choice, shared_steps: int | None) -> Callable:
    shape = {
      "max_examples": max_examples,
      "normalisation": config.data.normalisation,
      "microbatch": choice.microbatch,
    }
    model = model_of(choice.remat, choice.devices)
    if private:
      gradient = private_gradient(
        model, loss, clipping=choice.clipping, batch_cap=batch_cap, **shape
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
    )

  @functools.cache
  def block_as(choice: Choice) -> jax.stages.Wrapped:
    mesh = devices.mesh if choice.devices == devices.number else client_mesh(choice.devices)
    run_round = make_round(
      algorithm_as(choice),
      num_clients=num_clients,
      cohort_cap=cohort_cap,
      chunk=choice.chunk,
      mesh=mesh,
    )
    return make_block(run_round, num_clients, mesh)

  remat = config.execution.remat == "blocks"
  clipping, clipping_reason = "none", None
  if private:
    clipping, clipping_reason = resolve_method(config.privacy.clipping, uncovered(remat))

  first = Choice(devices.number, 1, 0, remat, clipping)

  given = Overlay({}, {}, "")
  if config.model.pretrained:
    fresh = jax.eval_shape(model_of(False, devices.number).init, base_key(0), image)
    given = overlay(config.model.pretrained, *fresh)

  def initial(seed: Any, given_params: Any, given_state: Any) -> SimulationState:
    key = key_for(base_key(seed), Stream.INIT)
    params, state = model_of(False, devices.number).init(key, jnp.zeros(image.shape, image.dtype))
    params, state = {**params, **given_params}, {**state, **given_state}
    return init_state(algorithm_as(first), params, state, num_clients)

  # Given values are arguments: constants would be compiled into the program.
  start = np.int32(config.seed), given.params, given.state
  arguments = planning.block_arguments(lambda: initial(*start), num_clients, max_examples, dataset)
  subject = planning.Subject(
    cohort=cohort,
    steps=steps,
    counts=counts,
    rates=rates,
    batch=batch_cap if private else client.batch_size,
    # Products hold patches, native convolutions do not: the most that either needs.
    model=planning.footprint(create_model(config.model, classes, "matmul", remat=remat), image),
    arguments=arguments,
    may_remat=has_remat(config.model, classes),
    may_share_less=may_share_less,
    uncovered=uncovered,
  )

  def time_chunk(choice: Choice) -> float:
    return planning.time_steps(
      train_as(choice, None),
      model_of(remat, choice.devices),
      image,
      choice.chunk,
      max_examples=max_examples,
      num_examples=int(np.median(counts)),
      rate=float(np.median(rates)),
    )

  budget = planning.memory_budget(config.execution.memory_gib)
  layout, choice, reasons = planning.decide(config, subject, first, budget, block_as, time_chunk)
  if choice.devices < devices.number:
    devices = Devices(
      choice.devices,
      client_mesh(choice.devices),
      f"devices {choice.devices}: {devices.number} exceed the memory",
    )
  mesh = devices.mesh
  initial = jax.jit(initial) if mesh is None else jax.jit(initial, out_shardings=replicated(mesh))
  lowering, lowering_reason = lowering_on(choice.devices)
  rate = 1.0 if cohort_cap is None else server.participation_rate
  padding_reason = describe_padding(steps, choice.chunk, devices.number, rate)
  reasons = [devices.reason, *reasons, padding_reason, lowering_reason]
  if clipping_reason is not None:
    same = choice.clipping == clipping
    reasons.append(f"clipping {choice.clipping}: {clipping_reason if same else 'to save memory'}")
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
    lambda: initial(*start),
    block_as(choice),
    *make_predict(
      model_of(False, choice.devices),
      batch_size=config.eval.batch_size,
      normalisation=config.data.normalisation,
      mesh=mesh,
    ),
    arguments,
    budget,
    given.origin,
  )


def _cohort_cap(config: Config, num_clients: int) -> int | None:
  """Most clients of a Poisson cohort (expected + 5 standard deviations), None for all clients."""
  if config.server.participation == "full":
    return None
  return min(num_clients, batch_size_bound(num_clients, config.server.participation_rate, 5))


def _hyper(config: Config) -> Hyper:
  return Hyper(
    *(
      jnp.asarray(value, jnp.float32)
      for value in (
        config.client.learning_rate,
        config.server.learning_rate,
        config.server.proximal_weight,
        config.privacy.clip_norm,
        config.server.ema_decay,
        config.server.participation_rate,
      )
    )
  )


def _stack_clients(
  config: Config,
  rows: ClientTable,
  numbers: np.ndarray,
  steps: np.ndarray,
  mechanisms: tuple[PoissonGaussian, ...] | None,
) -> Client:
  num_clients = len(rows.counts)
  weights = rows.counts if config.server.weighting == "examples" else np.ones(num_clients)
  private = mechanisms or ()
  absent = [0.0] * (0 if private else num_clients)
  return Client(
    number=jnp.asarray(numbers, jnp.int32),
    indices=jnp.asarray(rows.indices, jnp.int32),
    num_examples=jnp.asarray(rows.counts, jnp.int32),
    weight=jnp.asarray(weights / weights.sum(), jnp.float32),
    num_steps=jnp.asarray(steps, jnp.int32),
    sampling_probability=jnp.asarray(
      [m.sampling_probability for m in private] or absent, jnp.float32
    ),
    expected_batch_size=jnp.asarray(
      [m.expected_batch_size for m in private] or absent, jnp.float32
    ),
    noise_multiplier=jnp.asarray([m.noise_multiplier for m in private] or absent, jnp.float32),
  )


def build(config: Config, hospitals: Hospitals) -> Experiment:
  """The federation itself: every hospital is a client."""
  counts = hospitals.train.counts.astype(np.int64)
  numbers = np.arange(len(counts))
  steps = local_steps(config, counts)
  cohort = _cohort_cap(config, len(counts)) or len(counts)
  devices = choose_devices(config.execution.devices, cohort)
  names, table = hospitals.names, hospitals.train
  return _assemble(config, hospitals, names, table, numbers, steps, None, devices)


def _assemble(
  config: Config,
  hospitals: Hospitals,
  names: tuple[str, ...],
  rows: ClientTable,
  numbers: np.ndarray,
  steps: np.ndarray,
  pool: Pool | None,  # None: it is to be made, on as many devices as the plan finds best
  devices: Devices,
) -> Experiment:
  mechanisms, deltas = _mechanisms(config, rows.counts.astype(np.int64), steps)
  run_id = _run_id(config, hospitals, rows, names)
  cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
  dataset = hospitals.dataset
  program = make_program(
    config,
    dataset,
    devices=devices,
    steps=steps,
    max_examples=rows.indices.shape[1],
    shared_steps=int(steps[0]) if (steps == steps[0]).all() else None,
    batch_cap=_batch_cap(mechanisms),
    counts=rows.counts.astype(np.int64),
    # The devices of a CPU share its memory; fewer would save an accelerator nothing.
    may_share_less=pool is None and cpu and config.execution.devices == 0,
  )
  mesh = program.devices.mesh
  if pool is None:
    pool = Pool(replicate(dataset.inputs, mesh), replicate(dataset.labels, mesh))
  return Experiment(
    config,
    hospitals,
    names,
    replicate(_stack_clients(config, rows, numbers, steps, mechanisms), mesh),
    mechanisms,
    deltas,
    steps,
    replicate(_hyper(config), mesh),
    pool,
    replicate(_run_key(config, run_id), mesh),
    program,
    run_id,
  )


def _run_key(config: Config, run_id: str) -> jax.Array:
  """Key of the seed, and of the run where it is private.

  Two private trainings on the same records must not share noise, or their difference has none:
  neither two configurations with the default seed, nor a federation and its baselines.
  """
  key = base_key(config.seed)
  if config.privacy.mechanism == "none":
    return key
  return jax.random.fold_in(key, int(run_id[:8], 16))


def _batch_cap(mechanisms: tuple[PoissonGaussian, ...] | None) -> int:
  return max((mechanism.batch_cap for mechanism in mechanisms or ()), default=0)


def _baseline_config(config: Config) -> Config:
  """A single client needs no server optimiser and takes part in every round."""
  server = dataclasses.replace(
    config.server, optimizer="sgd", learning_rate=1.0, participation="full", proximal_weight=0.0
  )
  return dataclasses.replace(config, server=server)


def _for_one_client(federation: Experiment) -> tuple[Pool, Devices]:
  """Where a single client trains: one device, unless several processes must all take part."""
  pool, devices = federation.pool, federation.program.devices
  if devices.mesh is None or jax.process_count() > 1:
    return pool, devices
  one = Pool(*(leaf.addressable_data(0) for leaf in pool))  # the copy of the first device
  return one, Devices(1, None, "devices 1: there is one client")


def pooled(federation: Experiment) -> Experiment:
  """One model on everyone's data in one place, with as many local steps a round as all together."""
  hospitals = federation.hospitals
  rows = client_table([np.concatenate(client_rows(hospitals.train))])
  number, steps = np.array([len(hospitals.names)]), np.array([federation.steps.sum()])
  config = _baseline_config(federation.config)
  pool, devices = _for_one_client(federation)
  return _assemble(config, hospitals, ("pooled",), rows, number, steps, pool, devices)


def alone(federation: Experiment) -> list[Experiment]:
  """Each hospital by itself, with the same steps and ε; all share one compiled program."""
  hospitals, config = federation.hospitals, _baseline_config(federation.config)
  table = hospitals.train
  pool, devices = _for_one_client(federation)
  put = functools.partial(replicate, mesh=devices.mesh)
  program = make_program(
    config,
    hospitals.dataset,
    devices=devices,
    steps=federation.steps.max(keepdims=True),
    max_examples=table.indices.shape[1],
    shared_steps=None,
    batch_cap=_batch_cap(federation.mechanisms),
    counts=table.counts.astype(np.int64),
  )

  def run(k: int) -> Experiment:
    clients = jax.tree.map(lambda leaf: np.asarray(leaf)[k : k + 1], federation.clients)
    rows = ClientTable(table.indices[k : k + 1], table.counts[k : k + 1])
    names = (hospitals.names[k],)
    run_id = _run_id(config, hospitals, rows, names)
    return federation._replace(
      config=config,
      names=names,
      clients=put(clients._replace(weight=np.ones(1, np.float32))),
      mechanisms=federation.mechanisms and federation.mechanisms[k : k + 1],
      deltas=federation.deltas[k : k + 1],
      steps=federation.steps[k : k + 1],
      hyper=put(_hyper(config)),
      pool=pool,
      key=put(_run_key(config, run_id)),
      program=program,
      run_id=run_id,
    )

  return [run(k) for k in range(len(hospitals.names))]
