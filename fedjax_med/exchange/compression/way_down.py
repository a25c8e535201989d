"""A compressed way down: the server sends the difference of the weights to what clients hold."""

import jax.numpy as jnp

from fedjax_med.exchange.compression.compressor import Compressor
from fedjax_med.exchange.download import Download
from fedjax_med.exchange.transform import Wire


def differences(compressor: Compressor) -> Download:
  """Sends Q(weights - held); clients and server then hold that much more.

  What was left out of a difference is part of the next one, which is error feedback. All clients
  hold the same: they begin with the initial weights, and each gets every difference.
  """

  def send(params, held, key):
    difference = params - held
    message = compressor.encode(difference, key)
    held = held + compressor.decode(message, difference.shape[0], key)
    return held, held

  def wire(weights: Wire) -> Wire:
    return compressor.wire(weights.dense)

  return Download(init=jnp.copy, send=send, wire=wire)
