"""What hostile clients do: their messages are forged before the server joins all of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fedjax_med.federated.algorithm import ClientDelta


class Scene(NamedTuple):
  """What hostile clients know, which is everything, and how strongly they act.

  Attributes:
    weights: [n] weight of each message; 0 of an empty place.
    hostile: [n] bool, messages of hostile clients.
    strength: [] float32.
    key: key of the attack's draws, for this round.
    aggregate: messages -> what the server would make of them.
  """

  weights: jax.Array
  hostile: jax.Array
  strength: jax.Array
  key: jax.Array
  aggregate: Callable[[ClientDelta], ClientDelta]


# (messages with a leading axis [n], Scene) -> the same with the hostile ones forged.
Attack = Callable[[ClientDelta, Scene], ClientDelta]
