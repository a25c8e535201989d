"""Bounds of a privacy audit against enumeration, the paper's numbers and mechanisms of known ε."""

import math

import numpy as np
import pytest
from jax_privacy.auditing import CanaryScoreAuditor, Explicit
from scipy import optimize, stats

from fedjax_med.audit.epsilon_bounds import (
  guess_ladder,
  one_run_epsilon,
  one_run_p_value,
  threshold_epsilon,
)
from fedjax_med.core.errors import UserError

# A bound at 95% may fail in one of 20 repetitions; more than ``allowed`` have a chance of 1e-3.
LEVEL = 0.05


def allowed(repetitions):
  return stats.binom.isf(1e-3, repetitions, LEVEL)


def gaussian_epsilon(mu, delta):
  """ε of μ-Gaussian DP at δ, Balle and Wang 2018, theorem 8."""

  def excess(eps):
    below = math.exp(eps) * stats.norm.cdf(-eps / mu - mu / 2)
    return stats.norm.cdf(mu / 2 - eps / mu) - below - delta

  return optimize.root_scalar(excess, bracket=(0, 100)).root


def coins(rng, size):
  return rng.random(size) < 0.5


def randomized_response(rng, size, eps, delta=0.0):
  """Scores and bits of the worst (ε, δ)-DP release: a noisy bit each, bare with probability δ."""
  included = coins(rng, size)
  bare = rng.random(size) < delta
  right = bare | (rng.random(size) < 1 / (1 + math.exp(-eps)))
  # Sizes, which order guesses of one sign, say nothing of the bit; bare ones stand out.
  return np.where(included == right, 1, -1) * (1 + rng.random(size) + 5 * bare), included


def gaussian_canaries(rng, size, sigma):
  """A run that releases the sum of orthogonal unit canaries plus N(0, σ² I): a coordinate each."""
  included = coins(rng, size)
  return included + sigma * rng.standard_normal(size), included


def tail(r, v, rate):
  return math.fsum(
    math.comb(r, k) * rate**k * (1 - rate) ** (r - k) for k in range(max(v, 0), r + 1)
  )


@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-3, 0.02])
@pytest.mark.parametrize(("m", "r"), [(1, 1), (12, 7), (40, 40), (300, 60)])
def test_p_value_is_the_linear_program_over_added_right_guesses(m, r, delta):
  for eps in (0.0, 0.4, 2.0, 6.0):
    f = [tail(r, v, 1 / (1 + math.exp(-eps))) for v in range(r + 1)]
    for v in {0, 1, r // 2, (3 * r) // 4, r}:
      expected = f[v]
      if v > 0 and delta > 0:
        # x_i: probability of i added right guesses, whose mean is at most 2mδ.
        gains = [f[v] - f[v - i] for i in range(1, v + 1)]
        costs = [list(range(1, v + 1))]
        # HiGHS takes a gain under this as none.
        options = {"dual_feasibility_tolerance": 1e-10}
        budget = [2 * m * delta]
        expected -= optimize.linprog(gains, A_ub=costs, b_ub=budget, options=options).fun
      expected = pytest.approx(min(expected, 1), rel=1e-9, abs=1e-8)
      assert one_run_p_value(m, r, v, eps, delta) == expected


def published_p_value(m, r, v, eps, delta):
  """Appendix D of the paper, step by step, without a window."""
  rate = 1 / (1 + math.exp(-eps))
  steepest, inside = 0.0, 0.0
  for i in range(1, v + 1):
    inside += stats.binom.pmf(v - i, r, rate)
    steepest = max(steepest, inside / i)
  return min(1.0, stats.binom.sf(v - 1, r, rate) + steepest * 2 * m * delta)


@pytest.mark.parametrize(("m", "r", "v"), [(900, 400, 290), (900, 900, 899), (5000, 1000, 520)])
def test_p_value_of_many_guesses_is_the_published_loop(m, r, v):
  for eps in (0.0, 0.3, 1.0, 9.0):
    expected = published_p_value(m, r, v, eps, 1e-5)
    assert one_run_p_value(m, r, v, eps, 1e-5) == pytest.approx(expected, rel=1e-9)


def bound(m, r, v, delta, confidence=0.95):
  """``one_run_epsilon`` of m canaries of whose r guesses v are right."""
  half = r // 2
  included = np.zeros(m, bool)
  included[m - (r - half) :] = True
  # Wrong guesses: "out" for the lowest ones.
  included[: r - v] = True
  found = one_run_epsilon(np.arange(m), included, delta, confidence, num_guesses=r)
  assert (found.correct, found.guesses, found.canaries) == (v, r, m)
  return found.epsilon_lower


def test_bound_is_that_printed_in_the_paper():
  # Appendix D and section 7.
  assert bound(1000, 100, 75, 1e-4) == pytest.approx(0.673, abs=5e-4)
  assert math.floor(1000 * bound(100_000, 1510, 1439, 1e-5)) == 2675


@pytest.mark.parametrize("m", [1, 5, 64, 1001])
def test_bound_of_a_perfect_attack_is_the_closed_form(m):
  included = np.arange(m) >= m // 2
  scores = np.where(included, 3.0, -3.0) + np.linspace(0, 1, m)
  rate = 0.05 ** (1 / m)
  expected = max(0.0, math.log(rate / (1 - rate)))
  found = one_run_epsilon(scores, included, 0.0, num_guesses=m)
  assert found.epsilon_lower == pytest.approx(expected, rel=1e-9)
  assert (found.correct, found.guesses, found.canaries, found.confidence) == (m, m, m, 0.95)


@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_bound_inverts_the_p_value(delta):
  for r, v in ((100, 75), (500, 330), (60, 60)):
    lower = bound(500, r, v, delta)
    assert lower > 0.1
    assert one_run_p_value(500, r, v, lower, delta) == pytest.approx(LEVEL, rel=1e-6)
    assert lower < bound(500, r, v, 0.0)


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-3])
@pytest.mark.parametrize(("yes", "no", "idle"), [(16, 1, 0), (90, 10, 100), (700, 280, 3020)])
def test_p_value_turns_at_the_bound_of_jax_privacys_auditor(delta, yes, no, idle):
  half = idle // 2
  members = np.r_[np.ones(yes), np.zeros(half)]
  others = np.r_[np.ones(no), np.zeros(idle - half)]
  bound = CanaryScoreAuditor(members, others).epsilon_one_run(
    0.05, delta, threshold_strategy=Explicit(0.5)
  )
  arguments = yes + no + idle, yes + no, yes
  assert 0.3 < bound < 4
  assert one_run_p_value(*arguments, bound, delta) == pytest.approx(0.05, abs=1e-4)


