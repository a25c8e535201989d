"""Algorithms by name: a file of pure functions and a line here, or a call of ``register``."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from fedjax_med.core.config import Config, add_options, algorithm_options
from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.registered import add_name
from fedjax_med.core.sources import read_again, source_digest
from fedjax_med.federated.algorithm import FederatedAlgorithm
from fedjax_med.federated.fedavg import fedavg
from fedjax_med.federated.fednova import fednova, require_known_steps
from fedjax_med.federated.local import LocalTraining
from fedjax_med.federated.performance import performance_weighted
from fedjax_med.federated.personal import (
  ditto,
  layers_at_home,
  layers_named,
  norm_layers,
  tuned_at_home,
)
from fedjax_med.federated.rules import no_rules
from fedjax_med.federated.scaffold import require_plain_sgd, scaffold


class Entry(NamedTuple):
  """An algorithm, its settings, and the privacy mechanisms that cover it.

  Attributes:
    make: (LocalTraining, server optimiser, average=, and the options that are not traced, by
      name) -> FederatedAlgorithm.
    records: whether DP-SGD covers it: its clients read examples in ``LocalTraining.train`` alone,
      once a step, and what they send is made of that.
    clients: whether DP-FedAvg covers it: a client sends weights only, all of which are clipped, and
      every model that is used is made of what was sent.
    has_global_model: False if some layers never leave the clients, so that the server has no whole
      model.
    rules: raises UserError for a config that contradicts the algorithm, before anything compiles.
    options: dataclass of its settings, made by ``core.fields.field``: the fields
      ``options.NAME.*``. Traced ones are in ``hyper.algorithm``. Those of this package's algorithms
      are declared in ``server.*``, so that the command line need not import jax.
  """

  make: Callable[..., FederatedAlgorithm]
  records: bool
  clients: bool
  has_global_model: bool = True
  rules: Callable[[Config], None] = no_rules
  options: type | None = None


def _by_pattern(make: Callable[..., FederatedAlgorithm]) -> Callable[..., FederatedAlgorithm]:
  """``make`` whose layers are chosen by the option ``personal_layers``."""

  def made(*arguments: Any, personal_layers: str, **settings: Any) -> FederatedAlgorithm:
    return make(*arguments, chosen=layers_named(personal_layers), **settings)

  return made


def _fedbn(*arguments: Any, average: bool) -> FederatedAlgorithm:
  return layers_at_home(*arguments, average=average, chosen=norm_layers, statistics=True)


ALGORITHMS: dict[str, Entry] = {
  "fedavg": Entry(make=fedavg, records=True, clients=True),
  # What these send besides the weights is no client-level release.
  "scaffold": Entry(make=scaffold, records=True, clients=False, rules=require_plain_sgd),
  "fednova": Entry(make=fednova, records=True, clients=False, rules=require_known_steps),
  # What stays at home is part of the model that a hospital uses, and DP-FedAvg noises what is sent.
  "fedbn": Entry(
    make=_fedbn,
    records=True,
    clients=False,
    has_global_model=False,
  ),
  "fedper": Entry(
    make=_by_pattern(functools.partial(layers_at_home, statistics=False)),
    records=True,
    clients=False,
    has_global_model=False,
  ),
  # Its weights are read off the examples.
  "performance": Entry(make=performance_weighted, records=False, clients=False),
  # The models of these stay at home, but read every example again, neither clipped nor noised.
  "finetune": Entry(make=_by_pattern(tuned_at_home), records=False, clients=False),
  "ditto": Entry(make=ditto, records=False, clients=False),
}


def register(name: str, entry: Entry) -> None:
  """Adds an algorithm that configs can name, and its options as fields of the configuration.

  An entry that was read from its file once more replaces itself: config files are read several
  times.

  Raises:
    UserError: the name is taken by another algorithm, or an option is not declared.
  """
  known = ALGORITHMS.get(name, entry)
  require(
    known._replace(make=entry.make, rules=entry.rules, options=entry.options) == entry
    and read_again(known.make, entry.make)
    and read_again(known.rules, entry.rules),
    f"an algorithm named '{name}' is registered already",
    "choose another name",
  )
  if entry.options is not None:
    add_options(name, entry.options)
  ALGORITHMS[name] = entry
  add_name("server.algorithm", name)


def algorithm_code(name: str) -> str:
  """Digest of the source of an algorithm that was registered; empty for this package's own.

  Two algorithms of one name are two trainings: with the same random keys the difference of their
  releases would have no noise.
  """
  require_choice("server.algorithm", name, ALGORITHMS)
  return source_digest(ALGORITHMS[name].make, f"algorithm '{name}'")


def require_rules(config: Config) -> None:
  """Raises UserError where the algorithm is unknown, or the config contradicts its rules."""
  require_choice("server.algorithm", config.server.algorithm, ALGORITHMS)
  ALGORITHMS[config.server.algorithm].rules(config)


def create_algorithm(
  name: str,
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  records: bool = False,
  clients: bool = False,
  options: Mapping[str, Any] | None = None,
) -> FederatedAlgorithm:
  """The algorithm of that name, for a run with privacy or without.

  Args:
    name: of ``ALGORITHMS``.
    local: local training of the clients.
    optimizer: direction of the server step.
    average: also keep an exponential moving average of the weights over rounds.
    records: whether the run protects records or patients (DP-SGD).
    clients: whether the run protects whole hospitals (DP-FedAvg).
    options: those of the algorithm that are not traced, by name; None takes their defaults.

  Raises:
    UserError: the name is unknown (with the nearest one), or the algorithm is not declared private
      and the run is.
  """
  require_choice("server.algorithm", name, ALGORITHMS)
  entry = ALGORITHMS[name]
  if records or clients:
    covered = [
      other
      for other, each in ALGORITHMS.items()
      if (each.records or not records) and (each.clients or not clients)
    ]
    level = " and ".join(["records"] * records + ["hospitals"] * clients)
    require(
      name in covered,
      f"server.algorithm='{name}' is not declared private for {level}: its clients may send, or"
      " keep, what they read from their examples neither clipped nor noised",
      f"use server.algorithm={' or '.join(sorted(covered))}, or privacy.mechanism=none and"
      " client_privacy.mechanism=none",
    )
  if options is None:
    config = Config()
    config.server.algorithm = name
    options = algorithm_options(config, traced=False)
  return entry.make(local, optimizer, average=average, **options)
