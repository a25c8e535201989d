"""Models that are each hospital's own in part: layers that stay at home, and heads tuned there."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.errors import require
from fedjax_med.federated.algorithm import FederatedAlgorithm, Tree
from fedjax_med.federated.fedavg import difference, fedavg
from fedjax_med.federated.local import LocalTraining

# params -> the same tree of Python booleans: what is a client's own
Chosen = Callable[[Tree], Tree]


def norm_layers(params: Tree) -> Tree:
  """Marks the parameters of normalisation layers: those that hold a 'scale'.

  Raises:
    UserError: there are none.
  """

  def mark(node: Tree, inside: bool) -> Tree:
    if not isinstance(node, dict):
      return inside
    return {name: mark(child, "scale" in node) for name, child in node.items()}

  marks = mark(params, False)
  require(
    any(jax.tree.leaves(marks)),
    "server.algorithm='fedbn' keeps norm layers at home, and the model has none",
    "use another model, or server.algorithm=fedper",
  )
  return marks


def layers_named(pattern: str) -> Chosen:
  """Marks layers whose path (such as head or stage4_block1/conv2) begins with the pattern.

  Raises:
    UserError: when called, if no layer does, or all do.
  """

  def choose(params: Tree) -> Tree:
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    marks = [re.match(f"(?:{pattern})(?:/|$)", path) is not None for path in paths]
    names = ", ".join(dict.fromkeys(path.split("/")[0] for path in paths))
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
    return jax.tree.unflatten(structure, marks)

  return choose


def _own(params: Tree, marks: Tree) -> list[jax.Array]:
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(marks), strict=True)
  return [leaf for leaf, mine in pairs if mine]


def _merged(params: Tree, own: list[jax.Array], marks: Tree) -> Tree:
  """``params`` with the marked leaves from ``own``."""
  rest = iter(own)
  return jax.tree.map(lambda leaf, mine: next(rest) if mine else leaf, params, marks)


def layers_at_home(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  init_memory: Callable[[Tree], Tree],
  chosen: Chosen,
  statistics: bool,
) -> FederatedAlgorithm:
  """FedAvg of all layers but the chosen, which every client trains for itself and never sends.

  With norm layers it is FedBN (Li et al. 2021), with the head FedPer (Arivazhagan et al. 2019).

  Args:
    local: how clients train.
    optimizer: of the server.
    average: also keep an exponential moving average of the shared weights.
    init_memory: params -> what training goes on from in a client's first round.
    chosen: the layers.
    statistics: whether non-trained state (batch statistics) stays at home too.
  """
  plain = fedavg(local, optimizer, average=average, init_memory=init_memory)

  def personal(params: Tree, state: Tree, client_state: Tree) -> tuple[Tree, Tree]:
    _, own, own_state = client_state
    return _merged(params, own, chosen(params)), own_state if statistics else state

  def init_client(params: Tree, state: Tree) -> Tree:
    own = _own(params, chosen(params))
    return plain.init_client(params, state), own, state if statistics else {}

  def client_update(server, client_state, client, pool, hyper, key):
    start, state = personal(server.params, server.state, client_state)
    params, state, memory, metrics = local.train(
      start, state, client_state[0], client, pool, hyper, key, server.round
    )
    delta = difference(params, state, server._replace(params=start))
    marks = chosen(params)
    sent = jax.tree.map(
      lambda leaf, mine: jnp.zeros_like(leaf) if mine else leaf, delta.params, marks
    )
    if statistics:
      delta = delta._replace(state=jax.tree.map(jnp.zeros_like, delta.state))
    client_state = memory, _own(params, marks), state if statistics else {}
    return delta._replace(params=sent), client_state, metrics

  return plain._replace(
    init_client=init_client, client_update=client_update, at_home=chosen, personal=personal
  )


def tuned_at_home(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  init_memory: Callable[[Tree], Tree],
  chosen: Chosen,
) -> FederatedAlgorithm:
  """FedAvg, and beside it every client tunes the chosen layers on top of the global model.

  As many local steps again go into the client's own layers in each round, the rest frozen as
  received (a linear probe that is kept up to date). Arguments as of ``layers_at_home``.
  """
  plain = fedavg(local, optimizer, average=average, init_memory=init_memory)

  def personal(params: Tree, state: Tree, client_state: Tree) -> tuple[Tree, Tree]:
    return _merged(params, client_state[1], chosen(params)), state

  def init_client(params: Tree, state: Tree) -> Tree:
    return plain.init_client(params, state), _own(params, chosen(params))

  def client_update(server, client_state, client, pool, hyper, key):
    delta, memory, metrics = plain.client_update(server, client_state[0], client, pool, hyper, key)
    start, marks = personal(server.params, server.state, client_state)[0], chosen(server.params)
    tuned, _, _, extra = local.train(
      start, server.state, (), client, pool, hyper, key, server.round, trainable=marks
    )
    metrics = metrics._replace(finite=metrics.finite & extra.finite)
    return delta, (memory, _own(tuned, marks)), metrics

  return plain._replace(init_client=init_client, client_update=client_update, personal=personal)


def ditto(
  local: LocalTraining,
  optimizer: optax.GradientTransformation,
  *,
  average: bool,
  init_memory: Callable[[Tree], Tree],
) -> FederatedAlgorithm:
  """Ditto (Li et al. 2021, algorithm 1): FedAvg, and a whole model of its own at every client.

  The client's model takes as many local steps of its own, pulled to the received weights w by
  λ(v − w), λ being ``hyper.algorithm["personal_weight"]``. Arguments as of ``fedavg``.
  """
  plain = fedavg(local, optimizer, average=average, init_memory=init_memory)

  def personal(params: Tree, state: Tree, client_state: Tree) -> tuple[Tree, Tree]:
    return client_state[1], client_state[2]

  def init_client(params: Tree, state: Tree) -> Tree:
    return plain.init_client(params, state), params, state

  def client_update(server, client_state, client, pool, hyper, key):
    delta, memory, metrics = plain.client_update(server, client_state[0], client, pool, hyper, key)
    pull = hyper.algorithm["personal_weight"]

    def adjust(gradient: Tree, weights: Tree) -> Tree:
      return jax.tree.map(lambda g, v, w: g + pull * (v - w), gradient, weights, server.params)

    alone = hyper._replace(proximal_weight=jnp.zeros_like(hyper.proximal_weight))
    own, state, _, extra = local.train(
      client_state[1], client_state[2], (), client, pool, alone, key, server.round, adjust=adjust
    )
    metrics = metrics._replace(finite=metrics.finite & extra.finite)
    return delta, (memory, own, state), metrics

  return plain._replace(init_client=init_client, client_update=client_update, personal=personal)
