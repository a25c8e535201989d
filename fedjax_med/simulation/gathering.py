"""What happens to messages between clients and the server, where they meet all together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.keys import Stream, key_for
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.attack import Scene
from fedjax_med.exchange.registry import Exchange
from fedjax_med.federated.algorithm import Client, ClientDelta, Hyper, ServerState

Tree = Any  # a pytree of arrays


class Traffic(NamedTuple):
  """Counts of messages, and what server and clients remember of the way.

  Attributes:
    lost: [K] int32 messages of each client that did not arrive.
    refused: [K] int32 messages of each client that were left out, since a number was not finite.
    failed: [] int32 rounds that changed nothing, since too few messages arrived.
    rule: the aggregator's memory.
    held: the server's memory of what clients hold; () where the model travels as it is.
  """

  lost: jax.Array
  refused: jax.Array
  failed: jax.Array
  rule: Tree
  held: Tree


class Gathered(NamedTuple):
  """All messages of a round.

  Attributes:
    messages: with a leading axis [n] of slots.
    weights: [n], 0 of an empty place.
    numbers: [n] client number of each slot, K in empty ones.
  """

  messages: ClientDelta
  weights: jax.Array
  numbers: jax.Array


def no_traffic(
  exchange: Exchange, num_clients: int, blank: ClientDelta, params: jax.Array
) -> Traffic:
  """The Traffic before round 0.

  Args:
    exchange: the way of updates.
    num_clients: K.
    blank: message of zeros.
    params: [P] initial weights.
  """
  return Traffic(  # arrays of their own: a block donates each of them
    lost=jnp.zeros((num_clients,), jnp.int32),
    refused=jnp.zeros((num_clients,), jnp.int32),
    failed=jnp.zeros((), jnp.int32),
    rule=exchange.aggregator.init(blank),
    held=() if exchange.download is None else exchange.download.init(jnp.copy(params)),
  )


def sent_down(
  exchange: Exchange, server: ServerState, held: Tree, key: jax.Array
) -> tuple[ServerState, Tree]:
  """The server's state as clients get it, and the server's memory of what they hold."""
  if exchange.download is None:
    return server, held
  draws = key_for(key, Stream.EXCHANGE, 6, server.round)
  params, held = exchange.download.send(server.params, held, draws)
  return server._replace(params=params), held


def _in_order(gathered: Gathered, num_clients: int) -> Gathered:
  """The same messages by client number, whatever the layout; empty slots come last.

  Draws and ties of rules and attacks then do not depend on who trained beside whom.
  """
  order = jnp.argsort(gathered.numbers, stable=True)[:num_clients]
  return jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=0), gathered)


def join(
  exchange: Exchange,
  gathered: Gathered,
  memory: Tree,
  clients: Client,
  hyper: Hyper,
  key: jax.Array,
  round: jax.Array,
) -> tuple[Tree, jax.Array]:
  """Forges the messages of hostile clients, and joins all.

  Args:
    exchange: the way of updates.
    gathered: all messages.
    memory: the aggregator's memory.
    clients: stacked over K clients.
    hyper: traced hyperparameters.
    key: base key of the run.
    round: [] int32.

  Returns:
    The aggregator's partial result, and [K] bool clients whose message was left out, since a
    number was not finite.
  """
  aggregator, attack = exchange.aggregator, exchange.attack
  gathered = _in_order(gathered, len(clients.number))
  messages, weights, numbers = gathered.messages, gathered.weights, gathered.numbers
  joint = Joint(key=key_for(key, Stream.EXCHANGE, 4, round), last=memory)
  if attack is not None:
    assert clients.hostile is not None
    scene = Scene(
      weights=weights,
      hostile=jnp.take(clients.hostile, numbers, mode="fill", fill_value=False),
      strength=hyper.exchange["strength"],
      key=key_for(key, Stream.EXCHANGE, 5, round),
      aggregate=lambda some: aggregator.finish(
        aggregator.combine(some, weights, joint), weights.sum()
      ),
    )
    messages = attack(messages, scene)
  bad = jnp.zeros(clients.number.shape, bool)
  if aggregator.tolerant or attack is not None:
    finite = jnp.ones(weights.shape, bool)
    for leaf in jax.tree.leaves(messages):
      finite &= jnp.isfinite(leaf).reshape(len(weights), -1).all(1)
    bad = bad.at[numbers].set(~finite & (weights > 0), mode="drop")
    weights = jnp.where(finite, weights, 0)
  return aggregator.combine(messages, weights, joint), bad
