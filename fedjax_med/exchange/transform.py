"""A transform: one thing that is done to an update on its way from a client to the server."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedjax_med.federated.algorithm import Client, ClientDelta, Hyper

Tree = Any  # a pytree of arrays

# What the server gets to see of the updates.
EACH = "each update"
SUM = "sums of updates only"


class Sender(NamedTuple):
  """Values that a transform may read at a client.

  Attributes:
    client: the client.
    hyper: traced hyperparameters.
    key: key of this transform's draws, for this client and round.
    common_key: key of this transform's draws that all clients and the server share in this round.
    seated: [K] bool, the clients that take part in the round.
    round: [] int32.
  """

  client: Client
  hyper: Hyper
  key: jax.Array
  common_key: jax.Array
  seated: jax.Array
  round: jax.Array


class Receiver(NamedTuple):
  """Values that a transform may read at the server.

  Attributes:
    weight: [] float32 total weight of the clients whose messages arrived; under DP-FedAvg the
      expected one.
    hyper: traced hyperparameters.
    key: key of this transform's draws, for this round.
    common_key: as that of ``Sender``.
    seated: [K] bool, the clients that took part; under DP-FedAvg all of them.
    arrived: [K] bool, those of them whose messages arrived; under DP-FedAvg all of them.
    run_key: base key of the run, of which the accounted noise is drawn; under DP-FedAvg only the
      transform that draws it gets this key.
    round: [] int32.
  """

  weight: jax.Array
  hyper: Hyper
  key: jax.Array
  common_key: jax.Array
  seated: jax.Array
  arrived: jax.Array
  run_key: jax.Array
  round: jax.Array


class Wire(NamedTuple):
  """A message as it travels.

  Attributes:
    dense: numbers that the update has.
    sent: numbers of it that the message holds.
    value_bits: bits of a number.
    index_bits: bits that say which number it is; 0 where all are sent.
    beside: bytes besides the numbers, such as scales, seeds and keys.
    answer: bytes that the client gets for the message to be made, such as keys of other clients.
    apart: numbers of ``dense`` that are no weights: non-trained state, and what an algorithm sends
      besides.
  """

  dense: int
  sent: int
  value_bits: int = 32
  index_bits: int = 0
  beside: int = 0
  answer: int = 0
  apart: int = 0

  @property
  def size(self) -> int:
    """Bytes of the packed message."""
    return -(-self.sent * (self.value_bits + self.index_bits) // 8) + self.beside


def _same(value: Any) -> Any:
  return value


def _nothing(message: ClientDelta) -> Tree:
  return ()


def _no_facts(state: Tree) -> dict[str, Any]:
  return {}


class Transform(NamedTuple):
  """Functions of one transform; those of a chain run in order at clients, in reverse at the server.

  Attributes:
    encode: (message, kept, state, Sender) -> (message, kept, tally), at a client, under vmap.
      ``tally`` is summed over the clients that take part.
    decode: (aggregate, state, tally, Receiver) -> (aggregate, state), at the server.
    init_client: message -> a client's state between rounds, such as an error; () for most.
    init_server: message -> the server's state of the transform; () for most.
    wire: Wire -> Wire after ``encode``: its bytes are counted.
    trust: EACH or SUM, the messages that the server sees if this transform is the last.
    facts: server's state of the transform, on the host -> what it counted so far, by name, for
      summary.json.
    answers_nobody: whether a round in which nobody takes part moves the model, as noise does.
    clients: whether DP-FedAvg covers it: ``decode`` reads nothing of the clients but what was
      noised, and its tally is empty.
  """

  encode: Callable[[ClientDelta, Tree, Tree, Sender], tuple[ClientDelta, Tree, Tree]]
  decode: Callable[[ClientDelta, Tree, Tree, Receiver], tuple[ClientDelta, Tree]]
  init_client: Callable[[ClientDelta], Tree] = _nothing
  init_server: Callable[[ClientDelta], Tree] = _nothing
  wire: Callable[[Wire], Wire] = _same
  trust: str = EACH
  facts: Callable[[Tree], dict[str, Any]] = _no_facts
  answers_nobody: bool = False
  clients: bool = False


def chain(*transforms: Transform) -> Transform:
  """One transform of several; of none it leaves every update as it is.

  The server sees sums only if any of them hides the single updates.
  """

  def encode(message, kept, state, sender):
    after, tallies = [], []
    for place, (transform, own, shared) in enumerate(zip(transforms, kept, state, strict=True)):
      draws = _at(sender, place)
      message, own, tally = transform.encode(message, own, shared, draws)
      after.append(own)
      tallies.append(tally)
    return message, tuple(after), tuple(tallies)

  def decode(aggregate, state, tally, receiver):
    after = []
    steps = list(enumerate(zip(transforms, state, tally, strict=True)))
    for place, (transform, shared, total) in reversed(steps):
      draws = _at(receiver, place)
      aggregate, shared = transform.decode(aggregate, shared, total, draws)
      after.append(shared)
    return aggregate, tuple(reversed(after))

  def wire(message: Wire) -> Wire:
    for transform in transforms:
      message = transform.wire(message)
    return message

  def facts(state):
    found: dict[str, Any] = {}
    for transform, own in zip(transforms, state, strict=True):
      found |= transform.facts(own)
    return found

  return Transform(
    encode=encode,
    decode=decode,
    init_client=lambda message: tuple(each.init_client(message) for each in transforms),
    init_server=lambda message: tuple(each.init_server(message) for each in transforms),
    wire=wire,
    trust=SUM if any(transform.trust == SUM for transform in transforms) else EACH,
    facts=facts,
    answers_nobody=any(transform.answers_nobody for transform in transforms),
    clients=all(transform.clients for transform in transforms),
  )


def _at(side: Any, place: int) -> Any:
  """A Sender or a Receiver with the keys of the transform at this place of a chain."""
  fold = jax.random.fold_in
  return side._replace(key=fold(side.key, place), common_key=fold(side.common_key, place))
