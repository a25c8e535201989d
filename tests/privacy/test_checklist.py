"""What a reviewer of federated differential privacy asks for, item by item."""

import dataclasses
import json
import math
import re
from typing import Any

import chex
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld
from scipy import stats

from configs.smoke import get_config
from fedjax_med.audit.execution_checks import check_execution
from fedjax_med.audit.planted_records import setting_for
from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import client_table
from fedjax_med.federated import local, registry
from fedjax_med.federated.fedavg import fedavg
from fedjax_med.federated.optimizers import client_optimizer, schedule
from fedjax_med.federated.vector import network_spec, ravel
from fedjax_med.models.networks.canary import canary_model
from fedjax_med.models.registry import create_model
from fedjax_med.prepare.protection import protect
from fedjax_med.privacy import accounting, clipping, noise
from fedjax_med.privacy.guarantees import Guarantee, privacy_record, spent
from fedjax_med.privacy.ledger import KEYS, SAMPLER
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.privacy.statement import write_out
from fedjax_med.tasks import classification
from tests.audit.audited import audited_run
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper, make_pool
from tests.privacy.draws import every_normal

POOL = make_pool()
# The rest send what FedAvg sends, or less.
QUICK = ("fedavg", "scaffold")
PRIVATE = [
  pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
  for name, each in registry.ALGORITHMS.items()
  if each.records
]


def run(rounds=1, clients=None, pool=POOL, hyper=None, state=None, **settings):
  initial, block, _ = make_federation(private=True, **settings)
  clients = make_clients() if clients is None else clients
  hyper = make_hyper() if hyper is None else hyper
  start = initial() if state is None else state
  return block(start, clients, pool, hyper, KEY, jnp.asarray(rounds))


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


PADDED = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 1)), jnp.float32)


LINEAR = create_model(ModelConfig(name="linear"), 2)
LOSS = classification.cross_entropy(0.0)
PARAMS = LINEAR.init(base_key(1), PADDED[:1])[0]


@jax.jit
def clipped(inputs):
  """Clipped sum of the first two of four inputs by the method that 'auto' takes."""
  labels, mask = jnp.zeros(4, jnp.int32), jnp.arange(4) < 2
  batch = (PARAMS, {}, clipping.Rows(inputs, labels, mask), jnp.float32(0.5), None)
  return clipping.clipped_sum("book_keeping", LINEAR, LOSS, *batch)[0]


def test_item_01_sampler_and_accounted_event_come_from_one_object():
  m = PoissonGaussian(64, 0.2, 20, 1.0, 1.0)
  event = m.event()
  draws = 4000
  slots, mask = jax.vmap(
    lambda key: poisson_batch(
      key, m.num_units, m.sampling_probability, max_examples=64, batch_cap=m.batch_cap
    )
  )(jax.random.split(base_key(0), draws))
  sizes = np.asarray(mask).sum(1)
  # The law of a batch's size as the event has it: binomial, what exceeds the cap at the cap.
  n, q = event.dataset_size, event.sampling_probability
  cap = event.truncated_batch_size
  expected = draws * np.append(
    stats.binom.pmf(np.arange(6, cap), n, q), stats.binom.sf(cap - 1, n, q)
  )
  observed = np.append([np.sum(sizes == k) for k in range(6, cap)], np.sum(sizes == cap))
  rest = draws - expected.sum(), draws - observed.sum()
  found = stats.chisquare(np.append(observed, rest[1]), np.append(expected, rest[0]))
  assert found.pvalue > 1e-4
  drawn = np.bincount(np.asarray(slots)[np.asarray(mask)], minlength=64)
  assert stats.chisquare(drawn).pvalue > 1e-4  # every unit as often as any other


def test_item_02_empty_batches_are_noised_and_counted_and_padding_changes_no_bit():
  nobody = make_clients()._replace(sampling_probability=jnp.zeros(3, jnp.float32))
  after, metrics = run(clients=nobody)
  silent, _ = run(clients=nobody._replace(noise_multiplier=jnp.zeros(3, jnp.float32)))
  initial, _, _ = make_federation(private=True)
  chex.assert_trees_all_equal(silent.server.params, initial().server.params)
  assert np.abs(flat(after.server.params) - flat(silent.server.params)).min() > 0
  assert np.asarray(after.steps).tolist() == [2, 2, 2]
  assert float(metrics.clients.examples.sum()) == 0
  # No bit of a sum knows what stands in padding, be it NaN.
  sums = [flat(clipped(PADDED.at[2:].set(value))) for value in (0.0, jnp.nan, jnp.inf, 1e30)]
  assert all(np.array_equal(sums[0], each) for each in sums)
  assert np.abs(sums[0]).max() > 0
  # Slots past a hospital's records point at another's; whatever they hold is not looked at.
  clients = make_clients()
  slots = jnp.arange(clients.indices.shape[1])[None] >= clients.num_examples[:, None]
  elsewhere = clients._replace(indices=jnp.where(slots, 24, clients.indices))
  chex.assert_trees_all_equal(run(clients=clients)[0], run(clients=elsewhere)[0])


