"""What a reviewer of federated differential privacy asks for, item by item."""

import dataclasses
import json
import math
import re
from typing import Any

import chex
import dp_accounting
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld
from scipy import stats

from configs.smoke import get_config
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.core.validation import validate
from fedjax_med.experiment import audit
from fedjax_med.federated import local
from fedjax_med.models.model import from_flax
from fedjax_med.privacy import accounting, clipping, noise
from fedjax_med.privacy.guarantees import Guarantee, privacy_record, spent
from fedjax_med.privacy.ledger import KEYS, SAMPLER
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.privacy.statement import ASSUMPTIONS
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper, make_pool

POOL = make_pool()


def run(rounds=1, clients=None, pool=POOL, hyper=None, state=None, **settings):
  initial, block, _ = make_federation(private=True, **settings)
  clients = make_clients() if clients is None else clients
  hyper = make_hyper() if hyper is None else hyper
  start = initial() if state is None else state
  return block(start, clients, pool, hyper, KEY, jnp.asarray(rounds))


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


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
  # Steps are counted where they were taken, and the price of a step does not know of cohorts.
  steps = np.asarray(run(8, cohort_cap=2, hyper=make_hyper(participation_rate=0.5))[0].steps)
  assert 0 < steps.sum() < 3 * 16


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, math.nan, math.inf])
def test_item_06_one_units_contribution_is_at_most_c_and_nothing_if_not_finite(size):
  given = audit.Subject(
    Guarantee("record", ("a",), (PoissonGaussian(4, 1.0, 4, 1.0, 1.0),), (1e-2,)),
    (1,),
    (1,),
    "book_keeping",
  )
  setting = audit._setting(given, 9)
  model = audit.canary_model(1.0)
  inputs = jnp.full((2, 3, 3, 1), size, jnp.float32).at[1].set(0)
  total, _ = local.clipped_sum(
    "book_keeping",
    model,
    local.cross_entropy(0.0),
    setting.params,
    {},
    inputs,
    jnp.zeros(2, jnp.int32),
    jnp.ones(2, bool),
    jnp.float32(0.5),
    None,
  )
  norm = np.linalg.norm(np.asarray(flat(total), np.float64))
  assert norm <= 0.5 * (1 + 1e-3)
  if not math.isfinite(size):
    assert norm == 0


def test_item_07_whatever_follows_the_noise_sees_no_data():
  """Equal releases give equal weights: with every record blank, only noise is left to differ."""
  blank = POOL._replace(inputs=jnp.zeros_like(POOL.inputs))
  hyper = make_hyper(proximal_weight=0.3, clip_norm=1e-12)  # nothing of a record can pass
  cases: list[dict[str, Any]] = [{}, {"server": "momentum"}, {"average": True}]
  cases.append({"rate_schedule": "cosine"})
  for settings in cases:
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix int32 counts and floats
      with_data, _ = run(3, hyper=hyper, **settings)
      without, _ = run(3, hyper=hyper, pool=blank, **settings)
    chex.assert_trees_all_close(with_data.server, without.server, rtol=1e-6, atol=1e-9)


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
  for topic in ("losses", "norms", "normalisation", "validation", "tuning", "seed", "rounding"):
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
  assert accounting.epsilon(m, 10_000, 1e-6) == pytest.approx(reference, rel=1e-6)


def test_item_11_the_audit_can_fail(monkeypatch):
  mechanism = PoissonGaussian(40, 0.25, 24, 1.5, 0.7)
  given = audit.Subject(
    Guarantee("record", ("a",), (mechanism,), (1e-3,)), (12,), (3,), "book_keeping"
  )
  assert all(check.passed for check in audit.check_execution(given))

  def halved(clipped_sum, key, sigma, clip_norm, size):
    return noise.private_mean(clipped_sum, key, sigma / 2, clip_norm, size)

  monkeypatch.setattr(local, "private_mean", halved)
  assert not all(check.passed for check in audit.check_execution(given))


def test_item_12_randomness_is_simulation_grade_and_said_to_be():
  # jax's normals are an inverse CDF of 23-bit uniforms: the last value before 1 is the largest.
  last = np.nextafter(np.float32(1), np.float32(0))
  assert float(jnp.sqrt(jnp.float32(2)) * jax.lax.erf_inv(last)) == pytest.approx(5.42, abs=0.01)
  assert any("not certified" in line for line in ASSUMPTIONS)
  assert "float32" in SAMPLER


def test_keys_are_threefry_whatever_jax_is_set_to():
  with jax.default_prng_impl("rbg"):
    key = key_for(base_key(3), Stream.NOISE, 1, 2)
    drawn = noise.gaussian_noise_like(key, {"w": jnp.zeros(4)}, 1.0)["w"]
  assert "threefry" in repr(jax.random.key_impl(key))
  expected = noise.gaussian_noise_like(
    key_for(base_key(3), Stream.NOISE, 1, 2), {"w": jnp.zeros(4)}, 1.0
  )
  np.testing.assert_array_equal(drawn, expected["w"])


class MixesExamples(nn.Module):
  """A user's network that looks across the batch, by an operation and by batch norm."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4)(x.reshape(x.shape[0], -1))
    x = nn.BatchNorm(use_running_average=not train)(x) - 0.5 * x.mean(0, keepdims=True)
    return nn.Dense(2)(nn.relu(x))


def test_a_network_that_mixes_examples_runs_where_no_example_moves_anothers_contribution():
  model = from_flax(MixesExamples())
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 3, 1)), jnp.float32)
  params, state = model.init(base_key(0), inputs[:1])
  method, reason = clipping.resolve_method("auto", clipping.uncovered(model, params, state, inputs))
  assert method == "reference"
  assert "mix examples" in reason

  @jax.jit
  def total(inputs):
    labels, mask = jnp.zeros(5, jnp.int32), jnp.ones(5, bool)
    summed, _ = clipping.clipped_sum(
      method,
      model,
      local.cross_entropy(0.0),
      params,
      state,
      inputs,
      labels,
      mask,
      jnp.float32(0.1),
      None,
    )
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(summed)])

  # Whatever the last example is, the others' sum is the same: the differences are its own alone.
  others = inputs.at[:4].set(3 * inputs[:4] + 1)
  moved = [total(x.at[4].set(-2 * inputs[4])) - total(x) for x in (inputs, others)]
  np.testing.assert_allclose(moved[0], moved[1], rtol=1e-4, atol=1e-6)
  assert float(jnp.linalg.norm(moved[0])) <= 0.2 * (1 + 1e-5)
