"""Survival against lifelines' numbers, and against sums written out in Python and NumPy.

The golden values are of lifelines 0.30.3, which needs another pandas than this package; with
``pip install --target FOLDER lifelines`` and PYTHONPATH=FOLDER they are what this prints:

    from lifelines import CoxPHFitter, KaplanMeierFitter
    from lifelines.utils import concordance_index
    time, event, risk = observed()
    print(concordance_index(time, -risk, event))
    print(KaplanMeierFitter().fit(time, event).survival_function_at_times([0, 3.5, 10, 29, 40]))
    rows, time, event = covariates()
    frame = pd.DataFrame(rows, columns=list("abc")).assign(time=time, event=event)
    print(CoxPHFitter().fit(frame, "time", "event", fit_options={"precision": 1e-12}).params_)
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.tasks import survival
from fedjax_med.tasks.concordance import concordance, kaplan_meier, thirds
from fedjax_med.tasks.task import Targets

LIFELINES_C = 0.5173333333333333
LIFELINES_CURVE = [1.0, 0.9243506493506493, 0.8016126613910871] + 2 * [0.07381188687914526]
LIFELINES_WEIGHTS = [0.6494767863166411, -0.5116082105857896, -0.06103565084415877]


def observed():
  """80 records with ties in time and in risk: times, events, risks."""
  random = np.random.default_rng(7)
  time = random.integers(1, 30, 80).astype(np.float32)
  event = random.random(80) < 0.6
  return time, event, random.integers(0, 12, 80).astype(np.float32)


def covariates():
  """120 records [120, 3] whose times follow from the first two columns; no two times are equal."""
  random = np.random.default_rng(7)
  _ = random.integers(1, 30, 80), random.random(80), random.integers(0, 12, 80)  # as in observed
  rows = random.normal(size=(120, 3))
  time = random.exponential(np.exp(-rows @ [0.8, -0.5, 0.0])).astype(np.float32)
  end = random.exponential(2.0, 120).astype(np.float32)
  return rows, np.minimum(time, end), time <= end


def losses_written_out(risk, time, event):
  """Breslow's partial likelihood: of each event, as the definition says it."""
  return np.array(
    [
      np.log(sum(np.exp(risk[j]) for j in range(len(risk)) if time[j] >= time[i])) - risk[i]
      if event[i]
      else 0.0
      for i in range(len(risk))
    ]
  )


def newton(rows, time, event):
  """Weights of least mean partial-likelihood loss, by Newton's method in NumPy."""
  weights = np.zeros(rows.shape[1])
  for _ in range(30):
    gradient, curvature = np.zeros_like(weights), np.zeros((len(weights), len(weights)))
    for i in np.flatnonzero(event):
      held = rows[time >= time[i]]
      share = np.exp(held @ weights)
      share /= share.sum()
      mean = share @ held
      gradient += mean - rows[i]
      curvature += (held * share[:, None]).T @ held - np.outer(mean, mean)
    weights -= np.linalg.solve(curvature, gradient)
  return weights


def test_c_is_that_of_lifelines_and_of_all_pairs_one_by_one():
  time, event, risk = observed()
  found = concordance(time, event, risk)
  assert found.c_index == pytest.approx(LIFELINES_C, abs=1e-9)
  score = pairs = 0
  for i, j in itertools.permutations(range(len(time)), 2):
    if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
      pairs += 1
      score += 1 if risk[i] > risk[j] else 0.5 * (risk[i] == risk[j])
  assert (found.comparable, found.c_index) == (pairs, pytest.approx(score / pairs, abs=1e-12))


def test_c_within_groups_is_of_pairs_of_one_group_and_follows_from_the_groups_own():
  time, event, risk = observed()
  groups = np.arange(80) % 3
  own = [concordance(time[groups == g], event[groups == g], risk[groups == g]) for g in range(3)]
  within = concordance(time, event, risk, groups)
  assert within == tuple(np.array([tuple(pairs) for pairs in own]).sum(axis=0))
  lines = [{"c_index": pairs.c_index, "pairs": pairs.comparable} for pairs in own]
  nobody = {"c_index": None, "pairs": 0}
  told = survival.within_hospitals([*lines, nobody])
  assert told["c_within"] == pytest.approx(within.c_index, abs=1e-12)
  assert survival.within_hospitals([nobody]) == {"c_within": None}


