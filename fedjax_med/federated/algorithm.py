"""A federated algorithm: a few functions, and records of what moves between server and clients."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.privacy.client_level import ClientLevel

Tree = Any  # a pytree of arrays


class Pool(NamedTuple):
  """Every example of every client, once, on the device; clients refer to it by row number.

  Attributes:
    inputs: raw examples [N, ...] of the modality; of pictures [N, H, W, C] uint8 or uint16.
    labels: targets [N, ...] of the task; of classification [N] int32.
  """

  inputs: Any
  labels: Any


class Units(NamedTuple):
  """A client's privacy units where they hold several rows: stretches of ``Client.indices``.

  Attributes:
    starts: [u_max] int32 slot of the unit's first row.
    sizes: [u_max] int32 rows of the unit, at least 1; 1 past ``number``.
    number: int32 units the client holds.
  """

  starts: jax.Array
  sizes: jax.Array
  number: jax.Array


class Client(NamedTuple):
  """One client as the program sees it; stacked over K clients every field gains a leading axis.

  Attributes:
    number: int32, names the client in random keys.
    indices: [n_max] int32 rows of the pool; slots at or past ``num_examples`` are padding.
    num_examples: int32 n, examples the client holds.
    weight: float32 share of the client in the average.
    num_steps: int32 local steps a round.
    sampling_probability: float32 q of the Poisson draw (private runs).
    expected_batch_size: float32 q·n, the fixed denominator (private runs).
    noise_multiplier: float32 σ (private runs).
    units: rows that are sampled and clipped as a whole; None if every example is a unit.
    coefficients: [b] float32 strategy of correlated noise; None if steps' noise is independent.
    batch_cap: int32 units a Poisson batch is cut to; None if to as many slots as a batch has.
    hostile: bool, whether its messages are forged; None if nobody's are.
    late: bool, whether its messages come after the deadline; None without one.
  """

  number: jax.Array
  indices: jax.Array
  num_examples: jax.Array
  weight: jax.Array
  num_steps: jax.Array
  sampling_probability: jax.Array
  expected_batch_size: jax.Array
  noise_multiplier: jax.Array
  units: Units | None = None
  coefficients: jax.Array | None = None
  batch_cap: jax.Array | None = None
  hostile: jax.Array | None = None
  late: jax.Array | None = None


class Hyper(NamedTuple):
  """Traced hyperparameters, float32 scalars: changing one compiles nothing.

  Attributes:
    client_learning_rate: peak local learning rate.
    server_learning_rate: server learning rate.
    proximal_weight: FedProx μ (Li et al. 2020, eq. 2).
    clip_norm: C, bound on one example's gradient norm.
    ema_decay: decay of the evaluated average over rounds.
    participation_rate: probability that a client takes part in a round.
    algorithm: options of the algorithm in use that are traced, by name: Ditto's personal_weight.
    client_level: settings of client-level privacy, or None without it.
    exchange: numbers of the exchange that are traced, by name; {} for most.
  """

  client_learning_rate: jax.Array
  server_learning_rate: jax.Array
  proximal_weight: jax.Array
  clip_norm: jax.Array
  ema_decay: jax.Array
  participation_rate: jax.Array
  algorithm: Mapping[str, jax.Array]
  client_level: ClientLevel | None = None
  exchange: Mapping[str, jax.Array] = {}


def plain_hyper() -> Hyper:
  """Hyperparameters of plain FedAvg: rates 0.01 and 1, clip norm 1, everyone takes part."""
  zero, one = jnp.float32(0), jnp.float32(1)
  return Hyper(
    client_learning_rate=jnp.float32(0.01),
    server_learning_rate=one,
    proximal_weight=zero,
    clip_norm=one,
    ema_decay=zero,
    participation_rate=one,
    algorithm={},
  )


class ClientDelta(NamedTuple):
  """The update that a client sends: one vector of weights, and little besides.

  Attributes:
    params: [P] float32 local minus received weights, of the layers that leave the client.
    state: [S] float32, the same for non-trained state; [0] for most networks.
    extra: further values of the algorithm, averaged with the same weights; () for most.
  """

  params: jax.Array
  state: jax.Array
  extra: Tree = ()


class ServerState(NamedTuple):
  """The global model and other state of the server between rounds.

  Attributes:
    params: [P] float32 trained weights.
    state: [S] float32 non-trained state of the network (batch statistics); [0] for most.
    opt_state: state of the server optimiser.
    average: [P] exponential moving average of params over rounds, None when it is off.
    round: int32 finished rounds.
    extra: further state of the algorithm; () for most.
  """

  params: jax.Array
  state: jax.Array
  opt_state: Tree
  average: jax.Array | None
  round: jax.Array
  extra: Tree = ()


class RoundMetrics(NamedTuple):
  """Sums over the local steps of one client's round.

  Attributes:
    loss: summed over examples.
    tally: scores of the examples by the task, summed; of classification the correct ones.
    norm: gradient norms of the privacy units, summed (private runs, else 0).
    clipped: units whose gradient was scaled down (private runs, else 0).
    examples: examples seen.
    units: privacy units seen (private runs, else 0).
    steps: local steps executed.
    finite: whether every weight the client sends is finite.
  """

  loss: jax.Array
  tally: jax.Array
  norm: jax.Array
  clipped: jax.Array
  examples: jax.Array
  units: jax.Array
  steps: jax.Array
  finite: jax.Array


def no_metrics(shape: tuple[int, ...] = ()) -> RoundMetrics:
  """RoundMetrics of nothing done, every field of the given shape: the zero of add_metrics."""
  zero = jnp.zeros(shape, jnp.float32)
  return RoundMetrics(
    loss=zero,
    tally=zero,
    norm=zero,
    clipped=zero,
    examples=zero,
    units=zero,
    steps=jnp.zeros(shape, jnp.int32),
    finite=jnp.ones(shape, bool),
  )


def add_metrics(a: RoundMetrics, b: RoundMetrics) -> RoundMetrics:
  """Sums of both; finite only where both are."""
  summed = [name for name in RoundMetrics._fields if name != "finite"]
  sums = {name: getattr(a, name) + getattr(b, name) for name in summed}
  return RoundMetrics(**sums, finite=a.finite & b.finite)


class FederatedAlgorithm(NamedTuple):
  """A federated algorithm as pure functions; every one passes tests/federated/test_conformance.py.

  Weights and non-trained state are vectors (federated/vector.py).

  Attributes:
    init_server: (params, state) -> ServerState.
    init_client: (params, state) -> a client's persistent state. Includes the memory of its
      correlated noise; () for most runs.
    client_update: (server, client_state, client, pool, hyper, key) -> (ClientDelta, client_state,
      RoundMetrics). Runs under vmap over clients; random keys come from (client.number,
      server.round, step).
    server_update: (server, mean ClientDelta, share, hyper) -> ServerState. ``share`` is the part of
      all clients' weight that took part in the round, 1 under full participation.
    blank_delta: server -> the ClientDelta that changes nothing: zeros of the shapes that are sent.
    personal: (params, state, client_state) -> (params, state) that a client predicts with, made of
      the global model and its persistent state; None where that is the global model.
  """

  init_server: Callable[[jax.Array, jax.Array], ServerState]
  init_client: Callable[[jax.Array, jax.Array], Tree]
  client_update: Callable[
    [ServerState, Tree, Client, Pool, Hyper, jax.Array], tuple[ClientDelta, Tree, RoundMetrics]
  ]
  server_update: Callable[[ServerState, ClientDelta, jax.Array, Hyper], ServerState]
  blank_delta: Callable[[ServerState], ClientDelta]
  personal: Callable[[jax.Array, jax.Array, Tree], tuple[jax.Array, jax.Array]] | None = None
