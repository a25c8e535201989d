"""Results of a sweep as a table: loaded, averaged over seeds with intervals, arms compared.

Example:
  from fedjax_med import study
  frame = study.load("runs/noise")
  study.aggregate(frame, "privacy.noise_multiplier", "all.auroc")
  study.compare(frame, "privacy.noise_multiplier", 0.5, 2.0, "all.auroc", pair_by=["seed"])
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from fedjax_med.core.errors import UserError, require, require_choice
from fedjax_med.tasks.registry import DEFAULT, task_named
from fedjax_med.tasks.task import Metric


class Comparison(NamedTuple):
  """Two arms, pair by pair.

  Attributes:
    pairs: how many.
    mean_difference: second arm minus first.
    low: lower end of its t interval.
    high: upper end.
    t_p_value: paired t-test, two-sided; nan where no difference varies.
    wilcoxon_p_value: Wilcoxon's signed-rank test, two-sided, exact where n allows; nan without any
      difference.
  """

  pairs: int
  mean_difference: float
  low: float
  high: float
  t_p_value: float
  wilcoxon_p_value: float


def load(workdir: str | pathlib.Path) -> pd.DataFrame:
  """A row a point and hospital of a sweep, with the seconds that its point took.

  METRIC, alone.METRIC and alone.all.METRIC are of the hospital of the row; see ``by_point``. A
  metric that the sweep was not measured by, as it is newer, is nan.

  Raises:
    UserError: the folder has no table.
  """
  folder = pathlib.Path(workdir).expanduser()
  require(
    (folder / "results.parquet").exists(),
    f"{folder / 'results.parquet'} is missing",
    "give the --workdir of a sweep that has ended, or merge its shards",
  )
  frame = pd.read_parquet(folder / "results.parquet")
  for column in (f"{prefix}{name}" for prefix in PREFIXES for name in metrics_of(frame)):
    if column not in frame:
      frame[column] = np.nan
  return with_seconds(frame, pd.read_csv(folder / "timing.csv"))


def metrics_of(frame: pd.DataFrame) -> dict[str, Metric]:
  """The metrics of the tasks of a table, by name; tables of older versions name no task."""
  names = dict.fromkeys(frame["task"]) if "task" in frame else (DEFAULT,)
  return {metric.name: metric for name in names for metric in task_named(name).shown}


def with_seconds(frame: pd.DataFrame, timing: pd.DataFrame) -> pd.DataFrame:
  """The table with the seconds of each point."""
  return frame.merge(timing, on="point", how="left")


# Columns that say something of one hospital, and of which a row a point has nothing.
OF_HOSPITALS = ("hospital", "hostile", "num_train", "num_test", "epsilon", "delta", "sigma")
# Prefixes of metrics: of the run's model on the hospital's test images and on all, of the one that
# the hospital trained alone on both, and of the one trained on pooled data on all.
PREFIXES = ("", "all.", "alone.", "alone.all.", "pooled.all.")
# Prefixes of metrics that differ from hospital to hospital, and what their mean begins with.
REDUCED = {"": "mean.", "alone.": "alone.", "alone.all.": "alone.all."}


def honest(frame: pd.DataFrame) -> pd.DataFrame:
  """The rows of honest hospitals: all of them where no point has an attack."""
  return frame[frame["hostile"].ne(True)] if "hostile" in frame else frame


def by_point(frame: pd.DataFrame) -> pd.DataFrame:
  """A row a point: values that differ between hospitals become their mean and their worst.

  mean.METRIC and worst.METRIC are of the run's model on each hospital's test images. alone.METRIC
  (the mean) and worst.alone.METRIC are of the models that hospitals trained by themselves, on the
  same images, alone.all.METRIC and worst.alone.all.METRIC of those models on all test images.
  all.METRIC is of the run's model on all test images, and is no mean. The worst has the highest
  value of a metric of which lower is better, such as loss and ece, or the lowest value of any other
  metric; hospitals where a metric is undefined do not count.

  Raises:
    UserError: another column has several values in one point.
  """
  frame = honest(frame)
  grouped, metrics = frame.groupby("point", sort=True), metrics_of(frame)
  reduced = {
    f"{prefix}{metric}": (f"{name}{metric}", f"worst.{prefix}{metric}", metric)
    for prefix, name in REDUCED.items()
    for metric in metrics
    if f"{prefix}{metric}" in frame
  }
  shared = frame.drop(columns=[*reduced, *OF_HOSPITALS], errors="ignore")
  _require_one_value(shared)
  rows = shared.drop_duplicates("point").sort_values("point").reset_index(drop=True)
  columns: dict[str, np.ndarray] = {}
  for column, (mean, worst, metric) in reduced.items():
    columns[mean] = grouped[column].mean().to_numpy()
    lower = metrics[metric].better == "lower"
    ends = grouped[column].max() if lower else grouped[column].min()
    columns[worst] = ends.to_numpy()
  return pd.concat([rows, pd.DataFrame(columns)], axis=1)


def _require_one_value(frame: pd.DataFrame) -> None:
  """Raises UserError unless the hospitals of each point have the same in every column."""
  several = frame.groupby("point", sort=True).nunique(dropna=False) > 1
  names = several.columns[several.any()]
  if len(names):
    name = names[0]
    point = several.index[several[name]][0]
    raise UserError(
      f"column '{name}' has several values at the hospitals of point {point}; drop it, or reduce it"
      f" first: frame['{name}'] = frame.groupby('point')['{name}'].transform('mean')"
    )


def bounds_of(frame: pd.DataFrame, column: str) -> tuple[float, float]:
  """Least and largest value of a column: the bounds of its metric, infinite if it is of none."""
  metric = metrics_of(frame).get(column.rpartition(".")[2])
  return (-np.inf, np.inf) if metric is None else metric.bounds


def aggregate(
  frame: pd.DataFrame,
  by: str | Sequence[str],
  metric: str,
  *,
  interval: str = "t",
  confidence: float = 0.95,
) -> pd.DataFrame:
  """Mean of a metric over the points of each group, and an interval for it.

  Args:
    frame: from ``load``.
    by: columns that make a group; all else that varies, such as seeds, is averaged over.
    metric: a column of ``by_point``, such as all.auroc, worst.recall or alone.auroc.
    interval: t (Student), or bootstrap (BCa, 9,999 resamples, for 5 points or more).
    confidence: of the interval.

  Returns:
    A row a group, in the order of ``by``: its columns, n, mean, low, high. Points that diverged or
    have no such metric are not in n but in ``missing``. With a single value low and high are nan.
    Intervals stay within the bounds of the metric, such as [0, 1].
  """
  require_choice("interval", interval, ("t", "bootstrap"))
  require(0 < confidence < 1, f"confidence={confidence} is not between 0 and 1", "use 0.95")
  names = [by] if isinstance(by, str) else list(by)
  points = by_point(frame)
  for name in [*names, metric]:
    require_choice("column", name, points.columns)
  known = metrics_of(frame).get(metric.rpartition(".")[2])
  of_a_class = known is not None and known.of == "positive"
  rows: list[dict[str, Any]] = []
  for key, group in points.groupby(names, sort=True, dropna=False):
    positives = sorted(set(group.get("positive_class", ())))
    require(
      not of_a_class or len(positives) < 2,
      f"{metric} of points whose positive classes are {' and '.join(positives)} has no mean",
      "put positive_class into `by`",
    )
    values = group[metric].to_numpy(float)
    rows.append(
      {
        **dict(zip(names, key, strict=True)),
        **mean_interval(values, interval, confidence, bounds_of(frame, metric)),
      }
    )
  return pd.DataFrame(rows)


def mean_interval(
  values: np.ndarray,
  interval: str = "t",
  confidence: float = 0.95,
  bounds: tuple[float, float] = (-np.inf, np.inf),
) -> dict[str, Any]:
  """n, missing, mean, low and high of values of which some may be undefined; see ``aggregate``.

  ``bounds`` are the least and the largest value that there can be, and so of the interval.
  """
  known = values[np.isfinite(values)]
  low, high = _interval(known, interval, confidence, bounds)
  mean = float(known.mean()) if len(known) else np.nan
  missing = len(values) - len(known)
  return {"n": len(known), "missing": missing, "mean": mean, "low": low, "high": high}


def compare(
  frame: pd.DataFrame,
  arm: str,
  first: Any,
  second: Any,
  metric: str,
  *,
  pair_by: Sequence[str] = ("seed",),
  confidence: float = 0.95,
) -> Comparison:
  """Compares two values of a column in a metric, over pairs of points that share the rest.

  Args:
    frame: from ``load``.
    arm: the column, such as server.algorithm.
    first: a value of it.
    second: another one.
    metric: a column of ``by_point``.
    pair_by: columns whose values make a pair; each pair must have one point of either arm.
    confidence: of the interval, which stays within the bounds of a difference of the metric.

  Raises:
    UserError: no such column, or points that do not pair.
  """
  points = by_point(frame)
  for name in (arm, metric, *pair_by):
    require_choice("column", name, points.columns)
  sides = []
  for value in (first, second):
    side = points[points[arm] == value].set_index(list(pair_by))[metric]
    require(
      len(side) > 0 and side.index.is_unique,
      f"{arm}={value} has {len(side)} points, {side.index.nunique()} of them distinct in"
      f" {', '.join(pair_by)}",
      "name in pair_by every column that varies besides the arm",
    )
    sides.append(side)
  both = pd.concat(sides, axis=1, join="inner", keys=["first", "second"])
  differences = (both["second"] - both["first"]).to_numpy(float)
  require(
    len(differences) == max(map(len, sides)) and bool(np.isfinite(differences).all()),
    f"{len(differences)} of {max(map(len, sides))} points have a partner, or a metric is undefined",
    "run both arms with the same seeds; leave out points that diverged",
  )
  least, largest = bounds_of(frame, metric)
  low, high = _interval(differences, "t", confidence, (least - largest, largest - least))
  varied = len(differences) > 1 and bool(np.ptp(differences) > 0)
  wilcoxon = float(stats.wilcoxon(differences).pvalue) if bool(differences.any()) else np.nan
  return Comparison(
    pairs=len(differences),
    mean_difference=float(differences.mean()),
    low=low,
    high=high,
    t_p_value=float(stats.ttest_1samp(differences, 0.0).pvalue) if varied else np.nan,
    wilcoxon_p_value=wilcoxon,
  )


def _interval(
  values: np.ndarray, kind: str, confidence: float, bounds: tuple[float, float]
) -> tuple[float, float]:
  if len(values) < 2:
    return np.nan, np.nan
  mean = float(values.mean())
  if np.ptp(values) == 0:
    return mean, mean
  if kind == "bootstrap":
    require(
      len(values) >= 5, f"a bootstrap of {len(values)} points says little", "use interval='t'"
    )
    found = stats.bootstrap((values,), np.mean, confidence_level=confidence, rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
  half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
  return max(mean - half, bounds[0]), min(mean + half, bounds[1])
