"""The banded strategy against dense matrices, other strategies and free searches."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize

from fedjax_med.core.errors import UserError
from fedjax_med.privacy.calibration import PrivacyTarget, plan_mechanisms
from fedjax_med.privacy.strategy import error_over_independent, prefix_errors, toeplitz_strategy
from tests.privacy.banded_cases import dense, dense_prefix, plan_banded

SHAPES = [(1, 1), (8, 2), (8, 8), (40, 3), (64, 16), (300, 5)]


def dense_loss(coefficients, steps):
  """Mean squared error of the prefix sums at a given privacy, by dense matrices."""
  largest = (dense(coefficients, steps) ** 2).sum(axis=0).max()
  return largest * (dense_prefix(coefficients, steps) ** 2).sum(axis=1).mean()


def square_root(bands):
  """Coefficients of (1 - z)^(-1/2)."""
  return np.array([math.comb(2 * j, j) / 4**j for j in range(bands)])


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


@pytest.mark.parametrize("bands", [1, 4])
def test_error_over_independent_is_that_of_dense_matrices(bands):
  n, batch_size, steps, target = 400, 50, 60, 4.0
  plain = plan_mechanisms(
    [n], batch_size, [steps], PrivacyTarget(clip_norm=1.0, target_epsilon=target)
  )[0]
  banded = plan_banded(n, batch_size, bands, steps=steps, clip_norm=1.0, target_epsilon=target)
  root = {
    name: math.sqrt((dense_prefix(c, steps) ** 2).sum(axis=1).mean())
    for name, c in (("plain", [1.0]), ("banded", banded.coefficients))
  }
  expected = plain.noise_multiplier * root["plain"] / (banded.noise_multiplier * root["banded"])
  found = error_over_independent(plain, banded, steps)
  assert found == pytest.approx(expected, rel=1e-9)
  assert (found == 1) == (bands == 1)


def test_bands_help_at_a_large_epsilon_and_hurt_at_a_small_one():
  def advantage(target):
    plain, banded = (
      plan_banded(1000, 20, bands, steps=200, clip_norm=1.0, target_epsilon=target)
      for bands in (1, 8)
    )
    return error_over_independent(plain, banded, 200)

  assert advantage(0.2) < 1 < advantage(16.0)


def test_smaller_batches_count_against_bands():
  # 8 bands of 80 records leave 10 a batch, whatever was asked for.
  banded = plan_banded(80, 40, 8, steps=64, clip_norm=1.0, target_epsilon=4.0)
  plain = plan_mechanisms([80], 40, [64], PrivacyTarget(clip_norm=1.0, target_epsilon=4.0))[0]
  assert (banded.expected_batch_size, plain.expected_batch_size) == (10.0, 40.0)
  roots = [math.sqrt(prefix_errors(c, 64).mean()) for c in ((1.0,), banded.coefficients)]
  noises = plain.noise_multiplier / 40 * roots[0], banded.noise_multiplier / 10 * roots[1]
  assert error_over_independent(plain, banded, 64) == pytest.approx(noises[0] / noises[1], rel=1e-9)
