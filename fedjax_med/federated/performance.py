"""Performance-weighted fusion, as in FedXNet: who does better counts for more."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_med.federated.algorithm import FederatedAlgorithm, Tree
from fedjax_med.federated.fedavg import fedavg
from fedjax_med.federated.local import LocalTraining


def performance_weighted(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  init_memory: Callable[[Tree], Tree],
) -> FederatedAlgorithm:
  """FedAvg whose weights are multiplied by each client's accuracy on the batches of its round.

  Where nobody classifies anything rightly nothing moves. Arguments as of ``fedavg``.
  """
  plain = fedavg(local, optimizer, average=average, init_memory=init_memory)

  def client_update(server, client_state, client, pool, hyper, key):
    delta, client_state, metrics = plain.client_update(
      server, client_state, client, pool, hyper, key
    )
    accuracy = metrics.correct / jnp.maximum(metrics.examples, 1)
    params, state = jax.tree.map(lambda leaf: leaf * accuracy, (delta.params, delta.state))
    return delta._replace(params=params, state=state, extra=accuracy), client_state, metrics

  def server_update(server, delta, share, hyper):
    accuracy = jnp.maximum(delta.extra, 1e-6)  # the cohort's mean
    params, state = jax.tree.map(lambda leaf: leaf / accuracy, (delta.params, delta.state))
    return plain.server_update(server, delta._replace(params=params, state=state), share, hyper)

  return plain._replace(
    client_update=client_update,
    server_update=server_update,
    blank_extra=lambda params: jnp.zeros((), jnp.float32),
  )
