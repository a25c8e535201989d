"""Algorithms by name; a new one adds a file of pure functions and a line here."""

from collections.abc import Callable

import optax

from fedjax_med.core.errors import require, require_choice
from fedjax_med.federated.algorithm import FederatedAlgorithm, Tree
from fedjax_med.federated.fedavg import fedavg

# name: (train, server optimiser, average, init_memory) -> FederatedAlgorithm
ALGORITHMS: dict[str, Callable[..., FederatedAlgorithm]] = {"fedavg": fedavg}
# Those whose clients read their examples through ``train`` alone, which clips and noises. Not so
# SCAFFOLD's variates (Karimireddy et al. 2020): gradients of all of a client's examples, bare.
PRIVATE = frozenset({"fedavg"})


def create_algorithm(
  name: str,
  train: Callable,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  private: bool,
  init_memory: Callable[[Tree], Tree] = lambda params: (),
) -> FederatedAlgorithm:
  """The algorithm of that name, for a run with privacy or without.

  ``init_memory`` makes what ``train`` goes on from in a client's first round; () is nothing.

  Raises:
    UserError: the name is unknown (with the nearest one), or the algorithm is not in PRIVATE and
      the run is private.
  """
  require_choice("server.algorithm", name, ALGORITHMS)
  require(
    not private or name in PRIVATE,
    f"server.algorithm='{name}' is not declared private: its clients may send what they read from"
    " their examples neither clipped nor noised",
    f"use server.algorithm={' or '.join(sorted(PRIVATE))}, or privacy.mechanism=none and"
    " client_privacy.mechanism=none",
  )
  return ALGORITHMS[name](train, optimizer, average=average, init_memory=init_memory)
