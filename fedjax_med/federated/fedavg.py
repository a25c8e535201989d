"""FedAvg (McMahan et al. 2017) with any optax server optimiser; FedProx through local training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_med.federated.algorithm import (
  ClientDelta,
  FederatedAlgorithm,
  Hyper,
  ServerState,
  Tree,
)
from fedjax_med.federated.local import LocalTraining
from fedjax_med.federated.optimizers import descend


def difference(params: Tree, state: Tree, server: ServerState) -> ClientDelta:
  """What a client sends that ended with these weights and this state."""
  return ClientDelta(
    jax.tree.map(jnp.subtract, params, server.params),
    jax.tree.map(jnp.subtract, state, server.state),
  )


def fedavg(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  init_memory: Callable[[Tree], Tree],
) -> FederatedAlgorithm:
  """Clients train from the global weights; the server steps along the mean of their deltas.

  Args:
    local: how clients train.
    optimizer: direction of the server step (identity is FedAvg; Reddi et al. 2021 for others).
    average: also keep an exponential moving average of the weights over rounds.
    init_memory: params -> what training goes on from in a client's first round.
  """

  def init_server(params: Tree, state: Tree) -> ServerState:
    # A copy: the state is donated, and one buffer must not be donated twice.
    mean = jax.tree.map(jnp.copy, params) if average else {}
    return ServerState(params, state, optimizer.init(params), mean, jnp.zeros((), jnp.int32))

  def client_update(server, client_state, client, pool, hyper, key):
    params, state, client_state, metrics = local.train(
      server.params, server.state, client_state, client, pool, hyper, key, server.round
    )
    return difference(params, state, server), client_state, metrics

  def server_update(
    server: ServerState, delta: ClientDelta, share: jax.Array, hyper: Hyper
  ) -> ServerState:
    del share
    # optax minimises: the pseudo-gradient is the negative mean delta (Reddi et al. 2021, alg. 1).
    direction, opt_state = optimizer.update(
      jax.tree.map(jnp.negative, delta.params), server.opt_state, server.params
    )
    params = descend(server.params, direction, hyper.server_learning_rate)
    done = server.round + 1
    # Early rounds weigh more, else the initial weights dominate a short run.
    count = done.astype(jnp.float32)
    decay = jnp.minimum(hyper.ema_decay, (1 + count) / (10 + count))
    mean = jax.tree.map(
      lambda old, new: decay * old + (1 - decay) * new, server.average, params if average else {}
    )
    state = jax.tree.map(jnp.add, server.state, delta.state)
    return ServerState(params, state, opt_state, mean, done, server.extra)

  def init_client(params: Tree, state: Tree) -> Tree:
    return init_memory(params)

  return FederatedAlgorithm(init_server, init_client, client_update, server_update)
