"""P-values of draws against enumeration, limits and SciPy: valid if the claim holds, else tiny."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fedjax_med.audit.p_values import (
  dispersion_p_value,
  inclusion_p_value,
  noise_std_p_value,
  uncorrelated_p_value,
)
from fedjax_med.core.errors import UserError


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: noise_std_p_value([], 1.0), "no noise sample"),
    (lambda: noise_std_p_value([math.inf], 1.0), "samples has infinite values"),
    (lambda: noise_std_p_value([1.0], 0.0), "std=0.0 must be above 0"),
    (lambda: inclusion_p_value(3, 2, 0.5), "count=3 exceeds trials=2"),
    (lambda: inclusion_p_value(1, 2, 1.5), "probability=1.5 must be"),
    (lambda: dispersion_p_value([], 2, 0.5), "no count"),
    (lambda: dispersion_p_value([1, 3], 2, 0.5), "a count is no whole number from 0 to trials=2"),
    (lambda: dispersion_p_value([0.5], 2, 0.5), "a count is no whole number"),
    (lambda: dispersion_p_value([1], 2, -0.1), "probability=-0.1 must be"),
    (lambda: uncorrelated_p_value([1.0], [1.0]), "1 and 1 values"),
    (lambda: uncorrelated_p_value([1.0, 2.0], [1.0, 2.0, 3.0]), "2 and 3 values"),
    (lambda: uncorrelated_p_value([0.0, 0.0], [1.0, 2.0]), "a vector is 0"),
  ],
)
def test_p_values_fail_closed(call, message):
  with pytest.raises(UserError, match=message):
    call()


def test_noise_p_values_are_uniform_under_the_claim_and_tiny_for_another_std():
  rng = np.random.default_rng(12)
  for size in (1, 5, 400):
    values = [noise_std_p_value(3.0 * rng.standard_normal(size), 3.0) for _ in range(500)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
  noise = rng.standard_normal((20, 30))
  assert noise_std_p_value(0.5 * noise, 1.0) < 1e-12
  assert noise_std_p_value(2.0 * noise, 1.0) < 1e-12
  assert noise_std_p_value(np.zeros(400), 1.0) < 1e-12
  # A mean is variance too: it is known to be 0.
  assert noise_std_p_value(noise + 1.0, 1.0) < 1e-12


@pytest.mark.parametrize(("trials", "q"), [(1, 0.5), (30, 0.1), (200, 0.37), (12, 1.0)])
def test_inclusion_p_value_is_valid_at_every_level(trials, q):
  counts = np.arange(trials + 1)
  values = np.array([inclusion_p_value(count, trials, q) for count in counts])
  mass = stats.binom.pmf(counts, trials, q)
  assert all(mass[values <= value].sum() <= value * (1 + 1e-9) for value in values)
  assert values.max() == pytest.approx(1.0)


def test_inclusion_p_value_finds_another_rate():
  assert inclusion_p_value(500, 10_000, 0.05) == pytest.approx(1.0)
  for count in (250, 1000):
    assert inclusion_p_value(count, 10_000, 0.05) < 1e-12


@pytest.mark.parametrize(("trials", "q"), [(5, 0.3), (4, 0.95), (3, 1.0), (6, 0.01)])
def test_dispersion_p_value_is_the_enumeration_of_all_counts(trials, q):
  draws = np.array(list(itertools.product(range(trials + 1), repeat=3)))
  mass = stats.binom.pmf(draws, trials, q).prod(1)
  spread = np.square(draws - round(trials * q)).sum(1)
  for counts, seen in zip(draws, spread, strict=True):
    tails = mass[spread <= seen].sum(), mass[spread >= seen].sum()
    expected = min(1, 2 * min(tails))
    assert dispersion_p_value(counts, trials, q) == pytest.approx(expected, abs=1e-12)


def test_dispersion_p_value_has_its_limit_and_finds_what_varies_otherwise():
  rng = np.random.default_rng(15)
  for trials, q in ((800, 0.25), (800, 0.5)):  # many draws vary: chi-square
    counts = rng.binomial(trials, q, 32)
    spread = np.square(counts - trials * q).sum() / (trials * q * (1 - q))
    limit = 2 * min(stats.chi2.cdf(spread, 32), stats.chi2.sf(spread, 32))
    assert dispersion_p_value(counts, trials, q) == pytest.approx(limit, rel=0.05, abs=0.02)
  assert dispersion_p_value(np.full(32, 15), 60, 0.25) < 1e-12  # shuffled
  assert dispersion_p_value(np.repeat([0, 30], 16), 60, 0.25) < 1e-12  # all together
  # Most batches hold everybody, and a full one is no evidence.
  assert dispersion_p_value(np.full(32, 10), 10, 0.99) > 0.05
  assert dispersion_p_value(np.full(32, 9), 10, 1.0) == pytest.approx(0, abs=1e-12)


def test_correlation_p_values_are_uniform_for_independent_noise_and_tiny_for_shared_noise():
  rng = np.random.default_rng(13)
  for size in (2, 7, 300):
    # Exact whatever the other vector is.
    other = rng.exponential(size=size) ** 3
    values = [uncorrelated_p_value(rng.standard_normal(size), other) for _ in range(500)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
  a, b = rng.standard_normal((2, 2000))
  assert uncorrelated_p_value(a, a) == 0
  assert uncorrelated_p_value(a, -3 * a) == 0
  assert uncorrelated_p_value(a, a + b) < 1e-12
  assert uncorrelated_p_value(a, b) == uncorrelated_p_value(b, a) > 1e-3
  # With means removed it is SciPy's test of Pearson's correlation with one observation more.
  centred = a[:9] - a[:9].mean(), b[:9] - b[:9].mean()
  r = float(np.corrcoef(*centred)[0, 1])
  t = r * math.sqrt(8 / (1 - r * r))
  assert uncorrelated_p_value(*centred) == pytest.approx(2 * stats.t.sf(abs(t), 8), rel=1e-9)
