"""Compressed updates as the attacks of ``inversion`` see them: as the server decodes them."""

import functools

import jax

from fedjax_med.exchange.compression.compressor import Compressor
from fedjax_med.exchange.compression.quantise import quantise
from fedjax_med.exchange.compression.topk import topk


def decoded(compressor: Compressor, update: jax.Array, key: jax.Array) -> jax.Array:
  """An update [P] as the server decodes the message of it."""
  return compressor.decode(compressor.encode(update, key), update.shape[0], key)


int8 = functools.partial(decoded, quantise(8))
top_k = functools.partial(decoded, topk(0.01, 32))
