"""Makes a run of a validated config: its data, mechanisms, arrays and compiled functions."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedjax_med.core.config import Config, algorithm_options
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import (
  Dataset,
  Hospitals,
  real_counts,
)
from fedjax_med.data.poisoning import hostile_hospitals
from fedjax_med.exchange.fixed_point import Grid, choose_grid
from fedjax_med.exchange.registry import exchange_numbers, make_exchange
from fedjax_med.federated.algorithm import Client, Hyper, Pool, Units
from fedjax_med.prepare.accounted_arrays import differences, larger_updates, require_accounted
from fedjax_med.prepare.case import Case, baselines, federation
from fedjax_med.prepare.deployment import late
from fedjax_med.prepare.program import Program, make_program
from fedjax_med.prepare.protection import Protection, cohort_cap, require_a_round
from fedjax_med.prepare.recipe import Shapes
from fedjax_med.prepare.run_id import Identity, identify
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.privacy.distributed import DistributedGaussian, make_shares
from fedjax_med.privacy.guarantees import Guarantee
from fedjax_med.simulation.mesh import Devices, choose_devices, replicate
from fedjax_med.tasks.registry import task_named


class Experiment(NamedTuple):
  """One training run, ready to start.

  Attributes:
    case: definition of the run.
    clients: stacked Client records of the training clients.
    hyper: traced hyperparameters.
    pool: all examples on the device.
    key: base key of every random draw but the initial weights.
    program: compiled functions.
    start: row of the pool that its images begin at.
  """

  case: Case
  clients: Client
  hyper: Hyper
  pool: Pool
  key: jax.Array
  program: Program
  start: int = 0

  @property
  def config(self) -> Config:
    """The validated config."""
    return self.case.config

  @property
  def hospitals(self) -> Hospitals:
    """The data."""
    return self.case.hospitals

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the training clients."""
    return self.case.names

  @property
  def steps(self) -> np.ndarray:
    """[K] int64 local steps a round of each training client."""
    return self.case.protection.steps

  @property
  def local(self) -> Guarantee | None:
    """Guarantee of the records or patients of each training client, or None."""
    return self.case.protection.local

  @property
  def central(self) -> Guarantee | None:
    """Guarantee of a client as a whole, or None."""
    return self.case.protection.central

  @property
  def grid(self) -> Grid | None:
    """The whole numbers that updates are sent as; None if they are sent as they are."""
    config, central = self.config, self.central
    if config.secure.protocol == "none":
      return None
    if central is None or not isinstance(central.mechanisms[0], DistributedGaussian):
      return choose_grid(config, len(self.names))
    shares = central.mechanisms[0]
    return Grid(
      bits=config.secure.bits,
      range=shares.clip_norm,
      scale=shares.scale,
      extra_range=0.0,
      extra_scale=0.0,
      num_clients=shares.num_units,
    )

  @property
  def goes_on(self) -> bool:
    """Whether the run goes on after a message that is not finite, which then counts nothing."""
    exchange = make_exchange(self.config, len(self.names))
    return self.central is not None or exchange.goes_on

  @property
  def run_id(self) -> str:
    """Fingerprint of the trajectory."""
    return self.case.run_id

  @property
  def guarantees(self) -> tuple[Guarantee, ...]:
    """Guarantees of the run, the local one first."""
    return self.case.guarantees


def _hyper(config: Config, protection: Protection) -> Hyper:
  def scalar(value: float) -> jax.Array:
    return jnp.asarray(value, jnp.float32)

  level = None
  if protection.central is not None:
    (mechanism,) = protection.central.mechanisms
    client = config.client_privacy
    adaptive = client.clipping == "adaptive"
    level = ClientLevel(
      noise_multiplier=scalar(mechanism.sum_noise_multiplier),
      expected_cohort=scalar(mechanism.expected_batch_size),
      count_noise=scalar(mechanism.count_noise),
      quantile=scalar(client.quantile),
      clip_learning_rate=scalar(client.clip_learning_rate if adaptive else 0.0),
      shares=make_shares(mechanism) if isinstance(mechanism, DistributedGaussian) else None,
    )
  options = algorithm_options(config, traced=True)
  return Hyper(
    client_learning_rate=scalar(config.client.learning_rate),
    server_learning_rate=scalar(config.server.learning_rate),
    proximal_weight=scalar(config.server.proximal_weight),
    clip_norm=scalar(config.privacy.clip_norm),
    ema_decay=scalar(config.server.ema_decay),
    participation_rate=scalar(config.server.participation_rate),
    algorithm={name: scalar(value) for name, value in options.items()},
    client_level=level,
    exchange={name: scalar(value) for name, value in exchange_numbers(config).items()},
  )


