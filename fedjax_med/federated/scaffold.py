"""SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II): steps corrected by control variates.

A client's variate is the mean gradient of its last round, read off the weights that it sends. So
under DP-SGD it is made of clipped and noised gradients only, and costs no ε of its own (Noble et
al. 2022). Option I, a bare gradient of all of a client's examples, would.
"""

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.federated.algorithm import FederatedAlgorithm
from fedjax_med.federated.fedavg import difference, fedavg, first_step
from fedjax_med.federated.local import LocalTraining, Weights
from fedjax_med.federated.rules import require_no_proximal_term


def scaffold(
  local: LocalTraining, optimizer: optax.GradientTransformation, *, average: bool
) -> FederatedAlgorithm:
  """FedAvg whose clients step along g − c_i + c; arguments as of ``fedavg``, local steps plain SGD.

  The server's c is the mean of all clients' c_i, with the weights of the average.
  """
  plain = fedavg(local, optimizer, average=average)

  def init_server(params: jax.Array, state: jax.Array):
    return plain.init_server(params, state)._replace(extra=jnp.zeros_like(params))

  def init_client(params: jax.Array, state: jax.Array):
    return plain.init_client(params, state), jnp.zeros_like(params)

  def client_update(server, client_state, client, pool, hyper, key):
    memory, own = client_state
    start = Weights(params=server.params, state=server.state, memory=memory)
    context = first_step(server, client, pool, hyper, key)
    end, metrics = local.train(start, context, shift=server.extra - own)
    delta = difference(end, server)
    steps = metrics.steps.astype(jnp.float32)
    per_step = 1 / (local.rate(hyper, server.round) * jnp.maximum(steps, 1))
    # Equation 4, option II: c_i⁺ − c_i = −c + (x − y_i) / (K η).
    change = jnp.where(steps > 0, -server.extra - delta.params * per_step, 0)
    return delta._replace(extra=change), (end.memory, own + change), metrics

  def server_update(server, delta, share, hyper):
    control = server.extra + share * delta.extra
    return plain.server_update(server, delta, share, hyper)._replace(extra=control)

  def blank_delta(server):
    return plain.blank_delta(server)._replace(extra=jnp.zeros_like(server.params))

  return plain._replace(
    init_server=init_server,
    init_client=init_client,
    client_update=client_update,
    server_update=server_update,
    blank_delta=blank_delta,
  )


def require_plain_sgd(config: Config) -> None:
  """Raises UserError where control variates would be no mean gradients of the local loss."""
  require_no_proximal_term(config)
  optimizer = config.client.optimizer
  require(
    optimizer == "sgd",
    f"server.algorithm='scaffold' with client.optimizer='{optimizer}': its control variates are"
    " mean gradients only after plain SGD steps",
    "use client.optimizer=sgd",
  )
