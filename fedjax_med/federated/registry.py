"""Algorithms by name; a new one adds a file of pure functions and a line here."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax

from fedjax_med.core.errors import require, require_choice
from fedjax_med.federated.algorithm import FederatedAlgorithm
from fedjax_med.federated.fedavg import fedavg
from fedjax_med.federated.fednova import fednova
from fedjax_med.federated.local import LocalTraining
from fedjax_med.federated.performance import performance_weighted
from fedjax_med.federated.personal import (
  ditto,
  layers_at_home,
  layers_named,
  norm_layers,
  tuned_at_home,
)
from fedjax_med.federated.scaffold import scaffold


class Entry(NamedTuple):
  """An algorithm and what protects it.

  Attributes:
    make: (LocalTraining, server optimiser, average=) -> FederatedAlgorithm.
    records: whether DP-SGD covers it: its clients read examples in ``LocalTraining.train`` alone,
      once a step, and what they send is made of that.
    clients: whether DP-FedAvg covers it: a client sends weights only, all of which are clipped, and
      every model that is used is made of what was sent.
    has_global_model: False if some layers never leave the clients, so that the server has no whole
      model.
    names_layers: whether ``make`` also takes ``chosen``, the layers of server.personal_layers.
  """

  make: Callable[..., FederatedAlgorithm]
  records: bool
  clients: bool
  has_global_model: bool = True
  names_layers: bool = False


ALGORITHMS: dict[str, Entry] = {
  "fedavg": Entry(fedavg, records=True, clients=True),
  # What these send besides the weights is no client-level release.
  "scaffold": Entry(scaffold, records=True, clients=False),
  "fednova": Entry(fednova, records=True, clients=False),
  # What stays at home is part of the model that a hospital uses, and DP-FedAvg noises what is sent.
  "fedbn": Entry(
    functools.partial(layers_at_home, chosen=norm_layers, statistics=True),
    records=True,
    clients=False,
    has_global_model=False,
  ),
  "fedper": Entry(
    functools.partial(layers_at_home, statistics=False),
    records=True,
    clients=False,
    has_global_model=False,
    names_layers=True,
  ),
  # Its weights are read off the examples.
  "performance": Entry(performance_weighted, records=False, clients=False),
  # The models of these stay at home, but read every example again, neither clipped nor noised.
  "finetune": Entry(tuned_at_home, records=False, clients=False, names_layers=True),
  "ditto": Entry(ditto, records=False, clients=False),
}


def create_algorithm(
  name: str,
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  records: bool = False,
  clients: bool = False,
  personal_layers: str = "head",
) -> FederatedAlgorithm:
  """The algorithm of that name, for a run with privacy or without.

  Args:
    name: of ``ALGORITHMS``.
    local: how clients train.
    optimizer: direction of the server step.
    average: also keep an exponential moving average of the weights over rounds.
    records: whether the run protects records or patients (DP-SGD).
    clients: whether the run protects whole hospitals (DP-FedAvg).
    personal_layers: pattern of the layers that are a client's own, where the algorithm asks.

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
  layers = {"chosen": layers_named(personal_layers)} if entry.names_layers else {}
  return entry.make(local, optimizer, average=average, **layers)
