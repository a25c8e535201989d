"""Robust rules against ByzFL, against what they promise, and in the toy federation."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.conditions import ROBUST_RULES
from fedjax_med.core.config import Config, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.registry import make_exchange, register_aggregator
from fedjax_med.exchange.robust.mixing import in_buckets
from fedjax_med.exchange.robust.rules import BEFORE, RULES, robust_aggregator
from fedjax_med.federated.algorithm import ClientDelta
from tests.exchange.make_byzfl_golden import WHOLE
from tests.federated.toy import KEY

GOLDEN = dict(np.load(pathlib.Path(__file__).with_name("byzfl_golden.npz")))
# Of values that are equally far, ByzFL counts those that argpartition happens to put first.
AMBIGUOUS = ("krum", "multi_krum", "meamed", "nnm")
BYZFL = {"robust.weiszfeld": "byzfl", "robust.radius": 0.5, "robust.max_norm": 1.0}


def settings(**changes):
  config = Config()
  for path, value in {**BYZFL, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
    set_field(config, path, value)
  return config


def golden_cases(name):
  """Numbers of the cases whose result does not depend on the order of equal distances."""
  whole = GOLDEN["kind"] == WHOLE
  return np.flatnonzero(~whole) if name in AMBIGUOUS else np.arange(len(whole))


def presence():
  return np.arange(GOLDEN["vectors"].shape[1]) < GOLDEN["n"][:, None]


def arguments_of(cases):
  """Vectors, presence and f of the cases, stacked."""
  return [jnp.asarray(x[cases]) for x in (GOLDEN["vectors"], presence(), GOLDEN["f"])]


def check_golden(name, found, cases):
  expected = GOLDEN[name][cases]
  scale = np.abs(GOLDEN["vectors"][cases]).max((1, 2)).reshape((-1,) + (1,) * (expected.ndim - 1))
  np.testing.assert_allclose(found / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_that_of_byzfl_with_absent_rows_beside(name):
  cases = golden_cases(name)
  rule = RULES[name](settings().robust)
  vectors, present, f = arguments_of(cases)
  joined = jax.jit(jax.vmap(rule.combine))
  zero = jnp.zeros(vectors.shape[::2])
  found = joined(vectors, present, f, zero)
  check_golden(name, found, cases)
  assert len(cases) >= 150
  if rule.remembers:
    check_golden(f"{name}_again", joined(vectors, present, f, found), cases)


@pytest.mark.parametrize("name", ["nnm", "clipping", "arc"])
def test_a_step_before_is_that_of_byzfl(name):
  cases = golden_cases(name)
  before = BEFORE[name](settings().robust)
  vectors, present, f = arguments_of(cases)
  found, after = jax.jit(jax.vmap(lambda x, here, f: before(x, here, f, KEY)))(vectors, present, f)
  assert np.array_equal(after, present)
  check_golden(name, found, cases)


def test_buckets_are_those_of_byzfl_in_the_same_order():
  cases = np.arange(len(GOLDEN["n"]))
  present, order = presence(), GOLDEN["order"].copy()
  for row, n in zip(order, GOLDEN["n"], strict=True):
    row[n:] = np.arange(n, len(row))
  found, held = jax.jit(jax.vmap(lambda x, here, order: in_buckets(x, here, order, 2)))(
    GOLDEN["vectors"], present, order
  )
  assert np.array_equal(held.sum(1), -(-GOLDEN["n"] // 2))
  check_golden("bucketing", np.pad(found, ((0, 0), (0, 4), (0, 0))), cases)


def test_random_buckets_hold_everybody_once():
  vectors = jnp.eye(7, dtype=jnp.float32)
  present = jnp.arange(7) != 3
  means, held = BEFORE["bucketing"](Config().robust)(vectors, present, 0, KEY)
  assert held.tolist() == [True, True, True, False]
  counts = (means > 0).sum(1)
  assert counts.tolist() == [2, 2, 2, 0]
  held_by = (np.asarray(means) * np.asarray(counts)[:, None]).sum(0)
  np.testing.assert_allclose(held_by, np.asarray(present, float), rtol=1e-6)
  other, _ = BEFORE["bucketing"](Config().robust)(vectors, present, 0, jax.random.key(8))
  assert not np.array_equal(means, other)


# Every rule, and every step before the mean.
SETTINGS = {
  **{name: {"server__aggregator": name} for name in RULES},
  **{f"{name}-mean": {"robust__pre": name} for name in BEFORE},
  "nnm-geometric_median": {"server__aggregator": "geometric_median", "robust__pre": "nnm"},
}
every = pytest.mark.parametrize("name", SETTINGS)


def aggregator_of(name, f=2, **changes):
  config = Config()
  for path, value in {"robust__assumed_byzantine": f, **SETTINGS[name], **changes}.items():
    set_field(config, path.replace("__", "."), value)
  return robust_aggregator(config)


def messages_of(vectors):
  """Messages whose numbers are those of the rows, in three places."""
  vectors = jnp.asarray(vectors, jnp.float32)
  return ClientDelta(params=vectors[:, 2:], state=vectors[:, :1], extra=(vectors[:, 1],))


def joined(name, vectors, weights=None, **changes):
  aggregator, messages = aggregator_of(name, **changes), messages_of(vectors)
  weights = jnp.ones(len(vectors)) if weights is None else jnp.asarray(weights, jnp.float32)
  first = jax.tree.map(lambda leaf: leaf[0], messages)
  joint = Joint(key=KEY, last=aggregator.init(first))
  found = aggregator.finish(aggregator.combine(messages, weights, joint), weights.sum())
  return np.concatenate([found.state, np.reshape(found.extra[0], 1), found.params])


def drawn(seed=0, clients=9, width=8):
  return np.random.default_rng(seed).normal(size=(clients, width)).astype(np.float32)


@every
def test_absent_clients_count_exactly_nothing_whatever_they_hold(name):
  vectors, weights = drawn(), np.ones(9)
  weights[[2, 7]] = 0
  expected = joined(name, vectors, weights)
  for wrong in (1e30, np.nan, np.inf):
    other = vectors.copy()
    other[[2, 7]] = wrong
    np.testing.assert_array_equal(joined(name, other, weights), expected)
  if "bucketing" not in name:  # whose draws are of places
    np.testing.assert_allclose(joined(name, np.delete(vectors, [2, 7], 0)), expected, atol=1e-6)
  assert np.isfinite(joined(name, vectors, np.zeros(9))).all()


@every
def test_order_and_weights_do_not_matter_and_equal_updates_are_their_own_aggregate(name):
  vectors, random = drawn(), np.random.default_rng(1)
  expected = joined(name, vectors)
  if "bucketing" not in name:
    np.testing.assert_allclose(joined(name, vectors[random.permutation(9)]), expected, atol=1e-6)
  np.testing.assert_array_equal(joined(name, vectors, random.uniform(0.1, 1, 9)), expected)
  if name != "clipping-mean":  # one that is longer than the norm becomes shorter
    alike = np.broadcast_to(vectors[:1], vectors.shape)
    np.testing.assert_allclose(joined(name, alike), vectors[0], rtol=1e-5, atol=1e-6)


@every
def test_scaled_updates_have_a_scaled_aggregate_and_moved_ones_a_moved_one(name):
  vectors = drawn()
  expected = joined(name, vectors)
  if name != "clipping-mean":
    np.testing.assert_allclose(joined(name, 64 * vectors), 64 * expected, rtol=2e-5, atol=1e-4)
  # Where norms count, or the memory does, the origin is a place like no other.
  if not name.startswith(("clipping", "arc", "centered_clipping")):
    np.testing.assert_allclose(joined(name, vectors + 3), expected + 3, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.endswith("-mean")])
@pytest.mark.parametrize("wrong", [1e30, -1e30, np.inf, -np.inf, np.nan])
def test_f_wild_updates_leave_the_result_within_the_box_of_the_honest_ones(name, wrong):
  vectors = drawn()
  vectors[[1, 4]] = wrong
  honest = np.delete(vectors, [1, 4], 0)
  found = joined(name, vectors)
  assert (found >= honest.min(0) - 1e-6).all()
  assert (found <= honest.max(0) + 1e-6).all()


@pytest.mark.parametrize("name", ["clipping-mean", "arc-mean"])
def test_a_clipped_mean_moves_by_no_more_than_the_attackers_share_of_the_norm(name):
  vectors = drawn()
  longest = np.linalg.norm(np.delete(vectors, [1, 4], 0), axis=1).max()
  vectors[[1, 4]] = 1e30
  assert np.linalg.norm(joined(name, vectors)) <= longest


def test_the_geometric_median_is_within_its_breakdown_bound_of_large_updates():
  vectors = drawn()
  honest = np.delete(vectors, [1, 4], 0)
  bound = 2 * 7 / (9 - 4) * np.linalg.norm(honest, axis=1).max()  # Lopuhaä and Rousseeuw 1991
  for size in (10, 1e4, 1e15):
    vectors[[1, 4]] = size
    found = joined("geometric_median", vectors, robust__weiszfeld_steps=100)
    assert np.linalg.norm(found) <= bound
    assert np.linalg.norm(joined("geometric_median", vectors)) <= bound


def test_many_steps_find_the_point_of_the_least_sum_of_distances():
  vectors = drawn()
  found = joined("geometric_median", vectors, robust__weiszfeld_steps=200, robust__smoothing=1e-3)

  def total(point):
    return np.linalg.norm(vectors.astype(np.float64) - point, axis=1).sum()

  random = np.random.default_rng(0)
  nearby = [total(found + 0.01 * random.normal(size=8)) for _ in range(50)]
  assert total(found) < min(nearby)
  assert total(found) < total(vectors.mean(0))


def test_a_trimmed_mean_of_nobody_is_the_mean_and_too_few_clients_trim_fewer():
  vectors = drawn()
  np.testing.assert_allclose(joined("trimmed_mean", vectors, f=0), vectors.mean(0), atol=1e-6)
  weights = np.zeros(9)
  weights[[0, 3]] = 1  # f = 2 of two
  pair = vectors[[0, 3]]
  np.testing.assert_allclose(joined("trimmed_mean", vectors, weights), pair.mean(0), atol=1e-6)


def test_the_names_of_the_configuration_are_those_of_the_rules():
  assert tuple(RULES) == ROBUST_RULES
  with pytest.raises(UserError, match="'median' is registered already"):
    register_aggregator("median", lambda: aggregator_of("median"))


@pytest.mark.parametrize(
  ("changes", "clients", "sentence"),
  [
    (
      {"server.aggregator": "krum", "robust.assumed_byzantine": 2},
      4,
      "robust.assumed_byzantine=2 of 4 hospitals: no rule can tell .* honest; use at most 1",
    ),
    ({"server.aggregator": "median"}, 2, "'median' with 2 hospitals: .* takes 3; use .*=mean"),
    (
      {"robust.pre": "bucketing", "robust.bucket_size": 5},
      4,
      "robust.bucket_size=5 with 4 hospitals puts all into one bucket.*; use at most 4",
    ),
    (
      {"robust.pre": "clipping", "client_privacy.mechanism": "dp_fedavg"},
      4,
      "robust.pre='clipping' with client_privacy.mechanism='dp_fedavg'.* use robust.pre=none",
    ),
    (
      {"server.aggregator": "median", "client_privacy.mechanism": "dp_fedavg"},
      4,
      "'median' with client_privacy.mechanism='dp_fedavg': its sensitivity",
    ),
    (
      {"robust.pre": "nnm", "secure.protocol": "grid"},
      4,
      "robust.pre='nnm' with secure.protocol='grid': a step that looks at single updates",
    ),
    (
      {"server.aggregator": "median", "secure.protocol": "grid"},
      4,
      "'median' with secure.protocol='grid': a rule that looks at single updates",
    ),
    (
      {"robust.pre": "nnm", "server.aggregator": "middle"},
      4,
      "robust.pre='nnm' with server.aggregator='middle', which is a registered one",
    ),
  ],
)
def test_what_does_not_go_together_is_refused_with_a_remedy(changes, clients, sentence):
  import tests.exchange.parts  # noqa: F401

  config = Config()
  for path, value in changes.items():
    set_field(config, path, value)
  with pytest.raises(UserError, match=sentence):
    make_exchange(config, clients)
