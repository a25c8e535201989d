"""The compiled program: a block of federated rounds, clients on one axis, in chunks."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedjax_med.core.keys import Stream, key_for
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.registry import Exchange, plain_exchange
from fedjax_med.exchange.transform import Receiver, Sender
from fedjax_med.federated.algorithm import (
  Client,
  FederatedAlgorithm,
  Hyper,
  Pool,
  RoundMetrics,
  ServerState,
  Tree,
  add_metrics,
  no_metrics,
)
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.simulation.cohort import deal
from fedjax_med.simulation.gathering import Gathered, Traffic, join, no_traffic, sent_down
from fedjax_med.simulation.mesh import CLIENTS, replicated

NEVER = jnp.iinfo(jnp.int32).max


class SimulationState(NamedTuple):
  """Everything a run carries from round to round; a checkpoint is exactly this.

  Attributes:
    server: the server's state.
    client_states: persistent state of each client, leading axis K.
    steps: [K] int32 local steps executed so far by each client: the privacy ledger's counts.
    exchange: the server's state of the transforms, such as the bound of clipped updates.
    transform_states: each client's state of the transforms, leading axis K; () for most.
    traffic: counts of messages, and memories of the way.
  """

  server: ServerState
  client_states: Tree
  steps: jax.Array
  exchange: Tree
  transform_states: Tree
  traffic: Traffic


class BlockMetrics(NamedTuple):
  """Metrics of a block of rounds, summed over its rounds.

  Attributes:
    clients: RoundMetrics with a leading [K] axis.
    bad_round: [K] int32 round in which a client sent a non-finite weight, or NEVER; the first
      one, where a block ends after it, else the last one.
  """

  clients: RoundMetrics
  bad_round: jax.Array


class Setup(NamedTuple):
  """Functions and sizes of a round.

  Attributes:
    algorithm: the federated algorithm.
    num_clients: K.
    cohort_cap: most clients a Poisson-sampled cohort can hold, or None for full participation.
    chunk: clients trained at once on a device; K is vmap, 1 is a scan. Updates are folded chunk by
      chunk where the aggregator is linear, so memory grows with the chunk, not with K.
    mesh: devices that the chunks are dealt over (all arguments lie whole on each), or None.
    exchange: transforms and aggregator of updates.
  """

  algorithm: FederatedAlgorithm
  num_clients: int
  cohort_cap: int | None
  chunk: int
  mesh: Mesh | None
  exchange: Exchange

  @property
  def cohort(self) -> int:
    """Most clients that train in a round."""
    return self.num_clients if self.cohort_cap is None else self.cohort_cap

  @property
  def seats(self) -> np.ndarray:
    """[devices · chunks, chunk] place in the cohort of every slot."""
    return deal(self.cohort, self.chunk, 1 if self.mesh is None else self.mesh.size)

  @property
  def may_be_empty(self) -> bool:
    """Whether a slot may have no client."""
    return self.cohort_cap is not None or self.seats.size > self.num_clients


class Cohort(NamedTuple):
  """Clients of a round.

  Attributes:
    numbers: [devices · chunks, chunk] client numbers, K in empty slots.
    seated: [K] bool, clients that train.
    arrived: [K] bool, those of them whose messages arrive.
  """

  numbers: jax.Array
  seated: jax.Array
  arrived: jax.Array


class Sent(NamedTuple):
  """Messages of the clients of some chunks, as sums over the clients that took part.

  Attributes:
    partial: partial result of the aggregator, or a blank one where messages are gathered.
    tally: of the transforms.
  """

  partial: Tree
  tally: Tree


class Chunk(NamedTuple):
  """Results of a chunk, with a leading axis of its clients, and its sums.

  Attributes:
    client_states: persistent states after the round.
    transform_states: the clients' states of the transforms.
    metrics: RoundMetrics of each client.
    tally: sums of the transforms' tallies.
    messages: (updates, weights [chunk]) where the aggregator needs all of them at once, else ().
  """

  client_states: Tree
  transform_states: Tree
  metrics: RoundMetrics
  tally: Tree
  messages: Tree


def init_state(
  algorithm: FederatedAlgorithm,
  params: jax.Array,
  state: jax.Array,
  num_clients: int,
  exchange: Exchange | None = None,
) -> SimulationState:
  """State before round 0; every client keeps a copy of its own.

  Args:
    algorithm: the federated algorithm.
    params: [P] initial weights.
    state: [S] initial non-trained state.
    num_clients: K.
    exchange: transforms and aggregator of updates; None leaves updates as they are.
  """
  exchange = exchange or plain_exchange()
  transform = exchange.transform
  server = algorithm.init_server(params, state)
  blank = algorithm.blank_delta(server)

  def for_all(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_clients, axis=0), tree)

  return SimulationState(
    server=server,
    client_states=for_all(algorithm.init_client(params, state)),
    steps=jnp.zeros((num_clients,), jnp.int32),
    exchange=transform.init_server(blank),
    transform_states=for_all(transform.init_client(blank)),
    traffic=no_traffic(exchange, num_clients, blank, params),
  )


def make_round(
  algorithm: FederatedAlgorithm,
  *,
  num_clients: int,
  cohort_cap: int | None,
  chunk: int,
  mesh: Mesh | None = None,
  exchange: Exchange | None = None,
) -> Callable:
  """Builds one round: ``(SimulationState, clients, pool, hyper, key) -> (state, metrics [K])``.

  Arguments as of ``Setup``; without an exchange updates are averaged as they are.
  """
  setup = Setup(
    algorithm=algorithm,
    num_clients=num_clients,
    cohort_cap=cohort_cap,
    chunk=chunk,
    mesh=mesh,
    exchange=exchange or plain_exchange(),
  )
  transform, aggregator = setup.exchange.transform, setup.exchange.aggregator

  def train_chunks(*arguments):
    return _train_chunks(setup, *arguments)

  train = train_chunks if mesh is None else _over_devices(train_chunks, mesh)

  def run_round(state: SimulationState, clients: Client, pool: Pool, hyper: Hyper, key: jax.Array):
    server, traffic = state.server, state.traffic
    cohort = _seat(setup, clients, key, server.round, hyper.participation_rate)
    broadcast, held = sent_down(setup.exchange, server, traffic.held, key)
    begun = state._replace(server=broadcast)
    sent, left = train(begun, clients, pool, hyper, key, cohort, cohort.numbers)
    arrived, bad = cohort.arrived, jnp.zeros((num_clients,), bool)
    if setup.exchange.gathers:
      messages, weights = jax.tree.map(_joined, left.messages)
      gathered = Gathered(messages=messages, weights=weights, numbers=cohort.numbers.reshape(-1))
      partial, bad = join(setup.exchange, gathered, traffic.rule, clients, hyper, key, server.round)
      sent, arrived = sent._replace(partial=partial), arrived & ~bad
    # In the order of clients, whatever the layout.
    weight = jnp.where(arrived, aggregator.weigh(clients.weight), 0).sum()
    receiver = Receiver(
      weight=weight,
      hyper=hyper,
      key=key_for(key, Stream.EXCHANGE, 1, server.round),
      common_key=key_for(key, Stream.EXCHANGE, 2, server.round),
      seated=cohort.seated,
      arrived=arrived,
      run_key=key,
      round=server.round,
    )
    joined = aggregator.finish(sent.partial, weight)
    aggregate, shared = transform.decode(joined, state.exchange, sent.tally, receiver)
    share = aggregator.share(weight, num_clients)

    def scatter(old, new):
      return old.at[cohort.numbers].set(new, mode="drop")

    metrics = jax.tree.map(scatter, no_metrics((num_clients,)), left.metrics)
    counted = state.steps + metrics.steps
    after = SimulationState(
      server=algorithm.server_update(server, aggregate, share, hyper),
      client_states=jax.tree.map(scatter, state.client_states, left.client_states),
      steps=counted,
      exchange=shared,
      transform_states=jax.tree.map(scatter, state.transform_states, left.transform_states),
      traffic=traffic._replace(
        lost=traffic.lost + (cohort.seated & ~cohort.arrived).astype(jnp.int32),
        refused=traffic.refused + bad.astype(jnp.int32),
        rule=aggregator.remember(joined, traffic.rule),
        held=held,
      ),
    )
    return _unless_void(setup, state, after, arrived, weight), metrics

  return run_round


def _unless_void(
  setup: Setup,
  before: SimulationState,
  after: SimulationState,
  arrived: jax.Array,
  weight: jax.Array,
) -> SimulationState:
  """``after``, or in a round whose messages are too few ``before`` but for what was executed.

  That is the number of the round, local steps, and counts of messages.
  """
  exchange = setup.exchange
  may_be_void = setup.cohort_cap is not None or exchange.may_lose or setup.exchange.gathers
  if exchange.least:
    whole = arrived.sum() >= exchange.least
  elif may_be_void and not exchange.transform.answers_nobody:
    whole = weight > 0
  else:
    return after
  void = after._replace(
    server=before.server._replace(round=after.server.round),
    exchange=before.exchange,
    traffic=after.traffic._replace(
      failed=before.traffic.failed + int(exchange.least > 0), rule=before.traffic.rule
    ),
  )
  if exchange.least:  # some have trained, and go on as if the round had not been
    void = void._replace(
      client_states=before.client_states, transform_states=before.transform_states
    )
  return jax.tree.map(lambda new, old: jnp.where(whole, new, old), after, void)


def _seat(
  setup: Setup, clients: Client, key: jax.Array, round: jax.Array, rate: jax.Array
) -> Cohort:
  """The round's cohort."""
  num_clients, seats = setup.num_clients, setup.seats
  numbers, present = jnp.arange(num_clients), jnp.ones((num_clients,), bool)
  if setup.cohort_cap is not None:
    numbers, present = poisson_batch(
      key_for(key, Stream.PARTICIPATION, round),
      jnp.asarray(num_clients, jnp.int32),
      rate,
      max_examples=num_clients,
      batch_cap=setup.cohort_cap,
    )
  # Absent slots point past the table: reads clip to a real client, writes are dropped.
  numbers = jnp.where(present, numbers, num_clients)
  numbers = jnp.pad(numbers, (0, seats.size - setup.cohort), constant_values=num_clients)
  # A scan on one device waits for nobody.
  if seats.size > len(seats) or (setup.mesh is not None and setup.mesh.size > 1):
    steps = jnp.take(clients.num_steps, numbers, mode="fill", fill_value=-1)
    numbers = numbers[jnp.argsort(-steps, stable=True)]
  seated = jnp.zeros((num_clients,), bool).at[numbers].set(True, mode="drop")
  arrived = seated
  if setup.exchange.loss > 0:
    draws = key_for(key, Stream.EXCHANGE, 3, round)
    arrived = seated & ~jax.random.bernoulli(draws, setup.exchange.loss, (num_clients,))
  if setup.exchange.deadline:
    assert clients.late is not None
    arrived = arrived & ~clients.late
  return Cohort(numbers=numbers[seats], seated=seated, arrived=arrived)