def _stack_clients(case: Case, shapes: Shapes) -> Client:
  config, rows, protection = case.config, case.rows, case.protection
  num_clients, table = len(rows.counts), protection.units

  def padded(table: np.ndarray, width: int, fill: int) -> jax.Array:
    pad = ((0, 0), (0, width - table.shape[1]))
    return jnp.asarray(np.pad(table, pad, constant_values=fill), jnp.int32)

  # How many images a patient has is no public number, as how many patients there are is. Synthetic
  # images say no more of patients than those they are made from, and give a hospital no weight.
  real = real_counts(rows, case.hospitals.dataset.num_real)
  sizes = real if table is None else table.counts
  weights = sizes if config.server.weighting == "examples" else np.ones(num_clients)
  private = protection.local.mechanisms if protection.local else ()
  absent = [0.0] * (0 if private else num_clients)
  coefficients = None
  if config.privacy.bands > 1:
    coefficients = jnp.asarray([m.coefficients for m in private], jnp.float32)
  hostile = None
  if exchange_numbers(config):
    hostile = jnp.asarray(hostile_hospitals(config, case.names))
  units = None
  if table is not None:
    units = Units(
      starts=padded(table.starts, shapes.max_units, 0),
      sizes=padded(table.sizes, shapes.max_units, 1),
      number=jnp.asarray(table.counts, jnp.int32),
    )
  return Client(
    number=jnp.asarray(case.numbers, jnp.int32),
    indices=padded(rows.indices, shapes.max_examples, 0),
    num_examples=jnp.asarray(rows.counts, jnp.int32),
    weight=jnp.asarray(weights / weights.sum(), jnp.float32),
    num_steps=jnp.asarray(protection.steps, jnp.int32),
    sampling_probability=jnp.asarray(
      [m.sampling_probability for m in private] or absent, jnp.float32
    ),
    expected_batch_size=jnp.asarray(
      [m.expected_batch_size for m in private] or absent, jnp.float32
    ),
    noise_multiplier=jnp.asarray([m.noise_multiplier for m in private] or absent, jnp.float32),
    units=units,
    coefficients=coefficients,
    batch_cap=jnp.asarray([m.batch_cap for m in private], jnp.int32) if private else None,
    hostile=hostile,
  )


def build(config: Config, hospitals: Hospitals, secret: bytes | None = None) -> Experiment:
  """The federation itself: every hospital is a client; ``secret`` as in ``federation``."""
  case = federation(config, hospitals, secret)
  require_a_round(case.protection)  # a point of a sweep and a baseline may end at once
  program, shapes = make_shared_program([case])
  mesh, dataset = program.devices.mesh, hospitals.dataset
  return make_experiment(case, program, shapes, replicate(host_pool(dataset), mesh), mesh)


def host_pool(dataset: Dataset) -> Pool:
  """The examples of a dataset and their targets, on the host."""
  return Pool(inputs=dataset.inputs, labels=task_named(dataset.task).targets(dataset))


def make_shared_program(cases: Sequence[Case]) -> tuple[Program, Shapes]:
  """One program for several cases, which differ in nothing that a program is made from."""
  config, num_clients = cases[0].config, len(cases[0].names)
  devices = choose_devices(config.execution.devices, cohort_cap(config, num_clients) or num_clients)
  cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
  shapes = shapes_of(cases)
  # The devices of a CPU share its memory; fewer would save an accelerator nothing.
  may_share_less = cpu and config.execution.devices == 0
  dataset = max((case.hospitals.dataset for case in cases), key=lambda each: len(each.labels))
  program = make_program(config, dataset, shapes, devices=devices, may_share_less=may_share_less)
  return program, shapes


