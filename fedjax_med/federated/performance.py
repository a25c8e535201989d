"""Performance-weighted fusion, as in FedXNet: clients whose predictions are better count more."""

import jax.numpy as jnp
import optax

from fedjax_med.federated.algorithm import FederatedAlgorithm
from fedjax_med.federated.fedavg import fedavg
from fedjax_med.federated.local import LocalTraining


def performance_weighted(
  local: LocalTraining, optimizer: optax.GradientTransformation, *, average: bool
) -> FederatedAlgorithm:
  """FedAvg whose weights are multiplied by each client's mean tally on the batches of its round.

  For classification the tally is the accuracy. A round in which no client classifies any example
  correctly changes nothing. Arguments as of ``fedavg``.
  """
  plain = fedavg(local, optimizer, average=average)

  def client_update(server, client_state, client, pool, hyper, key):
    delta, client_state, metrics = plain.client_update(
      server, client_state, client, pool, hyper, key
    )
    accuracy = metrics.tally / jnp.maximum(metrics.examples, 1)
    weighted = delta._replace(
      params=delta.params * accuracy, state=delta.state * accuracy, extra=accuracy
    )
    return weighted, client_state, metrics

  def server_update(server, delta, share, hyper):
    accuracy = jnp.maximum(delta.extra, 1e-6)  # the cohort's mean
    mean = delta._replace(params=delta.params / accuracy, state=delta.state / accuracy)
    return plain.server_update(server, mean, share, hyper)

  def blank_delta(server):
    return plain.blank_delta(server)._replace(extra=jnp.zeros((), jnp.float32))

  return plain._replace(
    client_update=client_update, server_update=server_update, blank_delta=blank_delta
  )
