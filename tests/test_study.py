"""Means, intervals and comparisons of a sweep's table, against SciPy and by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedjax_med import study
from fedjax_med.core.errors import UserError
from fedjax_med.tasks.classification import NAMES

SIGMA = "privacy.noise_multiplier"


ALONE = ("alone.auroc", "alone.all.auroc", "alone.loss", "alone.all.loss")


def table(sigmas=(1.0, 2.0), seeds=6, hospitals=3):
  rng = np.random.default_rng(0)
  rows = []
  for point, (sigma, seed) in enumerate((s, k) for s in sigmas for k in range(seeds)):
    shared = {"point": point, SIGMA: sigma, "seed": seed}
    shared |= {f"all.{metric}": rng.uniform(0.6, 0.7) - 0.1 * sigma for metric in NAMES}
    rows += [
      {
        **shared,
        "hospital": f"hospital {k}",
        **{"num_train": 9, "num_test": 3, "epsilon": 1.0, "delta": 1e-3, "sigma": sigma},
        **{metric: rng.uniform() for metric in (*NAMES, *ALONE)},
      }
      for k in range(hospitals)
    ]
  return pd.DataFrame(rows)


def test_a_point_has_the_mean_and_the_worst_of_its_hospitals():
  frame = table()
  frame.loc[0, "auroc"] = np.nan
  rows = study.by_point(frame)
  assert len(rows) == 12
  own = frame[frame["point"] == 3]
  assert rows["worst.loss"][3] == max(own["loss"])
  assert rows["worst.auroc"][3] == min(own["auroc"])
  assert rows["mean.f1"][3] == pytest.approx(np.mean(own["f1"]))
  assert rows["worst.auroc"][0] == min(frame["auroc"][1:3])


def test_a_point_has_the_mean_and_the_worst_of_models_that_hospitals_trained_alone():
  frame = table()
  frame.loc[0, list(ALONE)] = np.nan  # a hospital whose test images are of one class
  rows = study.by_point(frame)
  for column in ALONE:
    for point in (0, 3):
      values = frame[frame["point"] == point][column].dropna()
      worst = max(values) if column.endswith("loss") else min(values)
      assert rows[column][point] == pytest.approx(sum(values) / len(values))
      assert rows[f"worst.{column}"][point] == worst
  found = study.aggregate(frame, SIGMA, "alone.auroc")
  means = frame.groupby([SIGMA, "point"])["alone.auroc"].mean().groupby(SIGMA).mean()
  assert found["mean"].tolist() == pytest.approx(means.tolist())
  frame[list(ALONE)] = np.nan  # a sweep without such models
  assert study.by_point(frame)[["alone.auroc", "worst.alone.auroc"]].isna().to_numpy().all()


def test_no_value_of_one_hospital_is_taken_for_all():
  frame = table()
  frame["age"] = 50.0
  frame.loc[4, "age"] = np.nan
  with pytest.raises(
    UserError, match=r"'age' has several values .* of point 1; drop it, or reduce"
  ):
    study.by_point(frame)
  reduced = frame.assign(age=frame.groupby("point")["age"].transform("mean"))
  assert study.by_point(reduced)["age"].tolist() == [50.0] * 12
  left = set(study.by_point(table()).columns)
  assert not left & {"hospital", "num_train", "num_test", "epsilon", "delta", "sigma", *NAMES}


@pytest.mark.parametrize(
  ("column", "least", "largest"),
  [("all.auroc", 0, 1), ("worst.alone.all.f1", 0, 1), ("mean.ece", 0, 1), ("all.loss", None, None)],
)
def test_intervals_of_metrics_stay_where_metrics_can_be(column, least, largest):
  high, low = np.array([0.7, 1.0, 1.0]), np.array([0.0, 0.0, 0.3])
  for values in (high, low):
    ends = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert ends[0] < 0 or ends[1] > 1
    found = study.mean_interval(values, bounds=study.bounds_of(table(), column))
    expected = ends if least is None else np.clip(ends, least, largest)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["mean"] == values.mean()
  frame = table(seeds=3, hospitals=1)
  frame["all.auroc"] = [*low, *high]
  ends = study.aggregate(frame, SIGMA, "all.auroc")[["low", "high"]].to_numpy()
  assert ends.min() == 0
  assert ends.max() == 1


def test_the_interval_of_a_difference_stays_in_what_differences_can_be():
  frame = table(seeds=2, hospitals=1)
  for metric in ("all.auroc", "all.loss"):
    frame[metric] = [0.0, 0.2, 1.0, 0.9]
  found, loss = (study.compare(frame, SIGMA, 1.0, 2.0, f"all.{m}") for m in ("auroc", "loss"))
  ends = stats.t.interval(0.95, 1, 0.85, stats.sem([1.0, 0.7]))
  assert (loss.low, loss.high) == pytest.approx(ends)
  assert (found.low, found.high) == (-1, 1)
  assert found.mean_difference == pytest.approx(0.85)


@pytest.mark.parametrize("interval", ["t", "bootstrap"])
def test_mean_and_interval_are_scipys(interval):
  frame = table()
  found = study.aggregate(frame, SIGMA, "all.auroc", interval=interval, confidence=0.9)
  values = study.by_point(frame).groupby(SIGMA)["all.auroc"].apply(list)
  for row, (sigma, group) in zip(found.to_dict("records"), values.items(), strict=True):
    assert row[SIGMA] == sigma
    assert row["n"] == 6
    assert row["mean"] == pytest.approx(np.mean(group))
    if interval == "t":
      low, high = stats.t.interval(0.9, 5, np.mean(group), stats.sem(group))
    else:
      low, high = stats.bootstrap(
        (group,), np.mean, confidence_level=0.9, rng=0
      ).confidence_interval
    assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_points_that_diverged_are_counted_and_not_averaged():
  frame = table()
  frame.loc[frame["point"] == 2, "all.f1"] = np.nan
  found = study.aggregate(frame, [SIGMA], "all.f1").to_dict("records")
  assert [(row["n"], row["missing"]) for row in found] == [(5, 1), (6, 0)]
  assert np.isfinite(found[0]["mean"])


def test_one_point_has_no_interval_and_equal_points_have_none_to_speak_of():
  single = study.aggregate(table(seeds=1), SIGMA, "all.f1")
  assert single[["low", "high"]].isna().to_numpy().all()
  frame = table()
  frame["all.f1"] = 0.5
  for interval in ("t", "bootstrap"):
    found = study.aggregate(frame, SIGMA, "all.f1", interval=interval)
    assert (found[["low", "mean", "high"]].to_numpy() == 0.5).all()


def test_arms_are_compared_in_pairs_as_scipy_does():
  frame = table().sample(frac=1, random_state=1)  # pairs are found by seed, not by place
  found = study.compare(frame, SIGMA, 1.0, 2.0, "all.auroc")
  points = study.by_point(frame).sort_values("seed")
  first, second = (points[points[SIGMA] == s]["all.auroc"].to_numpy() for s in (1.0, 2.0))
  test: Any = stats.ttest_rel(second, first)
  interval = test.confidence_interval(0.95)
  assert found.pairs == 6
  assert found.mean_difference == pytest.approx(np.mean(second - first))
  assert found.t_p_value == pytest.approx(test.pvalue)
  assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
  signed_ranks: Any = stats.wilcoxon(second, first)
  assert found.wilcoxon_p_value == pytest.approx(signed_ranks.pvalue)


def test_what_cannot_be_compared_is_a_sentence():
  frame = table()
  with pytest.raises(UserError, match="name in pair_by every column"):
    study.compare(frame, SIGMA, 1.0, 2.0, "all.f1", pair_by=[SIGMA])
  with pytest.raises(UserError, match="has 0 points"):
    study.compare(frame, SIGMA, 1.0, 3.0, "all.f1")
  with pytest.raises(UserError, match="5 of 6 points have a partner"):
    study.compare(frame[frame["point"] != 11], SIGMA, 1.0, 2.0, "all.f1")
  with pytest.raises(UserError, match=r"did you mean 'all\.auroc'"):
    study.aggregate(frame, SIGMA, "all.aurok")
  with pytest.raises(UserError, match="a bootstrap of 3 points says little"):
    study.aggregate(table(seeds=3), SIGMA, "all.f1", interval="bootstrap")


def test_a_folder_without_a_table_is_a_sentence(tmp_path):
  with pytest.raises(UserError, match=r"results.parquet is missing; give the --workdir of a sweep"):
    study.load(tmp_path)


def test_the_table_is_loaded_with_the_seconds(tmp_path):
  frame = table()
  frame.to_parquet(tmp_path / "results.parquet")
  pd.DataFrame({"point": range(12), "seconds": np.arange(12.0)}).to_csv(
    tmp_path / "timing.csv", index=False
  )
  loaded = study.load(tmp_path)
  assert len(loaded) == len(frame)
  assert list(loaded["seconds"]) == [float(point) for point in frame["point"]]
