"""FedAvg (McMahan et al. 2017) with any optax server optimiser; FedProx through local training."""

import jax
import jax.numpy as jnp
import optax

from fedjax_med.federated.algorithm import (
  Client,
  ClientDelta,
  FederatedAlgorithm,
  Hyper,
  Pool,
  ServerState,
  Tree,
)
from fedjax_med.federated.local import LocalTraining, StepContext, Weights
from fedjax_med.federated.optimizers import descend


def first_step(
  server: ServerState, client: Client, pool: Pool, hyper: Hyper, key: jax.Array
) -> StepContext:
  """The context of the first local step of a round."""
  step = jnp.zeros((), jnp.int32)
  return StepContext(client=client, pool=pool, hyper=hyper, key=key, round=server.round, step=step)


def difference(weights: Weights, server: ServerState) -> ClientDelta:
  """The update of a client whose training ended with these weights."""
  return ClientDelta(params=weights.params - server.params, state=weights.state - server.state)


def fedavg(
  local: LocalTraining, optimizer: optax.GradientTransformation, *, average: bool
) -> FederatedAlgorithm:
  """Clients train from the global weights; the server steps along the mean of their deltas.

  Args:
    local: local training of the clients.
    optimizer: direction of the server step (identity is FedAvg; Reddi et al. 2021 for others).
    average: also keep an exponential moving average of the weights over rounds.
  """

  def init_server(params: jax.Array, state: jax.Array) -> ServerState:
    return ServerState(
      params=params,
      state=state,
      opt_state=optimizer.init(params),
      # A copy: the state is donated, and one buffer must not be donated twice.
      average=jnp.copy(params) if average else None,
      round=jnp.zeros((), jnp.int32),
    )

  def client_update(server, memory, client, pool, hyper, key):
    start = Weights(params=server.params, state=server.state, memory=memory)
    end, metrics = local.train(start, first_step(server, client, pool, hyper, key))
    return difference(end, server), end.memory, metrics

  def server_update(
    server: ServerState, delta: ClientDelta, share: jax.Array, hyper: Hyper
  ) -> ServerState:
    del share
    # optax minimises: the pseudo-gradient is the negative mean delta (Reddi et al. 2021, alg. 1).
    direction, opt_state = optimizer.update(-delta.params, server.opt_state, server.params)
    params = descend(server.params, direction, hyper.server_learning_rate)
    done = server.round + 1
    # Early rounds weigh more, else the initial weights dominate a short run.
    count = done.astype(jnp.float32)
    decay = jnp.minimum(hyper.ema_decay, (1 + count) / (10 + count))
    return server._replace(
      params=params,
      state=server.state + delta.state,
      opt_state=opt_state,
      average=None if server.average is None else decay * server.average + (1 - decay) * params,
      round=done,
    )

  def init_client(params: jax.Array, state: jax.Array) -> Tree:
    return local.init_memory()

  def blank_delta(server: ServerState) -> ClientDelta:
    return ClientDelta(params=jnp.zeros_like(server.params), state=jnp.zeros_like(server.state))

  return FederatedAlgorithm(
    init_server=init_server,
    init_client=init_client,
    client_update=client_update,
    server_update=server_update,
    blank_delta=blank_delta,
  )
