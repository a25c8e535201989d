"""A transform and an aggregator for tests, each in one place, registered when this is imported."""

import jax
import jax.numpy as jnp

from fedjax_med.exchange.aggregator import Aggregator
from fedjax_med.exchange.registry import register_aggregator, register_transform
from fedjax_med.exchange.transform import SUM, Transform


def halved() -> Transform:
  """Sends half of what is due in 16 bits a number, and keeps the rest for later rounds."""

  def encode(message, kept, state, sender):
    due = message.params + kept
    return message._replace(params=due / 2), due / 2, jnp.ones(())

  def decode(aggregate, state, tally, receiver):
    return aggregate, state + tally

  return Transform(
    encode=encode,
    decode=decode,
    init_client=lambda message: jnp.zeros_like(message.params),
    init_server=lambda message: jnp.zeros(()),
    wire=lambda wire: wire._replace(value_bits=16),
    trust=SUM,
  )


def middle() -> Aggregator:
  """The median of every number over the clients that take part."""

  def combine(messages, weights, joint):
    def median(leaf):
      present = (weights > 0).reshape((-1,) + (1,) * (leaf.ndim - 1))
      found = jnp.nanmedian(jnp.where(present, leaf, jnp.nan), axis=0)
      return jnp.where(jnp.isnan(found), 0, found)

    return jax.tree.map(median, messages)

  return Aggregator(
    weigh=lambda weights: weights,
    combine=combine,
    finish=lambda partial, weight: partial,
    share=lambda weight, num_clients: weight,
    linear=False,
  )


register_transform("halved", halved)
register_aggregator("middle", middle)
