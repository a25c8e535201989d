"""Several labels an example, each present, absent or unknown; metrics in NumPy.

``Dataset.targets`` holds 1, 0 or nan, a column a label. The network has an output for each label,
its logit. Unknown labels count in no loss and no metric. jax is imported inside of functions:
reports and tables do without it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_med.tasks.classification import auroc_of, labels_of
from fedjax_med.tasks.task import (
  EVERYWHERE,
  Figure,
  Labelled,
  Loss,
  Metric,
  Place,
  PredictionTable,
  Targets,
  Task,
  fault_of_columns,
  required_targets,
)

if TYPE_CHECKING:
  import jax

SHARE = (0.0, 1.0)
SHOWN = (
  Metric(name="auroc", label="mean AUROC", bounds=SHARE),
  Metric(
    name="accuracy", label="accuracy of labels", bounds=SHARE, places=EVERYWHERE - {Place.WORST}
  ),
  Metric(
    name="f1",
    label="mean F1",
    bounds=SHARE,
    places=frozenset({Place.TERMINAL, Place.SWEEP, Place.PAPER}),
  ),
  Metric(name="loss", label="loss", better="lower", unit="nats", places=frozenset({Place.CURVES})),
  Metric(name="brier", label="Brier score", better="lower", bounds=SHARE, places=frozenset()),
)
NAMES = tuple(metric.name for metric in SHOWN)
COLUMNS = ("n", "auroc", "f1")  # of each label in summary.json
GROUPS = ("no label", "some label")


def groups_of(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
  """Groups that split and partition keep in proportion: examples with and without a label.

  Args:
    values: [N, M] 1, 0 or nan.

  Returns:
    [N] int32 numbers and the names of the groups; one group where all examples are of it.
  """
  some = (values == 1).any(axis=1)
  if some.all() or not some.any():
    return np.zeros(len(values), np.int32), (GROUPS[int(some.all())],)
  return some.astype(np.int32), GROUPS


def targets_of(dataset: Labelled) -> np.ndarray:
  """Returns the labels, [N, M] float32: 1, 0, or nan where nobody knows."""
  return required_targets(dataset).values


def num_labels(dataset: Labelled) -> int:
  """Returns the number of labels: each has an output of the network, its logit."""
  return targets_of(dataset).shape[1]


def binary_cross_entropy(label_smoothing: float) -> Loss:
  """Returns the per-example loss: the mean over known labels of the binary cross-entropy in nats.

  (logits [B, M], labels [B, M]) -> [B]. It is 0 for an example without a known label. Smoothing by
  s moves labels to s / 2 and 1 - s / 2.
  """
  import jax.numpy as jnp
  import optax

  def loss(logits: "jax.Array", labels: "jax.Array") -> "jax.Array":
    known = ~jnp.isnan(labels)
    # Before the loss: the gradient of a nan is one, also where it counts 0.
    targets = jnp.where(known, labels, 0) * (1 - label_smoothing) + label_smoothing / 2
    each = jnp.where(known, optax.sigmoid_binary_cross_entropy(logits, targets), 0)
    return each.sum(-1) / jnp.maximum(known.sum(-1, dtype=each.dtype), 1)

  return loss


def probabilities_of(logits: "jax.Array") -> "jax.Array":
  """Returns float32 probabilities of the labels, [B, M]."""
  import jax
  import jax.numpy as jnp

  return jax.nn.sigmoid(logits.astype(jnp.float32))


def share_right(logits: "jax.Array", labels: "jax.Array") -> "jax.Array":
  """Returns the share of known labels that are predicted right, [B]; 0 where none is known."""
  import jax.numpy as jnp

  known = ~jnp.isnan(labels)
  right = known & ((logits > 0) == (labels > 0.5))
  return right.sum(-1, dtype=jnp.float32) / jnp.maximum(known.sum(-1, dtype=jnp.float32), 1)


def multilabel_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Returns the metrics of ``SHOWN`` by name, None where undefined, and n.

  auroc and f1 are means over the labels for which they are defined: auroc wants examples with and
  without the label, f1 one with it. accuracy, brier and loss are means over all known values. A
  label is predicted where its probability is over one half; loss clips at 1e-12.

  Args:
    probabilities: [n, M].
    labels: [n, M] 1, 0 or nan.
  """
  n, known = len(probabilities), ~np.isnan(labels)
  if not known.any() or not np.isfinite(probabilities).all():
    return {**dict.fromkeys(NAMES), "n": n}
  told, true = probabilities[known].astype(np.float64), labels[known] > 0.5
  of_truth = np.where(true, told, 1 - told)
  each = _each(probabilities, labels)
  values = {
    "auroc": _mean(each["auroc"]),
    "accuracy": float(((told > 0.5) == true).mean()),
    "f1": _mean(each["f1"]),
    "loss": float(-np.log(np.maximum(of_truth, 1e-12)).mean()),
    "brier": float(np.square(1 - of_truth).mean()),
  }
  return {**values, "n": n}


