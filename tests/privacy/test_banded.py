"""Correlated noise against dense matrices; its event against simulated likelihoods and the library.

Statistical bounds are 4.5 standard errors, seeds fixed.
"""

import functools
import itertools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld
from scipy import linalg, optimize, stats

from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.privacy.accounting import default_delta, discretization_interval, epsilon
from fedjax_med.privacy.banded import (
  banded_batch,
  correlated_noise,
  empty_memory,
  error_over_independent,
  prefix_errors,
  toeplitz_strategy,
)
from fedjax_med.privacy.mechanism import PoissonGaussian, plan_mechanisms
from fedjax_med.privacy.noise import gaussian_noise_like
from fedjax_med.privacy.sampling import poisson_batch

SHAPES = [(1, 1), (8, 2), (8, 8), (40, 3), (64, 16), (300, 5)]


def dense(coefficients, steps):
  """The strategy matrix C."""
  column = np.zeros(max(steps, len(coefficients)))
  column[: len(coefficients)] = coefficients
  return linalg.toeplitz(column[:steps], np.zeros(steps))


def dense_prefix(coefficients, steps):
  """A C⁻¹: what the noise of all steps puts into each prefix sum."""
  inverse = linalg.solve_triangular(dense(coefficients, steps), np.eye(steps), lower=True)
  return np.tril(np.ones((steps, steps))) @ inverse


def dense_loss(coefficients, steps):
  """Mean squared error of the prefix sums at a given privacy, by dense matrices."""
  largest = (dense(coefficients, steps) ** 2).sum(axis=0).max()
  return largest * (dense_prefix(coefficients, steps) ** 2).sum(axis=1).mean()


def square_root(bands):
  """Coefficients of (1 - z)^(-1/2)."""
  return np.array([math.comb(2 * j, j) / 4**j for j in range(bands)])


def mechanism(**changes):
  values = {
    "num_units": 90,
    "sampling_probability": 0.4,
    "batch_cap": 23,
    "noise_multiplier": 1.5,
    "clip_norm": 2.0,
    "coefficients": tuple(toeplitz_strategy(20, 4)),
  }
  return PoissonGaussian(**(values | changes))


def plan_banded(num_units, batch_size, bands, *, steps, **values):
  return plan_mechanisms([num_units], batch_size, steps=[steps], bands=bands, **values)[0]


def empty_buffer(tree, bands):
  return empty_memory(tree, bands).noise


def run(fresh, coefficients):
  """[T, ...] noise of ``fresh`` [T, ...], step by step on the device."""

  def step(buffer, z):
    noise, buffer = correlated_noise(buffer, z, jnp.asarray(coefficients, jnp.float32))
    return buffer, noise

  return jax.lax.scan(step, empty_buffer(fresh[0], len(coefficients)), fresh)[1]


# The strategy.


@pytest.mark.parametrize(("steps", "bands"), SHAPES)
def test_coefficients_have_norm_1_are_positive_and_do_not_rise(steps, bands):
  c = toeplitz_strategy(steps, bands)
  assert c.shape == (bands,)
  assert c.dtype == np.float64
  assert np.linalg.norm(c) == pytest.approx(1, abs=1e-12)
  assert c[-1] > 0
  assert np.all(np.diff(c) <= 0)


def test_one_band_is_the_identity():
  np.testing.assert_array_equal(toeplitz_strategy(100, 1), [1.0])
  np.testing.assert_array_equal(prefix_errors((1.0,), 5), [1, 2, 3, 4, 5])


@pytest.mark.parametrize(("steps", "bands"), SHAPES)
def test_prefix_errors_are_the_rows_of_the_dense_product(steps, bands):
  c = toeplitz_strategy(steps, bands)
  expected = (dense_prefix(c, steps) ** 2).sum(axis=1)
  np.testing.assert_allclose(prefix_errors(c, steps), expected, rtol=1e-10)
  np.testing.assert_allclose(prefix_errors(2 * c, steps), expected / 4, rtol=1e-10)


def test_prefix_errors_are_the_variances_of_simulated_sums():
  steps, size = 12, 50_000
  c = toeplitz_strategy(steps, 4)
  fresh = jax.random.normal(base_key(0), (steps, size), jnp.float32)
  sums = np.cumsum(np.asarray(run(fresh, c), float), axis=0)
  found = (sums**2).mean(axis=1) / prefix_errors(c, steps)
  assert np.abs(found - 1).max() < 4.5 * math.sqrt(2 / size)


