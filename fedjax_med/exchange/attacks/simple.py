"""Attacks that need no look at the honest updates, or copy one: noise, nothing finite, mimicry."""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.attack import Scene
from fedjax_med.exchange.attacks.honest import forged, honest_clients
from fedjax_med.federated.algorithm import ClientDelta


def gaussian(messages: ClientDelta, scene: Scene) -> ClientDelta:
  """All send the same normal draws of mean 0 and standard deviation τ."""
  leaves, structure = jax.tree.flatten(messages)
  draws = [
    scene.strength * jax.random.normal(jax.random.fold_in(scene.key, place), leaf.shape[1:])
    for place, leaf in enumerate(leaves)
  ]
  return forged(messages, scene, structure.unflatten(draws))


def not_finite(messages: ClientDelta, scene: Scene) -> ClientDelta:
  """All send what is no number."""
  lie = jax.tree.map(lambda leaf: jnp.full(leaf.shape[1:], jnp.nan), messages)
  return forged(messages, scene, lie)


def mimic(messages: ClientDelta, scene: Scene) -> ClientDelta:
  """All send the update of the first honest client (Karimireddy et al. 2022)."""
  first = jnp.argmax(honest_clients(messages, scene))
  return forged(messages, scene, jax.tree.map(lambda leaf: jnp.take(leaf, first, 0), messages))