def _each(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[float | None]]:
  """AUROC and F1 of each label over its known values, None where undefined."""
  aurocs: list[float | None] = []
  scores: list[float | None] = []
  for told, true in zip(probabilities.T, labels.T, strict=True):
    known = ~np.isnan(true)
    present, found = true[known] > 0.5, told[known] > 0.5
    area = auroc_of(told[known], present)
    aurocs.append(None if np.isnan(area) else area)
    both = int((present & found).sum())
    total = int(present.sum() + found.sum())
    scores.append(2 * both / total if present.any() else None)
  return {"auroc": aurocs, "f1": scores}


def _mean(values: Sequence[float | None]) -> float | None:
  defined = [value for value in values if value is not None]
  return float(np.mean(defined)) if defined else None


def details(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Returns what summary.json holds of each label: test examples with it, AUROC and F1."""
  present = (labels > 0.5).sum(0).tolist()
  return {"label": {"n": present, **_each(probabilities, labels)}}


def pool(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Averages the values of each label over runs."""

  def averaged(name: str) -> list[float | None]:
    return [_mean(cells) for cells in zip(*(run["label"][name] for run in runs), strict=True)]

  return {"label": {name: averaged(name) for name in COLUMNS}}


def draw_labels(axis: Any, details: dict[str, Any], names: Sequence[str], crowded: bool) -> None:
  """Draws the AUROC of each label as a bar, the number of its test examples beside it."""
  aurocs, counts = details["label"]["auroc"], details["label"]["n"]
  places = np.arange(len(aurocs))
  axis.barh(places, [value or 0 for value in aurocs], color="#0072B2")
  axis.axvline(0.5, color="#222222", linewidth=0.8, linestyle=":")
  axis.set_xlim(0, 1)
  axis.invert_yaxis()
  if crowded:
    axis.set_yticks([])
    return
  ticks = [f"{name} (n {count:g})" for name, count in zip(names, counts, strict=True)]
  axis.set_yticks(places, ticks, fontsize=7.5)
  axis.set(xlabel="AUROC")


def table(probabilities: np.ndarray, targets: Targets) -> PredictionTable:
  """Returns a row for each example and label, with its probability."""
  names = targets.names
  return PredictionTable(
    heading=("label", "probability"),
    rows=[
      [[name, f"{value:.7g}"] for name, value in zip(names, row, strict=True)]
      for row in probabilities
    ],
  )


def about(positives: Sequence[str]) -> str:
  """Says below a table what is averaged."""
  return "AUROC and F1 are means over the labels for which they are defined."


def explained(class_names: Sequence[str]) -> str:
  """Says what the metrics of a report are."""
  return (
    "AUROC and F1 are means over the labels for which they are defined: an AUROC wants test"
    " examples with and without the label, an F1 one with it. Accuracy is of all known labels"
    " together, and high where labels are rare. A label is predicted where its probability is over"
    " one half; no threshold was tuned."
  )


MULTILABEL = Task(
  name="multilabel",
  targets=targets_of,
  columns=num_labels,
  loss=binary_cross_entropy,
  predict=probabilities_of,
  tally=share_right,
  tallied="accuracy",
  metrics=multilabel_metrics,
  details=details,
  problem=lambda summary, class_names: fault_of_columns(summary, "label", COLUMNS),
  shown=SHOWN,
  strata=labels_of,
  figures=(
    Figure(
      name="label",
      title="AUROC of each label on the test examples",
      caption=lambda class_names: "AUROC of each label over all test examples, of which n have it.",
      pooled_title="AUROC of each label",
      pooled_caption="AUROC of each label, its mean over the points of a setting.",
      size=lambda names, widest: (5.2 + widest, 1.6 + 0.24 * len(names)),
      pool=pool,
      draw=draw_labels,
      of_classes=False,
    ),
  ),
  about=about,
  explained=explained,
  has_classes=False,
  table=table,
)
