"""Everything that defines one run, and its baselines, before anything is compiled."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import ClientPrivacyConfig, Config
from fedjax_med.core.errors import require
from fedjax_med.core.exchange_sections import (
  AttackConfig,
  CompressionConfig,
  CostConfig,
  RobustConfig,
  SecureConfig,
)
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import (
  ClientTable,
  Dataset,
  Hospitals,
  UnitTable,
  client_rows,
  client_table,
)
from fedjax_med.data.modality import modality_named
from fedjax_med.data.patients import described
from fedjax_med.data.poisoning import POISONS, hostile_hospitals
from fedjax_med.exchange.distributed_noise import is_distributed
from fedjax_med.exchange.registry import make_exchange
from fedjax_med.federated.registry import require_rules
from fedjax_med.folder import secret as secrets
from fedjax_med.models.registry import create_model, require_inputs
from fedjax_med.prepare.deployment import links_of
from fedjax_med.prepare.protection import Protection, protect
from fedjax_med.prepare.run_id import Identity, identify
from fedjax_med.privacy.guarantees import Guarantee
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Task


class Case(NamedTuple):
  """Everything that defines one run, before anything is compiled.

  It is the federation or one of its baselines.

  Attributes:
    config: the validated config, with the value that ``privacy.solve_for`` finds filled in.
    hospitals: the data. Every run is measured on their test table.
    names: names of the K training clients.
    rows: rows of each client, in the order of ``protection.units``.
    numbers: [K] numbers of the clients in random keys.
    protection: the mechanisms, and the local steps a round.
    identity: the run's id and the words of its random keys; a checkpoint of another id is refused.
    secret: the secret of a private run (folder/secret.py); b"" without privacy.
    table: arrays of the rows of each client, for the identity.
  """

  config: Config
  hospitals: Hospitals
  names: tuple[str, ...]
  rows: ClientTable
  numbers: np.ndarray
  protection: Protection
  identity: Identity
  secret: bytes
  table: list[np.ndarray]

  @property
  def run_id(self) -> str:
    """Fingerprint of the trajectory."""
    return self.identity.run_id

  @property
  def guarantees(self) -> tuple[Guarantee, ...]:
    """The guarantees of the run, the local one first."""
    return self.protection.guarantees


def federation(config: Config, hospitals: Hospitals, secret: bytes | None = None) -> Case:
  """The case in which every hospital is a client.

  ``secret`` is the secret of a private run. None draws one, so that no other run has its noise.

  Raises:
    UserError: patients are to be protected and a file's name does not say its patient.
  """
  require_rules(config)
  make_exchange(config, len(hospitals.names))
  links_of(config, len(hospitals.names))
  hostile_hospitals(config, hospitals.names)  # raises UserError for a name that is unknown
  # Data that another caller dealt must not pass for poisoned ones.
  assert bool(hospitals.poisoned) == (config.attack.kind in POISONS)
  _require_single_losses(config, task_named(hospitals.dataset.task))
  modality = modality_named(hospitals.dataset.modality)
  require(
    config.privacy.unit != "group" or modality.keeps_copies,
    f"privacy.unit='group' protects near-duplicates, which {modality.nouns} have not",
    "use privacy.unit=patient with a patient column, or privacy.unit=record",
  )
  counts, images = hospitals.dataset.patient_counts, hospitals.dataset.num_real
  require(
    config.privacy.unit != "patient" or (counts is not None and counts.named == images),
    f"privacy.unit='patient' needs to know who is on every {modality.noun}:"
    f" {described(counts, images, hospitals.by_site, modality.nouns)}".removesuffix("."),
    "name the patients with data.patient_pattern, {patient} in data.layout or a manifest, or use"
    " privacy.unit=group, which protects groups of near-duplicates"
    if modality.keeps_copies
    else "name the column of the patient in data.columns or the manifest, or use"
    " privacy.unit=record",
  )
  require(
    config.privacy.unit != "patient" or counts is None or counts.patients < images,
    f"privacy.unit='patient': the names ({counts and counts.source}) make each of {images}"
    f" {modality.nouns} a patient of its own",
    "mend the pattern, or use privacy.unit=record if no patient has two",
  )
  private = secrets.is_private(config)
  secret = (secrets.draw() if secret is None else secret) if private else b""
  numbers = np.arange(len(hospitals.names))
  return _case(config, hospitals, hospitals.names, hospitals.train, numbers, secret)


def _require_single_losses(config: Config, task: Task) -> None:
  """Raises UserError where a step needs losses of single examples, and the task has none."""
  mechanism, microbatch = config.privacy.mechanism, config.execution.microbatch
  require(
    task.joint == "" or mechanism == "none",
    f"privacy.mechanism='{mechanism}' with the task '{task.name}': {task.joint}, so that clipping"
    " one example's gradient does not bound its influence",
    "use a loss of single examples (data.survival=hazards), or client_privacy.mechanism=dp_fedavg",
  )
  require(
    task.joint == "" or microbatch == 0,
    f"execution.microbatch={microbatch} with the task '{task.name}': {task.joint}, and would be of"
    " a microbatch only",
    "use execution.microbatch=0",
  )


def _case(
  config: Config,
  hospitals: Hospitals,
  names: tuple[str, ...],
  rows: ClientTable,
  numbers: np.ndarray,
  secret: bytes,
  steps: np.ndarray | None = None,  # None: as configured
  place: str = "federation",
) -> Case:
  size = _update_size(config, hospitals.dataset) if is_distributed(config) else 0
  protection = protect(config, names, rows, hospitals.split.units, steps, place, size)
  rows = rows if protection.units is None else protection.units.rows
  return _identified(hospitals, names, rows, numbers, protection, secret)


def _update_size(config: Config, dataset: Dataset) -> int:
  """Numbers of an update at most: all weights of the network."""
  require_inputs(
    config.model.name, dataset.inputs.shape[1:], modality_named(dataset.modality).nouns
  )
  model = create_model(config.model, task_named(dataset.task).columns(dataset))
  image = jax.ShapeDtypeStruct((1, *dataset.inputs.shape[1:]), jnp.float32)
  params, _ = jax.eval_shape(model.init, base_key(0), image)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _identified(
  hospitals: Hospitals,
  names: tuple[str, ...],
  rows: ClientTable,
  numbers: np.ndarray,
  protection: Protection,
  secret: bytes,
) -> Case:
  config, table = protection.config, _tables(rows, protection)
  identity = identify(config, hospitals, names, table, protection.guarantees, secret)
  return Case(
    config=config,
    hospitals=hospitals,
    names=names,
    rows=rows,
    numbers=numbers,
    protection=protection,
    identity=identity,
    secret=secret,
    table=table,
  )


def _tables(rows: ClientTable, protection: Protection) -> list[np.ndarray]:
  units = protection.units
  return [rows.indices, rows.counts, *([] if units is None else [units.starts, units.sizes])]


def baselines(federation: Case) -> dict[str, Case]:
  """The baselines of a federation: alone-1, alone-2, ... and pooled.

  Alone, a hospital trains with the same steps and the same mechanism. Pooled, one model trains on
  the data of all hospitals, with as many local steps a round as all of them together.
  """
  hospitals, config = federation.hospitals, with_plain_server(federation.config)
  names, numbers = hospitals.names, np.array([len(hospitals.names)])
  alone = {f"alone-{k + 1}": _alone(federation, config, k) for k in range(len(names))}
  rows = client_table([np.concatenate(client_rows(hospitals.train))])
  steps = federation.protection.steps.sum(keepdims=True)
  pooled = _case(config, hospitals, ("pooled",), rows, numbers, federation.secret, steps, "pooled")
  return alone | {"pooled": pooled}


def _alone(federation: Case, config: Config, k: int) -> Case:
  one, units = slice(k, k + 1), federation.protection.units
  rows = ClientTable(federation.rows.indices[one], federation.rows.counts[one])
  if units is not None:
    units = UnitTable(
      rows=rows, starts=units.starts[one], sizes=units.sizes[one], counts=units.counts[one]
    )
  local = federation.protection.local
  # The mechanism that the hospital has in the federation: the same σ, the same cap.
  protection = federation.protection._replace(
    config=config,
    steps=federation.protection.steps[one],
    units=units,
    local=local and local.only(k)._replace(place="alone"),
    central=None,
  )
  return _identified(
    federation.hospitals,
    federation.names[one],
    rows,
    federation.numbers[one],
    protection,
    federation.secret,
  )


def with_plain_server(config: Config) -> Config:
  """The config with a plain server: no optimiser, transform or noise, every client in every round.

  A client by itself needs neither.
  """
  server = dataclasses.replace(
    config.server,
    algorithm="fedavg",
    optimizer="sgd",
    learning_rate=1.0,
    participation="full",
    proximal_weight=0.0,
    transforms="",
    aggregator="mean",
  )
  measured = dataclasses.replace(config.eval, local_baselines=False)
  return dataclasses.replace(
    config,
    server=server,
    eval=measured,
    client_privacy=ClientPrivacyConfig(),
    compression=CompressionConfig(),
    secure=SecureConfig(),
    cost=CostConfig(),
    robust=RobustConfig(),
    attack=AttackConfig(),
  )
