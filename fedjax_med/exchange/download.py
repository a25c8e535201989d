"""How the model travels from the server to clients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_med.exchange.transform import Wire

Tree = Any  # a pytree of arrays


class Download(NamedTuple):
  """Functions of one way down.

  Attributes:
    init: weights [P] before round 0 -> the server's memory of what clients hold.
    send: (weights [P], memory, key) -> (weights [P] that clients get, memory).
    wire: Wire of the weights -> Wire of what travels.
  """

  init: Callable[[jax.Array], Tree]
  send: Callable[[jax.Array, Tree, jax.Array], tuple[jax.Array, Tree]]
  wire: Callable[[Wire], Wire]
