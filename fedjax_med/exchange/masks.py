"""Secure aggregation: masks that cancel in the sum hide every single update.

The protocol is that of Bonawitz et al. 2017 (Practical secure aggregation for privacy-preserving
machine learning) with an honest server. Each two clients i < j of a round agree on a seed; i adds
the words drawn from it and j takes them off. Each client adds words of a seed of its own besides.
Shares of all seeds lie at the other clients. They let the server take off the masks of its own of
every client that answered, and those that it shared with the ones that did not.

Masks are words of threefry, which is no certified generator, and all seeds follow from the key of
the run: the simulator computes what a deployment would, and keeps no secret from itself.
"""

import math

import jax
import jax.numpy as jnp

from fedjax_med.core.conditions import DEADLINE
from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.exchange.fixed_point import signed
from fedjax_med.exchange.transform import SUM, Receiver, Transform, Wire
from fedjax_med.federated.algorithm import ClientDelta

# Bytes of a public key (X25519) and of a share of a 256-bit secret.
KEY_BYTES = SHARE_BYTES = 32
FEWEST_CLIENTS = 3


def expected_clients(config: Config, num_clients: int) -> int:
  """Clients that a round expects, rounded up: K, or q·K where cohorts are drawn."""
  server = config.server
  if server.participation == "full":
    return num_clients
  return math.ceil(server.participation_rate * num_clients - 1e-9)


def may_miss(config: Config) -> bool:
  """Whether fewer messages than clients may arrive in a round."""
  lost = config.secure.dropout > 0 or DEADLINE.holds(config)
  return lost or config.server.participation != "full"


def fewest_answers(config: Config, num_clients: int) -> int:
  """Messages that a round needs: K where none can be missing, else the threshold.

  With drawn cohorts K is the expected size of a cohort. A cohort may then be twice the threshold
  or more, where a server that lies could ask one half of it for the masks of its own of a client
  and the other half for its shared ones: against such a server draw no cohorts.
  """
  if not may_miss(config):
    return num_clients
  return config.secure.threshold or expected_clients(config, num_clients) // 2 + 1


def require_masking(config: Config, num_clients: int) -> None:
  """Raises UserError where masks would hide nothing, or a lost message would undo a promise."""
  expected, secure = expected_clients(config, num_clients), config.secure
  drawn = config.server.participation != "full"
  rate = f" of which a round expects {expected}" if drawn else ""
  require(
    expected >= FEWEST_CLIENTS,
    f"secure.protocol='masking' with {num_clients} hospitals{rate}: of a sum of two each learns the"
    " other's update",
    "use at least 3 a round, or secure.protocol=none",
  )
  require(
    not drawn or config.client_privacy.mechanism == "none",
    "secure.protocol='masking' with server.participation='poisson' and"
    f" client_privacy.mechanism='{config.client_privacy.mechanism}': hospitals that share masks"
    " know who takes part, and its ε counts on that being secret",
    "use server.participation=full",
  )
  require(
    secure.dropout == 0 or config.privacy.bands == 1,
    f"secure.dropout={secure.dropout:g} with privacy.bands={config.privacy.bands}: later noise"
    " would take back noise that a lost message never carried",
    "use privacy.bands=1, or secure.dropout=0",
  )
  fewest = fewest_answers(config, num_clients)
  require(
    expected < 2 * fewest and fewest <= expected,
    f"secure.threshold={secure.threshold} is not above half of the {expected} hospitals that a"
    " round expects and at most all of them: with half, two groups could unmask an update",
    f"use {expected // 2 + 1} to {expected}, or 0 for {expected // 2 + 1}",
  )