def _train_chunks(
  setup: Setup,
  state: SimulationState,
  clients: Client,
  pool: Pool,
  hyper: Hyper,
  key: jax.Array,
  cohort: Cohort,
  numbers: jax.Array,
) -> tuple[Sent, Chunk]:
  """Trains a device's chunks [chunks, chunk]; returns sums over all, and results of each."""
  transform, aggregator, server = setup.exchange.transform, setup.exchange.aggregator, state.server
  joint = Joint(key=key_for(key, Stream.EXCHANGE, 4, server.round), last=state.traffic.rule)

  sender_of = functools.partial(_sender, hyper, key, cohort.seated, server.round)

  def update(client_state, kept, client):
    delta, client_state, metrics = setup.algorithm.client_update(
      server, client_state, client, pool, hyper, key
    )
    sender = sender_of(client)
    message, kept, tally = transform.encode(delta, kept, state.exchange, sender)
    return message, client_state, kept, metrics, tally

  def take(numbers):
    return jax.tree.map(
      lambda leaf: jnp.take(leaf, numbers, axis=0, mode="clip"),
      (state.client_states, state.transform_states, clients),
    )

  def shapes(numbers):
    first = jax.tree.map(lambda leaf: leaf[0], take(numbers)[1:])
    blank, sender = setup.algorithm.blank_delta(server), sender_of(first[1])
    message, _, tally = jax.eval_shape(transform.encode, blank, first[0], state.exchange, sender)
    return message, tally

  def run_chunk(total, numbers):
    client_state, kept, client = take(numbers)
    present = numbers < setup.num_clients
    client = client._replace(num_steps=jnp.where(present, client.num_steps, 0))
    if setup.chunk == 1:  # no vmap at all: a batch axis of one costs convolutions dearly
      first = jax.tree.map(lambda leaf: leaf[0], (client_state, kept, client))
      result = jax.tree.map(lambda leaf: leaf[None], update(*first))
    else:
      result = jax.vmap(update)(client_state, kept, client)
    message, client_state, kept, metrics, tally = result
    if setup.exchange.may_lose:  # whose message is lost goes on as if the round had not been
      arrives = jnp.take(cohort.arrived, numbers, mode="fill", fill_value=False)
      client_state, kept = _where(arrives, (client_state, kept), take(numbers)[:2])
      present = present & arrives
    weights = jnp.where(present, aggregator.weigh(client.weight), 0)
    if not setup.exchange.gathers:
      total = jax.tree.map(jnp.add, total, aggregator.combine(message, weights, joint))
    chunk = Chunk(
      client_states=client_state,
      transform_states=kept,
      metrics=metrics,
      tally=_total(present, tally),
      messages=(message, weights) if setup.exchange.gathers else (),
    )
    return total, chunk

  def skip_chunk(total, numbers):
    client_state, kept, _ = take(numbers)
    return total, _skipped(setup, client_state, kept, *shapes(numbers))

  def run_if_any(total, numbers):  # clients come before empty slots
    return jax.lax.cond(numbers[0] < setup.num_clients, run_chunk, skip_chunk, total, numbers)

  body = run_if_any if setup.may_be_empty else run_chunk
  blank: Tree = ()
  if not setup.exchange.gathers:
    some = _zeros(shapes(numbers[0])[0], setup.chunk), jnp.zeros((setup.chunk,), jnp.float32)
    blank = _zeros(jax.eval_shape(aggregator.combine, *some, joint))
  partial, left = jax.lax.scan(body, blank, numbers)
  tally = jax.tree.map(lambda leaf: leaf.sum(0), left.tally)
  return Sent(partial=partial, tally=tally), left


