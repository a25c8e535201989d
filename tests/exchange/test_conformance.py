"""What every transform and every aggregator promises, checked for each name of the registries."""

import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from fedjax_med.core.config import Config, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import Stream, key_for
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.registry import (
  AGGREGATORS,
  TRANSFORMS,
  Exchange,
  make_exchange,
  private_exchange,
  register_transform,
  transform_names,
)
from fedjax_med.exchange.transform import EACH, SUM, Transform, Wire, chain
from fedjax_med.federated.algorithm import ClientDelta
from tests.exchange.parts import halved, middle
from tests.federated.test_conformance import rounds
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper, make_pool
from tests.privacy.test_client_level import level

EXCHANGES = {
  f"{transform}-{aggregator}": Exchange(chain(TRANSFORMS[transform]()), AGGREGATORS[aggregator]())
  for transform in TRANSFORMS
  for aggregator in AGGREGATORS
  # A rule that needs every update does not go with sums alone.
  if AGGREGATORS[aggregator]().linear or TRANSFORMS[transform]().trust == EACH
}


def built(**changes):
  """The exchange of the toy federation's three clients, as a config has it."""
  config = Config()
  for path, value in changes.items():
    set_field(config, path.replace("__", "."), value)
  return make_exchange(config, 3)


# What sections of the config build.
EXCHANGES |= {
  "grid": built(secure__protocol="grid"),
  "grid-16": built(secure__protocol="grid", secure__bits=16),
  "masking": built(secure__protocol="masking", secure__dropout=0.2),
  "masking-executed": built(
    secure__protocol="masking", secure__masks="executed", secure__dropout=0.2, secure__bits=20
  ),
  "int": built(compression__kind="int"),
  "topk-ef": built(
    compression__kind="topk", compression__share=0.1, compression__error_feedback="ef"
  ),
  "sign-ef21": built(compression__kind="sign", compression__error_feedback="ef21"),
  "randk-ef": built(
    compression__kind="randk", compression__share=0.2, compression__error_feedback="ef"
  ),
  "sketch-ef": built(
    compression__kind="sketch",
    compression__rows=3,
    compression__columns=9,
    compression__share=0.2,
    compression__error_feedback="ef",
  ),
  "krum": built(server__aggregator="krum", robust__assumed_byzantine=1),
  "buckets": built(server__aggregator="geometric_median", robust__pre="bucketing"),
}
if importlib.util.find_spec("tenseal"):
  EXCHANGES["ckks"] = built(secure__protocol="ckks")
# Draws of masks take long to compile; the other kinds are as int and topk-ef are.
SLOW = {"masking-executed", "sign-ef21", "randk-ef", "sketch-ef", "grid-16", "krum", "ckks"}
every = pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EXCHANGES],
)


def messages(seed=0, clients=5):
  """Updates of several clients, stacked, and their weights."""
  random = np.random.default_rng(seed)
  values = ClientDelta(
    params=jnp.asarray(random.normal(size=(clients, 7)), jnp.float32),
    state=jnp.asarray(random.normal(size=(clients, 2)), jnp.float32),
  )
  weights = random.uniform(0.1, 1, clients)
  return values, jnp.asarray(weights / weights.sum(), jnp.float32)


def joint_of(name, values):
  first = jax.tree.map(lambda leaf: leaf[0], values)
  return Joint(key=KEY, last=AGGREGATORS[name]().init(first))


def joined(name, values, weights):
  aggregator = AGGREGATORS[name]()
  weights = jnp.where(weights > 0, aggregator.weigh(weights), 0)
  return aggregator.finish(
    aggregator.combine(values, weights, joint_of(name, values)), weights.sum()
  )


def check_resumed_rounds(exchange, hyper=None):
  federation = make_federation(exchange=exchange)
  whole, _ = rounds(federation, 10, hyper=hyper)
  half, _ = rounds(federation, 5, hyper=hyper)
  chex.assert_trees_all_equal(whole, rounds(federation, 5, state=half, hyper=hyper)[0])


