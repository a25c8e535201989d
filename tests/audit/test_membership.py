"""Membership inference against scikit-learn, loops over examples and data with a known shift."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from fedjax_med.audit.membership import lira_scores, logit_confidence, tpr_at_fpr
from fedjax_med.core.errors import UserError


def sklearn_tpr(scores, member, fpr):
  rates_out, rates_in, _ = metrics.roc_curve(member, scores, drop_intermediate=False)
  return rates_in[rates_out <= fpr].max()


@pytest.mark.parametrize("decimals", [0, 1, 6])
@pytest.mark.parametrize(("members", "others"), [(1, 1), (7, 30), (40, 9), (150, 150)])
def test_tpr_at_fpr_is_the_best_point_of_the_curve(members, others, decimals):
  rng = np.random.default_rng(0)
  member = rng.permutation(np.arange(members + others) < members)
  scores = np.round(rng.standard_normal(members + others) + member, decimals)
  for fpr in (0.0, 0.001, 0.01, 0.1, 1 / 3, 0.3, 0.5, 0.9, 1.0, 1 / others, 2 / others):
    if fpr <= 1:
      assert tpr_at_fpr(scores, member, fpr) == sklearn_tpr(scores, member, fpr)


def test_tpr_at_fpr_does_not_split_equal_scores():
  scores = np.array([3.0, 2.0, 2.0, 2.0, 1.0])
  member = np.array([True, True, True, False, False])
  assert tpr_at_fpr(scores, member, 0.49) == 1 / 3
  assert tpr_at_fpr(scores, member, 0.5) == 1
  assert tpr_at_fpr(np.zeros(5), member, 0.99) == 0
  assert tpr_at_fpr(np.where(member, math.inf, -math.inf), member, 0.0) == 1


def test_logit_confidence_is_the_formula():
  rng = np.random.default_rng(1)
  probabilities = rng.dirichlet(np.ones(5), (3, 4))
  labels = rng.integers(0, 5, (3, 4))
  expected = np.zeros((3, 4))
  for i in range(3):
    for j in range(4):
      p = probabilities[i, j, labels[i, j]]
      expected[i, j] = math.log(p / (1 - p))
  np.testing.assert_allclose(logit_confidence(probabilities, labels), expected, rtol=1e-12)
  # Logits are logarithms but for a constant of each example.
  logits = np.log(probabilities) + rng.standard_normal((3, 4, 1)) * 50
  np.testing.assert_allclose(logit_confidence(logits, labels, log=True), expected, atol=1e-12)


def test_logit_confidence_stays_exact_where_probabilities_saturate():
  logits = np.array([[800.0, -100.0], [800.0, -100.0], [0.0, -50.0]])
  found = logit_confidence(logits, np.array([0, 1, 0]), log=True)
  np.testing.assert_array_equal(found, [900.0, -900.0, 50.0])
  tiny = np.array([[1.0, 1e-300], [1.0, 1e-300]])
  np.testing.assert_allclose(
    logit_confidence(tiny, np.array([0, 1])), 300 * math.log(10) * np.array([1, -1]), rtol=1e-12
  )
  np.testing.assert_array_equal(
    logit_confidence(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])), [math.inf, -math.inf]
  )
  assert logit_confidence(np.array([0.25, 0.5, 0.25], np.float32), np.int32(1)) == 0


def shadow_runs(rng, runs, examples, shift, spread=1.0):
  """Confidences that rise by ``shift`` for members; examples differ in difficulty."""
  member = rng.random((runs, examples)) < 0.5
  difficulty = 4 * rng.standard_normal(examples)
  noise = spread * rng.standard_normal((runs, examples))
  return difficulty + shift * member + noise, member


def reference_lira(confidences, member, target):
  """Loops over examples; variances of ``statistics``-like sums, pooled under 32 runs."""
  runs, examples = confidences.shape
  others = [run for run in range(runs) if run != target]
  sides = {}
  for side in (True, False):
    groups = [[confidences[r, e] for r in others if member[r, e] == side] for e in range(examples)]
    squares = sum(np.var(g) * len(g) for g in groups if g)
    freedom = sum(len(g) - 1 for g in groups if g)
    sides[side] = groups, squares / freedom
  scores = []
  for e in range(examples):
    normal = {}
    for side, (groups, pooled) in sides.items():
      group = groups[e]
      if group:
        variance = np.var(group, ddof=1) if len(group) >= 32 else pooled
        normal[side] = stats.norm(np.mean(group), math.sqrt(variance))
    x = confidences[target, e]
    if True not in normal:
      scores.append(-normal[False].logsf(x))
    elif False not in normal:
      scores.append(normal[True].logcdf(x))
    else:
      scores.append(normal[True].logpdf(x) - normal[False].logpdf(x))
  return np.array(scores)


@pytest.mark.parametrize(("runs", "target"), [(5, 0), (9, 8), (66, 30), (120, 3)])
def test_lira_is_the_loop_over_examples(runs, target):
  rng = np.random.default_rng(2)
  confidences, member = shadow_runs(rng, runs, 25, 1.0)
  # Known to no other run, to all others, and to the target alone: offline on one side.
  member[:, 0], member[:, 1] = False, True
  member[:, 2] = np.arange(runs) == target
  found = lira_scores(confidences, member, target)
  np.testing.assert_allclose(found, reference_lira(confidences, member, target), rtol=1e-9)


def test_lira_does_not_read_the_targets_membership():
  confidences, member = shadow_runs(np.random.default_rng(3), 20, 30, 1.0)
  changed = member.copy()
  changed[4] = ~changed[4]
  found = lira_scores(confidences, member, 4)
  np.testing.assert_array_equal(found, lira_scores(confidences, changed, 4))


@pytest.mark.parametrize("runs", [9, 100])
def test_lira_finds_members_where_confidences_shift_and_nobody_where_not(runs):
  caught = {}
  for shift in (0.0, 1.5, 4.0):
    confidences, member = shadow_runs(np.random.default_rng(4), runs, 2000, shift)
    scores = lira_scores(confidences, member, 0)
    caught[shift] = tpr_at_fpr(scores, member[0], 0.05)
    if shift > 0:
      # Without the other runs, difficulty hides the members.
      assert caught[shift] > 2 * tpr_at_fpr(confidences[0], member[0], 0.05)
  assert caught[0.0] == pytest.approx(0.05, abs=0.025)
  assert 0.15 < caught[1.5] < caught[4.0] > 0.85


def test_offline_scores_rise_with_confidence():
  rng = np.random.default_rng(5)
  confidences, member = shadow_runs(rng, 12, 400, 3.0)
  member[1:] = False
  confidences[1:] -= 3.0 * shadow_runs(np.random.default_rng(5), 12, 400, 3.0)[1][1:]
  scores = lira_scores(confidences, member, 0)
  assert np.all(scores >= 0)
  assert tpr_at_fpr(scores, member[0], 0.05) > 0.6
  raised = confidences.copy()
  raised[0] += 0.1
  assert np.all(lira_scores(raised, member, 0) > scores)


def test_one_run_on_a_side_takes_the_spread_of_the_other():
  confidences = np.array([[0.5], [2.0], [0.0], [1.0]])
  member = np.array([[True], [True], [False], [False]])
  std = math.sqrt(0.5)
  expected = stats.norm.logpdf(0.5, 2.0, std) - stats.norm.logpdf(0.5, 0.5, std)
  np.testing.assert_allclose(lira_scores(confidences, member, 0), [expected])


def test_an_example_without_spread_of_its_own_keeps_finite_scores():
  confidences, member = shadow_runs(np.random.default_rng(6), 100, 10, 1.0)
  confidences[:, 0] = 7.0
  assert np.isfinite(lira_scores(confidences, member, 0)).all()


MEMBER = np.array([[True, False], [False, True], [True, True]])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: tpr_at_fpr([1.0, 2.0], np.array([True, True]), 0.1), "on one side"),
    (lambda: tpr_at_fpr([1.0, 2.0], np.array([True, False]), 1.1), "fpr=1.1 must be"),
    (lambda: tpr_at_fpr([1.0, 2.0], np.array([1, 0]), 0.1), "member is int64"),
    (lambda: tpr_at_fpr([1.0, math.nan], np.array([True, False]), 0.1), "scores has NaN"),
    (lambda: logit_confidence([[0.5, 0.5]], np.array([2])), "whole numbers from 0 to 1"),
    (lambda: logit_confidence([[0.5, 0.5]], np.array([-1])), "whole numbers from 0 to 1"),
    (lambda: logit_confidence([[0.5, 0.5]], np.array([1.0])), "whole numbers from 0 to 1"),
    (lambda: logit_confidence([[0.5, 0.5]], np.array([1, 1])), "do not fit"),
    (lambda: logit_confidence([[0.5]], np.array([0])), "do not fit"),
    (lambda: logit_confidence([[-0.5, 1.5]], np.array([0])), "set log=True"),
    (lambda: logit_confidence([[0.0, 0.0]], np.array([0])), "all 0"),
    (lambda: lira_scores(np.zeros((3, 2)), MEMBER, 3), "target_run=3 of 3 runs"),
    (lambda: lira_scores(np.zeros((3, 2)), MEMBER, -1), "target_run=-1 must be"),
    (lambda: lira_scores(np.zeros((3, 2)), MEMBER, 0), "no example differs"),
    (lambda: lira_scores(np.zeros((3, 2)), MEMBER[:2], 0), "member is bool"),
    (lambda: lira_scores(np.full((3, 2), math.inf), MEMBER, 0), "must be .* finite"),
  ],
)
def test_membership_fails_closed(call, message):
  with pytest.raises(UserError, match=message):
    call()