def _sender(
  hyper: Hyper, key: jax.Array, seated: jax.Array, round: jax.Array, client: Client
) -> Sender:
  return Sender(
    client=client,
    hyper=hyper,
    key=key_for(key, Stream.EXCHANGE, 0, client.number, round),
    common_key=key_for(key, Stream.EXCHANGE, 2, round),
    seated=seated,
    round=round,
  )


def _skipped(
  setup: Setup, client_states: Tree, transform_states: Tree, message: Tree, tally: Tree
) -> Chunk:
  """A chunk of empty slots, whose states stay as they are; ``message`` and ``tally`` are shapes."""
  weights = jnp.zeros((setup.chunk,), jnp.float32)
  return Chunk(
    client_states=client_states,
    transform_states=transform_states,
    metrics=no_metrics((setup.chunk,)),
    tally=_zeros(tally),
    messages=(_zeros(message, setup.chunk), weights) if setup.exchange.gathers else (),
  )


def _joined(leaf: jax.Array) -> jax.Array:
  """[chunks, chunk, ...] as [chunks · chunk, ...]."""
  return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


def _zeros(shapes: Tree, *leading: int) -> Tree:
  return jax.tree.map(lambda leaf: jnp.zeros((*leading, *leaf.shape), leaf.dtype), shapes)