@every
def test_five_rounds_and_five_more_equal_ten_bit_for_bit(name):
  check_resumed_rounds(EXCHANGES[name])


def check_layouts(exchange, hyper=None):
  expected, _ = rounds(make_federation(exchange=exchange), 3, hyper=hyper)
  for settings in ({"chunk": 1}, {"chunk": 2, "devices": 2}, {"chunk": 2, "cohort_cap": 3}):
    found, _ = rounds(make_federation(exchange=exchange, **settings), 3, hyper=hyper)
    chex.assert_trees_all_close(
      jax.device_get(expected), jax.device_get(found), rtol=2e-5, atol=1e-6
    )


@every
def test_layouts_devices_and_a_cohort_of_everyone_agree_to_rounding(name):
  check_layouts(EXCHANGES[name])


def check_absent_clients(exchange):
  federation = make_federation(exchange=exchange, cohort_cap=3, chunk=1)
  moving, _ = rounds(federation, 2)
  before = jax.tree.map(jnp.copy, moving)
  still, _ = rounds(federation, 2, state=moving, hyper=make_hyper(participation_rate=0.0))
  server = still.server._replace(round=before.server.round)
  failed = before.traffic.failed + (2 if exchange.least else 0)
  before = before._replace(traffic=before.traffic._replace(failed=failed))
  chex.assert_trees_all_equal(still._replace(server=server), before)


@every
def test_a_round_without_anyone_changes_nothing_but_its_number(name):
  check_absent_clients(EXCHANGES[name])


def check_learning(exchange, hyper=None):
  federation = make_federation(exchange=exchange)
  trained, _ = rounds(federation, 40, hyper=hyper)
  _, last = rounds(federation, 5, state=trained, hyper=hyper)
  assert float(last.clients.tally.sum() / last.clients.examples.sum()) > 0.9


@every
def test_learns_the_toy_task(name):
  check_learning(EXCHANGES[name])


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_message_without_weight_counts_exactly_nothing_whatever_it_holds(name):
  values, weights = messages()
  weights = weights.at[2].set(0)
  expected = joined(name, values, weights)
  for wrong in (1e30, jnp.nan, jnp.inf):
    other = jax.tree.map(lambda leaf, wrong=wrong: leaf.at[2].set(wrong), values)
    chex.assert_trees_all_equal(joined(name, other, weights), expected)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_order_of_clients_does_not_matter_and_equal_updates_are_their_own_aggregate(name):
  values, weights = messages()
  order = jnp.asarray([3, 0, 4, 2, 1])
  moved = joined(name, jax.tree.map(lambda leaf: leaf[order], values), weights[order])
  chex.assert_trees_all_close(moved, joined(name, values, weights), rtol=1e-6, atol=1e-6)
  alike = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), values)
  first = jax.tree.map(lambda leaf: leaf[0], values)
  chex.assert_trees_all_close(joined(name, alike, weights), first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in AGGREGATORS if AGGREGATORS[name]().linear])
def test_parts_of_a_linear_aggregator_add_up(name):
  aggregator, (values, weights) = AGGREGATORS[name](), messages()
  parts = [
    aggregator.combine(
      jax.tree.map(lambda leaf, part=part: leaf[part], values),
      weights[part],
      joint_of(name, values),
    )
    for part in (slice(0, 2), slice(2, 5))
  ]
  whole = aggregator.combine(values, weights, joint_of(name, values))
  chex.assert_trees_all_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_message_is_larger_than_the_update_it_stands_for(name):
  for numbers in (1, 7, 25_471):
    wire = TRANSFORMS[name]().wire(Wire(dense=numbers, sent=numbers))
    assert wire.dense == numbers
    assert 0 < wire.size <= 4 * numbers


def test_a_chain_encodes_in_order_decodes_in_reverse_and_folds_the_wire():
  one = chain(halved(), halved())
  assert one.wire(Wire(dense=3, sent=3)).size == 6
  assert one.trust == SUM
  assert chain().wire(Wire(dense=3, sent=3)).size == 12


