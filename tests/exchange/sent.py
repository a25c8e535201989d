"""Sends updates through an exchange by hand: no training, no server."""

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config, set_field
from fedjax_med.core.keys import Stream, key_for
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.registry import make_exchange
from fedjax_med.exchange.transform import Receiver, Sender
from fedjax_med.federated.algorithm import Client, ClientDelta
from tests.federated.toy import KEY, make_hyper


def configured(**changes) -> Config:
  """A config, changed as by ``secure__bits=16``."""
  config = Config()
  for path, value in changes.items():
    set_field(config, path.replace("__", "."), value)
  return config


def exchange_of(num_clients: int, **changes):
  return make_exchange(configured(**changes), num_clients)


def clients_of(weights) -> Client:
  """K clients with these weights, and nothing else."""
  weights = jnp.asarray(weights, jnp.float32)
  none = jnp.zeros(len(weights), jnp.int32)
  return Client(
    number=jnp.arange(len(weights)),
    indices=none[:, None],
    num_examples=none,
    weight=weights,
    num_steps=none,
    sampling_probability=weights,
    expected_batch_size=weights,
    noise_multiplier=weights,
  )


def deltas_of(values) -> ClientDelta:
  """Updates of weights alone."""
  values = jnp.asarray(values, jnp.float32)
  return ClientDelta(params=values, state=jnp.zeros((*values.shape[:-1], 0), jnp.float32))


def first_of(deltas: ClientDelta) -> ClientDelta:
  return jax.tree.map(lambda leaf: leaf[0], deltas)


def encoded(transform, deltas, weights, seated=None, round=0):
  """Messages of all clients, and their tallies."""
  clients, first = clients_of(weights), first_of(deltas)
  seated = jnp.ones(len(clients.weight), bool) if seated is None else seated
  state, kept = transform.init_server(first), transform.init_client(first)

  def send(delta, client):
    sender = Sender(
      client=client,
      hyper=make_hyper(),
      key=key_for(KEY, Stream.EXCHANGE, 0, client.number, round),
      common_key=key_for(KEY, Stream.EXCHANGE, 2, round),
      seated=seated,
      round=jnp.asarray(round),
    )
    message, _, tally = transform.encode(delta, kept, state, sender)
    return message, tally

  return jax.vmap(send)(deltas, clients)


def received(exchange, deltas, weights, arrived=None, seated=None):
  """(joined whole numbers, decoded update, state of the transforms) of what arrives."""
  everyone = jnp.ones(len(weights), bool)
  seated = everyone if seated is None else seated
  arrived = seated if arrived is None else arrived
  messages, tallies = encoded(exchange.transform, deltas, weights, seated)
  rule = exchange.aggregator
  shares = jnp.where(arrived, rule.weigh(jnp.asarray(weights, jnp.float32)), 0)
  joined = rule.finish(rule.combine(messages, shares, Joint(key=KEY, last=())), shares.sum())

  def add(leaf):
    column = arrived.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(column, leaf, 0).sum(0)

  receiver = Receiver(
    weight=shares.sum(),
    hyper=make_hyper(),
    key=key_for(KEY, Stream.EXCHANGE, 1, 0),
    common_key=key_for(KEY, Stream.EXCHANGE, 2, 0),
    seated=seated,
    arrived=arrived,
    run_key=KEY,
    round=jnp.asarray(0),
  )
  state = exchange.transform.init_server(first_of(deltas))
  update, state = exchange.transform.decode(joined, state, jax.tree.map(add, tallies), receiver)
  return joined, update, state


def signed_sum(numbers, bits: int) -> np.ndarray:
  """NumPy: the sum of int32 numbers modulo 2^bits over the first axis, with a sign."""
  total = np.asarray(numbers).astype(np.uint32).sum(0, dtype=np.uint32).astype(np.int64)
  total %= 2**bits
  return np.where(total >= 2 ** (bits - 1), total - 2**bits, total)