@pytest.mark.parametrize(("steps", "bands"), [(8, 2), (40, 3), (40, 8), (40, 40), (300, 5)])
def test_the_strategy_beats_identity_square_root_and_random_ones(steps, bands):
  best = dense_loss(toeplitz_strategy(steps, bands), steps)
  assert best < 0.95 * dense_loss([1.0], steps)
  assert best <= dense_loss(square_root(bands), steps)
  generator = np.random.default_rng(0)
  for _ in range(20):
    random = np.cumprod(np.append(1.0, generator.uniform(0.2, 1, bands - 1)))
    assert best <= dense_loss(random, steps)


@pytest.mark.parametrize(("steps", "bands"), [(16, 2), (200, 2), (30, 4), (30, 8)])
def test_no_free_search_finds_a_better_strategy(steps, bands):
  # Any sign and order of coefficients, slopes by finite differences, on the dense matrices.
  def log_loss(tail):
    return math.log(dense_loss(np.append(1.0, tail), steps))

  best = math.log(dense_loss(toeplitz_strategy(steps, bands), steps))
  for start in (square_root(bands)[1:], np.full(bands - 1, 0.1)):
    found = optimize.minimize(log_loss, start, method="BFGS")
    assert best <= found.fun + 1e-5


def test_more_bands_never_leave_more_error_at_equal_columns():
  losses = [dense_loss(toeplitz_strategy(128, bands), 128) for bands in (1, 2, 4, 8, 16, 32, 64)]
  assert np.all(np.diff(losses) < 0)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((4, 0), "bands=0 must be a whole number of at least 1"),
    ((4, 1.5), "bands=1.5 must be"),
    ((4, 5), "steps=4 must be a whole number of at least 5; lower bands=5"),
    ((0, 1), "steps=0 must be"),
  ],
)
def test_strategy_refuses(arguments, message):
  with pytest.raises(UserError, match=message):
    toeplitz_strategy(*arguments)


# Sensitivity: brute force over who takes part when.


