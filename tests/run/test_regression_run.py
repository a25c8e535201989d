"""Runs that predict numbers: files, models at home, privacy, predictions, references."""

import csv
import html
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import root_mean_squared_error

from fedjax_med import study
from fedjax_med.api import simulate, simulate_grid
from fedjax_med.audit import shadow_models
from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.data.gdsc import METHYLATION
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.experiment import build
from fedjax_med.privacy import ledger
from fedjax_med.report import reported_run
from fedjax_med.run import training
from fedjax_med.run.console import make_console
from fedjax_med.tasks import registry
from fedjax_med.tasks.regression import targets_of
from fedjax_med.trained.loading import load
from fedjax_med.trained.table_predictions import predict_table
from tests.data.lines import make_gdsc
from tests.data.table_cases import TARGETS, columns_file, target_folder
from tests.running import AT_SITES, config_of

OWN = {"server.algorithm": "fedper", "server.personal_layers": "head/bias"}
PRIVATE = {
  "privacy.mechanism": "dp_sgd",
  "privacy.target_epsilon": 8.0,
  "data.scaling": "ranges",
}


def config(folder, **changes) -> Config:
  fields = AT_SITES | {
    "data.source": "gdsc",
    "data.path": str(folder),
    "data.scaling": "federated",
    "client.learning_rate": 0.3,
    "client.batch_size": 8,
    "server.num_rounds": 6,
    "eval.every": 3,
  }
  return config_of(fields | changes)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
  return make_gdsc(tmp_path_factory.mktemp("gdsc") / "lines")


KINDS = [pytest.param("global", marks=pytest.mark.slow), "own", "private"]


@pytest.fixture(scope="module", params=KINDS)
def ran(request, lines, tmp_path_factory):
  """(kind, config, workdir, text of the terminal)."""
  changes = {"global": {}, "own": OWN, "private": PRIVATE}[request.param]
  made, folder = config(lines, **changes), tmp_path_factory.mktemp(request.param)
  console = make_console()
  with console.capture() as said:
    if request.param == "private":  # a page takes seconds
      training.run(made, folder, "lines", "test", console=console)
    else:
      reported_run.run(made, folder, "lines", "test", console=console)
  return request.param, made, folder, said.get()


def summary_of(folder):
  return json.loads((folder / "summary.json").read_text())


def test_the_means_of_training_stand_beside_every_result(ran):
  kind, made, folder, said = ran
  dealt = load_hospitals(made)
  targets, rows = targets_of(dealt.dataset), dealt.split.test
  values, means = (targets[name][rows].astype(float) for name in ("values", "means"))
  known = ~np.isnan(values)
  expected = root_mean_squared_error(values[known], means[known])
  summary = summary_of(folder)
  assert summary["test"]["rmse_of_means"] == pytest.approx(expected, rel=1e-6)
  assert all("rmse_of_means" in client for client in summary["clients"])
  assert sum(summary["target"]["n"]) == known.sum()
  assert "RMSE of means" in said
  assert f"{expected:.3f}" in said
  assert "(gdsc, 6 inputs, task regression)" in " ".join(said.split())
  if kind == "private":
    return
  page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
  assert "RMSE of means" in page
  assert f"{expected:.3f}" in page
  assert "task: regression" in page
  assert "Train: line" not in page
  assert (folder / "figures" / "target.png").exists()
  assert not (folder / "figures" / "examples.png").exists()


def test_what_is_learned_beats_the_means(ran):
  kind, _, folder, _ = ran
  test = summary_of(folder)["test"]
  assert np.isfinite(test["rmse"])
  if kind != "private":
    assert test["rmse"] < 0.8 * test["rmse_of_means"]
    assert test["target_r_mean"] > 0.6


def test_exact_sums_are_listed_once_and_in_the_ledger_where_there_is_one(ran):
  kind, _, folder, _ = ran
  statement = (folder / "privacy_statement.md").read_text(encoding="utf-8")
  inputs = "mean and deviation of each number column (data.scaling=federated) and mean and spread"
  told = "Mean and spread of each target" if kind == "private" else inputs.capitalize()
  assert statement.count("exact sums or values over the records leave every hospital") == 1
  assert (told if kind == "private" else "M" + inputs[1:]) in statement
  if kind == "private":
    book = ledger.read(folder)
    assert ledger.statistics_of(book) == ("mean and spread of each target",)
    gaps = json.loads((folder / "privacy.json").read_text())["not_covered"]
    assert sum(gap.startswith("Mean and spread of each target: exact sums") for gap in gaps) == 1


def test_intercepts_stay_at_their_hospital_where_asked(ran):
  kind, _, folder, _ = ran
  if kind != "own":
    return
  with pytest.raises(UserError, match="say whose model is meant"):
    load(folder)
  one, other = (load(folder, hospital=name).params["head"] for name in ("lung", "skin"))
  np.testing.assert_array_equal(one["kernel"], other["kernel"])
  assert not np.array_equal(one["bias"], other["bias"])


