"""What hostile clients know of the honest ones, and how a forged message is put in their place."""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.attack import Scene
from fedjax_med.federated.algorithm import ClientDelta


def honest_clients(messages: ClientDelta, scene: Scene) -> jax.Array:
  """[n] bool: messages of honest clients that take part; one that is not finite tells nothing."""
  honest = (scene.weights > 0) & ~scene.hostile
  for leaf in jax.tree.leaves(messages):
    honest &= jnp.isfinite(leaf).reshape(len(honest), -1).all(1)
  return honest


def _column(marks: jax.Array, leaf: jax.Array) -> jax.Array:
  return marks.reshape((-1,) + (1,) * (leaf.ndim - 1))


def honest_mean(messages: ClientDelta, honest: jax.Array) -> ClientDelta:
  """Mean of the honest messages, each counting the same; of none, zeros."""
  number = jnp.maximum(honest.sum(), 1).astype(jnp.float32)
  return jax.tree.map(
    lambda leaf: jnp.where(_column(honest, leaf), leaf, 0).sum(0) / number, messages
  )


def honest_deviation(messages: ClientDelta, honest: jax.Array) -> ClientDelta:
  """Standard deviation of each number over the honest messages, with n − 1 below; of one, 0."""
  freedom = jnp.maximum(honest.sum() - 1, 1).astype(jnp.float32)
  mean = honest_mean(messages, honest)

  def deviation(leaf: jax.Array, middle: jax.Array) -> jax.Array:
    squares = jnp.where(_column(honest, leaf), jnp.square(leaf - middle[None]), 0)
    return jnp.sqrt(squares.sum(0) / freedom)

  return jax.tree.map(deviation, messages, mean)


def forged(messages: ClientDelta, scene: Scene, lie: ClientDelta) -> ClientDelta:
  """The messages in which every hostile client sends ``lie``, which has no leading axis."""
  return jax.tree.map(
    lambda leaf, one: jnp.where(_column(scene.hostile, leaf), one[None].astype(leaf.dtype), leaf),
    messages,
    lie,
  )
