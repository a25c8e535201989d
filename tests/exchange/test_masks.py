"""Secure aggregation: masks cancel, lost messages are recovered, and single updates look random."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_med.audit.planted_hospital import hospital_trials
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.exchange.fixed_point import choose_grid, fixed_point
from fedjax_med.exchange.masks import _drawn, _pair_key, expected_clients, fewest_answers, masks
from fedjax_med.exchange.transform import SUM, Wire, chain
from fedjax_med.federated.algorithm import (
  ClientDelta,
  FederatedAlgorithm,
  ServerState,
  no_metrics,
)
from fedjax_med.federated.registry import ALGORITHMS
from fedjax_med.simulation.mesh import client_mesh
from fedjax_med.simulation.rounds import init_state, jit_block, make_block, make_round
from tests.audit.test_planted_hospital import FULL, hyper_of, settings
from tests.exchange import parts, protocol  # noqa: F401  (parts registers an aggregator)
from tests.exchange.sent import (
  clients_of,
  configured,
  deltas_of,
  encoded,
  exchange_of,
  first_of,
  received,
  signed_sum,
)
from tests.federated.test_conformance import rounds
from tests.federated.toy import KEY, make_federation, make_hyper, make_pool

MASKED = {"secure__protocol": "masking"}
EXECUTED = {**MASKED, "secure__masks": "executed"}
LENGTH = 40
DRAWN = {"server__participation": "poisson", "server__participation_rate": 0.5}
CENTRAL = {"client_privacy__mechanism": "dp_fedavg", "server__weighting": "uniform"}
LOSSY = {"secure__dropout": 0.1}


def updates(clients, length=LENGTH, seed=0):
  random = np.random.default_rng(seed)
  weights = random.dirichlet(np.ones(clients)).astype(np.float32)
  return deltas_of(random.normal(size=(clients, length))), weights


def survivors_of(six, fewest):
  """[K] bool of every subset of at least ``fewest``."""
  for number in range(fewest, six + 1):
    for some in itertools.combinations(range(six), number):
      yield np.isin(np.arange(six), some)


@pytest.mark.parametrize("bits", [32, 20])
def test_for_every_subset_that_may_be_lost_program_and_reference_give_the_survivors_sum(bits):
  deltas, weights = updates(6)
  lossy = {"secure__bits": bits, "secure__dropout": 0.2, "secure__threshold": 4}
  program = exchange_of(6, **EXECUTED, **lossy)
  assert program.least == 4
  plain = exchange_of(6, secure__protocol="grid", secure__bits=bits)
  numbers = np.asarray(encoded(plain.transform, deltas, weights)[0].params)
  # Draws of the grid are keyed by the place in the chain, which is the same in both.
  run = jax.jit(lambda arrived: received(program, deltas, weights, arrived))
  unmasked_run = jax.jit(lambda arrived: received(plain, deltas, weights, arrived)[1].params)
  # Masks whose leftovers are not taken off: what the server would have without recovery.
  kept = chain(*_parts(bits, lossy=False))
  unrecovered = jax.jit(
    lambda arrived: received(program._replace(transform=kept), deltas, weights, arrived)[1].params
  )
  group = protocol.keys_and_shares(6, 4)
  vectors = {k: protocol.masked(group, k, numbers[k], bits) for k in range(6)}
  subsets = list(survivors_of(6, 4))
  assert len(subsets) == 1 + 6 + 15
  grid = _grid(6, bits)
  for arrived in subsets:
    expected = signed_sum(numbers[arrived], bits)
    sent = {k: vectors[k] for k in np.flatnonzero(arrived).tolist()}
    found = protocol.unmasked_sum(group, sent, 4, bits)
    np.testing.assert_array_equal(signed_sum(found[None], bits), expected)
    _, update, state = run(jnp.asarray(arrived))
    np.testing.assert_array_equal(update.params, unmasked_run(jnp.asarray(arrived)))
    share = weights[arrived].sum(dtype=np.float32)
    decoded = expected.astype(np.float32) / (np.float32(grid.scale) * share)
    np.testing.assert_allclose(update.params, decoded, rtol=1e-6)
    assert program.transform.facts(state)["recovered"] == 6 - arrived.sum()
    same = np.asarray(unrecovered(jnp.asarray(arrived))) == np.asarray(update.params)
    assert same.all() if arrived.all() else same.mean() < 0.1
  with pytest.raises(ValueError, match="3 answers are fewer than 4"):
    protocol.unmasked_sum(group, {k: vectors[k] for k in range(3)}, 4, bits)


def _grid(clients, bits):
  return choose_grid(configured(**MASKED, secure__bits=bits), clients)


def _parts(bits, lossy):
  return fixed_point(_grid(6, bits)), masks(bits, 6, cohort=6, executed=True, lossy=lossy)


def test_shamir_shares_below_the_threshold_tell_nothing_that_fits_one_secret_better():
  shares = protocol.split(1234, 6, 4)
  for some in itertools.combinations(shares, 4):
    assert protocol.combine({x: shares[x] for x in some}) == 1234
  # Three shares and any guess lie on a polynomial of degree 3.
  three = {x: shares[x] for x in (1, 2, 3)}
  assert protocol.combine(three) != 1234
  for guess in (0, 99):
    assert protocol.combine({**three, 7: _through(three, guess)}) == guess


def _through(three, guess):
  """Value at 7 of the polynomial of degree 3 through three points and (0, guess)."""
  points = {**three, 0: guess}
  shifted = {(x - 7) % protocol.PRIME: y for x, y in points.items()}
  return protocol.combine(shifted)


def bytes_p(vectors, bits) -> list[float]:
  """p of χ² against uniform bytes, of each vector."""
  kind = {32: np.uint32, 16: np.uint16, 8: np.uint8}[bits]
  counts = [np.bincount(np.asarray(v).astype(kind).view(np.uint8), minlength=256) for v in vectors]
  return [float(stats.chisquare(count).pvalue) for count in counts]


@pytest.mark.parametrize("bits", [32, 16])
def test_what_the_server_holds_of_every_hospital_is_uniform(bits):
  deltas, weights = updates(4, 8192)
  program = exchange_of(4, **EXECUTED, secure__bits=bits)
  plain = exchange_of(4, secure__protocol="grid", secure__bits=bits)
  sent = encoded(program.transform, deltas, weights)[0].params
  assert sent.dtype == jnp.uint32
  assert int(sent.max()) < 2**bits
  found = bytes_p(sent, bits)
  assert min(found) > 1e-4
  assert max(bytes_p(encoded(plain.transform, deltas, weights)[0].params, bits)) < 1e-30
  numbers = np.asarray(encoded(plain.transform, deltas, weights)[0].params, np.float64)
  shown = np.corrcoef(np.asarray(sent, np.float64), numbers)[:4, 4:]
  assert np.abs(shown).max() < 5 / np.sqrt(8192)


def test_when_all_others_collude_two_equal_updates_are_two_unlike_vectors_of_one_known_sum():
  clients, length = 5, 8192
  values = np.repeat(np.random.default_rng(1).normal(size=(1, length)), clients, 0)
  deltas, weights = deltas_of(values), np.full(clients, 0.2, np.float32)
  program = exchange_of(clients, **EXECUTED)
  plain = exchange_of(clients, secure__protocol="grid")
  sent = np.asarray(encoded(program.transform, deltas, weights)[0].params)
  numbers = np.asarray(encoded(plain.transform, deltas, weights)[0].params).astype(np.uint32)
  like = deltas_of(np.zeros(length))
  common = jax.random.fold_in(key_for(KEY, Stream.EXCHANGE, 2, 0), 1)  # the second of the chain
  left = []
  for me in (0, 1):
    key = jax.random.fold_in(key_for(KEY, Stream.EXCHANGE, 0, me, 0), 1)
    total = sent[me] - np.asarray(_drawn(key, like).params)  # the server gets these seeds
    for other in (2, 3, 4):  # and these hospitals know their pair seeds
      pair = _pair_key(common, jnp.asarray(me), jnp.asarray(other))
      total = total - np.asarray(_drawn(pair, like).params)
    left.append(total)
  assert min(bytes_p(left, 32)) > 1e-4
  assert (left[0] == left[1]).mean() < 0.01
  np.testing.assert_array_equal(left[0] + left[1], numbers[0] + numbers[1])


def given(values) -> FederatedAlgorithm:
  """An algorithm whose client k sends row k of ``values``, a multiple of 2^-20, in every layout."""

  def init_server(params, state):
    zero = jnp.zeros((), jnp.int32)
    return ServerState(params=params, state=state, opt_state=(), average=None, round=zero)

  def blank_delta(server):
    return ClientDelta(params=jnp.zeros_like(server.params), state=server.state)

  def client_update(server, client_state, client, pool, hyper, key):
    row = jnp.take(values, client.number, axis=0) * (1 + server.round).astype(jnp.float32)
    return blank_delta(server)._replace(params=row), client_state + 1, no_metrics()

  def server_update(server, delta, share, hyper):
    return server._replace(params=server.params + delta.params, round=server.round + 1)

  return FederatedAlgorithm(
    init_server=init_server,
    init_client=lambda params, state: jnp.zeros((), jnp.int32),
    client_update=client_update,
    server_update=server_update,
    blank_delta=blank_delta,
  )


def sent_rounds(exchange, *, clients=8, chunk=8, devices=1, cohort_cap=None, rate=0.5, number=4):
  """State after some rounds of ``given``."""
  random = np.random.default_rng(5)
  values = jnp.asarray(random.integers(-(2**20), 2**20, (clients, 33)) / 2**20, jnp.float32)
  weights = np.full(clients, 1 / clients)
  algorithm, mesh = given(values), client_mesh(devices)
  run_round = make_round(
    algorithm,
    num_clients=clients,
    cohort_cap=cohort_cap,
    chunk=chunk,
    mesh=mesh,
    exchange=exchange,
  )
  state = init_state(algorithm, jnp.zeros(33), jnp.zeros(0), clients, exchange)
  block = jit_block(make_block(run_round, clients), mesh)
  hyper = make_hyper(participation_rate=rate)
  state, _ = block(state, clients_of(weights), make_pool(), hyper, KEY, jnp.asarray(number))
  return jax.device_get(state)


@pytest.mark.parametrize(
  ("masked", "layout"),
  [
    (MASKED, {"chunk": 1}),
    (EXECUTED, {"chunk": 3, "devices": 2}),
    pytest.param(MASKED, {"chunk": 1, "devices": 8}, marks=pytest.mark.slow),
    pytest.param(EXECUTED, {"chunk": 8}, marks=pytest.mark.slow),
    pytest.param(EXECUTED, {"chunk": 1, "devices": 8}, marks=pytest.mark.slow),
  ],
)
def test_sums_of_equal_vectors_are_equal_bit_for_bit_in_every_layout(masked, layout, elided):
  found = sent_rounds(exchange_of(8, **masked, secure__dropout=0.2), **layout)
  chex.assert_trees_all_equal(found.server, elided.server)
  chex.assert_trees_all_equal(found.client_states, elided.client_states)
  chex.assert_trees_all_equal(found.traffic, elided.traffic)


@pytest.fixture(scope="module")
def elided():
  """Rounds of the elided masks in one vmap, in which messages were lost."""
  state = sent_rounds(exchange_of(8, **MASKED, secure__dropout=0.2))
  assert state.traffic.lost.sum() > 0
  assert np.abs(state.server.params).max() > 0.1
  return state


def test_drawn_cohorts_mask_among_themselves_and_small_ones_change_nothing():
  drawn = {"server__participation": "poisson", "server__participation_rate": 0.5}
  exchange = exchange_of(8, **EXECUTED, **drawn)
  assert exchange.least == 3  # more than half of the 4 that are expected
  found = sent_rounds(exchange, cohort_cap=8, number=12)
  elided = sent_rounds(exchange_of(8, **MASKED, **drawn), cohort_cap=8, number=12)
  chex.assert_trees_all_equal(found.server, elided.server)
  failed = int(found.traffic.failed)
  assert 0 < failed < 12
  # Clients of failed rounds go on as if those had not been.
  assert found.client_states.sum() >= 3 * (12 - failed)
  assert int(found.server.round) == 12


def test_a_round_with_too_few_answers_changes_nothing_and_is_counted():
  exchange = exchange_of(8, **MASKED, secure__dropout=0.9)
  state = sent_rounds(exchange, number=5)
  assert int(state.traffic.failed) == 5
  assert not state.server.params.any()
  assert not state.client_states.any()
  assert int(state.exchange[-1]) == 0  # nothing was recovered
  assert state.traffic.lost.sum() > 5 * 4


@pytest.mark.slow  # the layouts above tell the same of vectors that are given
def test_executed_and_elided_masks_end_in_the_same_weights_of_a_training():
  lossy = {"secure__dropout": 0.3, "secure__bits": 20}
  states = [
    rounds(make_federation(exchange=exchange_of(3, **masked, **lossy)), 6)[0]
    for masked in (MASKED, EXECUTED)
  ]
  chex.assert_trees_all_equal(*states)
  assert int(states[0].traffic.lost.sum()) > 0


def test_scaffolds_variate_stays_the_mean_of_the_clients_where_messages_are_lost():
  exchange = exchange_of(
    3, **MASKED, secure__dropout=0.4, server__algorithm="scaffold", secure__extra_range=16.0
  )
  federation = make_federation("scaffold", exchange=exchange)
  state, _ = rounds(federation, 12)
  weights = np.asarray([12, 8, 5], np.float64) / 25
  assert int(state.traffic.lost.sum()) > 0
  assert 0 < int(state.traffic.failed) < 12
  mean = weights @ np.asarray(state.client_states[1], np.float64)
  bound = 3 / 2.0**26  # of a round: rounding of three variates within ±16
  assert np.abs(mean).max() > 1e-3
  np.testing.assert_allclose(state.server.extra, mean, rtol=2e-5, atol=12 * bound)


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[pytest.mark.slow] * (name != "performance")) for name in ALGORITHMS],
)
def test_every_algorithm_of_linear_updates_is_the_same_under_masks_up_to_the_grid(name):
  masked = exchange_of(3, **MASKED, server__algorithm=name)
  found, _ = rounds(make_federation(name, exchange=masked), 3)
  expected, _ = rounds(make_federation(name), 3)
  grid = _grid(3, 32)
  np.testing.assert_allclose(
    found.server.params,
    expected.server.params,
    rtol=2e-5,
    atol=3 * 200 * grid.rounding_error_bound,  # local steps spread what rounding moves
  )
  facts = masked.transform.facts(jax.device_get(found.exchange))
  assert facts["saturated"] == 0
  assert facts.get("extra_saturated", 0) == 0


@pytest.mark.slow
def test_the_audit_of_a_hospital_sees_through_masks_what_it_sees_without_them():
  masked = exchange_of(6, **EXECUTED, **CENTRAL, client_privacy__clip_norm=0.3)
  assert masked.clip_place == 0
  assert len(masked.transform.init_server(first_of(deltas_of(np.zeros((1, 4)))))) == 3
  hyper = hyper_of(FULL, settings(FULL, 2.5))
  found, expected = (
    hospital_trials(FULL, hyper, 2, 100, base_key(0), exchange) for exchange in (masked, None)
  )
  for share, pair in expected.items():
    for one, other in zip(found[share], pair, strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_bytes_are_those_of_the_protocol_by_stage():
  for hospitals in (3, 5, 64):
    wire = exchange_of(hospitals, **MASKED, secure__bits=20).transform.wire
    made = wire(Wire(dense=1001, sent=10, index_bits=10))  # masks make a sparse message dense
    keys, shares = 2 * 32 * hospitals, 32 * (5 * hospitals - 4)
    assert made.size + made.answer == -(-1001 * 20 // 8) + keys + shares
    assert made.answer == 2 * 32 * (hospitals - 1) + 2 * 32 * (hospitals - 1)
  assert exchange_of(3, **MASKED).transform.trust == SUM


def test_the_threshold_is_of_all_hospitals_or_of_the_cohort_that_is_expected():
  lossy = configured(**MASKED, secure__dropout=0.1)
  assert [fewest_answers(lossy, k) for k in (3, 4, 5, 6, 64)] == [2, 3, 3, 4, 33]
  assert fewest_answers(configured(**MASKED), 5) == 5
  drawn = configured(**MASKED, server__participation="poisson", server__participation_rate=0.3)
  assert [expected_clients(drawn, k) for k in (10, 20, 21)] == [3, 6, 7]
  assert [fewest_answers(drawn, k) for k in (10, 20, 21)] == [2, 4, 4]


@pytest.mark.parametrize(
  ("clients", "changes", "message"),
  [
    (2, {}, r"masking' with 2 hospitals: of a sum of two .*; use at least 3 a round, or"),
    (4, DRAWN, r"4 hospitals of which a round expects 2: .*; use at least 3"),
    (8, {**DRAWN, **CENTRAL}, r"know who takes part, and its ε .*; use server.participation=full"),
    (5, {**LOSSY, "privacy__bands": 2}, r"privacy.bands=2: later noise .*; use privacy.bands=1"),
    (6, {**LOSSY, "secure__threshold": 3}, r"threshold=3 is not above half .* 6 .*; use 4 to 6"),
    (6, {**LOSSY, "secure__threshold": 7}, r"threshold=7 is not above .* at most all"),
    (6, {"server__aggregator": "middle"}, r"'middle' with secure.protocol='masking': .*hides"),
    (120, {"secure__bits": 8}, r"secure.bits=8 leaves fewer than 8 steps .*; use secure.bits=9"),
    (5, {"secure__scale": 2.0**29}, r"could wrap modulo 2\^32 above 2.68435e\+08"),
  ],
)
def test_settings_under_which_masks_keep_no_promise_are_refused(clients, changes, message):
  with pytest.raises(UserError, match=message):
    exchange_of(clients, **{**MASKED, **changes})
