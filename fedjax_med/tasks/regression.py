"""Regression: several numbers an example, of which some may be missing; metrics in NumPy.

A network predicts every target in standard units: minus its mean, over its spread, both of the
training examples of all hospitals. Metrics are in the targets' own units, and beside each of them
stands that of predicting the training means, the same for every example. An undefined value is
None. jax is imported inside of functions: reports and tables do without it.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.core.moments import moments, sums
from fedjax_med.tasks.classification import labels_of
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
  require_no_smoothing,
  required_targets,
)

if TYPE_CHECKING:
  import jax

LEAST = 3  # values that a correlation is made of: that of two is 1 or -1 whatever they are
CONSTANT = 1e-6  # spread over the largest value, under which float32 values are all the same
CORRELATION, SHARE = (-1.0, 1.0), (float("-inf"), 1.0)
SHOWN_TWICE = frozenset({Place.TERMINAL, Place.SWEEP})

SHOWN = (
  Metric(name="rmse", label="RMSE", better="lower"),
  Metric(
    name="target_r_mean",
    label="mean r per target",
    bounds=CORRELATION,
    places=EVERYWHERE - {Place.WORST},
  ),
  Metric(name="target_r_median", label="median r", bounds=CORRELATION, places=SHOWN_TWICE),
  Metric(name="pearson", label="overall r", bounds=CORRELATION, places=SHOWN_TWICE),
  Metric(name="r2", label="R²", bounds=SHARE, places=SHOWN_TWICE),
  Metric(
    name="rmse_of_means",
    label="RMSE of means",
    better="lower",
    places=frozenset({Place.LINE, Place.TERMINAL, Place.SWEEP, Place.PAPER}),
  ),
  Metric(
    name="pearson_of_means", label="r of means", bounds=CORRELATION, places=frozenset({Place.SWEEP})
  ),
  Metric(name="r2_of_means", label="R² of means", bounds=SHARE, places=frozenset({Place.SWEEP})),
  Metric(name="loss", label="loss", better="lower", places=frozenset({Place.CURVES})),
)
NAMES = tuple(metric.name for metric in SHOWN)
COLUMNS = ("n", "r", "rmse", "rmse_of_means")  # of each target in summary.json


def fitted(targets: Targets, rows: Sequence[np.ndarray]) -> Targets:
  """The same targets with means and spreads [M] of the training values of all hospitals.

  They follow from the sums that each hospital tells of its known values. A target without two
  different training values is left out: it is neither trained nor measured.

  Args:
    targets: as the source gives them.
    rows: training example numbers of each hospital.

  Raises:
    UserError: no target is left.
  """
  total = np.sum([sums(targets.values[held]) for held in rows], axis=0)
  means, spreads = moments(total)
  empty = total[0] == 0
  constant = ~empty & (spreads <= CONSTANT * np.maximum(np.abs(means), 1e-30))
  reasons = {True: "no training value at any hospital", False: "all training values are the same"}
  left = tuple(
    (targets.names[number], reasons[bool(empty[number])])
    for number in np.flatnonzero(empty | constant)
  )
  require(
    len(left) < len(targets.names),
    f"none of the {len(targets.names)} targets has two different values in the training examples",
    "add examples, or choose other targets",
  )
  found = {"means": means, "spreads": np.where(empty | constant, 1, spreads)}
  fit = {name: values.astype(np.float32) for name, values in found.items()}
  return targets._replace(fitted=fit, left_out=left)


def targets_of(dataset: Labelled) -> dict[str, np.ndarray]:
  """Returns values, means and spreads, each [N, M] float32; mean and spread are equal in all rows.

  They stand beside every value, so that runs with other training sides can share a program. Values
  of targets that are left out are nan.
  """
  targets = required_targets(dataset)
  shape = targets.values.shape
  means = targets.fitted.get("means", np.zeros(shape[1], np.float32))
  spreads = targets.fitted.get("spreads", np.ones(shape[1], np.float32))
  left = {name for name, _ in targets.left_out}
  used = np.array([name not in left for name in targets.names])
  return {
    "values": np.where(used, targets.values, np.float32(np.nan)).astype(np.float32),
    "means": np.broadcast_to(means, shape),
    "spreads": np.broadcast_to(spreads, shape),
  }


def num_targets(dataset: Labelled) -> int:
  """Returns the number of targets: each has an output of the network."""
  return len(required_targets(dataset).names)


def squared_error(label_smoothing: float) -> Loss:
  """Returns the per-example loss: the mean of squared errors, in standard units, of known values.

  (outputs [B, M], dictionary of ``targets_of`` [B, M]) -> [B]. It is 0 for an example without any.

  Raises:
    UserError: labels are to be smoothed, and there are none.
  """
  import jax
  import jax.numpy as jnp

  require_no_smoothing(label_smoothing, "regression")

  def loss(outputs: jax.Array, targets: Any) -> jax.Array:
    known = ~jnp.isnan(targets["values"])
    # Each where stands before what it guards: the gradient of a nan is one, also if it counts 0.
    # Rows without an example are all zeros, spreads among them.
    values = jnp.where(known, targets["values"], targets["means"])
    spreads = jnp.where(targets["spreads"] > 0, targets["spreads"], 1)
    errors = jnp.where(known, outputs - (values - targets["means"]) / spreads, 0)
    return jnp.square(errors).sum(-1) / jnp.maximum(known.sum(-1, dtype=jnp.float32), 1)

  return loss


def standard_units(outputs: "jax.Array") -> "jax.Array":
  """Returns float32 predictions [B, M] in standard units."""
  import jax.numpy as jnp

  return outputs.astype(jnp.float32)


def closeness(outputs: "jax.Array", targets: Any) -> "jax.Array":
  """Returns 1 / (1 + loss) of each example, [B]: 0.5 where its means are predicted, on average."""
  return 1 / (1 + squared_error(0.0)(outputs, targets))


def in_units(predictions: np.ndarray, targets: dict[str, np.ndarray]) -> np.ndarray:
  """Predictions [n, M] in the targets' own units, float64."""
  return predictions.astype(np.float64) * targets["spreads"] + targets["means"]


