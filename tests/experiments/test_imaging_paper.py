"""The imaging paper's comparison: every row is trainable, and its statistics are what they say."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.imaging_paper import cost, significance, tables
from experiments.imaging_paper.systems import (
  OWN_MODELS,
  PROPOSED,
  SCALES,
  SETS,
  SPLITS,
  SYSTEMS,
  base_config,
  rows,
)
from experiments.imaging_paper.training import RESULTS, SEED_AXES
from fedjax_med.models.registry import MODELS
from fedjax_med.sweep.points import configure
from tests.command import ROOT


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dataset", SETS)
def test_every_row_of_every_scale_and_set_is_a_valid_configuration(scale, dataset):
  base = base_config(scale, dataset, "" if dataset == "phantoms" else "folder")
  found = rows(base, SCALES[scale])
  assert len(found) == len(SYSTEMS) * len(SPLITS) * SCALES[scale].seeds
  for row in found:
    config = configure(base, row.point, SEED_AXES)
    assert config.data.split == row.split
    assert config.seed == config.data.seed == row.seed
    assert config.model.name in MODELS
    changed = SYSTEMS[row.system].changes
    assert all(row.point[name] == value for name, value in changed.items())
  # FedAvg of the proposed network stands in two tables at full size.
  points = [json.dumps(row.point, sort_keys=True) for row in found if row.system != "fedavg"]
  assert len(set(points)) == len(points)  # no two rows are one training


def frame(values):
  """A table of trainings: values[system][split] is accuracy (and F1) of seeds 0, 1, ..."""
  lines = []
  for system, splits in values.items():
    for split, numbers in splits.items():
      for seed, number in enumerate(numbers):
        metrics = {f"all.{metric}": number for metric in tables.METRICS}
        names = {"system": system, "split": split, "seed": seed}
        predicts = "own models" if system in OWN_MODELS else "global model"
        lines.append({**names, "parameters": 7, "predicts": predicts, **metrics})
  return pd.DataFrame(lines)


def test_summary_holds_t_intervals_and_the_differences_to_the_paper_and_of_the_splits():
  reached, honest = np.array([0.9, 0.95, 1.0]), np.array([0.6, 0.7, 0.8])
  given = frame({PROPOSED: {"paper": reached, "grouped": honest}})
  (record,) = tables.summarise(given, "br35h")
  low, high = stats.t.interval(0.95, 2, loc=0.7, scale=stats.sem(honest))
  grouped = record["splits"]["grouped"]["accuracy"]
  np.testing.assert_allclose([grouped["low"], grouped["high"]], [low, high], rtol=1e-6)
  assert record["splits"]["paper"]["accuracy"]["high"] == 1.0  # cut at what accuracy can be
  assert record["difference"] == pytest.approx(0.95 - 0.988)
  of_splits, differences = record["random_minus_grouped"], reached - honest
  low, high = stats.t.interval(0.95, 2, loc=0.25, scale=stats.sem(differences))
  np.testing.assert_allclose(list(of_splits.values()), [3, 0, 0.25, low, high], rtol=1e-6)
  assert tables.summarise(given, "phantoms")[0]["difference"] is None
  row = tables.markdown([record], "table 3").splitlines()[-1]
  assert "| 0.988 | 0.950" in row
  assert "| -0.038 | 0.700" in row
  assert "| +0.250 [+0.126, +0.374] |" in row


NOTHING = {"paper": [np.nan, np.nan], "grouped": [0.5, np.nan]}


def test_a_training_that_diverged_is_called_so_and_counts_in_no_mean():
  (record,) = tables.summarise(frame({"vgg16": NOTHING}), "br35h")
  nothing = {"n": 0, "missing": 2, "mean": None, "low": None, "high": None}
  assert record["splits"]["paper"]["accuracy"] == record["random_minus_grouped"] == nothing
  row = tables.markdown([record], "figures 3 and 4").splitlines()[-1]
  assert "| unknown | diverged | – | 0.500 (1 of 2 diverged) | diverged |" in row
  json.dumps(record, allow_nan=False)


def test_leakage_is_told_of_the_systems_that_are_high_on_the_random_split():
  given = frame(
    {
      "vgg16": {"paper": [0.95, 0.97], "grouped": [0.7, 0.6]},
      "resnet50": {"paper": [0.93, 0.95], "grouped": [0.9, 0.52]},
      "fedprox": {"paper": [0.95, 0.81], "grouped": [0.99, 0.99]},
      "ditto": {"paper": [0.99, 0.99], "grouped": [0.99, 0.99]},  # predicts with own models
    }
  )
  assert tables.leakage(given) == (
    "2 of 3 global models are over 0.90 on the random split; the best of them is at 0.71 on the"
    " grouped one. Their mean is 0.95 and 0.68; seed by seed 0.94 and 0.80, 0.96 and 0.56."
  )
  given.loc[given["system"] == "resnet50", "all.accuracy"] = np.nan  # counted all the same
  assert tables.leakage(given).startswith("1 of 3 global models are over 0.90")
  assert tables.leakage(given, 0.98) == "0 of 3 global models are over 0.98 on the random split."


def test_nothing_in_the_latex_table_is_left_for_latex_to_read(monkeypatch):
  monkeypatch.setattr(tables, "caption", lambda: "Set sars_cov2_ct: a 95% interval")
  (first, *_) = (
    line
    for line in tables.latex(tables.summarise(frame({"vgg16": NOTHING}), "br35h")).splitlines()
    if line.startswith(r"\caption")
  )
  assert first == r"\caption{Set sars\_cov2\_ct: a 95\% interval}"


def test_p_values_are_scipys_paired_test_and_holms_correction():
  rng = np.random.default_rng(0)
  names = [PROPOSED, "vgg16", "resnet50", "fedavg", "fedprox", "ditto"]
  values = {name: {s: rng.uniform(0.5, 0.9, 5) for s in SPLITS} for name in names}
  values["fedprox"]["grouped"] = values["fedavg"]["grouped"]  # nothing to test
  found = significance.compare(frame(values))
  assert {test["other"] for test in found} == {"vgg16", "resnet50", "fedprox"}  # global models
  for test in found:
    held_to = "fedavg" if test["other"] == "fedprox" else PROPOSED
    own, other = (values[name][test["split"]] for name in (held_to, test["other"]))
    difference = own - other
    assert test["mean"] == pytest.approx(difference.mean())
    if np.ptp(difference):
      ends = stats.t.interval(0.95, 4, loc=difference.mean(), scale=stats.sem(difference))
      assert [test["low"], test["high"]] == pytest.approx(ends)
    if test["other"] == "fedprox" and test["split"] == "grouped":
      assert test["p"] is test["p_holm"] is None
    else:
      assert test["p"] == pytest.approx(stats.ttest_rel(own, other).pvalue)
  smallest, larger, largest = sorted(
    (t for t in found if t["split"] == "paper"), key=lambda t: t["p"]
  )
  # 20 systems have a global model beside the proposed one, looked at here or not.
  steps = [20 * smallest["p"], 19 * larger["p"], 18 * largest["p"]]
  for test, end in zip((smallest, larger, largest), (1, 2, 3), strict=True):
    assert test["p_holm"] == pytest.approx(min(1, max(steps[:end])))


def test_the_cost_model_is_the_papers_formula():
  case = cost.Case(rounds=3, clients=5, images=7, width=0.5, side=10)
  assert case.modelled() == 3 * 5 * 7 * (32 * 9 * 100 + 32**2)


def test_the_power_that_time_grows_with_is_that_of_each_turn():
  every = [
    dataclasses.replace(cost.Case(), **{factor: value})
    for factor, values in cost.VARIED.items()
    for value in values
  ]
  # One turn of the paper's model, one that grows with its root, on a machine half as fast.
  seconds = {case: [case.modelled(), 2 * case.modelled() ** 0.5] for case in every}
  for found in cost.compare(seconds):
    low, high = stats.t.interval(0.95, 1, loc=0.75, scale=stats.sem([1, 0.5]))
    assert found["power"]["mean"] == pytest.approx(0.75)
    assert [found["power"]["low"], found["power"]["high"]] == pytest.approx([low, high])
    assert [case["value"] for case in found["cases"]] == list(cost.VARIED[found["factor"]])
    modelled = np.array([case["modelled"] for case in found["cases"]])
    expected = (modelled + modelled**0.5) / 2  # median of two
    np.testing.assert_allclose([case["measured"] for case in found["cases"]], expected)
  row = cost.markdown(cost.compare(seconds)).splitlines()[2]
  assert row.startswith("| rounds | 1 | 0.75 [")
  assert "| -0.25 | 4, 8, 16 | 1.0, 2.0, 4.0 | 1.0, 1.7, 3.0 |" in row


def run_command(name, folder, *more):
  flags = ["--scale=smoke", "--only=fl_alone,cnn_fedavg_iid", f"--workdir={folder}", *more]
  return subprocess.run(
    [sys.executable, "-m", f"experiments.imaging_paper.{name}", *flags],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=True,
  )


@pytest.mark.slow
def test_tables_of_two_systems_from_the_command_line_are_kept_and_resumed(tmp_path):
  first = run_command("tables", tmp_path, "--json")
  found = json.loads(first.stdout)
  assert [row["system"] for row in found["rows"]] == ["fl_alone", "cnn_fedavg_iid"]
  for row in found["rows"]:
    for split in SPLITS:
      stats_of = row["splits"][split]
      assert all(np.isfinite(stats_of[metric]["mean"]) for metric in ("accuracy", "f1", "auroc"))
      assert stats_of["accuracy"]["n"] == SCALES["smoke"].seeds
  assert not (tmp_path / RESULTS).exists()  # those of all systems are not overwritten with two
  written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
  assert len(written) == 2 * 2 * SCALES["smoke"].seeds
  assert run_command("tables", tmp_path, "--json").stdout == first.stdout
  assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
  run_command("figures", tmp_path)
  assert (tmp_path / "figures-only" / "splits.png").stat().st_size > 0
  assert not (tmp_path / "figures" / "splits.png").exists()