def masks(bits: int, num_clients: int, *, cohort: int, executed: bool, lossy: bool) -> Transform:
  """Hides whole numbers by masks modulo 2^bits; the server sees their sum only.

  Bytes by stage, of a client in a round of n, as Bonawitz et al. count them in section 7: 2n keys
  and 5n - 4 shares. Up: 2 public keys; 2(n - 1) encrypted shares, of its own seed and of its key,
  one of each for each other client; the masked vector; n shares for unmasking, one for each
  client. Down: 2(n - 1) keys and 2(n - 1) shares of the others. Signatures, the list of who
  answered and overheads of encryption are not counted.

  Args:
    bits: of the modulus.
    num_clients: K.
    cohort: n, for the bytes.
    executed: whether masks are drawn, added and taken off; else they are left out, since they
      cancel exactly.
    lossy: whether messages may be lost after masking.
  """

  def encode(message, kept, state, sender):
    if not executed:
      return message, kept, ()
    me = sender.client.number

    def add(other, total):  # one draw in the loop, for its own mask too: it is compiled once
      counts = sender.seated[other] | (other == me)
      pair = _pair_key(sender.common_key, me, other)
      words = _drawn(jax.lax.select(other == me, sender.key, pair), total)
      return _plus(total, words, counts, other < me)

    total = jax.lax.fori_loop(0, num_clients, add, _words(message))
    # The seed reaches the server, in shares, if the message does.
    seed = jax.random.key_data(sender.key)
    seeds = jnp.zeros((num_clients, *seed.shape), seed.dtype).at[me].set(seed)
    return jax.tree.map(lambda leaf: leaf & _ones(bits), total), kept, seeds

  def decode(total, state, seeds, receiver):
    lost = receiver.seated & ~receiver.arrived
    if executed:
      total = _unmasked(_words(total), seeds, receiver, lossy)
      total = jax.tree.map(lambda leaf: signed(leaf, bits), total)
    return total, state + lost.sum(dtype=jnp.int32) if lossy else state

  def wire(message: Wire) -> Wire:
    others = cohort - 1
    up = 2 * KEY_BYTES + (2 * others + cohort) * SHARE_BYTES
    down = 2 * others * (KEY_BYTES + SHARE_BYTES)
    # A masked vector has no numbers that could be left out.
    return message._replace(
      sent=message.dense,
      index_bits=0,
      beside=message.beside + up,
      answer=message.answer + down,
    )

  return Transform(
    encode=encode,
    decode=decode,
    init_server=lambda message: jnp.zeros((), jnp.int32) if lossy else (),
    wire=wire,
    trust=SUM,
    facts=lambda state: {"recovered": int(state)} if lossy else {},
    clients=True,
  )


def _ones(bits: int) -> jax.Array:
  return jnp.uint32(2**bits - 1)


def _words(message: ClientDelta) -> ClientDelta:
  return jax.tree.map(lambda leaf: leaf.astype(jnp.uint32), message)


def _drawn(key: jax.Array, like: ClientDelta) -> ClientDelta:
  """uint32 words of a seed, in the shapes of a message."""
  leaves, structure = jax.tree.flatten(like)
  words = [
    jax.random.bits(jax.random.fold_in(key, place), leaf.shape, jnp.uint32) if leaf.size else leaf
    for place, leaf in enumerate(leaves)
  ]
  return structure.unflatten(words)


def _pair_key(common: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
  low, high = jnp.minimum(one, other), jnp.maximum(one, other)
  return jax.random.fold_in(jax.random.fold_in(common, low), high)


def _plus(
  total: ClientDelta, words: ClientDelta, counts: jax.Array, negative: jax.Array
) -> ClientDelta:
  """total ± words modulo 2^32, or total where they do not count."""
  return jax.tree.map(
    lambda leaf, word: leaf + jnp.where(counts, jnp.where(negative, -word, word), 0), total, words
  )


def _unmasked(total: ClientDelta, seeds: jax.Array, receiver: Receiver, lossy: bool) -> ClientDelta:
  """The sum without the masks that do not cancel in it.

  These are their own of clients that arrived, by ``seeds`` [K, 2], and those that clients which
  arrived share with lost ones.
  """
  arrived, lost = receiver.arrived, receiver.seated & ~receiver.arrived
  clients, kind = len(arrived), jax.random.key_impl(receiver.key)

  def remove(one, other, total):
    own = jax.random.wrap_key_data(seeds[one], impl=kind)
    key = jax.lax.select(one == other, own, _pair_key(receiver.common_key, one, other))
    return _plus(total, _drawn(key, total), jnp.bool_(True), one <= other)

  def remove_if_left(pair, total):
    one, other = (pair // clients, pair % clients) if lossy else (pair, pair)
    left = arrived[one] & ((one == other) | lost[other])
    return jax.lax.cond(left, remove, lambda one, other, total: total, one, other, total)

  return jax.lax.fori_loop(0, clients * clients if lossy else clients, remove_if_left, total)