def test_bound_falls_with_delta_and_canaries_and_rises_with_right_guesses():
  def rises(values):
    return values[0] < values[-1] and all(np.diff(values) >= 0)

  assert rises([bound(400, 100, v, 1e-4) for v in range(50, 101, 2)])
  assert rises([bound(400, 100, 80, d) for d in (1e-2, 1e-3, 1e-4, 1e-5, 0.0)])
  assert rises([bound(m, 100, 80, 1e-4) for m in (4000, 2000, 400, 100)])
  assert rises([bound(400, 100, 80, 1e-4, c) for c in (0.999, 0.99, 0.95, 0.9, 0.5)])


@pytest.mark.parametrize("eps", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
def test_p_value_bounds_releases_of_known_distribution(eps, delta):
  """Bits noisy, bare with probability δ each; and all bare at once with probability δ."""
  rate = 1 / (1 + math.exp(-eps))
  for m in (1, 6, 30):
    for v in range(m + 1):
      value = one_run_p_value(m, m, v, eps, delta) + 1e-12
      assert tail(m, v, delta + (1 - delta) * rate) <= value
      assert delta + (1 - delta) * tail(m, v, rate) <= value


@pytest.mark.parametrize("eps", [0.0, 0.5, 3.0])
def test_bound_exceeds_the_epsilon_of_randomized_response_in_5_percent(eps):
  rng = np.random.default_rng(0)
  runs = [randomized_response(rng, 300, eps) for _ in range(300)]
  one = [one_run_epsilon(*run, 0.0, num_guesses=150).epsilon_lower > eps for run in runs]
  # As tight as counts of 150 allow, at which 5% are 3 to 5%.
  assert stats.binom.ppf(1e-3, 300, 0.02) <= sum(one) <= allowed(300)
  ladder = [one_run_epsilon(*run, 0.0).epsilon_lower > eps for run in runs]
  assert sum(ladder) <= allowed(300)


def test_bound_holds_where_delta_is_what_leaks():
  rng = np.random.default_rng(1)
  runs = [randomized_response(rng, 400, 0.0, 0.02) for _ in range(200)]
  exceeds = [one_run_epsilon(*run, 0.02, num_guesses=50).epsilon_lower > 0 for run in runs]
  assert sum(exceeds) <= allowed(200)
  ignored = [one_run_epsilon(*run, 0.0, num_guesses=50).epsilon_lower > 0 for run in runs]
  assert sum(ignored) > allowed(200)


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "delta"), [(0.5, 1e-5), (1.0, 1e-5), (2.0, 1e-6)])
def test_bound_is_under_the_epsilon_of_the_gaussian_mechanism_and_well_above_0(sigma, delta):
  rng = np.random.default_rng(2)
  exact = gaussian_epsilon(1 / sigma, delta)
  runs = [gaussian_canaries(rng, 1000, sigma) for _ in range(200)]
  lower = np.array([one_run_epsilon(*run, delta).epsilon_lower for run in runs])
  assert np.sum(lower > exact) <= allowed(200)
  assert np.median(lower) > exact / 12


