"""Compression as a transform of the exchange, with a memory of what was not sent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.exchange.compression.compressor import Compressor
from fedjax_med.exchange.transform import Receiver, Sender, Transform, Wire


def compressed(compressor: Compressor, feedback: str, *, counted: bool = True) -> Transform:
  """Sends an update's weights through a compressor, at each client.

  Non-trained state and what an algorithm sends besides travel as they are, and their bytes are
  counted: a number of steps must be exact, a variance must not turn negative, and errors of control
  variates would add up over rounds. ``ef`` adds to an update what earlier messages left out
  (Karimireddy et al. 2019); ``ef21`` sends the difference to what was sent so far, which the server
  keeps (Richtárik et al. 2021). The memory begins at 0, is part of the checkpoint, and stays as it
  is where a client is absent or its update is not finite.

  Args:
    compressor: the kind.
    feedback: none, ef or ef21.
    counted: whether clients tell the error of their messages.
  """

  def encode(message, kept, state, sender):
    update = message.params
    due = update if feedback == "none" else update + kept if feedback == "ef" else update - kept
    sent = _through(compressor, due, sender.key)
    tally = _error(due, sent) if counted else ()
    if feedback != "none":
      after = due - sent if feedback == "ef" else kept + sent
      sent = after if feedback == "ef21" else sent
      kept = jnp.where(jnp.isfinite(due).all(), after, kept)
    return message._replace(params=sent), kept, tally

  def decode(aggregate, state, tally, receiver):
    return aggregate, jax.tree.map(jnp.add, state, tally)

  return Transform(
    encode=encode,
    decode=decode,
    init_client=lambda message: () if feedback == "none" else jnp.zeros_like(message.params),
    init_server=lambda message: _nothing_counted(counted),
    wire=_wire(compressor),
    facts=_facts,
    clients=True,
  )


class SketchState(NamedTuple):
  """The server's state of a sketch.

  Attributes:
    counts: sums of errors and of messages; () where nothing is counted.
    missed: [rows · columns] table of what was not decoded so far; () without error feedback.
    seed: [2] uint32 of the places in the table that all rounds share; () where each draws its own.
    size: [d, 0], empty: its shape says how many numbers a table stands for.
  """

  counts: Any
  missed: Any
  seed: Any
  size: jax.Array


def sketched(compressor: Compressor, feedback: str, *, counted: bool = True) -> Transform:
  """Sends tables that add up; the server decodes their mean, with error feedback of its own.

  With ``ef`` the server adds to the mean table what it has not decoded so far (FetchSGD, Rothchild
  et al. 2020, algorithm 1 without momentum). Tables of several rounds must then add up, so that all
  rounds share the places that the first one draws; else each round draws its own. Other arguments
  as of ``compressed``; feedback is none or ef.
  """
  remembers = feedback == "ef"

  def shared_key(state: SketchState, side: Sender | Receiver):
    if not remembers:
      return side.common_key
    fresh, impl = jax.random.key_data(side.common_key), jax.random.key_impl(side.common_key)
    drawn = (state.seed != 0).any()
    return jax.random.wrap_key_data(jnp.where(drawn, state.seed, fresh), impl=impl)

  def encode(message, kept, state, sender):
    update, key = message.params, shared_key(state, sender)
    table = compressor.encode(update, key)
    tally = ()
    if counted:
      tally = _error(update, compressor.decode(table, update.shape[0], key))
    return message._replace(params=table[0]), kept, tally

  def decode(aggregate, state, tally, receiver):
    key, size = shared_key(state, receiver), state.size.shape[0]
    table = aggregate.params + state.missed if remembers else aggregate.params
    update = compressor.decode((table,), size, key)
    state = state._replace(counts=jax.tree.map(jnp.add, state.counts, tally))
    if remembers:
      missed = table - compressor.encode(update, key)[0]
      state = state._replace(missed=missed, seed=jax.random.key_data(key))
    return aggregate._replace(params=update), state

  def init_server(message):
    size, table = message.params.shape[0], compressor.wire(message.params.shape[0]).sent
    return SketchState(
      counts=_nothing_counted(counted),
      missed=jnp.zeros((table,), jnp.float32) if remembers else (),
      seed=jnp.zeros((2,), jnp.uint32) if remembers else (),
      size=jnp.zeros((size, 0), jnp.float32),
    )

  return Transform(
    encode=encode,
    decode=decode,
    init_server=init_server,
    wire=_wire(compressor),
    facts=lambda state: _facts(state.counts),
    clients=True,
  )


def _through(compressor: Compressor, vector: jax.Array, key: jax.Array) -> jax.Array:
  """What the server decodes of a vector; all NaN if a number of it is not finite."""
  decoded = compressor.decode(compressor.encode(vector, key), vector.shape[0], key)
  return jnp.where(jnp.isfinite(vector).all(), decoded, jnp.nan)


def _error(vector: jax.Array, decoded: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(‖u - Q(u)‖² / ‖u‖², 1), of zeros (0, 1): the tally of one message."""
  whole, missed = jnp.square(vector).sum(), jnp.square(vector - decoded).sum()
  return jnp.where(whole > 0, missed / jnp.where(whole > 0, whole, 1), 0), jnp.ones(())


def _nothing_counted(counted: bool) -> tuple[jax.Array, ...]:
  return (jnp.zeros(()), jnp.zeros(())) if counted else ()


def _facts(state: tuple[Any, ...]) -> dict[str, Any]:
  if not state:
    return {}
  total, messages = (float(value) for value in state)
  return {"compression_error": total / max(messages, 1.0)}


def _wire(compressor: Compressor) -> Callable[[Wire], Wire]:
  """The bytes of a message whose weights are compressed."""

  def wire(message: Wire) -> Wire:
    own, weights = compressor.wire(message.dense - message.apart), message.dense - message.apart
    # A table stands in the place of the weights, and what follows sees its numbers.
    dense = own.dense if compressor.linear else weights
    return own._replace(
      dense=dense + message.apart,
      apart=message.apart,
      beside=own.beside + 4 * message.apart,
    )

  return wire
