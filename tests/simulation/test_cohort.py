"""Who trains beside whom: what waiting costs, and that the compiled rounds do no more than that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.federated.algorithm import (
  Client,
  ClientDelta,
  FederatedAlgorithm,
  Pool,
  ServerState,
  no_metrics,
)
from fedjax_med.prepare.plan import MAX_AT_ONCE, MAX_WASTE, choose_layout, describe_padding
from fedjax_med.simulation.cohort import best_chunk, deal, load
from fedjax_med.simulation.mesh import client_mesh
from fedjax_med.simulation.rounds import init_state, jit_block, make_block, make_round
from tests.federated.toy import KEY, make_hyper


def unlike_steps(seed: int, clients: int = 40) -> np.ndarray:
  """Steps of clients whose sizes differ up to 20 times, evenly on the logarithmic scale."""
  return np.ceil(np.exp(np.random.default_rng(seed).uniform(0, np.log(20), clients))).astype(int)


@pytest.mark.parametrize(
  ("cohort", "chunk", "devices"), [(1, 1, 1), (7, 3, 1), (40, 8, 1), (5, 1, 8), (50, 4, 3)]
)
def test_every_client_gets_one_slot_and_empty_slots_are_under_one_round_of_chunks(
  cohort, chunk, devices
):
  seats = deal(cohort, chunk, devices)
  assert seats.shape[1] == chunk
  assert sorted(seats.ravel()) == list(range(seats.size))
  assert seats.size - cohort < chunk * devices


def test_load_by_hand():
  # Chunks (9, 4) (3, 2) (1, 1): 9 + 3 + 1 steps of two clients each.
  assert load([1, 9, 2, 4, 1, 3], chunk=2) == (20, 26, 13)
  # Two devices: the first takes (9, 4), the second (3, 2) and then (1, 1).
  assert load([1, 9, 2, 4, 1, 3], chunk=2, devices=2) == (20, 26, 9)
  # Forth and back: the first takes 9, 2, 1 and the second 4, 3, 1.
  assert load([1, 9, 2, 4, 1, 3], chunk=1, devices=2) == (20, 20, 12)
  assert load([1, 9, 2, 4, 1, 3], chunk=2).waste == pytest.approx(0.3)
  assert load([5, 0, 0, 0], chunk=2) == (5, 10, 5), "a chunk without clients is not run"


def test_clients_in_their_own_order_would_wait_longer():
  for seed in range(20):
    steps = unlike_steps(seed)
    as_they_come = steps.reshape(-1, 8).max(1).sum() * 8
    assert load(steps, 8).executed < 0.8 * as_they_come


def test_hospitals_that_differ_twenty_times_waste_at_most_a_quarter():
  spread = np.ceil(20 ** np.linspace(0, 1, 40)).astype(int)
  assert load(spread, 8).waste <= 0.25
  for seed in range(50):
    steps = unlike_steps(seed)
    for devices in (1, 4):
      _, chunk, _ = choose_layout("auto", 0, 40, "gpu", devices=devices, steps=steps)
      assert chunk > 1
      assert load(steps, chunk, devices).waste <= 0.25


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_devices_finish_together_as_far_as_whole_chunks_allow(devices):
  for seed in range(20):
    steps = unlike_steps(seed, 96)
    cost = load(steps, 2, devices)
    assert cost.longest <= cost.executed / 2 / devices + steps.max() / 2


def test_best_chunk_takes_fewest_steps_in_a_row_then_the_least_memory():
  assert best_chunk([4] * 17, 1, 16, 0.25) == 9  # two chunks, as with 16, which wastes 15 slots
  assert best_chunk([4] * 16, 1, 16, 0.25) == 16
  assert best_chunk([4] * 16, 8, 16, 0.25) == 2
  assert best_chunk([1, 100], 1, 16, 0.25) == 1
  for seed in range(20):
    steps = unlike_steps(seed)
    chunk = best_chunk(steps, 1, MAX_AT_ONCE, MAX_WASTE)
    faster = [other for other in range(1, 17) if load(steps, other).longest < load(steps, chunk)[2]]
    assert all(load(steps, other).waste > MAX_WASTE for other in faster)


def test_the_plan_says_what_waiting_costs():
  assert describe_padding([1, 9, 2, 4, 1, 3], 2, 1).startswith("padding 30% of the useful")
  text = describe_padding([1, 9, 2, 4, 1, 3], 2, 2)
  assert "padding 30%" in text
  assert "80% with devices that wait" in text  # 2 devices x 2 clients x 9 steps for 20
  assert describe_padding([3, 5], 1, 1).startswith("padding none")
  assert describe_padding([2] * 100, 4, 1, 0.2).startswith("padding ")


def counting(counted: list[int]) -> FederatedAlgorithm:
  """An algorithm that trains nothing and notes the client of every step that is computed."""

  def init_server(params, state):
    return ServerState(
      params=params, state=state, opt_state=(), average=None, round=jnp.zeros((), jnp.int32)
    )

  def blank_delta(server):
    return ClientDelta(params=jnp.zeros_like(server.params), state=server.state)

  def client_update(server, client_state, client, pool, hyper, key):
    def step(_, params):
      jax.debug.callback(lambda number: counted.append(int(number)), client.number)
      return params + 1

    params = jax.lax.fori_loop(0, client.num_steps, step, server.params)
    metrics = no_metrics()._replace(steps=client.num_steps)
    return ClientDelta(params - server.params, server.state), client_state, metrics

  def server_update(server, delta, share, hyper):
    return server._replace(params=server.params + delta.params, round=server.round + 1)

  return FederatedAlgorithm(
    init_server=init_server,
    init_client=lambda params, state: (),
    client_update=client_update,
    server_update=server_update,
    blank_delta=blank_delta,
  )


@pytest.mark.parametrize(("chunk", "devices"), [(8, 1), (1, 1), (4, 2), (1, 8)])
@pytest.mark.parametrize("cohort_cap", [None, 30])
def test_compiled_rounds_compute_the_steps_that_load_counts(chunk, devices, cohort_cap):
  steps = unlike_steps(3)
  zeros = jnp.zeros((40,), jnp.float32)
  clients = Client(
    number=jnp.arange(40),
    indices=jnp.zeros((40, 1), jnp.int32),
    num_examples=jnp.ones((40,), jnp.int32),
    weight=jnp.full((40,), 1 / 40, jnp.float32),
    num_steps=jnp.asarray(steps, jnp.int32),
    sampling_probability=zeros,
    expected_batch_size=zeros,
    noise_multiplier=zeros,
  )
  counted: list[int] = []
  algorithm, mesh = counting(counted), client_mesh(devices)
  run_round = make_round(algorithm, num_clients=40, cohort_cap=cohort_cap, chunk=chunk, mesh=mesh)
  state = init_state(algorithm, jnp.zeros((2,)), jnp.zeros((0,)), 40)
  pool = Pool(jnp.zeros((1, 2, 2, 1), jnp.uint8), jnp.zeros((1,), jnp.int32))
  hyper = make_hyper(participation_rate=0.4)
  block = jit_block(make_block(run_round, 40), mesh)
  state, metrics = block(state, clients, pool, hyper, KEY, jnp.asarray(1))
  jax.effects_barrier()
  taken = np.asarray(metrics.clients.steps)
  if cohort_cap is None:
    np.testing.assert_array_equal(taken, steps)
    expected = load(steps, chunk, devices)
  else:
    assert 0 < (taken > 0).sum() < 30
    expected = load(np.sort(taken)[::-1][:cohort_cap], chunk, devices)
  assert len(counted) == expected.executed
  np.testing.assert_allclose(state.server.params, np.average(taken, weights=taken > 0), rtol=1e-6)
