"""Noise of whole numbers: its tables to the last bit, its distribution, what is bounded and how."""

import decimal
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.privacy import discrete_gaussian
from fedjax_med.privacy.discrete_gaussian import (
  TABLE_DISTANCE,
  draw,
  draw_distance,
  levels_of,
  make_sampler,
  sum_distance,
  weights_of,
)

HALF = 2**13


def pmf(sigma, reach):
  """Probabilities of -reach to reach, float64."""
  values = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
  return values / values.sum()


def draws(sigma, number, seed=0):
  return np.asarray(draw(base_key(seed), make_sampler(sigma), (number,)), np.int64)


@pytest.mark.parametrize("sigma", [4.0, 37.3, 512.0])
def test_a_table_holds_its_weights_to_the_last_bit(sigma):
  full = 1 << 82
  found = [0] * (2 * HALF)
  table = np.asarray(make_sampler(sigma).table).tolist()
  for place, (high, middle, low, alias) in enumerate(table):
    kept = full if alias == place else (high << 64) | (middle << 32) | low
    assert kept <= full
    found[place] += kept
    found[alias] += full - kept
  assert found == weights_of(sigma)
  assert sum(found) == 1 << 96


def test_weights_are_the_discrete_gaussian_within_the_stated_distance():
  with decimal.localcontext(decimal.Context(prec=80)):
    sigma = decimal.Decimal(8)
    exact = [(-(decimal.Decimal(z) ** 2) / (2 * sigma**2)).exp() for z in range(-300, 301)]
    total = sum(exact)
    held = [decimal.Decimal(weight) / 2**96 for weight in weights_of(8.0)]
    inside = held[HALF - 300 : HALF + 301]
    distance = sum(abs(a - b / total) for a, b in zip(inside, exact, strict=True)) / 2
    assert 0 < float(distance) <= TABLE_DISTANCE
    assert sum(held) - sum(inside) == 0


def test_draws_are_the_discrete_gaussian_of_the_smallest_grids():
  number = 1_000_000
  values, reach = draws(8.0, number), 60
  assert np.abs(values).max() < reach
  counts = np.bincount(values + reach, minlength=2 * reach + 1)
  law = pmf(8.0, reach)
  assert np.abs(np.cumsum(counts / number) - np.cumsum(law)).max() < 1.63 / math.sqrt(number)  # KS
  common = law * number > 20
  pooled = [*counts[common], counts[~common].sum()]
  expected = [*law[common] * number, law[~common].sum() * number]
  assert stats.chisquare(pooled, expected).pvalue > 1e-3
  assert values.std() == pytest.approx(8.0, rel=0.01)


@pytest.mark.parametrize("sigma", [513.0, 3.1e6, 2.6e8])
def test_draws_of_several_levels_have_the_standard_deviation_and_every_remainder(sigma):
  values = draws(sigma, 200_000)
  assert len(levels_of(sigma)[1]) > 1
  assert stats.kstest(values / sigma, "norm").pvalue > 1e-3
  assert values.std() == pytest.approx(sigma, rel=0.01)
  for modulus in {2, *levels_of(sigma)[1][1:]}:
    if modulus < 10_000:  # else too few draws to a remainder
      counts = np.bincount(values % modulus, minlength=modulus)
      assert stats.chisquare(counts).pvalue > 1e-4


def test_levels_add_up_to_the_standard_deviation_with_a_base_that_the_table_holds():
  for sigma in np.geomspace(4, 1e9, 200):
    base, multipliers = levels_of(float(sigma))
    assert base <= 512
    assert base * math.sqrt(sum(k**2 for k in multipliers)) == pytest.approx(sigma, rel=1e-14)
    assert draw_distance(base, multipliers) < 1e-50


def test_a_sum_of_scaled_draws_is_as_near_to_a_discrete_gaussian_as_the_bound_says():
  base, k = 4.0, 5
  law, reach = pmf(base, 80), 60
  both = {}
  for a, b in itertools.product(range(-80, 81), repeat=2):
    both[a + k * b] = both.get(a + k * b, 0) + law[a + 80] * law[b + 80]
  found = np.array([both[z] for z in range(-reach, reach + 1)])
  wanted = pmf(base * math.sqrt(1 + k**2), 500)[500 - reach : 500 + reach + 1]
  worst, bound = np.abs(np.log(found / wanted)).max(), draw_distance(base, (1, k))
  assert bound / 10 < worst <= bound
  assert bound == pytest.approx(5 * math.exp(-2 * math.pi**2 * 16 / 26))


def test_a_sum_of_shares_is_as_near_to_a_discrete_gaussian_as_tau_says():
  sigma, reach = 0.7, 12
  law = pmf(sigma, 40)
  found = np.convolve(np.convolve(law, law), law)[120 - reach : 120 + reach + 1]
  wanted = pmf(sigma * math.sqrt(3), 60)[60 - reach : 60 + reach + 1]
  worst, tau = np.abs(np.log(found / wanted)).max(), sum_distance(sigma, 3)
  assert tau / 20 < worst <= tau
  # Formula of theorem 1, term by term.
  terms = [math.exp(-2 * math.pi**2 * sigma**2 * part) for part in (1 / 2, 2 / 3)]
  assert tau == pytest.approx(10 * sum(terms))
  assert sum_distance(4.0, 64) < 1e-60


def test_clients_draw_the_same_alone_and_under_vmap():
  sampler, keys = make_sampler(700.0), [base_key(seed) for seed in range(3)]
  together = jax.vmap(lambda key: draw(key, sampler, (5, 7)))(jnp.stack(keys))
  assert together.dtype == jnp.int32
  for key, found in zip(keys, together, strict=True):
    np.testing.assert_array_equal(found, draw(key, sampler, (5, 7)))


@pytest.mark.parametrize("sigma", [3.9, 5e9])
def test_noise_that_no_table_gives_is_refused(sigma):
  with pytest.raises(UserError, match=r"is outside 4 to 4e9; use another scale"):
    make_sampler(sigma)


def test_keys_of_another_generator_are_refused():
  with pytest.raises(UserError, match="generator 'rbg'"):
    draw(jax.random.key(0, impl="rbg"), make_sampler(8.0), (3,))


def test_no_float_is_drawn():
  text = str(jax.make_jaxpr(lambda key, s: draw(key, s, (9,)))(base_key(0), make_sampler(8.0)))
  assert "f32" not in text
  assert make_sampler(8.0).multipliers.size == discrete_gaussian.MOST_LEVELS
