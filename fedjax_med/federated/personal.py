"""Models that are each hospital's own in part: layers that stay at home, and heads tuned there."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.errors import require
from fedjax_med.federated.algorithm import FederatedAlgorithm, Tree
from fedjax_med.federated.fedavg import fedavg, first_step
from fedjax_med.federated.local import LocalTraining, Weights
from fedjax_med.federated.vector import VectorSpec, merge, select

# The spec of the weights -> which leaves are a client's own.
Chosen = Callable[[VectorSpec], tuple[bool, ...]]


def norm_layers(spec: VectorSpec) -> tuple[bool, ...]:
  """Marks the parameters of normalisation layers: those that hold a 'scale'.

  Raises:
    UserError: there are none.
  """
  places = [name.rpartition("/") for name in spec.names]
  layers = {layer for layer, _, leaf in places if leaf == "scale"}
  marks = tuple(layer in layers for layer, _, _ in places)
  require(
    any(marks),
    "server.algorithm='fedbn' keeps norm layers at home, and the model has none",
    "use another model, or server.algorithm=fedper",
  )
  return marks


def layers_named(pattern: str) -> Chosen:
  """Marks layers whose path (such as head or stage4_block1/conv2) begins with the pattern.

  Raises:
    UserError: when called, if no layer does, or all do.
  """

  def choose(spec: VectorSpec) -> tuple[bool, ...]:
    marks = tuple(re.match(f"(?:{pattern})(?:/|$)", name) is not None for name in spec.names)
    names = ", ".join(dict.fromkeys(name.split("/")[0] for name in spec.names))
    require(
      any(marks),
      f"server.personal_layers='{pattern}' matches no layer of the model, which has {names}",
      "name one of those, or several as 'one|other'",
    )
    require(
      not all(marks),
      f"server.personal_layers='{pattern}' matches every layer of the model ({names}): nothing"
      " would be learned together",
      "name some of them, or use another model",
    )
    return marks

  return choose


def layers_at_home(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  chosen: Chosen,
  statistics: bool,
) -> FederatedAlgorithm:
  """FedAvg of all layers but the chosen, which every client trains for itself and never sends.

  With norm layers it is FedBN (Li et al. 2021), with the head FedPer (Arivazhagan et al. 2019).

  Args:
    local: local training of the clients.
    optimizer: of the server.
    average: also keep an exponential moving average of the shared weights.
    chosen: the layers.
    statistics: whether non-trained state (batch statistics) stays at home too.
  """
  plain, spec = fedavg(local, optimizer, average=average), local.spec.params
  own = chosen(spec)
  shared = tuple(not mark for mark in own)

  def personal(params: jax.Array, state: jax.Array, client_state: Tree):
    _, own_params, own_state = client_state
    others = select(params, spec, shared)
    return merge(own_params, others, spec, own), own_state if statistics else state

  def init_client(params: jax.Array, state: jax.Array):
    own_state = state if statistics else state[:0]
    return plain.init_client(params, state), select(params, spec, own), own_state

  def client_update(server, client_state, client, pool, hyper, key):
    params, state = personal(server.params, server.state, client_state)
    start = Weights(params=params, state=state, memory=client_state[0])
    end, metrics = local.train(start, first_step(server, client, pool, hyper, key))
    delta = blank_delta(server)._replace(params=select(end.params - params, spec, shared))
    if not statistics:
      delta = delta._replace(state=end.state - server.state)
    own_state = end.state if statistics else end.state[:0]
    return delta, (end.memory, select(end.params, spec, own), own_state), metrics

  def server_update(server, delta, share, hyper):
    still = jnp.zeros((spec.size - delta.params.size,), jnp.float32)
    whole = delta._replace(params=merge(still, delta.params, spec, own))
    if statistics:
      whole = whole._replace(state=jnp.zeros_like(server.state))
    return plain.server_update(server, whole, share, hyper)

  def blank_delta(server):
    sent = plain.blank_delta(server)
    state = sent.state[:0] if statistics else sent.state
    return sent._replace(params=select(sent.params, spec, shared), state=state)

  return plain._replace(
    init_client=init_client,
    client_update=client_update,
    server_update=server_update,
    blank_delta=blank_delta,
    personal=personal,
  )


def tuned_at_home(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  chosen: Chosen,
) -> FederatedAlgorithm:
  """FedAvg, and beside it every client tunes the chosen layers on top of the global model.

  As many local steps again go into the client's own layers in each round, the rest frozen as
  received (a linear probe that is kept up to date). Arguments as of ``layers_at_home``.
  """
  plain, spec = fedavg(local, optimizer, average=average), local.spec.params
  own = chosen(spec)
  shared = tuple(not mark for mark in own)

  def personal(params: jax.Array, state: jax.Array, client_state: Tree):
    return merge(client_state[1], select(params, spec, shared), spec, own), state

  def init_client(params: jax.Array, state: jax.Array):
    return plain.init_client(params, state), select(params, spec, own)

  def client_update(server, client_state, client, pool, hyper, key):
    delta, memory, metrics = plain.client_update(server, client_state[0], client, pool, hyper, key)
    params, state = personal(server.params, server.state, client_state)
    tuned, extra = local.train(
      Weights(params=params, state=state),
      first_step(server, client, pool, hyper, key),
      trainable=own,
    )
    metrics = metrics._replace(finite=metrics.finite & extra.finite)
    return delta, (memory, select(tuned.params, spec, own)), metrics

  return plain._replace(init_client=init_client, client_update=client_update, personal=personal)


def ditto(
  local: LocalTraining, optimizer: optax.GradientTransformation, *, average: bool
) -> FederatedAlgorithm:
  """Ditto (Li et al. 2021, algorithm 1): FedAvg, and a whole model of its own at every client.

  The client's model takes as many local steps of its own, pulled to the received weights w by
  λ(v − w), λ being ``hyper.algorithm["personal_weight"]``. Arguments as of ``fedavg``.
  """
  plain = fedavg(local, optimizer, average=average)

  def personal(params: jax.Array, state: jax.Array, client_state: Tree):
    return client_state[1], client_state[2]

  def init_client(params: jax.Array, state: jax.Array):
    return plain.init_client(params, state), params, state

  def client_update(server, client_state, client, pool, hyper, key):
    delta, memory, metrics = plain.client_update(server, client_state[0], client, pool, hyper, key)
    end, extra = local.train(
      Weights(params=client_state[1], state=client_state[2]),
      first_step(server, client, pool, hyper, key),
      pull=(hyper.algorithm["personal_weight"], server.params),
    )
    metrics = metrics._replace(finite=metrics.finite & extra.finite)
    return delta, (memory, end.params, end.state), metrics

  return plain._replace(init_client=init_client, client_update=client_update, personal=personal)