def test_runs_may_be_pooled():
  rng = np.random.default_rng(3)
  runs = [gaussian_canaries(rng, 200, 1.0) for _ in range(10)]
  scores, included = map(np.concatenate, zip(*runs, strict=True))
  pooled = one_run_epsilon(scores, included, 1e-5)
  assert pooled.canaries == 2000
  assert pooled.epsilon_lower > max(one_run_epsilon(*run, 1e-5).epsilon_lower for run in runs)
  assert pooled.epsilon_lower < gaussian_epsilon(1.0, 1e-5)


def test_the_ladder_is_paid_for_and_the_same_for_all_scores():
  assert guess_ladder(64) == (64, 44, 32, 22, 16)
  assert guess_ladder(17) == (16,)
  assert guess_ladder(9) == (9,)
  assert all(count % 2 == 0 for count in guess_ladder(50_001))
  scores, included = gaussian_canaries(np.random.default_rng(4), 64, 0.3)
  share = 1 - LEVEL / 5
  each = [one_run_epsilon(scores, included, 0.0, share, count) for count in guess_ladder(64)]
  found = one_run_epsilon(scores, included, 0.0)
  assert found.epsilon_lower == pytest.approx(max(b.epsilon_lower for b in each), rel=1e-12)
  assert found.epsilon_lower > 1


def tied_canaries():
  rng = np.random.default_rng(5)
  scores, included = gaussian_canaries(rng, 500, 0.7)
  return np.round(2 * scores) / 2, included


def test_bound_depends_on_no_order_of_the_canaries():
  scores, included = tied_canaries()
  expected = one_run_epsilon(scores, included, 1e-5)
  assert expected.epsilon_lower > 0
  for order in (np.argsort(included), np.argsort(~included), np.arange(500)[::-1]):
    assert one_run_epsilon(scores[order], included[order], 1e-5) == expected


def test_bound_is_the_same_for_negated_scores_and_flipped_bits():
  scores, included = tied_canaries()
  expected = one_run_epsilon(scores, included, 1e-5)
  assert one_run_epsilon(-scores, ~included, 1e-5) == expected
  assert one_run_epsilon(np.exp(scores), included, 1e-5) == expected


@pytest.mark.parametrize("members_first", [False, True])
def test_equal_scores_are_no_evidence(members_first):
  included = (np.arange(100) < 50) == members_first
  found = one_run_epsilon(np.zeros(100), included, 0.0, num_guesses=40)
  assert (found.epsilon_lower, found.correct) == (0.0, 0)
  assert one_run_epsilon(np.zeros(100), included, 0.0).epsilon_lower == 0
  # Of 60 equal scores, 15 of them members, 40 are needed as "in": all that can be wrong are.
  scores = np.where(np.arange(100) < 40, -1.0 - np.arange(100), 1.0)
  bits = (np.arange(100) >= 40) & (np.arange(100) < 55)
  order = np.arange(100) if members_first else np.arange(100)[::-1]
  assert one_run_epsilon(scores[order], bits[order], 0.0, num_guesses=80).correct == 40


def test_shuffled_bits_show_nothing():
  rng = np.random.default_rng(6)
  scores, included = gaussian_canaries(rng, 2000, 0.1)
  assert one_run_epsilon(scores, included, 1e-5).epsilon_lower > 3
  shuffled = [
    one_run_epsilon(scores, rng.permutation(included), 1e-5).epsilon_lower for _ in range(100)
  ]
  assert np.count_nonzero(shuffled) <= allowed(100)
  assert max(shuffled) < 0.3
  assert one_run_epsilon(-scores, included, 1e-5).epsilon_lower == 0


def test_infinite_scores_are_ranked():
  included = np.arange(64) >= 32
  scores = np.where(included, math.inf, -math.inf)
  finite = one_run_epsilon(np.where(included, 1, -1), included, 0.0)
  assert one_run_epsilon(scores, included, 0.0) == finite
  assert finite.correct == 64