def _where(marks: jax.Array, new: Tree, old: Tree) -> Tree:
  """Rows of ``new`` where marked [n], else of ``old``."""
  return jax.tree.map(
    lambda one, other: jnp.where(marks.reshape((-1,) + (1,) * (one.ndim - 1)), one, other), new, old
  )


def _total(present: jax.Array, tally: Tree) -> Tree:
  """Sums over the clients that are present."""

  def add(leaf: jax.Array) -> jax.Array:
    column = present.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return jnp.where(column, leaf, 0).sum(0)

  return jax.tree.map(add, tally)


def _over_devices(train: Callable, mesh: Mesh) -> Callable:
  """``train`` with the rows of its last argument shared out, and its sums added up, over a mesh."""

  def share(*args):
    sums, results = train(*args)
    return jax.lax.psum(sums, CLIENTS), results

  whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
  sharded = jax.shard_map(
    share,
    mesh=mesh,
    in_specs=(whole,) * 6 + (dealt,),
    out_specs=(whole, dealt),
    check_vma=False,  # else each loop of a model would have to say what differs between devices
  )

  def gathered(*args):
    sums, results = sharded(*args)
    return sums, jax.lax.with_sharding_constraint(results, replicated(mesh))

  return gathered


def make_block(run_round: Callable, num_clients: int, goes_on: bool = False) -> Callable:
  """Builds ``block(state, clients, pool, hyper, key, num_rounds)``, not jitted.

  ``num_rounds`` is traced: blocks of any length share one compiled program. The block ends early
  after a round in which some client sent a non-finite weight, unless it ``goes_on``: under
  client-level privacy such an update counts 0, and ending would tell an unnoised fact about one
  hospital.
  """

  def block(state, clients, pool, hyper, key, num_rounds):
    bad_round = jnp.full((num_clients,), NEVER, jnp.int32)
    metrics = BlockMetrics(clients=no_metrics((num_clients,)), bad_round=bad_round)

    def healthy(carry):
      i, _, metrics = carry
      return (i < num_rounds) & (goes_on | metrics.clients.finite.all())

    def body(carry):
      i, state, metrics = carry
      round = state.server.round
      state, new = run_round(state, clients, pool, hyper, key)
      bad = jnp.where(new.finite, metrics.bad_round, round)
      both = add_metrics(metrics.clients, new)
      return i + 1, state, BlockMetrics(clients=both, bad_round=bad)

    start = (jnp.zeros((), jnp.int32), state, metrics)
    _, state, metrics = jax.lax.while_loop(healthy, body, start)
    return state, metrics

  return block


def jit_block(block: Callable, mesh: Mesh | None) -> jax.stages.Wrapped:
  """The block compiled, its state donated; with a mesh all lies whole on each device."""
  if mesh is None:
    return jax.jit(block, donate_argnums=0)
  whole = replicated(mesh)
  return jax.jit(block, donate_argnums=0, in_shardings=whole, out_shardings=whole)
