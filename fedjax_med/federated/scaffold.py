"""SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II): steps corrected by control variates.

A client's variate is the mean gradient of its last round, read off the weights that it sends. So
under DP-SGD it is made of clipped and noised gradients only, and costs no ε of its own (Noble et
al. 2022). Option I, a bare gradient of all of a client's examples, would.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.federated.algorithm import FederatedAlgorithm, Tree
from fedjax_med.federated.fedavg import difference, fedavg
from fedjax_med.federated.local import LocalTraining
from fedjax_med.federated.rules import require_no_proximal_term


def scaffold(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  init_memory: Callable[[Tree], Tree],
) -> FederatedAlgorithm:
  """FedAvg whose clients step along g − c_i + c; arguments as of ``fedavg``, local steps plain SGD.

  The server's c is the mean of all clients' c_i, with the weights of the average.
  """
  plain = fedavg(local, optimizer, average=average, init_memory=init_memory)

  def blank(params: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, params)

  def init_server(params: Tree, state: Tree):
    return plain.init_server(params, state)._replace(extra=blank(params))

  def init_client(params: Tree, state: Tree) -> Tree:
    return plain.init_client(params, state), blank(params)

  def client_update(server, client_state, client, pool, hyper, key):
    memory, own = client_state

    def adjust(gradient: Tree, weights: Tree) -> Tree:
      del weights
      return jax.tree.map(lambda g, c, c_i: g + (c - c_i), gradient, server.extra, own)

    params, state, memory, metrics = local.train(
      server.params,
      server.state,
      memory,
      client,
      pool,
      hyper,
      key,
      server.round,
      adjust=adjust,
    )
    delta = difference(params, state, server)
    steps = metrics.steps.astype(jnp.float32)
    per_step = 1 / (local.rate(hyper, server.round) * jnp.maximum(steps, 1))

    def changed(c, moved):  # equation 4, option II: c_i⁺ − c_i = −c + (x − y_i) / (K η)
      return jnp.where(steps > 0, -c - moved * per_step, 0)

    change = jax.tree.map(changed, server.extra, delta.params)
    own = jax.tree.map(jnp.add, own, change)
    return delta._replace(extra=change), (memory, own), metrics

  def server_update(server, delta, share, hyper):
    control = jax.tree.map(lambda c, change: c + share * change, server.extra, delta.extra)
    return plain.server_update(server, delta, share, hyper)._replace(extra=control)

  return plain._replace(
    init_server=init_server,
    init_client=init_client,
    client_update=client_update,
    server_update=server_update,
    blank_extra=blank,
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