def test_item_03_the_denominator_is_fixed_and_the_noise_is_on_the_sum():
  nobody = make_clients((1, 1, 1))._replace(sampling_probability=jnp.zeros(3, jnp.float32))
  doubled = nobody._replace(expected_batch_size=2 * nobody.expected_batch_size)
  initial, _, _ = make_federation(private=True)
  start = flat(initial().server.params)
  hyper = make_hyper(clip_norm=3.0)
  one, two = (flat(run(clients=c, hyper=hyper)[0].server.params) - start for c in (nobody, doubled))
  np.testing.assert_allclose(one, 2 * two, rtol=1e-4, atol=1e-6)  # of q·n, though nobody was drawn
  louder = nobody._replace(noise_multiplier=2 * nobody.noise_multiplier)
  noisier = flat(run(clients=louder, hyper=hyper)[0].server.params) - start
  np.testing.assert_allclose(noisier, 2 * one, rtol=1e-4, atol=1e-6)  # σ C on the sum


@pytest.mark.parametrize("adjacency", ["add_remove", "replace_one"])
def test_item_04_n_is_public_and_the_adjacency_is_zero_out(adjacency):
  config = get_config()
  config.privacy.adjacency = adjacency
  with pytest.raises(UserError, match=r"use privacy.adjacency=zero_out"):
    validate(config)
  step = accounting._step_pld.__wrapped__(PoissonGaussian(50, 0.2, 50, 2.0, 1.0).event())
  exact = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(2.0 / 1.001))
  relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
  reference = pld.PLDAccountant(relation, 1e-4).compose(exact).get_epsilon(1e-4)
  assert step.get_epsilon_for_delta(1e-4) == pytest.approx(reference, rel=0.01)


def test_item_05_epsilon_is_per_hospital_the_run_has_the_largest_and_cohorts_earn_nothing():
  mechanisms = (PoissonGaussian(60, 0.2, 28, 1.3, 1.0), PoissonGaussian(40, 0.3, 26, 1.7, 1.0))
  given = Guarantee("record", ("a", "b"), mechanisms, (1e-3, 2e-3))
  record = privacy_record([given], [[30, 9]])
  alone = [
    accounting.epsilon(m, steps, delta)
    for m, steps, delta in zip(mechanisms, (30, 9), given.deltas, strict=True)
  ]
  assert list(spent(given, [30, 9])) == alone
  assert record["epsilon_max"] == max(alone) < sum(alone)
  # Steps are counted where they were taken; σ pays for all of them, whoever else takes part.
  steps = np.asarray(run(8, cohort_cap=2, hyper=make_hyper(participation_rate=0.5))[0].steps)
  assert 0 < steps.sum() < 3 * 16
  few, all_of_them = [protect(*protected("poisson")), protect(*protected("full"))]
  assert few.local is not None
  assert few.local == all_of_them.local
  # No credit for others' noise: a hospital among three is as one by itself.
  assert protect(*protected("full", 1)).local == few.local.only(0)


def protected(participation, hospitals=3):
  """Arguments of ``protect`` for hospitals of 60 records and a target ε."""
  config = get_config()
  config.privacy.noise_multiplier, config.privacy.target_epsilon = 0.0, 3.0
  config.server.participation, config.server.participation_rate = participation, 0.2
  table = client_table([np.arange(60 * k, 60 * k + 60) for k in range(hospitals)])
  return config, tuple("abc"[:hospitals]), table, np.arange(60 * hospitals)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, math.nan, math.inf])
