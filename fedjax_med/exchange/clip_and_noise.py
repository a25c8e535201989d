"""Client-level privacy (DP-FedAvg): each update clipped at its client, their sum noised once."""

import math

import jax.numpy as jnp

from fedjax_med.core.errors import require
from fedjax_med.exchange.transform import Transform
from fedjax_med.federated.algorithm import ClientDelta
from fedjax_med.privacy.client_level import clip_update, noisy_mean


def clip_and_noise(clip_norm: float, step: float = 0.0) -> Transform:
  """Clips an update to l2 norm C and noises the sum of all, by ``hyper.client_level``.

  The aggregate is the sum in which each client counts 1; ``decode`` releases a noisy mean of it.
  Noise answers an empty cohort too. Non-trained state and ``extra`` are neither clipped nor noised:
  they do not reach the server.

  Args:
    clip_norm: C of the first round; a later one may follow a quantile of the updates' norms.
    step: of the grid that updates are rounded to after the clip. Rounding moves each number by less
      than a step, so that updates are clipped to C less sqrt(P) steps, and are within C after it.
      Tracing ``encode`` raises UserError where nothing of C would be left.
  """

  def encode(message, kept, bound, sender):
    room = math.sqrt(message.params.size) * step
    require(
      room < clip_norm,
      f"client_privacy.clip_norm={clip_norm:g} leaves nothing of an update of"
      f" {message.params.size:,} weights that is rounded to steps of {step:g}: rounding alone may"
      f" have the norm {room:g}",
      "raise client_privacy.clip_norm or secure.bits, or lower secure.range",
    )
    update, within = clip_update(message.params, jnp.maximum(bound - room, 0) if step else bound)
    return message._replace(params=update), kept, within - 0.5

  def decode(total, bound, tally, receiver):
    level = receiver.hyper.client_level
    assert level is not None
    update, bound = noisy_mean(total.params, tally, bound, level, receiver.run_key, receiver.round)
    return ClientDelta(params=update, state=jnp.zeros_like(total.state)), bound

  return Transform(
    encode=encode,
    decode=decode,
    init_server=lambda message: jnp.asarray(clip_norm, jnp.float32),
    # Numbers that were packed stay so, and the factor of the clip travels beside them.
    wire=lambda wire: wire if wire.value_bits == 32 else wire._replace(beside=wire.beside + 4),
    answers_nobody=True,
    clients=True,
  )
