"""An aggregator: the rule that makes one update of those of all clients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.federated.algorithm import ClientDelta

Tree = Any  # a pytree of arrays


class Joint(NamedTuple):
  """Values of a round that a rule may read beside the messages.

  Attributes:
    key: key of the rule's draws, for this round.
    last: the rule's memory: what ``remember`` kept of the last round.
  """

  key: jax.Array
  last: Tree


def _nothing(message: ClientDelta) -> Tree:
  return ()


def _forget(aggregate: ClientDelta, last: Tree) -> Tree:
  return last


class Aggregator(NamedTuple):
  """Functions of one rule.

  Attributes:
    weigh: weights [n] of clients, shares of 1 -> the weights that they get here.
    combine: (messages with a leading axis [n], weights [n], Joint) -> partial result. A weight of 0
      marks an empty place or a client that is absent, and must count exactly nothing.
    finish: (partial result, total weight) -> ClientDelta; of no weight, anything finite.
    share: (total weight, number of clients) -> the part of all clients that took part.
    linear: whether partial results of parts of the clients add up to that of all. They are then
      folded chunk by chunk; else all messages are in memory at once.
    tolerant: whether a message with a number that is not finite counts as absent, and the run goes
      on; else such a run ends.
    init: blank message -> the rule's memory before the first round; () for most.
    remember: (aggregate, memory) -> memory of the next round.
  """

  weigh: Callable[[jax.Array], jax.Array]
  combine: Callable[[ClientDelta, jax.Array, Joint], Tree]
  finish: Callable[[Tree, jax.Array], ClientDelta]
  share: Callable[[jax.Array, int], jax.Array]
  linear: bool = True
  tolerant: bool = False
  init: Callable[[ClientDelta], Tree] = _nothing
  remember: Callable[[ClientDelta, Tree], Tree] = _forget


def weighted_sum(
  messages: ClientDelta, weights: jax.Array, joint: Joint | None = None
) -> ClientDelta:
  """Σ weight · message over the leading axis; a weight of 0 adds exactly 0, whatever was sent."""

  def add(leaf: jax.Array) -> jax.Array:
    column = weights.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(column > 0, column * leaf, 0).sum(0)

  return jax.tree.map(add, messages)


def mean() -> Aggregator:
  """The mean with the clients' weights (FedAvg, McMahan et al. 2017)."""

  def finish(total: ClientDelta, weight: jax.Array) -> ClientDelta:
    scale = 1 / jnp.where(weight > 0, weight, 1)
    return jax.tree.map(lambda leaf: leaf * scale, total)

  return Aggregator(
    weigh=lambda weights: weights,
    combine=weighted_sum,
    finish=finish,
    share=lambda weight, num_clients: weight,
  )


def equal_sum() -> Aggregator:
  """The sum in which every client counts 1, as client-level privacy needs it."""
  return Aggregator(
    weigh=jnp.ones_like,
    combine=weighted_sum,
    finish=lambda total, weight: total,
    share=lambda weight, num_clients: weight / num_clients,
  )