def test_item_06_one_units_contribution_is_at_most_c_and_nothing_if_not_finite(size):
  mechanism = PoissonGaussian(4, 1.0, 4, 1.0, 1.0)
  given = audited_run(Guarantee("record", ("a",), (mechanism,), (1e-2,)), (1,), (1,))
  setting = setting_for(given, 9)
  model = canary_model(1.0)
  inputs = jnp.full((2, 3, 3, 1), size, jnp.float32).at[1].set(0)
  total, _ = local.clipped_sum(
    "book_keeping",
    model,
    LOSS,
    setting.params,
    {},
    clipping.Rows(inputs, jnp.zeros(2, jnp.int32), jnp.ones(2, bool)),
    jnp.float32(0.5),
    None,
  )
  norm = np.linalg.norm(np.asarray(flat(total), np.float64))
  assert norm <= 0.5 * (1 + 1e-3)
  if not math.isfinite(size):
    assert norm == 0


def handed_on(optimizer, proximal_weight):
  """(the noisy gradients of two local steps, the weights after them) at the first hospital."""
  shape = local.BatchShape(slots=10, max_examples=12, normalisation="fixed")
  gradient = local.private_gradient(LINEAR, LOSS, "book_keeping", shape)

  def remembering(params, state, seen, context):
    grad, _, _, metrics = gradient(params, state, (), context)
    return grad, state, seen.at[context.step].set(grad), metrics

  method = client_optimizer(optimizer, 0.9, 0.01)
  spec, rate = network_spec(PARAMS, {}), schedule("constant", 1, 0)
  train = local.local_training(remembering, method, rate, 2, spec).train
  client = jax.tree.map(lambda leaf: leaf[0], make_clients())
  hyper = make_hyper(proximal_weight=proximal_weight)
  seen = jnp.zeros((2, flat(PARAMS).size))
  with jax.numpy_dtype_promotion("standard"):  # optax counts in int32
    context = local.StepContext(client, POOL, hyper, KEY, round=jnp.int32(0), step=jnp.int32(0))
    after, _ = jax.jit(train)(local.Weights(ravel(PARAMS), jnp.zeros(0), seen), context)
  return np.asarray(after.memory), np.asarray(after.params)


def test_item_07_the_optimiser_gets_one_noisy_gradient_whatever_it_is_and_the_proximal_weight():
  plain, weights = handed_on("sgd", 0.0)
  assert np.abs(plain).min() > 0
  for optimizer in ("momentum", "adam", "adamw"):
    np.testing.assert_allclose(handed_on(optimizer, 2.0)[0][0], plain[0], rtol=1e-6)
  # The proximal term is not in what is clipped and noised; it does move the second step.
  both, moved = handed_on("sgd", 2.0)
  np.testing.assert_allclose(both, plain, rtol=1e-6, atol=1e-7)
  assert np.abs(moved - weights).max() > 1e-2


AFTER_THE_NOISE: list[dict[str, Any]] = [
  {"optimizer": "momentum", "server": "momentum", "average": True},
  {"optimizer": "adamw", "server": "adam", "rate_schedule": "cosine"},
]


def without_the_data(monkeypatch, name, settings):
  """Whether rounds end alike on two data sets if every release is the same noise."""

  def released(total, key, *rest):
    return noise.gaussian_noise_like(key, total, 0.3)

  monkeypatch.setattr(local, "private_mean", released)
  ends, losses = [], []
  for pool in (POOL, make_pool(1)._replace(labels=1 - POOL.labels)):
    initial, block, _ = make_federation.__wrapped__(name, private=True, **settings)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix int32 counts and floats
      hyper = make_hyper(proximal_weight=0.3, ema_decay=0.5)
      state, metrics = block(initial(), make_clients(), pool, hyper, KEY, jnp.asarray(3))
    ends.append(flat((state.server, state.client_states)))
    losses.append(float(metrics.clients.loss.sum()))
  assert losses[0] != losses[1]  # the data were looked at
  return np.array_equal(*ends)


@pytest.mark.parametrize("settings", AFTER_THE_NOISE, ids=str)
@pytest.mark.parametrize("name", PRIVATE)
def test_item_07_nothing_of_the_data_enters_after_the_noise(name, settings, monkeypatch):
  assert without_the_data(monkeypatch, name, settings)