def test_c_without_a_comparable_pair_is_none():
  time = np.array([3.0, 2.0, 1.0])
  assert concordance(time, np.array([True, False, False]), time).c_index is None


def test_curves_are_those_of_lifelines():
  time, event, _ = observed()
  found = kaplan_meier(time, event, np.array([0, 3.5, 10, 29, 40]))
  np.testing.assert_allclose(found, LIFELINES_CURVE, atol=1e-12)
  assert kaplan_meier(time[:0], event[:0], np.array([1.0])).tolist() == [1.0]


def test_thirds_keep_equal_risks_together():
  assert thirds(np.array([5.0, 1, 2, 3, 4, 6])).tolist() == [2, 0, 0, 1, 1, 2]
  assert len(set(thirds(np.zeros(9)).tolist())) == 1


def test_partial_likelihood_is_the_definition_and_its_gradient_that_of_differences():
  time, event, risk = (values[:32] for values in observed())
  outputs, targets = jnp.asarray(risk[:, None] / 4), jnp.stack([time, event.astype("f4")], axis=1)
  loss = jax.jit(survival.partial_likelihood(0.0))
  expected = losses_written_out(risk.astype(np.float64) / 4, time, event)
  np.testing.assert_allclose(loss(outputs, targets), expected, atol=1e-5)
  slope = jax.jit(jax.grad(lambda outputs: loss(outputs, targets).sum()))(outputs)[:, 0]
  for i in (0, 17, 31):
    ends = [risk.astype(np.float64) / 4 for _ in range(2)]
    ends[0][i] += 1e-5
    ends[1][i] -= 1e-5
    high, low = (losses_written_out(end, time, event).sum() for end in ends)
    assert slope[i] == pytest.approx((high - low) / 2e-5, abs=1e-4)
  mean = survival.cox_loss(np.asarray(outputs), np.asarray(targets))
  assert mean == pytest.approx(expected.mean(), abs=1e-6)


def test_places_without_a_record_and_batches_without_an_event_change_nothing():
  time, event, risk = (values[:27] for values in observed())
  loss = jax.jit(survival.partial_likelihood(0.0))
  targets = jnp.stack([time, event.astype("f4")], axis=1)
  padding = jnp.full((5, 2), jnp.nan)
  padded = jnp.concatenate([targets[:10], padding, targets[10:]])
  outputs = jnp.asarray(risk[:, None])
  more = jnp.concatenate([outputs[:10], jnp.full((5, 1), 1e3), outputs[10:]])
  both = jax.jit(jax.value_and_grad(lambda outputs, targets: loss(outputs, targets).sum()))
  found, slope = both(more, padded)
  whole = both(jnp.concatenate([outputs, more[10:15]]), jnp.concatenate([targets, padding]))
  expected = losses_written_out(risk.astype(np.float64), time, event).sum()
  np.testing.assert_allclose([found, whole[0]], expected, rtol=1e-5)
  assert (slope[10:15] == 0).all()
  for quiet in (padded.at[:, 1].set(0), jnp.full_like(padded, jnp.nan)):
    value, slope = both(more, quiet)
    assert value == 0
    assert (slope == 0).all()


def test_the_least_loss_has_the_weights_of_lifelines():
  rows, time, event = covariates()
  weights = newton(rows, time, event)
  np.testing.assert_allclose(weights, LIFELINES_WEIGHTS, atol=1e-6)
  targets = jnp.stack([time, event.astype("f4")], axis=1)
  loss, inputs = survival.partial_likelihood(0.0), jnp.asarray(rows, jnp.float32)
  slope = jax.jit(jax.grad(lambda w: loss((inputs @ w)[:, None], targets).mean()))
  assert np.abs(slope(jnp.asarray(LIFELINES_WEIGHTS, jnp.float32))).max() < 1e-5