def regression_metrics(predictions: np.ndarray, targets: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns the metrics of ``SHOWN`` by name, None where undefined, and n.

  rmse, r2 and pearson are of all known values together; target_r_mean and target_r_median are of
  the correlations of each target by itself, over the examples given. r2 is scikit-learn's, against
  the mean of the known values. The same of the training means has the ending _of_means. A
  correlation needs three values, and two different ones on either side.

  Args:
    predictions: [n, M] in standard units.
    targets: dictionary of ``targets_of`` for the same examples.
  """
  n = len(predictions)
  known = ~np.isnan(targets["values"])
  if not known.any() or not np.isfinite(predictions).all():
    return {**dict.fromkeys(NAMES), "n": n}
  predicted = in_units(predictions, targets)
  true, told = targets["values"][known].astype(np.float64), predicted[known]
  means = targets["means"][known].astype(np.float64)
  each = _correlations(predicted, targets["values"], known)
  each = each[~np.isnan(each)]
  errors = (predicted - targets["values"]) / targets["spreads"]
  squares = np.where(known, np.square(errors), 0)
  values = {
    "rmse": _rmse(told, true),
    "target_r_mean": float(each.mean()) if each.size else None,
    "target_r_median": float(np.median(each)) if each.size else None,
    "pearson": _pearson(told, true),
    "r2": _r2(told, true),
    "rmse_of_means": _rmse(means, true),
    "pearson_of_means": _pearson(means, true),
    "r2_of_means": _r2(means, true),
    "loss": float((squares.sum(1) / np.maximum(known.sum(1), 1))[known.any(1)].mean()),
  }
  return {**values, "n": n}


def _rmse(told: np.ndarray, true: np.ndarray) -> float:
  return float(np.sqrt(np.square(told - true).mean()))


def _r2(told: np.ndarray, true: np.ndarray) -> float | None:
  total = np.square(true - true.mean()).sum()
  return float(1 - np.square(told - true).sum() / total) if np.ptp(true) > 0 else None


def _pearson(told: np.ndarray, true: np.ndarray) -> float | None:
  (value,) = _correlations(told[:, None], true[:, None], np.ones((len(true), 1), bool))
  return None if np.isnan(value) else float(value)


def _correlations(told: np.ndarray, true: np.ndarray, known: np.ndarray) -> np.ndarray:
  """[M] Pearson correlations of columns over their known values; NaN where undefined."""
  counts = known.sum(0)

  def centred(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = np.where(known, values, np.inf).min(0, initial=np.inf)
    high = np.where(known, values, -np.inf).max(0, initial=-np.inf)
    values = np.where(known, values.astype(np.float64), 0)
    return np.where(known, values - values.sum(0) / np.maximum(counts, 1), 0), high > low

  (one, varies), (other, also) = centred(told), centred(true)
  defined = (counts >= LEAST) & varies & also
  size = np.sqrt(np.square(one).sum(0) * np.square(other).sum(0))
  out = np.full(len(counts), np.nan)
  return np.divide((one * other).sum(0), size, out=out, where=defined & (size > 0))


def details(predictions: np.ndarray, targets: dict[str, np.ndarray]) -> dict[str, Any]:
  """Returns what summary.json holds of each target: test values n, r, rmse, rmse_of_means."""
  known = ~np.isnan(targets["values"])
  predicted = in_units(predictions, targets)

  def rmse(told: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)  # a target without a value
      return np.sqrt(np.nanmean(np.square(told - targets["values"]), axis=0))

  def plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]

  return {
    "target": {
      "n": known.sum(0).tolist(),
      "r": plain(_correlations(predicted, targets["values"], known)),
      "rmse": plain(rmse(predicted)),
      "rmse_of_means": plain(rmse(targets["means"])),
    }
  }


def table(predictions: np.ndarray, targets: Targets) -> PredictionTable:
  """Returns a row for each example and target, in the target's own unit; none of left out ones."""
  told = in_units(predictions, targets.fitted)
  left = {name for name, _ in targets.left_out}
  places = [place for place, name in enumerate(targets.names) if name not in left]
  return PredictionTable(
    heading=("target", "prediction"),
    rows=[[[targets.names[m], f"{row[m]:.7g}"] for m in places] for row in told],
  )


def pool(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Puts the targets of runs side by side."""
  return {"target": {name: [v for run in runs for v in run["target"][name]] for name in COLUMNS}}


def draw_targets(axis: Any, details: dict[str, Any], names: Sequence[str], crowded: bool) -> None:
  """Draws how many targets have which correlation, with a line at their mean."""
  known = [value for value in details["target"]["r"] if value is not None]
  axis.hist(known, bins=np.linspace(-1, 1, 41), color="#0072B2")
  if known:
    mean = float(np.mean(known))
    axis.axvline(mean, color="#D55E00", linewidth=1.4)
    text = f" mean {mean:.3f}"
    axis.text(mean, 0.97, text, transform=axis.get_xaxis_transform(), va="top", fontsize=9)
  axis.set_xlim(min([-0.2, *known]) - 0.05, 1.0)
  if not crowded:
    axis.set(xlabel="r of predicted and true values", ylabel="targets")


def about(positives: Sequence[str]) -> str:
  """Says below a table what the baseline is."""
  return (
    "'of means' is the baseline: every target's training mean over all hospitals, predicted for"
    " each example."
  )


def explained(class_names: Sequence[str]) -> str:
  """Says what the metrics of a report are."""
  return (
    "Errors are in the targets' own units. Overall r, R² and RMSE are of all known test values"
    " together: where targets have unlike means, predicting each target's training mean (“of"
    " means”) scores high in them, and the mean r per target, over the test examples, tells what a"
    " model knows of an example. The means do not tell examples apart, so that their r per target"
    " is not defined. A dash stands for a value that is not defined, such as an r of under"
    f" {LEAST} values."
  )


REGRESSION = Task(
  name="regression",
  targets=targets_of,
  columns=num_targets,
  loss=squared_error,
  predict=standard_units,
  tally=closeness,
  tallied="closeness",
  metrics=regression_metrics,
  details=details,
  problem=lambda summary, class_names: fault_of_columns(summary, "target", COLUMNS),
  shown=SHOWN,
  strata=labels_of,
  figures=(
    Figure(
      name="target",
      title="targets by their r on the test examples",
      caption=lambda class_names: (
        "Correlation of predicted and true values of each target by itself, over all test examples."
      ),
      pooled_title="Targets by their r on the test examples",
      pooled_caption="Correlation of each target by itself, over the points of a setting.",
      size=lambda names, widest: (6.4, 3.6),
      pool=pool,
      draw=draw_targets,
      of_classes=False,
    ),
  ),
  about=about,
  explained=explained,
  has_classes=False,
  fit=fitted,
  releases="mean and spread of each target",
  table=table,
  zero_head=True,  # training begins at the training means
)
