"""Random keys from names and counters, never from a carried split.

A key depends only on (base seed, stream, counters), so 5+5 rounds equal 10, the layout of
clients does not change a draw, and a resumed run repeats the same noise for the same step.
"""

import enum

import jax

from fedjax_med.core import threefry
from fedjax_med.core.errors import require


class Stream(enum.IntEnum):
  """One stream for each use of randomness; numbers are part of the run format and never change."""

  INIT = 0
  SAMPLE = 1  # which examples a local step draws
  NOISE = 2  # Gaussian noise of a private step
  PARTICIPATION = 3  # which clients take part in a round
  DROPOUT = 4
  SHUFFLE = 5  # order of a non-private epoch
  CLIENT_NOISE = 6  # Gaussian noise of a round, at the server
  AUGMENT = 7  # which rows of a patient, and how an image is changed
  SYNTHETIC = 8  # the GAN of a hospital, and what it makes
  # Draws of the exchange: 0, client and round for transforms at a client; then the use and the
  # round: 1 transforms at the server, 2 transforms at all sides, 3 and client lost messages, 4 the
  # aggregator, 5 the attack, 6 the way down.
  EXCHANGE = 9


def base_key(seed: int | jax.Array) -> jax.Array:
  """Threefry key of a seed. Threefry only: vmapped rbg draws ignored the client's key."""
  return jax.random.key(seed, impl=threefry.IMPLEMENTATION)


def require_threefry(key: jax.Array) -> None:
  """Raises UserError for a key of another generator, whose vmapped draws may be one draw."""
  kind = jax.random.key_impl(key)
  require(
    kind in ("threefry2x32", threefry.IMPLEMENTATION),
    f"the key is of the generator '{kind}', whose draws for clients under vmap may not differ",
    "make it by core.keys.base_key(seed)",
  )


def key_for(base: jax.Array, stream: Stream, *counters: int | jax.Array) -> jax.Array:
  """Folds the stream and each counter (client, round, step ...) into ``base``, in order.

  Raises:
    UserError: ``base`` is no threefry key.
  """
  require_threefry(base)
  key = jax.random.fold_in(base, int(stream))
  for counter in counters:
    key = jax.random.fold_in(key, counter)
  return key
