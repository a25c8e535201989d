"""Several labels an example: metrics as scikit-learn has them, the loss as NumPy has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from fedjax_med.tasks import multilabel
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Targets

TASK = task_named("multilabel")


def example(seed=0, n=60, m=4, missing=0.2):
  """(probabilities, labels) of n examples; some labels are unknown, the last is never present."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 2, (n, m)).astype(np.float32)
  probabilities = np.clip(0.3 * labels + rng.random((n, m)) * 0.7, 0, 1).astype(np.float32)
  labels[rng.random((n, m)) < missing] = np.nan
  labels[:, -1] = np.where(np.isnan(labels[:, -1]), np.nan, 0)
  return probabilities, labels


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn_over_known_labels(seed):
  probabilities, labels = example(seed)
  found = TASK.measure(probabilities, labels)
  known = ~np.isnan(labels)
  columns = [(labels[known[:, k], k], probabilities[known[:, k], k]) for k in range(4)]
  usable = columns[:-1]  # no AUROC and no F1 of a label that no example has
  assert found["auroc"] == pytest.approx(np.mean([sk.roc_auc_score(*pair) for pair in usable]))
  scores = [sk.f1_score(true, told > 0.5) for true, told in usable]
  assert found["f1"] == pytest.approx(np.mean(scores))
  true, told = labels[known], probabilities[known].astype(float)
  assert found["accuracy"] == pytest.approx(sk.accuracy_score(true, told > 0.5))
  assert found["brier"] == pytest.approx(sk.brier_score_loss(true, told))
  assert found["loss"] == pytest.approx(sk.log_loss(true, told))
  details = TASK.details(probabilities, labels)["label"]
  assert details["n"] == [int((true > 0).sum()) for true, _ in columns]
  assert details["auroc"][-1] is details["f1"][-1] is None
  assert TASK.problem({"label": details}, ()) == ""


def test_nothing_known_and_a_diverged_model_have_no_metrics():
  probabilities, labels = example()
  for told, true in ((probabilities, np.full_like(labels, np.nan)), (labels, labels)):
    found = TASK.measure(told, true)
    assert found.pop("n") == 60
    assert set(found.values()) == {None}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_cross_entropy_of_known_labels(smoothing):
  _, labels = example()
  labels[0] = np.nan
  logits = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
  known, chance = ~np.isnan(labels), 1 / (1 + np.exp(-logits.astype(float)))
  goal = np.where(known, labels, 0) * (1 - smoothing) + smoothing / 2
  each = np.where(known, -goal * np.log(chance) - (1 - goal) * np.log(1 - chance), 0).sum(1)
  expected = each / np.maximum(known.sum(1), 1)
  loss = TASK.loss(smoothing)
  np.testing.assert_allclose(loss(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
  gradient = jax.grad(lambda logits: loss(logits, jnp.asarray(labels)).sum())(jnp.asarray(logits))
  slopes = np.where(known, chance - goal, 0) / np.maximum(known.sum(1), 1)[:, None]
  np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)


def test_predictions_and_tally_follow_the_logits():
  _, labels = example()
  logits = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
  probabilities = np.asarray(TASK.predict(jnp.asarray(logits)))
  known = ~np.isnan(labels)
  right = known & ((probabilities > 0.5) == (labels == 1))
  np.testing.assert_allclose(
    TASK.tally(jnp.asarray(logits), jnp.asarray(labels)),
    right.sum(1) / np.maximum(known.sum(1), 1),
    rtol=1e-6,
  )
  assert TASK.table is not None
  told = TASK.table(probabilities[:2], Targets(values=labels, names=("a", "b", "c", "d")))
  assert told.heading == ("label", "probability")
  assert [row[0] for row in told.rows[1]] == ["a", "b", "c", "d"]
  assert float(told.rows[1][2][1]) == pytest.approx(probabilities[1, 2], rel=1e-6)


def test_groups_are_examples_with_and_without_a_label():
  labels, names = multilabel.groups_of(np.array([[0, np.nan], [1, 0], [0, 0]]))
  assert (labels.tolist(), names) == ([0, 1, 0], ("no label", "some label"))
  for value, name in ((0, "no label"), (1, "some label")):
    assert multilabel.groups_of(np.full((3, 2), value))[1] == (name,)
