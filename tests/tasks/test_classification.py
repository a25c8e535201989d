"""Classification metrics against scikit-learn, with ties, missing classes and empty sets."""

import time
import warnings

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_med.tasks.classification import NAMES, classification_metrics, confusion_matrix


def random_case(seed, n, num_classes, levels, dtype: type = np.float32):
  """Probabilities on a coarse grid (few levels: many ties) and labels."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(1, levels + 1, (n, num_classes)).astype(np.float64)
  probabilities = scores / scores.sum(axis=1, keepdims=True)
  return probabilities.astype(dtype), rng.integers(0, num_classes, n)


def calibration_error(probabilities, labels, predicted):
  """Guo et al. 2017, eq. 3, bin by bin."""
  confidence = [float(row[k]) for row, k in zip(probabilities, predicted, strict=True)]
  total = 0.0
  for b in range(15):
    own = [i for i, c in enumerate(confidence) if b < c * 15 <= b + 1]
    if own:
      accuracy = np.mean([labels[i] == predicted[i] for i in own])
      total += len(own) / len(labels) * abs(accuracy - np.mean([confidence[i] for i in own]))
  return total


def sklearn_metrics(probabilities, labels):
  """The promised values by scikit-learn and plain loops; NaN where undefined."""
  num_classes = probabilities.shape[1]
  predicted = probabilities.argmax(axis=1)
  classes = [1] if num_classes == 2 else sorted(set(labels.tolist()))
  rows = []
  for c in classes:
    truth, guess = labels == c, predicted == c
    both = truth.any() and not truth.all()
    precision = reference.precision_score(truth, guess) if guess.any() else 0.0
    rows.append(
      {
        "precision": precision if truth.any() else np.nan,
        "recall": reference.recall_score(truth, guess) if truth.any() else np.nan,
        "specificity": reference.recall_score(~truth, ~guess) if not truth.all() else np.nan,
        "f1": reference.f1_score(truth, guess) if truth.any() else np.nan,
        "auroc": reference.roc_auc_score(truth, probabilities[:, c]) if both else np.nan,
      }
    )
  exact = probabilities.astype(np.float64)
  rounded = np.clip(exact, 1e-12, None)
  return {
    "loss": np.mean([-np.log(row[label]) for row, label in zip(rounded, labels, strict=True)]),
    "accuracy": reference.accuracy_score(labels, predicted),
    "ece": calibration_error(probabilities, labels, predicted),
    "brier": sum(
      reference.brier_score_loss(labels == c, exact[:, c])
      for c in ([1] if num_classes == 2 else range(num_classes))
    ),
    **{name: np.mean([row[name] for row in rows]) for name in rows[0]},
  }


@settings(max_examples=80, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  n=st.integers(1, 40),
  num_classes=st.integers(2, 5),
  levels=st.integers(1, 6),
  dtype=st.sampled_from([np.float32, np.float64]),
)
def test_metrics_equal_scikit_learn_with_ties(seed, n, num_classes, levels, dtype):
  probabilities, labels = random_case(seed, n, num_classes, levels, dtype)
  ours = classification_metrics(probabilities, labels)
  assert ours["n"] == n
  for name, expected in sklearn_metrics(probabilities, labels).items():
    if np.isnan(expected):
      assert ours[name] is None, name
    else:
      assert ours[name] == pytest.approx(expected, rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("num_classes", [3, 6])
def test_multi_class_is_the_macro_one_vs_rest_of_scikit_learn(num_classes):
  probabilities, labels = random_case(3, 500, num_classes, levels=50, dtype=np.float64)
  ours = classification_metrics(probabilities, labels)
  guess = probabilities.argmax(axis=1)
  assert ours["precision"] == pytest.approx(
    reference.precision_score(labels, guess, average="macro")
  )
  assert ours["f1"] == pytest.approx(reference.f1_score(labels, guess, average="macro"))
  assert ours["auroc"] == pytest.approx(
    reference.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
  )


@pytest.mark.parametrize("num_classes", [2, 4])
def test_confusion_rows_are_truth_and_columns_prediction(num_classes):
  probabilities, labels = random_case(0, 200, num_classes, levels=9)
  expected = reference.confusion_matrix(
    labels, probabilities.argmax(axis=1), labels=range(num_classes)
  )
  np.testing.assert_array_equal(confusion_matrix(probabilities, labels), expected)
  assert not np.array_equal(expected, expected.T)  # else the test could not see a transpose


@pytest.mark.parametrize("num_classes", [2, 3])
def test_an_empty_set_is_undefined_not_zero(num_classes):
  ours = classification_metrics(np.zeros((0, num_classes), np.float32), np.zeros(0, np.int32))
  assert ours == {**dict.fromkeys(NAMES), "n": 0}
  assert confusion_matrix(np.zeros((0, 2)), np.zeros(0, np.int32)).sum() == 0


def test_undefined_values_are_none_and_raise_no_warning():
  sure_of_0 = np.array([[0.9, 0.1], [0.8, 0.2]], np.float32)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    only_negatives = classification_metrics(sure_of_0, np.array([0, 0]))
    only_positives = classification_metrics(sure_of_0, np.array([1, 1]))
    one_of_three = classification_metrics(np.eye(3)[[1, 1]], np.array([1, 1]))
  assert only_negatives["auroc"] is only_negatives["recall"] is only_negatives["f1"] is None
  assert only_negatives["precision"] is None
  assert (only_negatives["accuracy"], only_negatives["specificity"]) == (1.0, 1.0)
  assert only_positives["auroc"] is only_positives["specificity"] is None
  assert (only_positives["precision"], only_positives["recall"]) == (0.0, 0.0)
  assert one_of_three["auroc"] is one_of_three["specificity"] is None
  assert one_of_three["f1"] == 1.0


def test_a_diverged_model_has_no_metrics():
  probabilities = np.array([[0.5, 0.5], [np.nan, np.nan]], np.float32)
  assert classification_metrics(probabilities, np.array([0, 1])) == {
    **dict.fromkeys(NAMES),
    "n": 2,
  }


def test_a_certain_and_wrong_prediction_costs_the_clipped_loss():
  ours = classification_metrics(np.array([[1.0, 0.0]], np.float32), np.array([1]))
  assert ours["loss"] == pytest.approx(-np.log(1e-12))


@pytest.mark.parametrize("labels", [np.array([0, 2]), np.array([-1, 0]), np.array([0, 1, 1])])
def test_labels_that_do_not_fit_are_refused(labels):
  with pytest.raises(ValueError, match="labels"):
    classification_metrics(np.full((2, 2), 0.5), labels)


def test_a_thousand_hospitals_take_under_a_second():
  probabilities, labels = random_case(1, 200, 2, levels=1000)
  classification_metrics(probabilities, labels)
  start = time.process_time()
  for _ in range(1000):
    classification_metrics(probabilities, labels)
  assert time.process_time() - start < 1.0
