"""Points of a sweep against runs by themselves: results, ledgers, ε; resuming, shards, tables."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from fedjax_med.core.config import PrivacyConfig, flat, to_dict
from fedjax_med.core.errors import UserError, require
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare import synthetic_images
from fedjax_med.prepare.experiment import build
from fedjax_med.privacy import __main__ as privacy_command
from fedjax_med.privacy import ledger
from fedjax_med.report import reported_run as runs
from fedjax_med.report.run_page import write_report
from fedjax_med.run.single import train_rounds
from fedjax_med.run.summaries import summary_record
from fedjax_med.sweep import merge, programs, runner, table
from fedjax_med.sweep.points import configure, groups, shown
from tests.sweep.sweeping import AXES, base, output, plan, sweep

SIGMA, TARGET, RATE = "privacy.noise_multiplier", "privacy.target_epsilon", "client.learning_rate"


def alone(folder, config):
  """The same configuration as a run by itself; its summary and its log."""
  folder.mkdir()
  experiment = build(config, load_hospitals(config))
  outcome = train_rounds(experiment, folder)
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return summary_record(experiment, outcome, "smoke"), lines


def close(found, expected):
  """Equal, but for float error in the numbers of results."""
  if isinstance(expected, dict):
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"weights_sha256", "plan", "seconds", "config_name"}:
      close(found[key], expected[key])
  elif isinstance(expected, list):
    assert len(found) == len(expected)
    for pair in zip(found, expected, strict=True):
      close(*pair)
  elif isinstance(expected, float):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
  else:
    assert found == expected


# Everything that a program takes as data, in one group.
TOGETHER = [
  {"seed": 3},
  {"data.split": "paper", "data.test_fraction": 0.3},
  {"partition.alpha": 0.3, "partition.min_client_size": 8},
  {"partition.scheme": "iid", "server.weighting": "uniform"},
  {RATE: 0.1, "server.learning_rate": 0.5, "server.proximal_weight": 0.1},
  {"server.num_rounds": 5, SIGMA: 0.7, "privacy.clip_norm": 0.3},
  {TARGET: 4.0, SIGMA: 0.0},
  {TARGET: 6.0, SIGMA: 0.0, "privacy.same_noise": True, "privacy.delta": 1e-4},
  {TARGET: 6.0, SIGMA: 0.0, "privacy.noise_stddev": 0.5, "privacy.solve_for": "clip_norm"},
  {TARGET: 6.0},  # a budget that three rounds would cross
]


# The same of whole hospitals' privacy, of drawn cohorts and of averages.
Z, CLIENT = "client_privacy.noise_multiplier", "client_privacy"
CENTRAL = [
  {Z: 2.0},
  {Z: 0.0, f"{CLIENT}.target_epsilon": 9.0, f"{CLIENT}.delta": 0.02},
  {Z: 3.0, f"{CLIENT}.clipping": "adaptive", f"{CLIENT}.quantile": 0.3},
  {Z: 3.0, f"{CLIENT}.clipping": "adaptive", f"{CLIENT}.clip_learning_rate": 0.5},
  {Z: 3.0, f"{CLIENT}.clipping": "adaptive", f"{CLIENT}.count_noise": 4.0},
  {Z: 2.0, "server.participation_rate": 0.8, "server.ema_decay": 0.3},
]


def central():
  config = base(
    server__weighting="uniform",
    server__participation="poisson",
    server__participation_rate=0.6,
    server__ema_decay=0.6,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__noise_multiplier=2.0,
  )
  config.privacy = PrivacyConfig()
  return config


@pytest.fixture(scope="module")
def centrally_swept(tmp_path_factory):
  folder = tmp_path_factory.mktemp("central")
  sweep(folder, CENTRAL, central())
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CENTRAL)), ids=[shown(p) for p in CENTRAL])
def test_whole_hospitals_and_drawn_cohorts_equal_the_runs_by_themselves(
  centrally_swept, tmp_path, number
):
  assert len(groups(plan(CENTRAL, central()))) == 1
  config = configure(central(), CENTRAL[number], AXES)
  expected, _ = alone(tmp_path / "alone", config)
  folder = table.folder_of(centrally_swept, number)
  close(json.loads((folder / "summary.json").read_text()), expected)
  assert ledger.read(folder).counts == ledger.read(tmp_path / "alone").counts


@pytest.mark.slow
def test_points_whose_hospitals_add_unlike_noise_share_a_program_and_equal_their_runs(tmp_path):
  points = [{Z: 2.0}, {Z: 0.5}, {Z: 0.0, f"{CLIENT}.target_epsilon": 9.0}]
  config = central()
  config.server.participation, config.server.participation_rate = "full", 1.0
  config.client_privacy.noise, config.secure.protocol = "distributed", "masking"
  sweep(tmp_path, points, config)
  assert len(groups(plan(points, config))) == 1
  for number in range(len(points)):
    expected, _ = alone(tmp_path / f"alone{number}", configure(config, points[number], AXES))
    folder = table.folder_of(tmp_path, number)
    close(json.loads((folder / "summary.json").read_text()), expected)
    own, other = ledger.read(folder), ledger.read(tmp_path / f"alone{number}")
    assert (own.counts, own.guarantees) == (other.counts, other.guarantees)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  folder = tmp_path_factory.mktemp("swept")
  table.begin(folder, base(), TOGETHER, AXES)
  (group,) = groups(plan(TOGETHER))
  prepared = programs.prepare(group, 4)
  runner.run_group(prepared, set(), output(folder))
  # Three chunks, of unlike hospitals and test sets.
  assert prepared.compilations() == 1
  table.write(folder)
  return folder


def test_points_that_differ_in_data_share_one_program():
  assert len(groups(plan(TOGETHER))) == 1


@pytest.mark.parametrize("number", range(len(TOGETHER)), ids=[shown(p) for p in TOGETHER])
def test_a_point_equals_the_run_by_itself_in_results_ledger_and_epsilon(swept, tmp_path, number):
  config = configure(base(), TOGETHER[number], AXES)
  expected, log = alone(tmp_path / "alone", config)
  folder = table.folder_of(swept, number)
  found = json.loads((folder / "summary.json").read_text())
  close(found, expected)
  assert found["run_id"] == expected["run_id"]
  assert found["epsilon_max"] == expected["epsilon_max"]
  ours, theirs = ledger.read(folder), ledger.read(tmp_path / "alone")
  assert ours.guarantees == theirs.guarantees
  assert ours.counts == theirs.counts
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  for line, other in zip(lines, log, strict=True):
    for key in ("round", "split", "loss", "accuracy"):
      close(line[key], other[key])
  assert privacy_command.recompute(folder)["epsilon_max"] == expected["epsilon_max"]


def test_budgets_end_points_where_they_end_runs(swept):
  ended = json.loads((table.folder_of(swept, len(TOGETHER) - 1) / "summary.json").read_text())
  assert ended["stopped"] == "budget"
  assert 0 < ended["rounds"] < 3
  assert ended["epsilon_max"] <= 6


def test_a_point_whose_budget_allows_no_round_ends_at_once_and_says_so(tmp_path):
  points = [{SIGMA: sigma, TARGET: 0.01 if sigma < 1 else 0.0} for sigma in (0.5, 2.0)]
  frame = sweep(tmp_path, points)
  rounds = frame.groupby("point")[["rounds", "stopped", "epsilon_max"]].first()
  assert rounds["rounds"].tolist() == [0, 3]
  assert rounds["stopped"].tolist() == ["budget", "completed"]
  assert rounds["epsilon_max"][0] == 0
  assert np.isfinite(frame["all.loss"]).all()  # of the initial weights


@pytest.mark.slow
def test_groups_of_other_programs_patients_and_no_privacy_run_beside_each_other(tmp_path):
  points = [
    {"privacy.unit": "record", "client.batch_size": 16},
    {"privacy.unit": "patient", "client.batch_size": 16},
    {"privacy.unit": "record", "client.batch_size": 8},
  ]
  frame = sweep(tmp_path / "units", points)
  assert len(groups(plan(points))) == 3
  assert list(frame["unit"].unique()) == ["record", "patient"]
  frame = sweep(tmp_path / "targets", [{TARGET: 3.0, SIGMA: 0.0}, {TARGET: math.inf, SIGMA: 0.0}])
  assert list(frame.groupby("point")["epsilon_max"].first()) == [
    pytest.approx(3, rel=0.01),
    math.inf,
  ]
  assert list(frame.groupby("point")[TARGET].first()) == [3.0, math.inf]
  assert list(frame.groupby("point")["privacy.mechanism"].first()) == ["dp_sgd", "none"]
  expected, _ = alone(tmp_path / "alone", configure(base(), {TARGET: math.inf}, AXES))
  close(
    json.loads((table.folder_of(tmp_path / "targets", 1) / "summary.json").read_text()), expected
  )


def test_a_point_that_diverges_says_so_and_touches_no_other(tmp_path):
  config = base(privacy__mechanism="none", privacy__noise_multiplier=0.0)

  def lines(name, middle):
    frame = sweep(tmp_path / name, [{RATE: 0.1}, {RATE: middle}, {RATE: 0.2}], config)
    return frame.groupby("point").first().to_dict("records")

  wild, calm = lines("wild", 1e38), lines("calm", 0.3)
  assert [line["stopped"] for line in wild] == ["completed", "diverged", "completed"]
  assert np.isnan(wild[1]["all.auroc"])
  for number in (0, 2):
    for metric in ("all.loss", "all.accuracy", "all.auroc", "loss"):
      assert wild[number][metric] == calm[number][metric]


@pytest.mark.slow
def test_a_sweep_of_seeds_of_phantoms_has_images_of_its_own_for_each(tmp_path):
  points = [{"seed": 0}, {"seed": 1}]
  axes = ("partition", "init", "sampling")
  sweep(tmp_path / "sweep", points, seed_axes=axes)
  for number in (0, 1):
    expected, _ = alone(tmp_path / f"alone{number}", configure(base(), points[number], axes))
    folder = table.folder_of(tmp_path / "sweep", number)
    close(json.loads((folder / "summary.json").read_text()), expected)


def test_what_a_kill_left_out_is_finished_to_the_same_bytes(swept, tmp_path):
  again = tmp_path / "again"
  shutil.copytree(swept, again)
  for name in (table.RESULTS, "results.csv", "timing.csv"):
    (again / name).unlink()
  shutil.rmtree(table.folder_of(again, 1))
  (table.folder_of(again, 4) / "summary.json").unlink()  # killed while it wrote
  (table.folder_of(again, 4) / "metrics.jsonl").write_text('{"round": 0, ')
  sweep(again, TOGETHER, at_once=4)
  assert (again / table.RESULTS).read_bytes() == (swept / table.RESULTS).read_bytes()
  for number in (1, 4):
    for name in ("ledger.jsonl", "summary.json", "privacy.json"):
      ours, theirs = (table.folder_of(folder, number) / name for folder in (again, swept))
      assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_shards_in_folders_of_their_own_merge_to_the_whole(swept, tmp_path, capsys):
  points = TOGETHER[:4]
  whole = sweep(tmp_path / "whole", points)
  for index in (0, 1):
    sweep(tmp_path / f"part{index}", points, numbers=range(index, 4, 2))
  merge.join(tmp_path / "part0", [tmp_path / "part1"])
  assert "4 of 4 points" in capsys.readouterr().out
  merged = pd.read_parquet(tmp_path / "part0" / table.RESULTS)
  pd.testing.assert_frame_equal(merged, whole, rtol=1e-4, atol=1e-5)
  with pytest.raises(UserError, match="merge folders of one sweep"):
    merge.join(tmp_path / "part0", [swept])


def test_the_table_has_a_row_a_point_and_hospital_with_everything_in_it(swept):
  frame = pd.read_parquet(swept / table.RESULTS)
  assert len(frame) == 3 * len(TOGETHER)
  assert list(frame["hospital"][:3]) == [f"hospital {k}" for k in (1, 2, 3)]
  assert flat(to_dict(base())).keys() <= set(frame.columns)
  privacy = json.loads((table.folder_of(swept, 5) / "privacy.json").read_text())
  parties = privacy["guarantees"][0]["parties"]
  rows = frame[frame["point"] == 5]
  assert list(rows["epsilon"]) == [party["epsilon"] for party in parties]
  assert list(rows["delta"]) == [party["delta"] for party in parties]
  assert set(rows["epsilon_max"]) == {privacy["epsilon_max"]}
  assert min(frame["num_train"]) > 0
  np.testing.assert_array_equal(pd.read_csv(swept / "results.csv")["run_id"], frame["run_id"])
  assert list(pd.read_csv(swept / "timing.csv")["point"]) == list(range(len(TOGETHER)))


def test_a_sweep_is_not_resumed_by_another_version_of_this_package(swept, monkeypatch):
  table.begin(swept, base(), TOGETHER, AXES)  # the same one is
  monkeypatch.setattr(table, "__version__", "0.0.9")
  with pytest.raises(UserError, match=r"holds sweep .* and the fedjax_med, of the first start"):
    table.begin(swept, base(), TOGETHER, AXES)


def test_another_sweep_or_a_run_in_the_folder_is_refused(swept, tmp_path):
  with pytest.raises(UserError, match=r"holds sweep \w+, this one is"):
    table.begin(swept, base(), TOGETHER[:2], AXES)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match="holds a run; use another --workdir"):
    table.begin(tmp_path, base(), TOGETHER, AXES)
  with pytest.raises(UserError, match=r"sweep.json is missing; give the --workdir of a sweep"):
    table.read(tmp_path)


@pytest.mark.slow
def test_baselines_may_be_asked_for_by_a_point(tmp_path):
  table = sweep(tmp_path, [{"eval.local_baselines": True}, {"eval.local_baselines": False}])
  first, second = (table[table["point"] == number] for number in (0, 1))
  assert first["alone.auroc"].notna().all()
  assert second["alone.auroc"].isna().all()


@pytest.mark.slow
def test_baselines_of_a_point_are_those_of_the_run_by_itself(tmp_path):
  config = base(eval__local_baselines=True)
  points = [{SIGMA: 1.0}, {SIGMA: 2.0}]
  frame = sweep(tmp_path / "sweep", points, config)
  runs.run(configure(config, points[1], AXES), tmp_path / "alone", "smoke", "")
  folder = table.folder_of(tmp_path / "sweep", 1)
  for name in ("summary.json", "privacy.json", "baselines.json"):
    found, expected = (
      json.loads((place / name).read_text()) for place in (folder, tmp_path / "alone")
    )
    if name != "baselines.json":
      close({**found, "ledger": ""}, {**expected, "ledger": ""})
    else:
      assert [e["name"] for e in found["alone"]] == [e["name"] for e in expected["alone"]]
      close(found["pooled"]["curve"][-1], expected["pooled"]["curve"][-1])
  expected = json.loads((tmp_path / "alone" / "summary.json").read_text())["baselines"]
  rows = frame[frame["point"] == 1].to_dict("records")
  for row, by_itself in zip(rows, expected["alone"], strict=True):
    assert row["alone.loss"] == pytest.approx(by_itself["own"]["loss"], rel=1e-4)
    assert row["alone.all.loss"] == pytest.approx(by_itself["all"]["loss"], rel=1e-4)
    assert row["pooled.all.loss"] == pytest.approx(expected["pooled"]["loss"], rel=1e-4)
  again = json.loads((folder / "privacy.json").read_text())["not_covered"]
  assert len(set(again)) == len(again)
  write_report(folder)
  found = privacy_command.recompute(folder)  # of statement and report too
  assert found["rounds_of_weights"] is None
  assert ledger.read(folder).head in (folder / "privacy_statement.md").read_text()


@pytest.mark.slow
def test_points_of_one_seed_share_the_images_of_their_gans(tmp_path, monkeypatch):
  calls = []

  def make_images(config, hospitals):
    calls.append((config.seed, config.client.gan_steps))
    shape = (hospitals.dataset.num_synthetic, *hospitals.dataset.inputs.shape[1:])
    return np.random.default_rng(config.seed).integers(0, 256, shape).astype(np.uint8)

  monkeypatch.setattr(synthetic_images, "make_images", make_images)
  changes = {"client__synthetic": "gan", "privacy__mechanism": "none"}
  config = base(**changes, privacy__noise_multiplier=0.0, eval__local_baselines=True)
  rates = [
    {"seed": seed, "client.learning_rate": rate, "client.synthetic": "gan"}
    for seed in (0, 1)
    for rate in (0.1, 0.2)
  ]
  rates.append({**rates[-1], "client.synthetic": "none"})
  planned = plan(rates, config)
  assert calls == []  # nor would a dry run train any
  assert len(groups(planned)) == 3  # the federation and two baselines, with images and without

  def broken(config, hospitals):
    require(config.seed == 1, "the GAN did not stay finite", "lower client.gan_steps")
    return make_images(config, hospitals)

  monkeypatch.setattr(synthetic_images, "make_images", broken)
  with pytest.raises(UserError, match=r"point seed=0, .* finite"):
    sweep(tmp_path / "sweep", rates, config)
  monkeypatch.setattr(synthetic_images, "make_images", make_images)
  assert [table.has_run(tmp_path / "sweep", number) for number in range(5)] == [0, 0, 1, 1, 1]
  calls.clear()
  sweep(tmp_path / "sweep", rates, config)
  assert calls == [(0, 500)]
  alone = base(**changes, privacy__noise_multiplier=0.0, client__learning_rate=0.2)
  alone.seed = 1
  for number, alone.client.synthetic in ((3, "gan"), (4, "none")):
    runs.run(alone, tmp_path / alone.client.synthetic, "smoke", "test")
    one, other = (
      json.loads((folder / "summary.json").read_text())
      for folder in (tmp_path / alone.client.synthetic, tmp_path / f"sweep/points/{number:05d}")
    )
    assert one["run_id"] == other["run_id"]
    assert one.get("train_images") == other.get("train_images")
    assert other["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-4)
