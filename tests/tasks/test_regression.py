"""Regression: metrics as scikit-learn and SciPy have them, the loss as NumPy has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn import metrics as sk

from fedjax_med.core.errors import UserError
from fedjax_med.core.moments import moments, sums
from fedjax_med.tasks import regression
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.regression import fitted
from fedjax_med.tasks.task import Targets

TASK = task_named("regression")


class Held:
  """A dataset as far as the task reads it."""

  def __init__(self, targets):
    self.targets = targets
    self.labels = np.zeros(len(targets.values), np.int32)
    self.class_names = ("example",)


def example(seed=0, n=40, m=5, missing=0.3):
  """(targets of n examples after ``fitted``, predictions in standard units, the same in units)."""
  rng = np.random.default_rng(seed)
  values = (10.0 * np.arange(m) + rng.normal(size=(n, m)) * (1 + np.arange(m))).astype(np.float32)
  values[rng.random(values.shape) < missing] = np.nan
  whole = fitted(
    Targets(values=values, names=tuple("abcdefgh"[:m])), [np.arange(n // 3), np.arange(n // 3, n)]
  )
  targets = TASK.targets(Held(whole))
  means, spreads = whole.fitted["means"], whole.fitted["spreads"]
  standard = np.where(np.isnan(values), 0, (values - means) / spreads)
  predictions = (0.6 * standard + 0.5 * rng.normal(size=values.shape)).astype(np.float32)
  return targets, predictions, predictions * spreads + means


def by_column(values, predicted):
  """Correlation of each column, by SciPy."""
  known = ~np.isnan(values)
  return [
    float(np.asarray(stats.pearsonr(predicted[known[:, k], k], values[known[:, k], k]))[0])
    for k in range(values.shape[1])
  ]


def test_sums_of_hospitals_are_the_moments_of_all_their_examples_together():
  rng = np.random.default_rng(1)
  values = rng.normal(5, 2, (30, 4))
  values[rng.random(values.shape) < 0.4] = np.nan
  hospitals = [np.arange(3), np.arange(3, 11), np.arange(20, 30)]
  total = np.sum([sums(values[rows]) for rows in hospitals], axis=0)
  frame = pd.DataFrame(values[np.concatenate(hospitals)])
  means, spreads = moments(total)
  np.testing.assert_array_equal(total[0], frame.count())
  np.testing.assert_allclose(means, frame.mean(), rtol=1e-12)
  np.testing.assert_allclose(spreads, frame.std(ddof=0), rtol=1e-10)


def test_metrics_are_those_of_scikit_learn_and_scipy_in_the_targets_own_units():
  targets, predictions, told = example()
  values = targets["values"]
  known = ~np.isnan(values)
  found = TASK.measure(predictions, targets)
  means = np.broadcast_to(targets["means"], values.shape)
  for ending, guess in (("", told), ("_of_means", means)):
    pair = values[known].astype(float), guess[known].astype(float)
    assert found["rmse" + ending] == pytest.approx(sk.root_mean_squared_error(*pair), rel=1e-6)
    assert found["r2" + ending] == pytest.approx(sk.r2_score(*pair), rel=1e-5)
    expected = stats.pearsonr(*pair)[0]
    assert found["pearson" + ending] == pytest.approx(expected, rel=1e-6)
  each = by_column(values, told)
  assert found["target_r_mean"] == pytest.approx(np.mean(each), rel=1e-5)
  assert found["target_r_median"] == pytest.approx(np.median(each), rel=1e-5)
  assert found["n"] == 40


def test_details_of_targets_are_those_of_each_column_alone():
  targets, predictions, told = example(seed=2)
  values = targets["values"]
  found = TASK.details(predictions, targets)["target"]
  assert found["n"] == (~np.isnan(values)).sum(0).tolist()
  assert found["r"] == pytest.approx(by_column(values, told), rel=1e-5)
  errors = np.sqrt(np.nanmean(np.square(told - values), 0))
  assert found["rmse"] == pytest.approx(errors.tolist(), rel=1e-5)
  assert TASK.problem({"target": found}, ("example",)) == ""
  assert TASK.problem({}, ("example",)) == ""
  assert "one length" in TASK.problem({"target": {**found, "r": [0.1]}}, ("example",))
  assert "no number" in TASK.problem({"target": {**found, "r": ["x"] * 5}}, ("example",))


def test_an_undefined_value_is_none_and_never_a_number():
  targets, predictions, _ = example(n=12, missing=0.0)

  def part(rows):
    return TASK.measure(predictions[rows], {name: held[rows] for name, held in targets.items()})

  two, none = part([0, 1]), part([])
  assert (two["target_r_mean"], two["target_r_median"]) == (None, None)
  assert two["rmse"] > 0
  assert set(none.values()) == {None, 0}
  same = TASK.measure(np.zeros_like(predictions), targets)
  assert same["target_r_mean"] is None
  assert same["pearson"] == pytest.approx(same["pearson_of_means"])
  assert TASK.measure(np.full_like(predictions, np.nan), targets)["rmse"] is None
  alike = {**targets, "values": np.full_like(targets["values"], 3)}
  assert [TASK.measure(predictions, alike)[name] for name in ("r2", "pearson")] == [None, None]
  nothing = {**targets, "values": np.full_like(targets["values"], np.nan)}
  assert TASK.measure(predictions, nothing)["rmse"] is None
  assert TASK.details(predictions, nothing)["target"]["rmse"] == [None] * 5


def reference_loss(outputs, targets):
  """[B] losses and [B, M] gradient of their sum, in NumPy."""
  known = ~np.isnan(targets["values"])
  wanted = np.where(known, (targets["values"] - targets["means"]) / targets["spreads"], 0)
  errors = np.where(known, outputs - wanted, 0).astype(np.float64)
  count = np.maximum(known.sum(1), 1)
  return (errors**2).sum(1) / count, 2 * errors / count[:, None]


def test_loss_and_gradient_are_those_of_numpy_and_nothing_without_a_value():
  targets, predictions, _ = example(seed=3)
  targets["values"] = targets["values"].copy()
  targets["values"][7] = np.nan
  loss = TASK.loss(0.0)
  expected, gradient = reference_loss(predictions, targets)
  np.testing.assert_allclose(loss(jnp.asarray(predictions), targets), expected, rtol=2e-5)
  found = jax.grad(lambda outputs: loss(outputs, targets).sum())(jnp.asarray(predictions))
  np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-6)
  assert expected[7] == 0
  assert not np.asarray(found)[7].any()
  others = np.delete(expected, 7).mean()
  assert TASK.measure(predictions, targets)["loss"] == pytest.approx(others, rel=1e-5)
  scores = TASK.tally(jnp.asarray(predictions), targets)
  np.testing.assert_allclose(scores, 1 / (1 + expected), rtol=1e-5)


def test_a_row_without_an_example_has_a_finite_gradient():
  blank = {name: np.zeros((2, 3), np.float32) for name in ("values", "means", "spreads")}
  found = jax.grad(lambda outputs: TASK.loss(0.0)(outputs, blank).sum())(jnp.ones((2, 3)))
  assert np.isfinite(np.asarray(found)).all()


def test_smoothed_labels_are_refused():
  with pytest.raises(
    UserError, match=r"label_smoothing=0.1 is of classes, and regression has none"
  ):
    TASK.loss(0.1)


def test_runs_side_by_side_pool_their_targets():
  held = [TASK.details(*example(seed=seed)[1::-1])["target"] for seed in (0, 1)]
  pooled = regression.pool([{"target": one} for one in held])["target"]
  assert pooled["r"] == held[0]["r"] + held[1]["r"]