def config(**changes):
  made = Config()
  for name, value in changes.items():
    setattr(made.server, name, value)
  return made


def test_names_are_read_with_commas_and_unknown_ones_are_refused_with_the_nearest():
  assert transform_names(config(transforms=" halved, identity")) == ["halved", "identity"]
  with pytest.raises(
    UserError, match=r"server.transforms='halfed' is unknown; did you mean 'halved'"
  ):
    make_exchange(config(transforms="halfed"), 3)
  with pytest.raises(UserError, match=r"server.aggregator='men' is unknown; did you mean 'mean'"):
    make_exchange(config(aggregator="men"), 3)
  with pytest.raises(UserError, match="'identity' is registered already"):
    register_transform("identity", halved)


def test_sums_alone_do_not_go_with_a_rule_that_needs_every_update():
  with pytest.raises(UserError, match=r"needs every update, and with .* the server sees sums only"):
    make_exchange(config(transforms="halved", aggregator="middle"), 3)


def test_client_level_privacy_takes_the_mean_alone_and_clips_after_every_transform():
  private = config(aggregator="middle")
  private.client_privacy.mechanism = "dp_fedavg"
  with pytest.raises(UserError, match=r"'middle' with client_privacy.* is not known; use .*=mean"):
    make_exchange(private, 3)
  private.server.aggregator, private.server.transforms = "mean", "halved"
  with pytest.raises(
    UserError, match=r"halved is not declared private for hospitals.*; leave it out"
  ):
    make_exchange(private, 3)
  private.server.transforms = "identity"
  exchange = make_exchange(private, 3)
  assert exchange.transform.answers_nobody
  assert middle().linear is False


def third(counted: bool = False) -> Transform:
  """Sends a third, which the server takes times three; it may count every client at the server."""

  def encode(message, kept, state, sender):
    tally = message.params.sum() if counted else ()
    return message._replace(params=message.params / 3), kept, tally

  def decode(aggregate, state, tally, receiver):
    assert receiver.run_key is receiver.key  # of the noise it knows nothing
    # Times the expected cohort over itself: nothing else is told of how many took part.
    share = receiver.weight / receiver.hyper.client_level.expected_cohort
    return aggregate._replace(params=3 * share * aggregate.params), state

  return Transform(encode=encode, decode=decode, clients=True)


def private_round(exchange, clip_norm, states):
  """Movement of the server in a round of DP-FedAvg without noise, from the first clip norm."""
  initial, block, _ = make_federation(client_level=True, exchange=exchange)
  hyper = make_hyper()._replace(client_level=level())
  start = initial()._replace(exchange=(*states, jnp.float32(clip_norm)))
  before = np.asarray(start.server.params)
  after, _ = block(start, make_clients(), make_pool(), hyper, KEY, jnp.asarray(1))
  return np.asarray(after.server.params) - before


def test_under_client_level_privacy_a_covered_transform_comes_before_the_clip_and_sees_no_cohort():
  plain, covered = private_exchange(1.0), private_exchange(1.0, third())
  assert covered.transform.trust == EACH
  np.testing.assert_allclose(
    private_round(covered, 1e6, [()]), private_round(plain, 1e6, []), rtol=1e-5, atol=1e-7
  )
  moved = private_round(covered, 1e-3, [()])  # three updates of norm C over 3, times three
  assert 0 < np.linalg.norm(moved) <= 3e-3 * (1 + 1e-5)
  assert np.linalg.norm(moved) > 1.5e-3


def test_under_client_level_privacy_nothing_comes_to_the_server_beside_the_noised_sum():
  with pytest.raises(UserError, match=r"counts something of every client at the server.*; return"):
    private_round(private_exchange(1.0, third(counted=True)), 1.0, [()])


def shaken() -> Transform:
  """Adds noise to an update, and to the aggregate of the round."""

  def encode(message, kept, state, sender):
    noise = jax.random.normal(sender.key, message.params.shape)
    return message._replace(params=message.params + noise), kept, ()

  def decode(aggregate, state, tally, receiver):
    noise = jax.random.normal(receiver.key, aggregate.params.shape)
    return aggregate._replace(params=aggregate.params + noise), state

  return Transform(encode=encode, decode=decode)


