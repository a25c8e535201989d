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

from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.metrics import LOWER_IS_BETTER, METRICS


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
  return with_seconds(frame, pd.read_csv(folder / "timing.csv"))


def with_seconds(frame: pd.DataFrame, timing: pd.DataFrame) -> pd.DataFrame:
  """The table with the seconds of each point."""
  return frame.merge(timing, on="point", how="left")


def by_point(frame: pd.DataFrame) -> pd.DataFrame:
  """A row a point: all.METRIC of all test images, mean.METRIC and worst.METRIC over hospitals.

  The worst hospital has the highest loss or ece, or the lowest value of any other metric; hospitals
  where a metric is undefined do not count.
  """
  grouped = frame.groupby("point", sort=True)
  hospitals = ("hospital", "num_train", "num_test", "epsilon", "delta", "sigma", *METRICS)
  rows = grouped.first().drop(columns=list(hospitals)).reset_index()
  for metric in METRICS:
    rows[f"mean.{metric}"] = grouped[metric].mean().to_numpy()
    worst = grouped[metric].max() if metric in LOWER_IS_BETTER else grouped[metric].min()
    rows[f"worst.{metric}"] = worst.to_numpy()
  return rows


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
    by: columns that make a group; what else varies, seeds for one, is averaged over.
    metric: a column of ``by_point``, such as all.auroc or worst.recall.
    interval: t (Student), or bootstrap (BCa, 9,999 resamples, for 5 points or more).
    confidence: of the interval.

  Returns:
    A row a group, in the order of ``by``: its columns, n, mean, low, high. Points that diverged or
    have no such metric are not in n but in ``missing``. With a single value low and high are nan.
  """
  require_choice("interval", interval, ("t", "bootstrap"))
  require(0 < confidence < 1, f"confidence={confidence} is not between 0 and 1", "use 0.95")
  names = [by] if isinstance(by, str) else list(by)
  points = by_point(frame)
  for name in [*names, metric]:
    require_choice("column", name, points.columns)
  rows: list[dict[str, Any]] = []
  for key, group in points.groupby(names, sort=True, dropna=False):
    values = group[metric].to_numpy(float)
    rows.append(
      {
        **dict(zip(names, key, strict=True)),
        **mean_interval(values, interval, confidence),
      }
    )
  return pd.DataFrame(rows)


def mean_interval(
  values: np.ndarray, interval: str = "t", confidence: float = 0.95
) -> dict[str, Any]:
  """n, missing, mean, low and high of values of which some may be undefined; see ``aggregate``."""
  known = values[np.isfinite(values)]
  low, high = _interval(known, interval, confidence)
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
  """Whether two values of a column differ in a metric, over pairs of points that share the rest.

  Args:
    frame: from ``load``.
    arm: the column, such as server.algorithm.
    first: a value of it.
    second: another one.
    metric: a column of ``by_point``.
    pair_by: columns whose values make a pair; each pair must have one point of either arm.
    confidence: of the interval.

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
  low, high = _interval(differences, "t", confidence)
  varied = len(differences) > 1 and bool(np.ptp(differences) > 0)
  return Comparison(
    len(differences),
    float(differences.mean()),
    low,
    high,
    float(stats.ttest_1samp(differences, 0.0).pvalue) if varied else np.nan,
    float(stats.wilcoxon(differences).pvalue) if bool(differences.any()) else np.nan,
  )


def _interval(values: np.ndarray, kind: str, confidence: float) -> tuple[float, float]:
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
  half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
  return mean - float(half), mean + float(half)