@pytest.mark.parametrize(("steps", "bands"), [(6, 2), (9, 3), (10, 4), (7, 7)])
def test_records_drawn_bands_apart_have_sensitivity_sqrt_of_their_number(steps, bands):
  matrix = dense(toeplitz_strategy(steps, bands), steps)
  largest = {}
  for pattern in itertools.product((0, 1), repeat=steps):
    when = np.flatnonzero(pattern)
    if np.all(np.diff(when) >= bands):
      # Contributions of unit vectors: the sign or direction of each is free.
      norm = np.linalg.norm(matrix @ np.diag(pattern))
      for signs in ([1] * steps, [(-1) ** k for k in range(steps)]):
        np.testing.assert_allclose(np.linalg.norm(matrix @ (np.array(pattern) * signs)), norm)
      largest[len(when)] = max(largest.get(len(when), 0.0), norm)
  assert max(largest) == -(-steps // bands)
  for count, norm in largest.items():
    assert norm <= math.sqrt(count) + 1e-12
    if steps >= count * bands:  # room for whole columns
      assert norm == pytest.approx(math.sqrt(count), abs=1e-12)


def test_records_drawn_more_often_have_more():
  matrix = dense(toeplitz_strategy(9, 3), 9)
  assert np.linalg.norm(matrix @ [1, 0, 1, 0, 0, 0, 0, 0, 0]) > 1.1 * math.sqrt(2)


# The noise.


@pytest.mark.parametrize("bands", [1, 2, 3, 8, 20])
def test_the_recursion_is_the_inverse_times_the_draws(bands):
  steps = 20
  c = toeplitz_strategy(steps, bands)
  fresh = np.asarray(jax.random.normal(base_key(1), (steps, 50), jnp.float32))
  expected = linalg.solve_triangular(dense(np.float32(c), steps), fresh.astype(float), lower=True)
  np.testing.assert_allclose(run(jnp.asarray(fresh), c), expected, rtol=1e-5, atol=1e-5)


def test_the_recursion_is_exact_where_float32_is():
  # Halves and whole draws: no rounding in 12 steps.
  c, steps = np.array([1, 0.5, 0.25]), 12
  fresh = np.random.default_rng(0).integers(-8, 9, (steps, 30)).astype(np.float32)
  expected = linalg.solve_triangular(dense(c, steps), fresh.astype(float), lower=True)
  np.testing.assert_array_equal(run(jnp.asarray(fresh), c), expected)


def test_a_thousand_steps_in_float32_stay_with_the_dense_inverse():
  steps, bands = 1000, 16
  c = np.float32(toeplitz_strategy(steps, bands))
  fresh = np.asarray(jax.random.normal(base_key(2), (steps, 4), jnp.float32))
  expected = linalg.solve_triangular(dense(c, steps), fresh.astype(float), lower=True)
  assert np.abs(np.asarray(run(jnp.asarray(fresh), c)) - expected).max() < 1e-4


def test_one_band_is_plain_noise_bit_for_bit():
  tree = {"w": jnp.ones((3, 4)), "b": [jnp.zeros(4), jnp.full((), 2.0)]}
  fresh = gaussian_noise_like(base_key(0), tree, 1.0)
  buffer = empty_buffer(tree, 1)
  noise, buffer = correlated_noise(buffer, fresh, jnp.ones(1))
  jax.tree.map(np.testing.assert_array_equal, noise, fresh)
  assert [leaf.shape for leaf in jax.tree.leaves(buffer)] == [(0, 4), (0,), (0, 3, 4)]


def test_the_buffer_holds_the_last_noise_newest_first_in_float32():
  c = jnp.asarray(toeplitz_strategy(10, 4), jnp.float32)
  tree = {"w": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros(())}
  buffer, past = empty_buffer(tree, 4), []
  for step in range(6):
    fresh = gaussian_noise_like(jax.random.fold_in(base_key(0), step), tree, 1.0)
    noise, buffer = correlated_noise(buffer, fresh, c)
    past.insert(0, noise)
    for name in tree:
      assert buffer[name].dtype == noise[name].dtype == jnp.float32
      assert buffer[name].shape == (3, *tree[name].shape)
      known = [each[name] for each in past[:3]]
      np.testing.assert_array_equal(buffer[name][: len(known)], np.stack(known))
      assert not np.any(buffer[name][len(known) :])


def test_vmapped_clients_equal_a_loop_over_them():
  clients, steps = 3, 7
  coefficients = jnp.stack(
    [jnp.asarray(toeplitz_strategy(horizon, 3), jnp.float32) for horizon in (5, 20, 400)]
  )
  fresh = jax.random.normal(base_key(4), (clients, steps, 2, 5), jnp.float32)
  start = empty_buffer(fresh[:, 0, 0], 3)  # only for its rank
  assert start.shape == (2, 3, 5)

  def client(fresh, c):
    buffer, rows = empty_buffer(fresh[0], 3), []
    for step in range(steps):
      noise, buffer = correlated_noise(buffer, fresh[step], c)
      rows.append(noise)
    return jnp.stack(rows)

  together = jax.jit(jax.vmap(client))(fresh, coefficients)
  for k in range(clients):
    np.testing.assert_array_equal(together[k], jax.jit(client)(fresh[k], coefficients[k]))
  assert not np.allclose(together[0], client(fresh[0], coefficients[2]))


def test_noise_of_a_step_depends_on_no_later_draw_and_on_every_earlier_one():
  steps, c = 6, toeplitz_strategy(6, 3)
  jacobian = jax.jacobian(lambda fresh: run(fresh, c))(jnp.zeros(steps))
  np.testing.assert_array_equal(np.triu(jacobian, 1), 0)
  assert np.all(jacobian[np.tril_indices(steps)] != 0)


def test_the_covariance_over_steps_is_that_of_the_inverse():
  steps, size, sigma = 6, 40_000, 1.7
  c = toeplitz_strategy(steps, 3)
  keys = jax.random.split(base_key(5), steps)
  fresh = jnp.stack([gaussian_noise_like(key, jnp.zeros(size), 1.0) for key in keys])
  noise = sigma * np.asarray(run(fresh, c), float)
  inverse = np.linalg.inv(dense(c, steps))
  expected = sigma**2 * inverse @ inverse.T
  scale = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / size)
  assert np.abs((noise @ noise.T / size - expected) / scale).max() < 4.5
  assert abs(expected[1, 0]) > 50 * scale[1, 0]  # correlated enough for the test to see it


