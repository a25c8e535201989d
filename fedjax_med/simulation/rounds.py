"""The compiled program: a block of federated rounds, clients on one axis, in chunks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fedjax_med.core.keys import Stream, key_for
from fedjax_med.federated.algorithm import (
  Client,
  ClientDelta,
  FederatedAlgorithm,
  Hyper,
  Pool,
  RoundMetrics,
  ServerState,
  Tree,
  add_metrics,
  no_metrics,
)
from fedjax_med.privacy.client_level import clip_update, noisy_mean
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.simulation.cohort import deal
from fedjax_med.simulation.mesh import CLIENTS, replicated

NEVER = jnp.iinfo(jnp.int32).max


class SimulationState(NamedTuple):
  """Everything a run carries from round to round; a checkpoint is exactly this.

  Attributes:
    server: the server's state.
    client_states: persistent state of each client, leading axis K.
    steps: [K] int32 local steps executed so far by each client: the privacy ledger's counts.
    clip_norm: [] float32 bound on an update's norm under client-level privacy, else {}.
  """

  server: ServerState
  client_states: Tree
  steps: jax.Array
  clip_norm: Tree


class BlockMetrics(NamedTuple):
  """What a block of rounds reports, summed over its rounds.

  Attributes:
    clients: RoundMetrics with a leading [K] axis.
    bad_round: [K] int32 round in which a client sent a non-finite weight, or NEVER; the first
      one, where a block ends after it, else the last one.
  """

  clients: RoundMetrics
  bad_round: jax.Array


def init_state(
  algorithm: FederatedAlgorithm,
  params: jax.Array,
  state: jax.Array,
  num_clients: int,
  clip_norm: float | None = None,
) -> SimulationState:
  """State before round 0; every client keeps a copy of its own.

  Args:
    algorithm: the federated algorithm.
    params: [P] initial weights.
    state: [S] initial non-trained state.
    num_clients: K.
    clip_norm: bound on an update's norm in round 0 (client-level privacy).
  """
  client_states = jax.tree.map(
    lambda leaf: jnp.repeat(leaf[None], num_clients, axis=0), algorithm.init_client(params, state)
  )
  return SimulationState(
    algorithm.init_server(params, state),
    client_states,
    jnp.zeros((num_clients,), jnp.int32),
    {} if clip_norm is None else jnp.asarray(clip_norm, jnp.float32),
  )


def _reduce(total: Tree, deltas: Tree, weights: jax.Array) -> Tree:
  """total + Σ_client weight · delta over the leading client axis; a zero weight adds exactly 0."""

  def add(accumulated, leaf):
    column = weights.reshape((-1,) + (1,) * (leaf.ndim - 1))
    return accumulated + jnp.where(column > 0, column * leaf, 0).sum(0)

  return jax.tree.map(add, total, deltas)


def _over_devices(train: Callable, mesh: Mesh) -> Callable:
  """``train`` with the rows of its last argument shared out, and its sums added up, over a mesh."""

  def share(*args):
    sums, results = train(*args)
    return jax.lax.psum(sums, CLIENTS), results

  whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
  sharded = jax.shard_map(
    share,
    mesh=mesh,
    in_specs=(whole,) * 7 + (dealt,),
    out_specs=(whole, dealt),
    check_vma=False,  # else each loop of a model would have to say what differs between devices
  )

  def gathered(*args):
    sums, results = sharded(*args)
    return sums, jax.lax.with_sharding_constraint(results, replicated(mesh))

  return gathered


def make_round(
  algorithm: FederatedAlgorithm,
  *,
  num_clients: int,
  cohort_cap: int | None,
  chunk: int,
  mesh: Mesh | None = None,
  client_level: bool = False,
) -> Callable:
  """Builds one round: ``(SimulationState, clients, pool, hyper, key) -> (state, metrics [K])``.

  Args:
    algorithm: the federated algorithm.
    num_clients: K.
    cohort_cap: most clients a Poisson-sampled cohort can hold, or None for full participation.
    chunk: clients trained at once on a device; K is vmap, 1 is a scan. Deltas are folded into a
      weighted sum chunk by chunk, so memory grows with the chunk, not with K.
    mesh: devices that the chunks are dealt over (all arguments lie whole on each), or None.
    client_level: whether updates are clipped and their sum noised by ``hyper.client_level``
      (DP-FedAvg); weights are then not used, every client of the cohort counts 1.
  """
  cohort = num_clients if cohort_cap is None else cohort_cap
  devices = 1 if mesh is None else mesh.size
  seats = deal(cohort, chunk, devices)
  some_absent = cohort_cap is not None or seats.size > num_clients

  def draw_cohort(key, round, rate):
    if cohort_cap is None:
      return jnp.arange(num_clients), jnp.ones((num_clients,), bool)
    return poisson_batch(
      key_for(key, Stream.PARTICIPATION, round),
      jnp.asarray(num_clients, jnp.int32),
      rate,
      max_examples=num_clients,
      batch_cap=cohort_cap,
    )

  def seat(clients: Client, numbers: jax.Array, present: jax.Array) -> jax.Array:
    """[devices · chunks, chunk] client numbers, K in empty slots."""
    # Absent slots point past the table: reads clip to a real client, writes are dropped.
    numbers = jnp.where(present, numbers, num_clients)
    numbers = jnp.pad(numbers, (0, seats.size - cohort), constant_values=num_clients)
    if seats.size > len(seats) or devices > 1:  # a scan on one device waits for nobody
      steps = jnp.take(clients.num_steps, numbers, mode="fill", fill_value=-1)
      numbers = numbers[jnp.argsort(-steps, stable=True)]
    return numbers[seats]

  def train_chunks(
    server: ServerState, clip_norm, client_states: Tree, clients: Client, pool, hyper, key, numbers
  ):
    """Runs a device's chunks [chunks, chunk]: (Σ delta, Σ weight, Σ bit), (states, metrics)."""

    def update(client_state, client):
      delta, client_state, metrics = algorithm.client_update(
        server, client_state, client, pool, hyper, key
      )
      if not client_level:
        return delta, client_state, metrics, jnp.zeros((), jnp.float32)
      update, within = clip_update(delta.params, clip_norm)
      return delta._replace(params=update), client_state, metrics, within - 0.5

    def take(numbers):
      def rows(leaf):
        return jnp.take(leaf, numbers, axis=0, mode="clip")

      return jax.tree.map(rows, clients), jax.tree.map(rows, client_states)

    def run_chunk(total, numbers):
      client, client_state = take(numbers)
      present = numbers < num_clients
      client = client._replace(num_steps=jnp.where(present, client.num_steps, 0))
      if chunk == 1:  # no vmap at all: a batch axis of one costs convolutions dearly
        first = jax.tree.map(lambda leaf: leaf[0], (client_state, client))
        result = jax.tree.map(lambda leaf: leaf[None], update(*first))
      else:
        result = jax.vmap(update)(client_state, client)
      delta, client_state, metrics, bits = result
      weights = jnp.where(present, 1.0 if client_level else client.weight, 0)
      sums = weights.sum(), jnp.where(present, bits, 0).sum()
      return _reduce(total, delta, weights), (client_state, metrics, sums)

    def skip_chunk(total, numbers):
      nothing = jnp.zeros((), jnp.float32)
      return total, (take(numbers)[1], no_metrics((chunk,)), (nothing, nothing))

    def run_if_any(total, numbers):  # clients come before empty slots
      return jax.lax.cond(numbers[0] < num_clients, run_chunk, skip_chunk, total, numbers)

    total, (client_states, metrics, (weight, bits)) = jax.lax.scan(
      run_if_any if some_absent else run_chunk, algorithm.blank_delta(server), numbers
    )
    return (total, weight.sum(), bits.sum()), (client_states, metrics)

  train = train_chunks if mesh is None else _over_devices(train_chunks, mesh)

  def run_round(state: SimulationState, clients: Client, pool: Pool, hyper: Hyper, key: jax.Array):
    server = state.server
    numbers, present = draw_cohort(key, server.round, hyper.participation_rate)
    numbers = seat(clients, numbers, present)
    (total, weight, bits), (client_states, metrics) = train(
      server, state.clip_norm, state.client_states, clients, pool, hyper, key, numbers
    )

    def scatter(old, new):
      return old.at[numbers].set(new, mode="drop")

    client_states = jax.tree.map(scatter, state.client_states, client_states)
    metrics = jax.tree.map(scatter, no_metrics((num_clients,)), metrics)
    clip_norm, someone = state.clip_norm, weight > 0
    if client_level:
      level = hyper.client_level
      assert level is not None
      update, clip_norm = noisy_mean(total.params, bits, clip_norm, level, key, server.round)
      mean = ClientDelta(params=update, state=jnp.zeros_like(total.state))  # state is not clipped
      share = weight / num_clients
    else:
      scale = 1 / jnp.where(someone, weight, 1)
      mean = jax.tree.map(lambda leaf: leaf * scale, total)
      share = weight
    updated = algorithm.server_update(server, mean, share, hyper)
    # An empty cohort leaves all but the round's number as it was; under DP-FedAvg it is noise.
    if cohort_cap is not None and not client_level:
      absent = server._replace(round=updated.round)
      updated = jax.tree.map(lambda new, old: jnp.where(someone, new, old), updated, absent)
    return SimulationState(updated, client_states, state.steps + metrics.steps, clip_norm), metrics

  return run_round


def make_block(run_round: Callable, num_clients: int, client_level: bool = False) -> Callable:
  """Builds ``block(state, clients, pool, hyper, key, num_rounds)``, not jitted.

  ``num_rounds`` is traced: blocks of any length share one compiled program. The block ends early
  after a round in which some client sent a non-finite weight. Under ``client_level`` it goes on:
  such an update counts 0, and ending would tell of one hospital what nothing has noised.
  """

  def block(state, clients, pool, hyper, key, num_rounds):
    metrics = BlockMetrics(no_metrics((num_clients,)), jnp.full((num_clients,), NEVER, jnp.int32))

    def healthy(carry):
      i, _, metrics = carry
      return (i < num_rounds) & (client_level | metrics.clients.finite.all())

    def body(carry):
      i, state, metrics = carry
      round = state.server.round
      state, new = run_round(state, clients, pool, hyper, key)
      bad = jnp.where(new.finite, metrics.bad_round, round)
      return i + 1, state, BlockMetrics(add_metrics(metrics.clients, new), bad)

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
