"""The records of a task: predictions of a network, and the metrics and figures that judge them.

A metric is one ``Metric`` in ``Task.shown``, with its value there or in ``Task.metrics``. The
terminal, the figures, the reports, the tables of a sweep and ``fedjax_med.study`` list metrics by
``shown`` only.
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fedjax_med.core.errors import UserError, require

if TYPE_CHECKING:
  import jax


Loss = Callable[["jax.Array", Any], "jax.Array"]  # (outputs [B, columns], targets) -> [B]


class Place(enum.Enum):
  """Places with room for some of the metrics; reports of runs and tables of sweeps show all."""

  LINE = "the progress line, bars of hospitals, and the comparison with models trained alone"
  CURVES = "the figure of a run over its rounds"
  TERMINAL = "the final table on the terminal, and the tiles of a report"
  SWEEP = "the first table of a sweep's page"
  PAPER = "the LaTeX table of a sweep, and its table on the terminal"
  WORST = "the table of a sweep's page on the worst hospital"


EVERYWHERE = frozenset(Place)


class Metric(NamedTuple):
  """One number about predictions.

  Attributes:
    name: its key in the files of a run.
    label: its name for people, in lower case but for abbreviations.
    better: higher or lower.
    unit: behind the label on the axis of a figure; empty without one.
    bounds: least and largest value that it can have.
    of: all (examples); positive (the positive class of two, an average over three or more); or
      classes (an average over three or more classes).
    places: where it is shown besides the places that show all metrics.
    value: (predictions, targets) -> its value, None where it is undefined; None where
      ``Task.metrics`` gives the value. Called with one or more predictions, all of them finite.
  """

  name: str
  label: str
  better: str = "higher"
  unit: str = ""
  bounds: tuple[float, float] = (-math.inf, math.inf)
  of: str = "all"
  places: frozenset[Place] = EVERYWHERE
  value: Callable[[np.ndarray, Any], float | None] | None = None

  @property
  def heading(self) -> str:
    """The label with a capital letter in front."""
    return self.label[:1].upper() + self.label[1:]

  @property
  def axis(self) -> str:
    """The label with its unit."""
    return f"{self.label} ({self.unit})" if self.unit else self.label

  @property
  def is_share(self) -> bool:
    """Whether it lies between 0 and 1 and the higher is the better."""
    return self.bounds == (0.0, 1.0) and self.better == "higher"

  def worst(self, values: Sequence[float]) -> float | None:
    """The worst of some values; None of none."""
    return (max if self.better == "lower" else min)(values, default=None)


class Targets(NamedTuple):
  """Numbers to predict, where a task predicts no classes: ``Dataset.targets``.

  Attributes:
    values: [N, M] float32 in their own units; nan where a value is missing.
    names: [M] names of the columns.
    unit: of all columns, for people; empty without one.
    fitted: arrays by name that ``Task.fit`` took from training values, such as means; {} before it.
    left_out: (name, reason) of columns that nobody can learn.
  """

  values: np.ndarray
  names: tuple[str, ...]
  unit: str = ""
  fitted: dict[str, np.ndarray] = {}  # noqa: RUF012
  left_out: tuple[tuple[str, str], ...] = ()


class Labelled(Protocol):
  """The part of a ``data.dataset.Dataset`` that a task reads."""

  @property
  def labels(self) -> np.ndarray: ...
  @property
  def class_names(self) -> tuple[str, ...]: ...
  @property
  def targets(self) -> Targets | None: ...


def read_targets(record: dict[str, Any]) -> Targets:
  """The targets of a run by its hospitals.json, without values."""
  names = tuple(map(str, record["names"]))
  return Targets(
    values=np.zeros((0, len(names)), np.float32),
    names=names,
    unit=str(record["unit"]),
    fitted={name: np.array(values, np.float32) for name, values in record["fitted"].items()},
    left_out=tuple((str(name), str(reason)) for name, reason in record["left_out"]),
  )


class PredictionTable(NamedTuple):
  """Predictions as the rows of a table.

  Attributes:
    heading: names of the columns.
    rows: of each example one row or more, with a cell for each column.
  """

  heading: tuple[str, ...]
  rows: list[list[list[str]]]


class Figure(NamedTuple):
  """A figure of what ``Task.details`` leaves in summary.json.

  Attributes:
    name: of the file.
    title: of the panel.
    caption: (class names) -> sentence under it.
    pooled_title: of the figure in the report of a sweep.
    pooled_caption: the sentence in the report of a sweep, where ``pool`` has joined several runs.
    size: (names as drawn, widest of them in inches) -> width and height in inches.
    pool: details of several runs -> those of all of them together.
    draw: (axis, details, names as drawn, crowded), where a crowded axis is one of many.
    of_classes: whether the classes are the ticks of both axes.
  """

  name: str
  title: str
  caption: Callable[[Sequence[str]], str]
  pooled_title: str
  pooled_caption: str
  size: Callable[[Sequence[str], float], tuple[float, float]]
  pool: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
  draw: Callable[[Any, dict[str, Any], Sequence[str], bool], None]
  of_classes: bool = True


def no_class(class_names: Sequence[str]) -> str:
  """Returns "": no metric of the task is of one class."""
  del class_names
  return ""


def required_targets(dataset: Labelled) -> Targets:
  """The targets of a dataset; raises UserError where it has none."""
  if dataset.targets is None:
    raise UserError("the task predicts numbers, and the dataset has none; give Dataset.targets")
  return dataset.targets


def require_no_smoothing(label_smoothing: float, task: str) -> None:
  """Raises UserError where labels are to be smoothed, and the task has no labels."""
  require(
    label_smoothing == 0,
    f"client.label_smoothing={label_smoothing:g} is of classes, and {task} has none",
    "leave client.label_smoothing at 0",
  )


def fault_of_columns(summary: dict[str, Any], entry: str, names: Sequence[str]) -> str:
  """The fault of lists of numbers of one length in an entry of summary.json; empty if none."""
  held = summary.get(entry, {})
  columns = [held.get(name, []) for name in names] if held else []
  if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
    return f"the columns of {entry} are not of one length"
  usable = all(cell is None or isinstance(cell, int | float) for one in columns for cell in one)
  return "" if usable else f"{entry} holds something that is no number"


class Task(NamedTuple):
  """A kind of prediction.

  Attributes:
    name: its key in ``registry.TASKS``, which config.json of a run names.
    targets: dataset -> arrays with a leading axis of N examples.
    columns: dataset -> outputs of the network for an example.
    loss: client.label_smoothing -> per-example loss, (outputs [B, columns], targets) -> [B].
    predict: outputs [B, columns] -> float32 predictions, such as probabilities.
    tally: (outputs, targets) -> [B] score of each training example, 0 to 1 and the higher the
      better. Its mean is in the lines of the local training, and weighs updates under
      server.algorithm=performance.
    tallied: the name of that mean.
    metrics: (predictions, targets) -> values by name, None where undefined, and n; of the metrics
      without a ``value`` of their own.
    details: (predictions, targets) -> further entries of summary.json about the predictions.
    problem: (summary.json, class names) -> fault of the details; empty if there is none.
    shown: the metrics, the headline first.
    strata: dataset -> [N] int numbers, as many as class_names, of groups of like examples, which
      the split keeps in proportion, the partition deals by, and hospitals.json counts.
    figures: drawn from the details.
    about: (positive classes of the runs of a table) -> text that must stand under its metrics.
    explained: (class names) -> sentences that explain the metrics of a report.
    positive: (class names) -> name of the class that some metrics are of; empty without one.
    has_classes: whether ``class_names`` are what is predicted; else they only name the strata.
    fit: (targets, training rows of each hospital) -> the same targets with what follows from the
      training side, such as means; None where nothing does.
    releases: name of what hospitals tell for ``fit``, exactly and outside ε, for ledger and
      statement; empty where nothing leaves them.
    table: (predictions [n, columns], targets of the run) -> what ``predict`` writes of n examples;
      None writes the predicted class and all probabilities.
    zero_head: whether a layer named head starts at 0, so that the first outputs are all 0.
    joint: reason why the loss of an example needs the others of its batch, which DP-SGD refuses;
      empty where it does not. Numbers of places without an example are then nan in the targets.
    across: metrics of the hospitals -> those of all examples together that follow from them, such
      as of pairs within a hospital; None where there are no such.
  """

  name: str
  targets: Callable[[Labelled], Any]
  columns: Callable[[Labelled], int]
  loss: Callable[[float], Loss]
  predict: Callable[["jax.Array"], "jax.Array"]
  tally: Callable[["jax.Array", Any], "jax.Array"]
  tallied: str
  metrics: Callable[[np.ndarray, Any], dict[str, Any]]
  details: Callable[[np.ndarray, Any], dict[str, Any]]
  problem: Callable[[dict[str, Any], Sequence[str]], str]
  shown: tuple[Metric, ...]
  strata: Callable[[Labelled], np.ndarray]
  figures: tuple[Figure, ...]
  about: Callable[[Sequence[str]], str]
  explained: Callable[[Sequence[str]], str]
  positive: Callable[[Sequence[str]], str] = no_class
  has_classes: bool = True
  fit: Callable[[Targets, Sequence[np.ndarray]], Targets] | None = None
  releases: str = ""
  table: Callable[[np.ndarray, Targets], PredictionTable] | None = None
  zero_head: bool = False
  joint: str = ""
  across: Callable[[Sequence[dict[str, Any]]], dict[str, Any]] | None = None

  @property
  def headline(self) -> Metric:
    """The metric by which runs are compared first."""
    return self.shown[0]

  def measure(self, predictions: np.ndarray, targets: Any) -> dict[str, Any]:
    """Returns n and the values of all metrics by name, None where undefined."""
    values = self.metrics(predictions, targets)
    usable = len(predictions) > 0 and bool(np.isfinite(predictions).all())
    more = {metric.name: metric.value for metric in self.shown if metric.value is not None}
    return values | {
      name: value(predictions, targets) if usable else None for name, value in more.items()
    }

  def metrics_in(self, place: Place) -> tuple[Metric, ...]:
    """The metrics that are shown in a place."""
    return tuple(metric for metric in self.shown if place in metric.places)


def qualified(metric: Metric, positive: str) -> str:
  """Addition to a metric's name in a heading: its class; empty for a metric of all examples.

  Args:
    metric: of the heading.
    positive: from ``Task.positive``.
  """
  if metric.of == "all" or (positive and metric.of == "classes"):
    return ""
  return f" (positive: {positive})" if positive else " (macro)"
