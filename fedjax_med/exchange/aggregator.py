"""An aggregator: the rule that makes one update of those of all clients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.federated.algorithm import ClientDelta

Tree = Any  # a pytree of arrays


class Aggregator(NamedTuple):
  """Functions of one rule.

  Attributes:
    weigh: weights [n] of clients, shares of 1 -> the weights that they get here.
    combine: (messages with a leading axis [n], weights [n]) -> partial result. A weight of 0 marks
      an empty place or a client that is absent, and must count exactly nothing.
    finish: (partial result, total weight) -> ClientDelta; of no weight, anything finite.
    share: (total weight, number of clients) -> the part of all clients that took part.
    linear: whether partial results of parts of the clients add up to that of all. They are then
      folded chunk by chunk; else all messages are in memory at once.
  """

  weigh: Callable[[jax.Array], jax.Array]
  combine: Callable[[ClientDelta, jax.Array], Tree]
  finish: Callable[[Tree, jax.Array], ClientDelta]
  share: Callable[[jax.Array, int], jax.Array]
  linear: bool = True


def weighted_sum(messages: ClientDelta, weights: jax.Array) -> ClientDelta:
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
