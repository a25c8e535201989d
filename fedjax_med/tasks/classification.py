"""Classification: one class an example, of two the second the positive one; metrics in NumPy.

Metrics are computed for every hospital at every log point. An undefined value is None, never a
number that could be mistaken for a result. jax is imported inside of functions: reports and tables
do without it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_med.tasks.task import EVERYWHERE, Figure, Labelled, Loss, Metric, Place, Task

if TYPE_CHECKING:
  import jax

SHOWN = (
  Metric(name="auroc", label="AUROC", bounds=(0.0, 1.0), of="classes"),
  Metric(
    name="accuracy",
    label="accuracy",
    bounds=(0.0, 1.0),
    places=EVERYWHERE - {Place.WORST},
  ),
  Metric(
    name="f1",
    label="F1",
    bounds=(0.0, 1.0),
    of="positive",
    places=frozenset({Place.TERMINAL, Place.SWEEP, Place.PAPER}),
  ),
  Metric(
    name="recall",
    label="sensitivity",
    bounds=(0.0, 1.0),
    of="positive",
    places=frozenset({Place.TERMINAL, Place.SWEEP, Place.WORST}),
  ),
  Metric(
    name="specificity",
    label="specificity",
    bounds=(0.0, 1.0),
    of="positive",
    places=frozenset({Place.TERMINAL, Place.SWEEP}),
  ),
  Metric(name="precision", label="precision", bounds=(0.0, 1.0), of="positive", places=frozenset()),
  Metric(
    name="loss",
    label="loss",
    better="lower",
    unit="nats",
    places=frozenset({Place.CURVES}),
  ),
  Metric(
    name="ece",
    label="calibration error",
    better="lower",
    bounds=(0.0, 1.0),
    places=frozenset({Place.SWEEP}),
  ),
  Metric(name="brier", label="Brier score", better="lower", places=frozenset()),
)
NAMES = tuple(metric.name for metric in SHOWN)
NO_CLASS = "macro average"  # in the place of a positive class, where there are three or more
CALIBRATION_BINS = 15  # as Guo et al. 2017
CROWDED_CLASSES = 6  # up to which the cells of a small confusion matrix are written out


def labels_of(dataset: Labelled) -> np.ndarray:
  """Returns the class numbers of the examples, [N] int32."""
  return dataset.labels


def num_classes(dataset: Labelled) -> int:
  """Returns the number of classes: each has an output of the network, its logit."""
  return len(dataset.class_names)


def cross_entropy(label_smoothing: float) -> Loss:
  """Returns the per-example softmax cross-entropy: (logits [B, classes], labels [B]) -> [B]."""
  import jax
  import optax

  def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    targets = optax.smooth_labels(
      jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing
    )
    return optax.softmax_cross_entropy(logits, targets)

  return loss


def probabilities_of(logits: "jax.Array") -> "jax.Array":
  """Returns float32 class probabilities."""
  import jax
  import jax.numpy as jnp

  return jax.nn.softmax(logits.astype(jnp.float32))


def hits(logits: "jax.Array", labels: "jax.Array") -> "jax.Array":
  """Returns which examples are classified correctly, [B] bool."""
  return logits.argmax(-1) == labels


def positive_class(class_names: Sequence[str]) -> str:
  """Returns the class that sensitivity is of: the second of two; empty where there are more."""
  return class_names[1] if len(class_names) == 2 else ""


def about(positives: Sequence[str]) -> str:
  """Returns the sentence below a table that names the class of its metrics.

  Args:
    positives: ``positive_class`` of each run in the table.
  """
  if len(set(positives)) > 1:
    return (
      "The positive class, which sensitivity, specificity, precision and F1 are of, differs: see"
      f" the column; {NO_CLASS} stands for averages over three or more classes."
    )
  positive = positives[0] if positives else ""
  if positive:
    return f"Sensitivity, specificity, precision and F1 are of the positive class '{positive}'."
  return (
    "Sensitivity, specificity, precision, F1 and AUROC are macro averages: each class against the"
    " rest, averaged over the classes that a test set holds."
  )


def explained(class_names: Sequence[str]) -> str:
  """Returns sentences that explain the metrics of a report."""
  if len(class_names) == 2:
    meaning = (
      f"The positive class is “{class_names[1]}”: sensitivity is the share of its images that the"
      f" model finds, specificity the share of “{class_names[0]}” images that it leaves alone."
    )
  else:
    meaning = (
      "Sensitivity, specificity, precision, F1 and AUROC are one-vs-rest values averaged over the"
      " classes that a test set holds."
    )
  return (
    f"{meaning} The predicted class is the most probable one; no threshold was tuned. The"
    " calibration error is the expected one of that class, in 15 bins. A dash stands for a value"
    " that is not defined, such as the AUROC of a test set with one class."
  )


def classification_metrics(
  probabilities: np.ndarray,  # [n, classes] f32 or f64, rows sum to 1
  labels: np.ndarray,  # [n] class numbers
) -> dict[str, Any]:
  """Returns loss, accuracy, precision, recall, specificity, f1, auroc, ece, brier (or None), n.

  The predicted class is the argmax (the lowest on a tie); loss is the mean cross-entropy in nats,
  with probabilities clipped at 1e-12. With two classes, class 1 is the positive one: recall is
  the sensitivity. With more classes precision to auroc are one-vs-rest values averaged, unweighted,
  over the classes present in ``labels``. ece is the expected calibration error of the predicted
  class in 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3). brier is the mean
  squared difference of probability and truth: of two classes that of class 1, of more the sum over
  the classes (as scikit-learn).

  None stands for: everything, if n = 0 or a probability is not finite (a diverged model);
  precision, recall and f1 without a positive example; specificity without a negative one; auroc
  without both. With positive examples, of which none is predicted positive, precision is 0
  (scikit-learn's zero_division=0).

  Raises:
    ValueError: for other shapes, or a label outside 0 .. classes - 1.
  """
  counts = confusion_matrix(probabilities, labels)
  n, classes_known = probabilities.shape
  if n == 0 or not np.isfinite(probabilities).all():
    return {**dict.fromkeys(NAMES), "n": n}

  found, actual, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
  true_negatives = n - actual - predicted + found
  classes = np.array([1]) if classes_known == 2 else np.flatnonzero(actual)
  precision = _ratio(found, predicted, empty=0.0)
  f1 = _ratio(2 * found, actual + predicted, empty=0.0)
  likelihood = probabilities[np.arange(n), labels].astype(np.float64)
  values = {
    "loss": -np.log(np.maximum(likelihood, 1e-12)).mean(),
    "accuracy": found.sum() / n,
    "precision": np.where(actual > 0, precision, np.nan)[classes].mean(),
    "recall": _ratio(found, actual, empty=np.nan)[classes].mean(),
    "specificity": _ratio(true_negatives, n - actual, empty=np.nan)[classes].mean(),
    "f1": np.where(actual > 0, f1, np.nan)[classes].mean(),
    "auroc": np.mean([auroc_of(probabilities[:, c], labels == c) for c in classes]),
    "ece": _calibration_error(probabilities, labels),
    "brier": _brier_score(probabilities, labels),
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
  count = probabilities.shape[1]
  if labels.size and not (labels.min() >= 0 and labels.max() < count):
    raise ValueError(
      f"labels reach from {labels.min()} to {labels.max()}, outside 0 to {count - 1}"
    )
  cells = labels.astype(np.int64) * count + probabilities.argmax(axis=1)
  return np.bincount(cells, minlength=count**2).reshape(count, count)


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


def _brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
  classes = probabilities.shape[1]
  error = probabilities.astype(np.float64) - (labels[:, None] == np.arange(classes))
  return float(np.square(error[:, 1:] if classes == 2 else error).sum(axis=1).mean())


def auroc_of(scores: np.ndarray, positive: np.ndarray) -> float:
  """P(score of a positive > score of a negative), ties count half (Mann-Whitney); NaN undefined."""
  ranked = np.sort(scores[~positive])
  cases = scores[positive]
  if not (ranked.size and cases.size):
    return float("nan")
  wins = np.searchsorted(ranked, cases, "left") + np.searchsorted(ranked, cases, "right")
  return float(wins.sum()) / (2.0 * ranked.size * cases.size)


def details(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Returns the entries of summary.json about the predictions, besides the metrics."""
  return {"confusion": confusion_matrix(probabilities, labels).tolist()}


def problem(summary: dict[str, Any], class_names: Sequence[str]) -> str:
  """Returns the fault of the confusion matrix of summary.json; empty if there is none."""
  rows = summary.get("confusion", [[0] * len(class_names)] * len(class_names))
  square = isinstance(rows, list) and len(rows) == len(class_names)
  if square and all(isinstance(row, list) and len(row) == len(class_names) for row in rows):
    cells = [cell for row in rows for cell in row]
    return "" if all(isinstance(cell, int) for cell in cells) else "confusion holds no counts"
  return f"confusion is no square of the {len(class_names)} classes"


def pool(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Adds up the confusion matrices of runs over the same classes."""
  return {"confusion": np.sum([run["confusion"] for run in runs], axis=0).tolist()}


def confusion_caption(class_names: Sequence[str]) -> str:
  """Returns the caption of a run's confusion matrix."""
  positive = positive_class(class_names)
  sentence = f" The positive class is “{positive}”." if positive else ""
  return f"Confusion matrix over all test images: rows are the true class.{sentence}"


def confusion_size(names: Sequence[str], widest: float) -> tuple[float, float]:
  """Returns width and height in inches of a run's confusion matrix."""
  side = 2.2 + 0.85 * len(names) + max(0.0, widest - 0.9)
  return side + 0.9, side


def draw_confusion(axis: Any, details: dict[str, Any], names: Sequence[str], crowded: bool) -> None:
  """Draws counts and shares of the true class, or the shares alone on a crowded axis."""
  counts = np.array(details["confusion"])
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
  for row, column in np.ndindex(counts.shape):
    if crowded and len(names) > CROWDED_CLASSES:
      break
    share = shares[row, column]
    text = f"{share:.0%}" if crowded else f"{counts[row, column]}\n{share:.1%}"
    colour = "white" if share > 0.55 else "#222222"
    size = 9 if crowded else None
    axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
  if not crowded:
    axis.set(xlabel="predicted", ylabel="true class")
  axis.grid(visible=False)


CLASSIFICATION = Task(
  name="classification",
  targets=labels_of,
  columns=num_classes,
  loss=cross_entropy,
  predict=probabilities_of,
  tally=hits,
  tallied="accuracy",
  metrics=classification_metrics,
  details=details,
  problem=problem,
  shown=SHOWN,
  strata=labels_of,
  figures=(
    Figure(
      name="confusion",
      title="images, and share of the true class",
      caption=confusion_caption,
      pooled_title="Shares of the true class",
      pooled_caption="Confusion matrices over all test images, added up over the points of a"
      " setting: rows are the true class.",
      size=confusion_size,
      pool=pool,
      draw=draw_confusion,
    ),
  ),
  positive=positive_class,
  about=about,
  explained=explained,
)