def reference_threshold_epsilon(scores_in, scores_out, threshold, delta):
  """Clopper-Pearson by SciPy's exact test; two sides of 97.5% each."""
  true = stats.binomtest(int(np.sum(scores_in >= threshold)), len(scores_in))
  false = stats.binomtest(int(np.sum(scores_out >= threshold)), len(scores_out))
  tpr = true.proportion_ci(0.95, "exact").low
  fpr = false.proportion_ci(0.95, "exact").high
  shown = [0.0]
  if tpr > delta:
    shown.append(math.log((tpr - delta) / fpr))
  if 1 - fpr > delta:
    shown.append(math.log((1 - fpr - delta) / (1 - tpr)))
  return max(shown)


@pytest.mark.parametrize("delta", [0.0, 1e-3])
@pytest.mark.parametrize(("a", "b", "shift"), [(400, 300, 1.0), (301, 500, 4.0), (60, 41, 30.0)])
def test_threshold_bound_is_clopper_pearson(a, b, shift, delta):
  rng = np.random.default_rng(9)
  for sign in (1, -1):
    # Skewed, so that either inequality is the larger one for one of the signs.
    scores_in = sign * rng.exponential(size=a) + shift
    scores_out = sign * rng.exponential(size=b)
    for threshold in (0.0, shift / 2, shift):
      found = threshold_epsilon(scores_in, scores_out, threshold, delta)
      expected = reference_threshold_epsilon(scores_in, scores_out, threshold, delta)
      assert found == pytest.approx(expected, rel=1e-9)


def test_threshold_bound_holds_and_is_close_for_randomized_response():
  rng = np.random.default_rng(10)
  rate = 1 / (1 + math.exp(-2.0))
  lower = []
  for _ in range(200):
    scores_in, scores_out = rng.random(4000) < rate, rng.random(4000) >= rate
    lower.append(threshold_epsilon(scores_in, scores_out, 0.5, 0.0))
  assert np.sum(np.array(lower) > 2.0) <= allowed(200)
  assert np.median(lower) > 1.8


def test_threshold_bound_is_under_the_epsilon_of_the_gaussian_mechanism():
  rng = np.random.default_rng(11)
  exact = gaussian_epsilon(1.0, 1e-3)
  lower = []
  for _ in range(200):
    trials = rng.standard_normal((2, 2000))
    lower.append(threshold_epsilon(trials[0] + 1, trials[1], 2.0, 1e-3))
  assert np.sum(np.array(lower) > exact) <= allowed(200)
  assert np.median(lower) > exact / 3


def test_threshold_bound_of_equal_scores_is_0():
  assert threshold_epsilon(np.zeros(9), np.zeros(7), 0.0, 1e-3) == 0
  assert threshold_epsilon(np.zeros(900), np.ones(900), 0.5, 1e-3) == 0


GOOD = (np.arange(20.0), np.arange(20) >= 10, 1e-5)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"scores": np.full(20, math.nan)}, "scores has NaN"),
    ({"scores": np.zeros((20, 1)), "included": np.zeros((20, 1), bool)}, "not \\[m\\]"),
    ({"scores": [], "included": np.zeros(0, bool)}, "canaries=0 must be"),
    ({"included": np.ones(20, int)}, "included is int64"),
    ({"included": np.ones(19, bool)}, r"included is bool \(19,\), not bool \(20,\)"),
    ({"delta": 1.0}, "delta=1.0 must be in"),
    ({"delta": math.nan}, "delta=nan must be in"),
    ({"confidence": 1.0}, "confidence=1.0 must be in"),
    ({"confidence": 0.4}, "confidence=0.4 must be in"),
    ({"num_guesses": 21}, "num_guesses=21 must be at most the 20 canaries"),
    ({"num_guesses": 0}, "num_guesses=0 must be"),
  ],
)
def test_one_run_epsilon_fails_closed(change, message):
  arguments = dict(zip(("scores", "included", "delta"), GOOD, strict=True)) | change
  with pytest.raises(UserError, match=message):
    one_run_epsilon(**arguments)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: one_run_p_value(10, 5, 6, 1.0, 0.0), "correct=6, guesses=5"),
    (lambda: one_run_p_value(10, 5, 3, -1.0, 0.0), "epsilon=-1.0 must be"),
    (lambda: one_run_p_value(10, 5, 3, math.nan, 0.0), "epsilon=nan must be"),
    (lambda: threshold_epsilon([], [1.0, 2.0], 0.0, 0.0), r"scores_in \(0,\) and"),
    (lambda: threshold_epsilon([1.0, 2.0], [math.nan, 1.0], 0.0, 0.0), "scores_out has NaN"),
  ],
)
def test_other_bounds_fail_closed(call, message):
  with pytest.raises(UserError, match=message):
    call()
