"""Classification metrics of one test set, in NumPy: called for every hospital at every log point.

An undefined value is None, never a number that could be mistaken for a result.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

METRICS = ("loss", "accuracy", "precision", "recall", "specificity", "f1", "auroc", "ece")
LOWER_IS_BETTER = ("loss", "ece")
NO_CLASS = "macro average"  # in the place of a positive class, where there are three or more
CALIBRATION_BINS = 15  # as Guo et al. 2017


def positive_class(class_names: Sequence[str]) -> str:
  """The class that sensitivity is of: the second of two; empty where there are more."""
  return class_names[1] if len(class_names) == 2 else ""


def about_points(positives: Sequence[str]) -> str:
  """``about_classes`` for a table of several runs, of which each may have another such class."""
  if len(set(positives)) <= 1:
    return about_classes(positives[0] if positives else "")
  return (
    "The positive class, which sensitivity, specificity, precision and F1 are of, differs: see the"
    f" column; {NO_CLASS} stands for averages over three or more classes."
  )


def about_classes(positive: str) -> str:
  """A sentence for a table of metrics: which class they are of.

  Args:
    positive: from ``positive_class``.
  """
  if positive:
    return f"Sensitivity, specificity, precision and F1 are of the positive class '{positive}'."
  return (
    "Sensitivity, specificity, precision, F1 and AUROC are macro averages: each class against the"
    " rest, averaged over the classes that a test set holds."
  )


def classification_metrics(
  probabilities: np.ndarray,  # [n, classes] f32 or f64, rows sum to 1
  labels: np.ndarray,  # [n] class numbers
) -> dict[str, Any]:
  """Returns loss, accuracy, precision, recall, specificity, f1, auroc, ece (or None) and n.

  The predicted class is the argmax (the lowest on a tie); loss is the mean cross-entropy in nats,
  with probabilities clipped at 1e-12. With two classes, class 1 is the positive one: recall is
  the sensitivity. With more classes precision to auroc are one-vs-rest values averaged, unweighted,
  over the classes present in ``labels``. ece is the expected calibration error of the predicted
  class in 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3).

  None stands for: everything, if n = 0 or a probability is not finite (a diverged model);
  precision, recall and f1 without a positive example; specificity without a negative one; auroc
  without both. With positive examples, of which none is predicted positive, precision is 0
  (scikit-learn's zero_division=0).

  Raises:
    ValueError: for other shapes, or a label outside 0 .. classes - 1.
  """
  counts = confusion_matrix(probabilities, labels)
  n, num_classes = probabilities.shape
  if n == 0 or not np.isfinite(probabilities).all():
    return {**dict.fromkeys(METRICS), "n": n}

  hits, actual, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
  true_negatives = n - actual - predicted + hits
  classes = np.array([1]) if num_classes == 2 else np.flatnonzero(actual)
  precision = _ratio(hits, predicted, empty=0.0)
  f1 = _ratio(2 * hits, actual + predicted, empty=0.0)
  likelihood = probabilities[np.arange(n), labels].astype(np.float64)
  values = {
    "loss": -np.log(np.maximum(likelihood, 1e-12)).mean(),
    "accuracy": hits.sum() / n,
    "precision": np.where(actual > 0, precision, np.nan)[classes].mean(),
    "recall": _ratio(hits, actual, empty=np.nan)[classes].mean(),
    "specificity": _ratio(true_negatives, n - actual, empty=np.nan)[classes].mean(),
    "f1": np.where(actual > 0, f1, np.nan)[classes].mean(),
    "auroc": np.mean([_auroc(probabilities[:, c], labels == c) for c in classes]),
    "ece": _calibration_error(probabilities, labels),
  }
  plain: dict[str, Any] = {
    name: None if np.isnan(value) else float(value) for name, value in values.items()
  }
  return {**plain, "n": n}


def confusion_matrix(
  probabilities: np.ndarray,  # [n, classes]
  labels: np.ndarray,  # [n]
) -> np.ndarray:
  """Returns [classes, classes] int64: examples of true class (row) predicted as class (column).

  Raises:
    ValueError: for other shapes, or a label outside 0 .. classes - 1.
  """
  if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
    raise ValueError(
      f"probabilities {probabilities.shape} and labels {labels.shape} must be [n, classes] and [n]"
    )
  num_classes = probabilities.shape[1]
  if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
    raise ValueError(
      f"labels reach from {labels.min()} to {labels.max()}, outside 0 to {num_classes - 1}"
    )
  cells = labels.astype(np.int64) * num_classes + probabilities.argmax(axis=1)
  return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float) -> np.ndarray:
  """Elementwise ratio in f64; ``empty`` where the denominator is 0."""
  out = np.full(numerator.shape, empty)
  return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
  confidence = probabilities.max(axis=1).astype(np.float64)
  gap = (probabilities.argmax(axis=1) == labels) - confidence
  # Bins are open below and closed above.
  bins = np.clip(np.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1)
  return float(np.abs(np.bincount(bins.astype(np.int64), weights=gap)).sum()) / len(labels)


def _auroc(scores: np.ndarray, positive: np.ndarray) -> float:
  """P(score of a positive > score of a negative), ties count half (Mann-Whitney); NaN undefined."""
  ranked = np.sort(scores[~positive])
  cases = scores[positive]
  if not (ranked.size and cases.size):
    return float("nan")
  wins = np.searchsorted(ranked, cases, "left") + np.searchsorted(ranked, cases, "right")
  return float(wins.sum()) / (2.0 * ranked.size * cases.size)
