"""Algorithms by name; a new one adds a file of pure functions and a line here."""

from collections.abc import Callable

import optax

from fedjax_med.core.errors import require_choice
from fedjax_med.federated.algorithm import FederatedAlgorithm
from fedjax_med.federated.fedavg import fedavg

# name: (train, server optimiser, average) -> FederatedAlgorithm
ALGORITHMS: dict[str, Callable[..., FederatedAlgorithm]] = {"fedavg": fedavg}


def create_algorithm(
  name: str, train: Callable, optimizer: optax.GradientTransformation, *, average: bool
) -> FederatedAlgorithm:
  """The algorithm of that name; an unknown name raises UserError with the nearest one."""
  require_choice("server.algorithm", name, ALGORITHMS)
  return ALGORITHMS[name](train, optimizer, average=average)