def test_draws_of_transforms_are_the_same_in_every_layout():
  exchange = Exchange(chain(shaken()), AGGREGATORS["mean"]())
  expected, _ = rounds(make_federation(exchange=exchange), 2)
  found, _ = rounds(make_federation(exchange=exchange, chunk=1), 2)
  chex.assert_trees_all_close(jax.device_get(expected), jax.device_get(found), rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_draws_differ_between_transforms_of_a_chain_clients_rounds_and_the_server():
  keys = []

  def seen(message, kept, state, sender):
    if not isinstance(sender.key, Tracer):  # nor where only shapes are asked for
      keys.append(sender.key)
    return message, kept, ()

  def told(aggregate, state, tally, receiver):
    keys.append(receiver.key)
    return aggregate, state

  exchange = Exchange(chain(*[Transform(encode=seen, decode=told)] * 2), AGGREGATORS["mean"]())
  initial, _, run_round = make_federation.__wrapped__(exchange=exchange, chunk=1)
  clients = make_clients()._replace(num_steps=jnp.zeros(3, jnp.int32))
  with jax.disable_jit():  # keys as values
    state = initial()
    for _ in range(2):
      state, _ = run_round(state, clients, make_pool(), make_hyper(), KEY)
  words = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}
  assert len(keys) >= 2 * 2 * (3 + 1)
  assert len(words) == 2 * 2 * (3 + 1)  # rounds, transforms, clients and the server
  for stream in Stream:
    for counters in ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)):
      data = np.asarray(jax.random.key_data(key_for(KEY, stream, *counters)))
      assert tuple(data.tolist()) not in words


def only(k):
  """Clients of whom the k-th alone has a weight."""
  clients = make_clients()
  return clients._replace(weight=jnp.zeros(3).at[k].set(1))


def test_a_hospital_that_is_late_in_every_round_trains_and_counts_nothing():
  exchange = Exchange(chain(), AGGREGATORS["mean"](), deadline=True)
  late = make_clients()._replace(late=jnp.asarray([False, True, False]))
  federation = make_federation("scaffold", exchange=exchange)
  found, _ = rounds(federation, 3, clients=late)
  assert found.steps.tolist() == [6, 6, 6]
  assert found.traffic.lost.tolist() == [0, 3, 0]
  own = np.asarray(found.client_states[1])
  assert (own[1] == 0).all()  # its control variate is that of before the first round
  assert (own[0] != 0).any()
  plain = make_federation(exchange=exchange)
  some, _ = rounds(plain, 1, clients=late)
  # FedAvg of the two others by themselves: their weights are shares of those who arrive.
  alone = [rounds(make_federation(), 1, clients=only(k))[0].server.params for k in (0, 2)]
  weights = np.asarray(late.weight)[[0, 2]]
  expected = np.average(np.asarray(alone), axis=0, weights=weights)
  np.testing.assert_allclose(np.asarray(some.server.params), expected, rtol=1e-5, atol=1e-6)


def test_a_round_with_fewer_messages_than_due_changes_nothing_but_what_was_executed():
  exchange = Exchange(chain(halved()), AGGREGATORS["mean"](), deadline=True, least=2)
  late = make_clients()._replace(late=jnp.asarray([True, True, False]))
  federation = make_federation("scaffold", exchange=exchange)
  start = federation[0]()
  before = jax.device_get(start)
  after, _ = rounds(federation, 2, state=start, clients=late)
  assert after.traffic.failed == 2
  assert after.server.round == 2
  assert after.steps.tolist() == [4, 4, 4]
  server = after.server._replace(round=before.server.round)
  chex.assert_trees_all_equal(jax.device_get(server), before.server)
  for name in ("client_states", "exchange", "transform_states"):
    chex.assert_trees_all_equal(jax.device_get(getattr(after, name)), getattr(before, name))