def test_intervals_count_what_a_record_survived_and_where_its_event_was():
  ends = np.array([10.0, 20, 30])
  time = np.array([10, 10.5, 14.9, 15, 30, 31, 31], np.float32)
  event = np.array([True, True, False, False, False, False, True])
  survived, ended = np.split(survival.interval_targets(time, event, ends), 2, axis=1)
  assert ended.astype(int).tolist()[:2] == [[1, 0, 0], [0, 1, 0]]
  assert not ended[2:].any()
  expected = [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
  assert survived.astype(int).tolist() == expected


def test_the_loss_of_hazards_is_the_likelihood_of_each_record_by_itself():
  time, event, _ = observed()
  ends = survival.cut_points(30, 5)
  targets = np.concatenate(
    [np.stack([time, event], axis=1), survival.interval_targets(time, event, ends)], axis=1
  ).astype(np.float32)
  outputs = np.random.default_rng(1).normal(size=(80, 5)).astype(np.float32)
  hazards = np.asarray(survival.hazards_of(jnp.asarray(outputs)), np.float64)
  expected = []
  for i in range(80):
    chance, start = 1.0, 0.0
    for k, end in enumerate(ends):
      if time[i] > end or (not event[i] and time[i] >= (start + end) / 2):
        chance *= 1 - hazards[i, k]
      elif event[i] and time[i] > start:
        chance *= hazards[i, k]
      start = end
    expected.append(-np.log(chance))
  found = survival.interval_likelihood(0.0)(jnp.asarray(outputs), jnp.asarray(targets))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  alone = survival.interval_likelihood(0.0)(jnp.asarray(outputs[3:4]), jnp.asarray(targets[3:4]))
  assert alone[0] == pytest.approx(float(found[3]), rel=1e-6)
  mean = survival.hazard_loss(hazards.astype(np.float32), targets)
  assert mean == pytest.approx(np.mean(expected), rel=1e-4)


def test_risk_of_hazards_is_the_cumulative_hazard_summed_over_the_ends():
  hazards = np.array([[0.1, 0.2], [0.2, 0.1]], np.float32)
  curves = survival.survival_curves(hazards)
  np.testing.assert_allclose(curves, [[0.9, 0.72], [0.8, 0.72]], rtol=1e-6)
  np.testing.assert_allclose(survival.risks(hazards), -np.log(curves).sum(1), rtol=1e-9)
  assert np.isfinite(survival.risks(np.ones((1, 3), np.float32))).all()


def test_the_score_of_a_batch_is_one_in_the_right_order_and_half_in_none():
  time = jnp.arange(1, 41, dtype=jnp.float32)
  targets = jnp.stack([time, jnp.ones(40)], axis=1)
  score = jax.jit(survival.neighbours_in_order)
  assert (score(-time[:, None], targets) == 1).all()
  assert (score(time[:, None], targets) == 0).all()
  assert (score(-time[:, None], targets.at[:, 1].set(0)) == 0.5).all()
  assert (score(jnp.repeat(-time[:, None] / 8, 3, axis=1), targets) == 1).all()


def test_quantiles_of_events_are_fitted_on_training_rows_only_and_must_differ():
  values = np.array([[1, 1], [2, 1], [3, 1], [4, 1], [50, 1], [5, 0]], np.float32)
  targets = Targets(values=values, names=("t", "e"), fitted={"intervals": np.array([2])})
  fitted = survival.fit_ends(targets, [np.array([0, 1, 5]), np.array([2, 3])])
  assert fitted.fitted["ends"].tolist() == [2.5, 4]
  assert survival.fit_ends(fitted, [np.array([0])]) is fitted
  with pytest.raises(UserError, match=r"data.intervals=2 with .* and 1 events in the training rec"):
    survival.fit_ends(targets, [np.array([0, 5])])
  with pytest.raises(UserError, match=r"data.intervals=2: the 2 events of the training records"):
    survival.fit_ends(targets, [np.array([0, 0])])
  with pytest.raises(UserError, match=r"finds no event in the training records; use data.interval"):
    survival.fit_ends(targets, [np.array([5])])


def test_metrics_and_curves_of_a_model_that_diverged_are_none():
  targets = np.array([[1, 1], [2, 0]], np.float32)
  broken = np.full((2, 1), np.nan, np.float32)
  found = survival.cox_metrics(broken, targets)
  assert (found["c_index"], found["loss"], found["n"]) == (None, None, 2)
  details = survival.details(broken, targets)
  assert details["kaplan_meier"]["thirds"] == []
  assert survival.problem(details, ()) == ""
  whole = survival.details(np.array([[1.0], [2.0]], np.float32), targets)
  assert survival.problem(whole, ()) == ""
  assert survival.pool([whole, details, whole])["kaplan_meier"]["thirds"][0]["n"] == 2
  whole["kaplan_meier"]["thirds"][0]["survival"] = [1]
  assert survival.problem(whole, ()) == "kaplan_meier holds no curves of one length"