def test_item_07_an_algorithm_that_reads_the_data_itself_is_found_and_refused(monkeypatch):
  """As SCAFFOLD's option I for its variates, here with a mean over all of a client's images."""

  def option_i(local, optimizer, **settings):
    made = fedavg(local, optimizer, **settings)

    def client_update(server, client_state, client, pool, hyper, key):
      delta, client_state, metrics = made.client_update(
        server, client_state, client, pool, hyper, key
      )
      variate = pool.inputs[client.indices].astype(jnp.float32).mean() / 255
      params = jax.tree.map(lambda leaf: leaf + variate, delta.params)
      return delta._replace(params=params), client_state, metrics

    return made._replace(client_update=client_update)

  declared = registry.Entry(option_i, records=False, clients=False)
  monkeypatch.setitem(registry.ALGORITHMS, "option_i", declared)
  for kind in ({"private": True}, {"client_level": True}):
    with pytest.raises(UserError, match=r"server.algorithm='option_i' .*; use .*=fedavg(,| or) "):
      make_federation.__wrapped__("option_i", **kind)
  make_federation.__wrapped__("option_i")  # without privacy it runs
  monkeypatch.setitem(registry.ALGORITHMS, "option_i", declared._replace(records=True))
  assert not without_the_data(monkeypatch, "option_i", {})


def test_item_08_a_replayed_step_is_the_same_release():
  once, _ = run(5)
  half, _ = run(3)
  for _ in range(2):  # resumed, and resumed again
    again, _ = run(2, state=jax.tree.map(jnp.copy, half))
    chex.assert_trees_all_equal(again, once)
  assert "round, local step" in KEYS["record"]


def test_item_09_what_the_ledger_does_not_cover_is_listed():
  given = Guarantee("record", ("a",), (PoissonGaussian(60, 0.2, 28, 1.3, 1.0),), (1e-3,))
  text = json.dumps(privacy_record([given], [[5]])).lower()
  for topic in (
    "losses",
    "norms",
    "normalisation",
    "validation",
    "tuning",
    "secret of the run",
    "rounding",
    "took part",
  ):
    assert topic in text
  # Nothing in the configuration stops a run by what it sees: rounds, a budget, or a broken loss.
  config = get_config()
  sections = [getattr(config, field.name) for field in dataclasses.fields(config)]
  sections = [section for section in sections if dataclasses.is_dataclass(section)]
  names = [field.name for section in sections for field in dataclasses.fields(section)]
  assert len(names) > 50
  assert [name for name in names if re.search("early|patience|stop", name)] == []


def test_item_10_ten_thousand_steps_are_one_event_composed_on_demand():
  m = PoissonGaussian(10_000, 0.01, 160, 2.0, 1.0)
  relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
  whole = dp_accounting.SelfComposedDpEvent(m.event(), 10_000)
  interval = accounting.discretization_interval(m)
  reference = pld.PLDAccountant(relation, interval).compose(whole).get_epsilon(1e-6)
  composed = accounting.epsilon(m, 10_000, 1e-6)
  assert composed == pytest.approx(reference, rel=1e-6)
  pairs = pld.PLDAccountant(relation, interval)  # as a ledger has it, log point by log point
  for count in (1, 2999, 7000):
    pairs.compose(m.event(), count)
  assert composed == pytest.approx(pairs.get_epsilon(1e-6), rel=1e-6)


def test_item_11_the_audit_can_fail(monkeypatch):
  mechanism = PoissonGaussian(40, 0.25, 24, 1.5, 0.7)
  given = audited_run(Guarantee("record", ("a",), (mechanism,), (1e-3,)), (12,), (3,))
  assert all(check.passed for check in check_execution(given))

  def halved(clipped_sum, key, sigma, clip_norm, size):
    return noise.private_mean(clipped_sum, key, sigma / 2, clip_norm, size)

  monkeypatch.setattr(local, "private_mean", halved)
  assert not all(check.passed for check in check_execution(given))


def test_item_12_one_normal_stops_at_5_42_four_at_10_84_and_the_statement_says_so():
  # Not a sample: all values that a draw can take, each as probable as any other.
  values = every_normal().astype(np.float64)
  assert np.abs(values).max() == pytest.approx(5.41998, abs=1e-5)
  assert len(np.unique(values)) == 2**23
  assert values.mean() == pytest.approx(0, abs=1e-6)
  assert values.var() == pytest.approx(1, abs=1e-6)
  given = Guarantee("record", ("a",), (PoissonGaussian(60, 0.2, 28, 1.3, 1.0),), (1e-3,))
  text = write_out(privacy_record([given], [[5]]), "id")
  for words in (
    "stops at 10.84 standard deviations",
    "certified",
    "a grain of",
    "float32 normals, threefry",
  ):
    assert words in text
  assert f"{2 * np.abs(values).max():.2f} standard" in text
  assert "float32" in SAMPLER