# The sampler.


@functools.partial(jax.jit, static_argnames=("n", "q", "bands", "rows", "cap"))
def draw(keys, steps, *, n, q, bands, rows, cap):
  sampler = functools.partial(banded_batch, bands=bands, max_examples=rows, batch_cap=cap)
  return jax.vmap(lambda key, step: sampler(key, n, q, step=step))(keys, steps)


def counts(slots, mask, rows):
  """[draws, rows] how often each slot is in each batch."""
  chosen = np.zeros((len(slots), rows), int)
  np.add.at(chosen, (np.nonzero(mask)[0], slots[mask]), 1)
  return chosen


@pytest.mark.parametrize(("n", "rows", "bands"), [(12, 12, 4), (14, 20, 4), (9, 12, 5), (7, 7, 7)])
def test_a_slot_is_drawn_with_probability_q_in_its_own_steps_only(n, rows, bands):
  draws, q = 4000 * bands, 0.3
  keys, steps = jax.random.split(base_key(6), draws), jnp.arange(draws)
  batches = draw(keys, steps, n=n, q=q, bands=bands, rows=rows, cap=-(-rows // bands))
  slots, mask = (np.asarray(value) for value in batches)
  chosen = counts(slots, mask, rows)
  assert chosen.max() == 1
  assert chosen[:, n:].sum() == 0
  mine = np.arange(draws)[:, None] % bands == np.arange(n) % bands
  assert chosen[:, :n][~mine].sum() == 0
  pvalues = [stats.binomtest(int(count), 4000, q).pvalue for count in chosen[:, :n].sum(axis=0)]
  assert min(pvalues) > 1e-4 / n
  np.testing.assert_array_equal(np.sort(~mask, axis=1), ~mask)  # drawn slots come first
  assert not np.any(slots[~mask])


def test_with_one_band_batches_are_those_of_poisson_batch():
  keys = jax.random.split(base_key(7), 200)
  slots, mask = draw(keys, jnp.arange(200), n=30, q=0.3, bands=1, rows=40, cap=12)
  plain = jax.vmap(lambda key: poisson_batch(key, 30, 0.3, max_examples=40, batch_cap=12))(keys)
  np.testing.assert_array_equal(slots, plain[0])
  np.testing.assert_array_equal(mask, plain[1])


def test_a_blank_place_is_drawn_and_cut_like_a_record():
  # 7 records in 2 subsets: the second has 3 and a blank; of 4 places 3 are kept.
  draws, q, cap = 20_000, 0.3, 3
  keys, steps = jax.random.split(base_key(8), draws), jnp.ones(draws, jnp.int32)
  slots, mask = draw(keys, steps, n=7, q=q, bands=2, rows=7, cap=cap)
  chosen = counts(np.asarray(slots), np.asarray(mask), 7)[:, 1::2]
  # One of 4 drawn places is cut: a record is kept in 3 of 4 full draws.
  kept = q - q**4 / 4
  assert stats.binomtest(int(chosen.sum()), 3 * draws, kept).pvalue > 1e-4
  full = q**3 * (1 - q) + q**4 / 4  # all three records
  assert stats.binomtest(int((chosen.sum(axis=1) == 3).sum()), draws, full).pvalue > 1e-4


def test_the_sampler_called_with_the_mechanism_draws_batches_of_the_event():
  m = mechanism(num_units=120, batch_cap=18)
  event, draws = m.event(), 20_000
  keys, steps = jax.random.split(base_key(9), draws), jnp.full(draws, 5)
  batches = draw(
    keys, steps, n=m.num_units, q=m.sampling_probability, bands=4, rows=150, cap=m.batch_cap
  )
  cap, n, q = event.truncated_batch_size, event.dataset_size, event.sampling_probability
  assert (cap, n) == (18, 30)
  observed = np.bincount(np.asarray(batches[1]).sum(axis=1), minlength=cap + 1)
  expected = stats.binom.pmf(np.arange(cap + 1), n, q) * draws
  expected[cap] = stats.binom.sf(cap - 1, n, q) * draws
  observed, expected = (np.append(v[5:], v[:5].sum()) for v in (observed, expected))
  assert stats.chisquare(observed, expected).pvalue > 1e-4


# The event.


def test_the_event_is_that_of_the_largest_subset():
  m = mechanism()
  event = m.event()
  assert isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent)
  assert (event.dataset_size, event.truncated_batch_size) == (23, 23)
  assert event.sampling_probability == pytest.approx(0.4, abs=2e-7)
  norm = np.linalg.norm(np.asarray(m.coefficients, np.float32).astype(float))
  assert event.noise_multiplier == pytest.approx(1.5 / norm / 1.001, rel=1e-12)
  assert m.expected_batch_size == pytest.approx(9.0)


def test_one_band_has_the_event_and_the_epsilon_of_dp_sgd():
  banded = PoissonGaussian(300, 0.1, 57, 2.0, 1.0, (1.0,))
  plain = PoissonGaussian(300, 0.1, 57, 2.0, 1.0)
  assert banded.event() == plain.event()
  assert banded.expected_batch_size == plain.expected_batch_size
  for accountant in ("pld", "rdp"):
    expected = epsilon(plain, 100, 1e-4, accountant)
    assert epsilon(banded, 100, 1e-4, accountant) == expected
  planned = plan_banded(300, 30, 1, steps=100, clip_norm=1.0, target_epsilon=2.0)
  independent = plan_mechanisms([300], 30, steps=[100], clip_norm=1.0, target_epsilon=2.0)[0]
  assert planned.event() == independent.event()


def test_epsilon_is_that_of_the_composition_written_out():
  m = mechanism(batch_cap=14)
  accountant = pld.PLDAccountant(
    dp_accounting.NeighboringRelation.REPLACE_SPECIAL, discretization_interval(m)
  )
  for _ in range(6):  # steps 0, 4, .., 20 of 21 are those of slot 0
    accountant.compose(
      dp_accounting.TruncatedSubsampledGaussianDpEvent(
        23, m.drawn_probability, 14, 1.5 / m.column_norm / 1.001
      )
    )
  expected = accountant.get_epsilon(1e-3)
  assert epsilon(m, 21, 1e-3) == pytest.approx(expected, rel=1e-6)


def test_a_record_pays_once_in_as_many_steps_as_there_are_bands():
  m = mechanism()
  spent = [epsilon(m, steps, 1e-3) for steps in range(10)]
  assert spent[0] == 0
  assert spent[1] == spent[4] < spent[5] == spent[8] < spent[9]
  assert [m.compositions(steps) for steps in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_no_noise_costs_everything():
  assert epsilon(mechanism(noise_multiplier=0.0), 1, 1e-3) == math.inf
  assert epsilon(mechanism(noise_multiplier=0.0), 0, 1e-3) == 0


def adaptive_deltas(m, eps, *, steps, stride, outcomes, samples=400_000):
  """(δ of present over nothing, and of nothing over present), each with its standard error.

  The whole mechanism, simulated: gradients follow from the outputs before them, as an adversary
  would have it, and the likelihoods are those of the dense C, over all ways to be drawn.
  ``outcomes`` is [(what a step adds to the sum in units of the gradient, its probability with the
  record, without)], and the record may be drawn in every ``stride``-th step.
  """
  generator = np.random.default_rng(0)
  c, sigma = np.asarray(m.coefficients, np.float32).astype(float), m.noise_multiplier
  values, present, nothing = (np.array(each) for each in zip(*outcomes, strict=True))
  when = list(range(0, steps, stride))

  def simulate(weights):
    drawn = generator.choice(values, (samples, len(when)), p=weights)
    sums, outputs = np.zeros((samples, steps)), np.zeros((samples, steps))
    mine, others = np.zeros((samples, steps)), np.zeros((samples, steps))
    for t in range(steps):
      last = outputs[:, t - 1] if t else np.ones(samples)
      mine[:, t] = np.where(last > 0, 1.0, -1.0)
      others[:, t] = 3 * np.sin(2 * last) + 0.5 * t
      sums[:, t] = others[:, t]
      if t in when:
        sums[:, t] += drawn[:, when.index(t)] * mine[:, t]
      row = sum(c[j] * sums[:, t - j] for j in range(min(len(c), t + 1)))
      outputs[:, t] = row + sigma * generator.standard_normal(samples)
    return outputs, mine, others

  matrix = dense(c, steps)

  def log_densities(outputs, mine, others):
    """Log likelihoods with and without the record, up to the same constant."""
    terms = ([], [])
    for ways in itertools.product(range(len(values)), repeat=len(when)):
      sums = others.copy()
      for t, way in zip(when, ways, strict=True):
        sums[:, t] += values[way] * mine[:, t]
      exponent = -((outputs - sums @ matrix.T) ** 2).sum(axis=1) / (2 * sigma**2)
      for term, weights in zip(terms, (present, nothing), strict=True):
        weight = math.prod(weights[way] for way in ways)
        term.append(exponent + math.log(weight) if weight else np.full(samples, -np.inf))
    return [np.logaddexp.reduce(term) for term in terms]

  found = []
  for weights, sign in ((present, 1), (nothing, -1)):
    with_record, without = log_densities(*simulate(weights))
    loss = sign * (with_record - without)
    parts = np.maximum(-np.expm1(np.minimum(eps - loss, 0.0)), 0.0)
    found.append((parts.mean(), parts.std() / math.sqrt(samples)))
  return found


def test_the_accounted_delta_is_that_of_the_simulated_adaptive_mechanism():
  q, delta = 0.4, 0.05
  m = PoissonGaussian(3, q, 1, 1.0, 1.0, tuple(toeplitz_strategy(7, 3)))
  eps = epsilon(m, 7, delta)
  outcomes = [(0, 1 - q, 1), (1, q, 0)]  # one record in the subset: it is drawn, or nobody is
  over, under = adaptive_deltas(m, eps, steps=9, stride=3, outcomes=outcomes)
  assert over[0] == pytest.approx(delta, abs=4.5 * over[1] + 0.005 * delta)
  assert under[0] <= delta + 4.5 * under[1]


def test_records_drawn_in_every_step_would_exceed_the_accounted_delta():
  q, delta = 0.4, 0.05
  m = PoissonGaussian(3, q, 1, 1.0, 1.0, tuple(toeplitz_strategy(7, 3)))
  eps = epsilon(m, 7, delta)
  outcomes = [(0, 1 - q, 1), (1, q, 0)]
  over, _ = adaptive_deltas(m, eps, steps=7, stride=1, outcomes=outcomes, samples=50_000)
  assert over[0] > 2 * delta


def test_the_accounted_delta_bounds_a_batch_that_is_cut():
  # Two records a subset, one place in the batch, the other record pulling the other way.
  q, delta = 0.09, 0.02
  m = PoissonGaussian(4, q, 1, 0.7, 1.0, tuple(toeplitz_strategy(5, 2)))
  assert m.event().dataset_size == 2
  eps = epsilon(m, 5, delta)
  alone, half = q * (1 - q), q**2 / 2
  outcomes = [
    (0, (1 - q) ** 2, (1 - q) ** 2 + alone + half),
    (1, alone + half, 0),
    (-1, alone + half, alone + half),
  ]
  over, under = adaptive_deltas(m, eps, steps=5, stride=2, outcomes=outcomes)
  assert 0 < over[0] <= delta + 4.5 * over[1]
  # Nothing over present is at most (1 - q)**-2 a draw, here less than ε.
  assert under[0] <= delta + 4.5 * under[1]


# Plans and comparisons.


def test_a_plan_spends_its_target_and_has_the_batches_it_was_asked_for():
  m = plan_banded(500, 32, 8, steps=100, clip_norm=1.0, target_epsilon=3.0)
  assert m.expected_batch_size == pytest.approx(32)
  assert m.event().dataset_size == 63
  assert m.batch_cap <= 63
  assert 0.99 * 3 <= epsilon(m, 100, default_delta(500)) <= 3
  np.testing.assert_array_equal(m.coefficients, toeplitz_strategy(100, 8))
  small = plan_banded(20, 32, 4, steps=8, clip_norm=1.0, noise_multiplier=1.0)
  assert (small.sampling_probability, small.expected_batch_size) == (1.0, 5.0)
  assert small.noise_multiplier == 1.0


def test_a_run_may_go_on_beyond_its_plan_with_the_same_coefficients():
  m = plan_banded(500, 32, 4, steps=40, clip_norm=1.0, target_epsilon=3.0)
  delta = default_delta(500)
  assert epsilon(m, 41, delta) > epsilon(m, 40, delta)


@pytest.mark.parametrize("bands", [1, 4])
def test_error_over_independent_is_that_of_dense_matrices(bands):
  n, batch_size, steps, target = 400, 50, 60, 4.0
  plain = plan_mechanisms([n], batch_size, steps=[steps], clip_norm=1.0, target_epsilon=target)[0]
  banded = plan_banded(n, batch_size, bands, steps=steps, clip_norm=1.0, target_epsilon=target)
  root = {
    name: math.sqrt((dense_prefix(c, steps) ** 2).sum(axis=1).mean())
    for name, c in (("plain", [1.0]), ("banded", banded.coefficients))
  }
  expected = plain.noise_multiplier * root["plain"] / (banded.noise_multiplier * root["banded"])
  found = error_over_independent(n, batch_size, bands, steps=steps, target_epsilon=target)
  assert found == pytest.approx(expected, rel=1e-9)
  assert (found == 1) == (bands == 1)


def test_bands_help_at_a_large_epsilon_and_hurt_at_a_small_one():
  def advantage(target):
    return error_over_independent(1000, 20, 8, steps=200, target_epsilon=target)

  assert advantage(0.2) < 1 < advantage(16.0)


def test_smaller_batches_count_against_bands():
  # 8 bands of 80 records leave 10 a batch, whatever was asked for.
  ratio = error_over_independent(80, 40, 8, steps=64, target_epsilon=4.0)
  banded = plan_banded(80, 40, 8, steps=64, clip_norm=1.0, target_epsilon=4.0)
  plain = plan_mechanisms([80], 40, steps=[64], clip_norm=1.0, target_epsilon=4.0)[0]
  assert (banded.expected_batch_size, plain.expected_batch_size) == (10.0, 40.0)
  roots = [math.sqrt(prefix_errors(c, 64).mean()) for c in ((1.0,), banded.coefficients)]
  noises = plain.noise_multiplier / 40 * roots[0], banded.noise_multiplier / 10 * roots[1]
  assert ratio == pytest.approx(noises[0] / noises[1], rel=1e-9)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"coefficients": ()}, "must be positive, not rising and of norm 1"),
    ({"coefficients": (0.6, 0.8)}, "not rising"),
    ({"coefficients": (0.8, -0.6)}, "positive"),
    ({"coefficients": (0.9, 0.5)}, "of norm 1; use banded.toeplitz_strategy"),
    ({"coefficients": (math.nan,)}, "of norm 1"),
    ({"num_units": 3}, "num_units=3 must be a whole number of at least 4; lower bands=4"),
    ({"num_units": 90.5}, "num_units=90.5 must be"),
    ({"sampling_probability": 0.0}, "sampling_probability=0.0 must be"),
    ({"batch_cap": 10}, "batch_cap=10 is under 14"),
    ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
    ({"clip_norm": math.nan}, "clip_norm=nan must be"),
  ],
)
def test_a_bad_value_is_refused_with_rule_and_remedy(changes, message):
  with pytest.raises(UserError, match=message) as caught:
    mechanism(**changes)
  assert "; " in str(caught.value)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((-1, 1e-4), "steps=-1 must be a whole number of at least 0"),
    ((1.5, 1e-4), "steps=1.5 must be"),
    ((1, 1 / 90), "must be at least 1e-10 and under 1/n=0.0111"),
    ((1, 1e-4, "pdl"), "did you mean 'pld'"),
  ],
)
def test_epsilon_fails_closed(arguments, message):
  with pytest.raises(UserError, match=message):
    epsilon(mechanism(), *arguments)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bands": 11}, "steps=10 must be a whole number of at least 11; lower bands=11"),
    ({"num_units": 3}, "num_units=3 must be a whole number of at least 4; lower bands=4"),
    ({"batch_size": 0}, "batch_size=0 must be"),
    ({"noise_multiplier": 0.0}, "leave σ open"),
    ({"delta": 0.01}, "delta=0.01 must be at least 1e-10 and under 1/n=0.01"),
    ({"batch_cap": 12}, "batch_cap=12 is under"),
  ],
)
def test_plan_refuses(changes, message):
  values = {"num_units": 100, "batch_size": 12, "bands": 4, "steps": 10, "clip_norm": 1.0}
  values |= {"noise_multiplier": 1.0} | changes
  with pytest.raises(UserError, match=message):
    plan_banded(values.pop("num_units"), values.pop("batch_size"), values.pop("bands"), **values)