def make_experiment(
  case: Case, program: Program, shapes: Shapes, pool: Pool, mesh: Mesh | None, start: int = 0
) -> Experiment:
  """The run of a case by a program of at least its shapes, on images that are on the device.

  Its images begin at row ``start`` of the pool.
  """
  clients, hyper = _stack_clients(case, shapes), _hyper(case.config, case.protection)
  behind = late(case.config, case.names, program.parts.message, case.protection.steps)
  if behind is not None:
    clients = clients._replace(late=jnp.asarray(behind))
  found = differences(case.protection, case.numbers, case.rows, clients, hyper)
  size = program.arguments.state.server.params.size
  require_accounted(found + larger_updates(case.protection, size))
  return Experiment(
    case=case,
    clients=replicate(clients._replace(indices=clients.indices + start), mesh),
    hyper=replicate(hyper, mesh),
    pool=pool,
    key=replicate(_run_key(case.config.seed, case.identity), mesh),
    program=program,
    start=start,
  )


def shapes_of(cases: Sequence[Case]) -> Shapes:
  """The largest sizes of several cases."""
  steps = np.stack([case.protection.steps for case in cases])
  units = [case.protection.units for case in cases]
  tables = [table for table in units if table is not None]
  counts = [
    case.rows.counts if table is None else table.counts
    for case, table in zip(cases, units, strict=True)
  ]
  # No more slots than the largest subset that a step draws from: a cap above it cuts nothing.
  places = -(-max(int(each.max()) for each in counts) // cases[0].config.privacy.bands)
  return Shapes(
    steps=steps.max(0),
    max_examples=max(case.rows.indices.shape[1] for case in cases),
    shared_steps=int(steps.flat[0]) if (steps == steps.flat[0]).all() else None,
    batch_cap=min(places, max(_batch_cap(case.protection.local) for case in cases)),
    counts=np.concatenate(counts).astype(np.int64),
    max_units=max((table.starts.shape[1] for table in tables), default=0),
    rows_per_unit=cases[0].protection.rows_per_unit,
  )


def _run_key(seed: int, identity: Identity) -> jax.Array:
  """Key of the seed, and of the run where it is private.

  Two private trainings on the same records must not share noise, or their difference has none:
  neither two configurations with the default seed, nor a federation and its baselines.
  """
  key = base_key(seed)
  for word in identity.words:
    key = jax.random.fold_in(key, np.uint32(word))
  return key


def run_key(experiment: Experiment, seed: int) -> jax.Array:
  """Key of the same run with another seed, as ``build`` would give it with the same secret."""
  case = experiment.case
  config = dataclasses.replace(case.config, seed=seed)
  identity = identify(config, case.hospitals, case.names, case.table, case.guarantees, case.secret)
  return _run_key(seed, identity)


def _batch_cap(local: Guarantee | None) -> int:
  return max((mechanism.batch_cap for mechanism in local.mechanisms), default=0) if local else 0


def build_baselines(federation: Experiment) -> dict[str, Experiment]:
  """The baselines of a run; hospitals by themselves share one compiled program."""
  cases = baselines(federation.case)
  pool, devices = federation.pool, federation.program.devices
  # One client trains on one device, unless several processes must all take part.
  if devices.mesh is not None and jax.process_count() == 1:
    pool = jax.tree.map(lambda leaf: leaf.addressable_data(0), pool)  # the copy of the first device
    devices = Devices(number=1, mesh=None, reason="devices 1: there is one client")

  def built(names: Sequence[str]) -> dict[str, Experiment]:
    own = [cases[name] for name in names]
    shapes = shapes_of(own)
    program = make_program(own[0].config, own[0].hospitals.dataset, shapes, devices=devices)
    mesh = program.devices.mesh
    return {name: make_experiment(cases[name], program, shapes, pool, mesh) for name in names}

  *solo, together = cases
  return built(solo) | built([together])
