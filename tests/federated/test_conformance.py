"""What every federated algorithm promises, checked for each name of the registry."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.federated.registry import ALGORITHMS
from fedjax_med.simulation.mesh import client_mesh
from fedjax_med.simulation.rounds import jit_block, make_block
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper, make_pool


def cases(fast: set[str], private: set[str]) -> pytest.MarkDecorator:
  """Every algorithm, those of ``private`` also with DP-SGD; all but some of them slow."""

  def case(name, noisy):
    quick = name == "fedavg" or (name in fast and not noisy)
    return pytest.param(name, noisy, marks=() if quick else pytest.mark.slow)

  kinds = [(name, p) for name in ALGORITHMS for p in {False, name in private}]
  return pytest.mark.parametrize(("name", "private"), [case(*kind) for kind in kinds])


every = cases(
  {"scaffold", "fednova", "ditto", "fedper"},
  {name for name, each in ALGORITHMS.items() if each.records},
)
thorough = cases(set(), {"fedavg"})  # noise is the same step for all
POOL = make_pool()


def rounds(federation, num_rounds, state=None, clients=None, hyper=None, pool=POOL):
  initial, block, _ = federation
  return block(
    initial() if state is None else state,
    make_clients() if clients is None else clients,
    pool,
    make_hyper() if hyper is None else hyper,
    KEY,
    jnp.asarray(num_rounds),
  )


@every
def test_five_rounds_and_five_more_equal_ten_bit_for_bit(name, private):
  federation = make_federation(name, private=private)
  whole, _ = rounds(federation, 10)
  half, _ = rounds(federation, 5)
  resumed, _ = rounds(federation, 5, state=half)
  chex.assert_trees_all_equal(whole, resumed)


@thorough
def test_layouts_agree_to_rounding(name, private):
  results = [
    rounds(make_federation(name, private=private, chunk=chunk, shared_steps=steps), 3)
    for chunk, steps in ((3, None), (2, None), (1, None), (3, 2), (1, 2))
  ]
  for result in results[1:]:
    chex.assert_trees_all_close(results[0], result, rtol=2e-5, atol=1e-6)


@thorough
@pytest.mark.parametrize(
  ("steps", "cohort_cap"), [((2, 2, 2), None), ((1, 5, 3), None), ((1, 5, 3), 2)]
)
def test_devices_agree_to_rounding_with_everyone_and_with_a_drawn_cohort(
  name, private, steps, cohort_cap
):
  clients, hyper = make_clients(steps), make_hyper(participation_rate=0.6)
  shared = 2 if steps == (2, 2, 2) else None
  expected, metrics = rounds(
    make_federation(name, private=private, chunk=1, cohort_cap=cohort_cap, shared_steps=shared),
    4,
    clients=clients,
    hyper=hyper,
  )
  for devices, chunk in ((2, 2), (8, 1)):
    federation = make_federation(
      name,
      private=private,
      chunk=chunk,
      cohort_cap=cohort_cap,
      shared_steps=shared,
      devices=devices,
    )
    found, found_metrics = rounds(federation, 4, clients=clients, hyper=hyper)
    assert all(len(leaf.sharding.device_set) == devices for leaf in jax.tree.leaves(found))
    chex.assert_trees_all_close(expected, found, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, found_metrics, rtol=2e-5, atol=1e-6)


@thorough
def test_eight_devices_resume_from_one_and_go_on_bit_for_bit_by_themselves(name, private):
  one, eight = (make_federation(name, private=private, chunk=1, devices=n) for n in (1, 8))
  whole, _ = rounds(eight, 6)
  half, _ = rounds(eight, 3)
  again, _ = rounds(eight, 3, state=half)
  chex.assert_trees_all_equal(whole, again)
  half, _ = rounds(one, 3)
  resumed, _ = rounds(eight, 3, state=jax.device_get(half))
  chex.assert_trees_all_close(whole, resumed, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
@thorough
def test_compiled_equals_interpreted(name, private):
  initial, block, run_round = make_federation(name, private=private, chunk=1, shared_steps=1)
  clients, hyper = make_clients((1, 1, 1)), make_hyper()
  compiled, _ = block(initial(), clients, POOL, hyper, KEY, jnp.asarray(1))
  with jax.disable_jit():
    plain, _ = run_round(initial(), clients, POOL, hyper, KEY)
  chex.assert_trees_all_close(compiled.server, plain.server, rtol=1e-5, atol=1e-6)


@thorough
@pytest.mark.parametrize("devices", [1, 8])
def test_block_lengths_hyperparameters_and_seeds_share_one_trace(name, private, devices):
  chex.clear_trace_counter()
  initial, _, run_round = make_federation(name, private=private, devices=devices)
  block = jit_block(make_block(chex.assert_max_traces(run_round, n=1), 3), client_mesh(devices))
  for length, rate, seed in ((1, 0.5, 0), (3, 0.1, 1), (2, 0.2, 2)):
    key = jax.random.key(seed, impl="threefry2x32")
    hyper = make_hyper(client_learning_rate=rate, clip_norm=rate)
    clients = make_clients((1, length, 2), sigma=rate)
    block(initial(), clients, POOL, hyper, key, jnp.asarray(length))


@thorough
def test_what_lies_in_padding_changes_no_bit(name, private):
  federation = make_federation(name, private=private)
  clean, _ = rounds(federation, 2)
  clients = make_clients()
  slots = jnp.arange(clients.indices.shape[1])[None] >= clients.num_examples[:, None]
  garbage = clients._replace(indices=jnp.where(slots, 24, clients.indices))
  dirty, _ = rounds(federation, 2, clients=garbage)
  chex.assert_trees_all_equal(clean, dirty)


@thorough
def test_an_absent_cohort_changes_nothing(name, private):
  federation = make_federation(name, private=private, cohort_cap=2, chunk=2)
  initial = federation[0]()
  state, metrics = rounds(federation, 3, hyper=make_hyper(participation_rate=0.0))
  chex.assert_trees_all_equal(state.server.params, initial.server.params)
  chex.assert_trees_all_equal(state.client_states, initial.client_states)
  assert int(state.steps.sum()) == 0
  assert int(metrics.clients.steps.sum()) == 0


@thorough
def test_an_empty_round_leaves_a_server_with_momentum_where_it_is(name, private):
  federation = make_federation(name, private=private, cohort_cap=3, chunk=1, server="momentum")
  moving, _ = rounds(federation, 2)
  before = jax.tree.map(jnp.copy, moving.server)
  still, _ = rounds(federation, 2, state=moving, hyper=make_hyper(participation_rate=0.0))
  chex.assert_trees_all_equal(still.server._replace(round=before.round), before)
  assert int(still.server.round) == 4


@thorough
def test_a_cohort_of_everyone_equals_full_participation(name, private):
  full, _ = rounds(make_federation(name, private=private), 3)
  cohort, _ = rounds(make_federation(name, private=private, cohort_cap=3, chunk=2), 3)
  chex.assert_trees_all_close(full, cohort, rtol=2e-5, atol=1e-6)


@thorough
def test_steps_are_counted_for_the_clients_that_took_them(name, private):
  federation = make_federation(name, private=private)
  state, metrics = rounds(federation, 4, clients=make_clients((1, 3, 2)))
  np.testing.assert_array_equal(state.steps, [4, 12, 8])
  np.testing.assert_array_equal(metrics.clients.steps, [4, 12, 8])


@every
def test_learns_the_toy_task(name, private):
  federation = make_federation(name, private=private)
  _, first = rounds(federation, 1)
  trained, _ = rounds(federation, 30)
  _, last = rounds(federation, 5, state=trained)
  before = float(first.clients.loss.sum() / first.clients.examples.sum())
  after = float(last.clients.loss.sum() / last.clients.examples.sum())
  assert after < 0.5 * before
  assert float(last.clients.tally.sum() / last.clients.examples.sum()) > 0.9


@thorough
def test_a_client_that_breaks_is_named_and_ends_the_block(name, private):
  federation = make_federation(name, private=private)
  clients = make_clients()._replace(
    noise_multiplier=jnp.array([0.5, jnp.inf, 0.5]), num_steps=jnp.array([2, 2, 2])
  )
  pool = POOL
  hyper = make_hyper() if private else make_hyper(client_learning_rate=float("inf"))
  state, metrics = rounds(federation, 5, clients=clients, hyper=hyper, pool=pool)
  bad = np.asarray(metrics.bad_round)
  assert bad[1] == 0
  if private:
    assert bad[0] == bad[2] == np.iinfo(np.int32).max
  assert int(state.server.round) == 1