def test_predictions_of_a_table_are_what_the_run_measured(ran, lines, tmp_path):
  kind, made, folder, _ = ran
  dealt, place = load_hospitals(made), tmp_path / "predictions.csv"
  model = load(folder, hospital="lung" if kind == "own" else "")
  assert predict_table(model, lines / METHYLATION, place) == (80, "")
  with place.open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == ["record", "target", "prediction"]
  told = {(row["record"], row["target"]): float(row["prediction"]) for row in rows}
  assert len(told) == 80 * 4
  targets, names = dealt.dataset.targets, dealt.dataset.names
  assert targets is not None
  held = dealt.test.indices[dealt.names.index("lung")][: dealt.test.counts[0]]
  pairs = [(n, m) for n in held for m in range(4) if not np.isnan(targets.values[n, m])]
  errors = [targets.values[n, m] - told[names[n], targets.names[m]] for n, m in pairs]
  summary = summary_of(folder)
  assert summary["clients"][0]["name"] == "lung"
  rmse = np.sqrt(np.mean(np.square(errors)))
  assert summary["clients"][0]["rmse"] == pytest.approx(rmse, rel=1e-5)


def test_pooled_training_converges_to_least_squares_of_the_known_values(lines):
  made = config(
    lines,
    **{
      "partition.scheme": "iid",
      "partition.num_clients": 1,
      "client.batch_size": 64,
      "client.learning_rate": 1.0,
      "client.num_local_steps": 50,
      "server.num_rounds": 12,
      "eval.every": 12,
    },
  )
  result = simulate(made)
  dealt = load_hospitals(made)
  data, targets = dealt.dataset, dealt.dataset.targets
  assert targets is not None
  means, spreads = targets.fitted["means"], targets.fitted["spreads"]
  values = (targets.values - means) / spreads
  known = ~np.isnan(values)
  # An example's loss is the mean over its known targets, so that each of them weighs 1 / number.
  weights = np.sqrt(known / np.maximum(known.sum(1, keepdims=True), 1))
  inputs = np.column_stack([data.inputs, np.ones(len(data.inputs))]).astype(float)
  train, test, predicted = dealt.split.train, dealt.split.test, np.zeros(values.shape)
  for m in range(values.shape[1]):
    rows = train[known[train, m]]
    weight = weights[rows, m]
    solved = np.linalg.lstsq(inputs[rows] * weight[:, None], values[rows, m] * weight)[0]
    predicted[:, m] = inputs @ solved * spreads[m] + means[m]
  errors = (predicted - targets.values)[test][known[test]]
  assert result.overall["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), abs=1e-3)


def test_a_table_with_targets_trains_without_code(tmp_path):
  made = config(
    target_folder(tmp_path / "tables"),
    **{"data.source": "table", "data.columns": columns_file(tmp_path, TARGETS)},
  )
  training.run(made, tmp_path / "run", "table", "test", console=make_console(quiet=True))
  test = summary_of(tmp_path / "run")["test"]
  assert test["rmse"] < 0.5 * test["rmse_of_means"]
  model = load(tmp_path / "run")
  new = tmp_path / "new.csv"
  new.write_text("age,sex\n30,f\n70,m\n")
  assert predict_table(model, new, tmp_path / "out.csv") == (2, "")
  frame = pd.read_csv(tmp_path / "out.csv")
  assert frame["record"].tolist() == ["new.csv:2"] * 2 + ["new.csv:3"] * 2
  assert frame["target"].tolist() == ["dose", "days"] * 2
  np.testing.assert_allclose(frame["prediction"], [160, 7, 270, 3], rtol=0.25)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"model.name": "cnn_small"}, r"'cnn_small' is a network for pictures, and records of shape"),
    (
      {"client.label_smoothing": 0.1},
      r"client.label_smoothing=0.1 is read with a data.source of c",
    ),
    ({"client.augmentation": "flip"}, r"is read with a data.source of pictures or series only"),
  ],
)
def test_what_needs_pictures_or_classes_is_refused_before_anything_compiles(
  lines, changes, sentence
):
  def begin():
    made = config(lines, **changes)
    build(made, load_hospitals(made))

  with pytest.raises(UserError, match=sentence):
    begin()


def test_a_loss_of_whole_batches_is_refused_under_privacy_of_records(lines, monkeypatch):
  joint = registry.TASKS["regression"]._replace(joint="its loss ranks the records of a batch")
  monkeypatch.setitem(registry.TASKS, "regression", joint)
  made = config(lines, **PRIVATE)
  with pytest.raises(UserError, match=r"privacy.mechanism='dp_sgd' with the task 'regression': it"):
    build(made, load_hospitals(made))


def test_attacks_on_probabilities_are_refused(lines):
  made = config(lines)
  with pytest.raises(UserError, match=r"attacks probabilities of classes, and the task is 'regre"):
    shadow_models.prepare(made, load_hospitals(made), 8, 0)


def test_a_metric_of_classes_is_not_one_of_a_regression():
  rows = {"point": [0, 0], "task": ["regression"] * 2, "rmse": [1.0, 2.0], "all.rmse": [1.5] * 2}
  frame = pd.DataFrame(rows | {"seed": [0, 0]})
  assert study.by_point(frame)["worst.rmse"].tolist() == [2.0]
  with pytest.raises(UserError, match=r"column=.all.auroc. is unknown; did you mean"):
    study.aggregate(frame, "seed", "all.auroc")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["grouped", "pairs"])
def test_points_of_a_sweep_with_other_training_sides_equal_runs_by_themselves(lines, split):
  made = config(lines, **{"data.split": split})
  frame = simulate_grid(made, {"data.seed": [0, 1]})
  for seed in (0, 1):
    alone = simulate(config(lines, **{"data.split": split, "data.seed": seed})).overall
    point = frame[frame["data.seed"] == seed].iloc[0]
    for name in ("rmse", "rmse_of_means"):
      assert point[f"all.{name}"] == pytest.approx(alone[name], rel=1e-4)
