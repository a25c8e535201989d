"""Attacks that follow from mean and deviation of the honest updates, of given strength or the best.

Inner product manipulation (Xie et al. 2020), a little is enough (Baruch et al. 2019), and both with
the strength that moves the aggregate farthest, as in ByzFL 0.0.11.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedjax_med.exchange.attack import Attack, Scene
from fedjax_med.exchange.attacks.honest import (
  forged,
  honest_clients,
  honest_deviation,
  honest_mean,
)
from fedjax_med.federated.algorithm import ClientDelta

# (mean, deviation) of the honest messages and a strength -> the message of all hostile clients.
Lie = Callable[[ClientDelta, ClientDelta, jax.Array], ClientDelta]

# The search of ByzFL: evaluations, first step, and its part that is left after one in vain.
EVALUATIONS, FIRST_STEP, RATIO = 20, 10.0, 0.8


def against_the_mean(mean: ClientDelta, deviation: ClientDelta, strength: jax.Array) -> ClientDelta:
  """−τ times the honest mean (IPM)."""
  return jax.tree.map(lambda leaf: -strength * leaf, mean)


def beside_the_mean(mean: ClientDelta, deviation: ClientDelta, strength: jax.Array) -> ClientDelta:
  """The honest mean and τ deviations of each number (ALIE)."""
  return jax.tree.map(lambda middle, spread: middle + strength * spread, mean, deviation)


def sign_flip(messages: ClientDelta, scene: Scene) -> ClientDelta:
  """All send the negative of the honest mean."""
  return _send(against_the_mean, messages, scene, jnp.float32(1))


def ipm(messages: ClientDelta, scene: Scene) -> ClientDelta:
  """All send −τ times the honest mean."""
  return _send(against_the_mean, messages, scene, scene.strength)


def alie(messages: ClientDelta, scene: Scene) -> ClientDelta:
  """All send the honest mean and τ deviations of each number."""
  return _send(beside_the_mean, messages, scene, scene.strength)


def _send(lie: Lie, messages: ClientDelta, scene: Scene, strength: jax.Array) -> ClientDelta:
  honest = honest_clients(messages, scene)
  mean, deviation = honest_mean(messages, honest), honest_deviation(messages, honest)
  return forged(messages, scene, lie(mean, deviation, strength))


def strongest(lie: Lie) -> Attack:
  """The attack whose τ moves the run's own aggregate farthest from the honest mean.

  The search begins at τ = 0 with a step of 10. The step doubles as long as that is better; after
  the first failure it shrinks to 0.8 of itself each time. The rule is evaluated 20 times a round.
  """

  def attack(messages, scene):
    honest = honest_clients(messages, scene)
    mean, deviation = honest_mean(messages, honest), honest_deviation(messages, honest)

    def effect(strength: jax.Array) -> jax.Array:
      found = scene.aggregate(forged(messages, scene, lie(mean, deviation, strength)))
      squares = jax.tree.map(lambda one, other: jnp.square(one - other).sum(), found, mean)
      return jnp.sqrt(jnp.stack(jax.tree.leaves(squares)).sum())

    def step(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      best, most, size, growing = carry
      tried = best + size
      reached = effect(tried)
      better = reached > most
      grows = growing & better
      return (
        jnp.where(better, tried, best),
        jnp.where(better, reached, most),
        size * jnp.where(grows, 2, jnp.float32(RATIO)),
        grows,
      )

    zero = jnp.float32(0)
    start = (zero, effect(zero), jnp.float32(FIRST_STEP), jnp.bool_(True))
    strength, *_ = jax.lax.fori_loop(0, EVALUATIONS - 1, step, start)
    return forged(messages, scene, lie(mean, deviation, strength))

  return attack
