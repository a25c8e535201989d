"""Survival runs end to end: results, files, report, statement, predictions, refusals, weights."""

import csv
import html
import json
import re

import numpy as np
import pytest

from fedjax_med.audit import shadow_models
from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.case import federation
from fedjax_med.prepare.experiment import build
from fedjax_med.report import reported_run
from fedjax_med.run.measure import evaluated
from fedjax_med.run.single import train_rounds
from fedjax_med.tasks.concordance import concordance
from fedjax_med.trained.loading import load
from fedjax_med.trained.table_predictions import predict_table
from tests.data.survival_cases import SURVIVAL, survival_folder
from tests.data.table_cases import columns_file
from tests.running import AT_SITES, config_of
from tests.sweep.sweeping import sweep
from tests.tasks.test_survival import covariates, newton

PRIVATE = {"privacy__mechanism": "dp_sgd", "privacy__noise_multiplier": 1.0}
HAZARDS = {"data__survival": "hazards", "data__intervals": 4}


def survival_config(folder, manifest=SURVIVAL, **changes) -> Config:
  """Three small hospitals with a linear network, changed as by ``server__num_rounds=4``."""
  data = {
    "data.source": "table",
    "data.path": str(survival_folder(folder / "tables")),
    "data.columns": columns_file(folder, manifest),
  }
  return config_of(AT_SITES | data, **changes)


@pytest.fixture(scope="module")
def private(tmp_path_factory):
  """(config, workdir) of a private run on hazards whose intervals end at quantiles."""
  folder = tmp_path_factory.mktemp("hazards")
  config = survival_config(folder, **PRIVATE, **HAZARDS, data__interval_bounds="quantiles")
  reported_run.run(config, folder / "run", "survival", "test")
  return config, folder / "run"


@pytest.fixture(scope="module")
def cox(tmp_path_factory):
  """(config, workdir) of a Cox run."""
  folder = tmp_path_factory.mktemp("cox")
  config = survival_config(folder)
  reported_run.run(config, folder / "run", "survival", "test")
  return config, folder / "run"


@pytest.mark.parametrize("made", ["private", "cox"])
def test_predictions_on_a_table_have_the_c_of_the_run(made, request, tmp_path):
  config, folder = request.getfixturevalue(made)
  number, met = predict_table(load(folder), folder.parent / "tables", tmp_path / "out.csv")
  assert (number, met) == (150, "")
  with (tmp_path / "out.csv").open() as file:
    rows = list(csv.DictReader(file))
  risk_name = "risk" if made == "private" else "log relative risk"
  assert list(rows[0])[:2] == ["record", risk_name]
  hospitals = load_hospitals(config)
  summary, test = json.loads((folder / "summary.json").read_text()), hospitals.split.test
  lines = [line for name in ("east", "north", "south") for line in
           (folder.parent / "tables" / f"{name}.csv").read_text().splitlines()[1:]]  # fmt: skip
  risk = np.array([float(row[risk_name]) for row in rows])
  assert [row["record"] for row in rows] == [line.split(",")[2] for line in lines]
  targets = hospitals.dataset.targets
  assert targets is not None
  time, event = targets.values[test, 0], targets.values[test, 1] == 1
  assert summary["test"]["c_index"] == pytest.approx(concordance(time, event, risk[test]).c_index)
  owners = np.zeros(len(lines), int)
  for k, row in enumerate(hospitals.test.indices):
    owners[row[: hospitals.test.counts[k]]] = k
  within = concordance(time, event, risk[test], owners[test]).c_index
  assert summary["test"]["c_within"] == pytest.approx(within, abs=1e-9)


def test_predictions_of_hazards_are_curves_that_fall(private, tmp_path):
  _, folder = private
  predict_table(load(folder), folder.parent / "tables", tmp_path / "out.csv")
  with (tmp_path / "out.csv").open() as file:
    heading, *rows = csv.reader(file)
  ends = json.loads((folder / "hospitals.json").read_text())["targets"]["fitted"]["ends"]
  assert heading[2:] == [f"no event to {end:.7g}" for end in ends]
  curves = np.array([row[2:] for row in rows], float)
  assert (np.diff(curves, axis=1) < 0).all()
  assert ((curves > 0) & (curves < 1)).all()


def test_quantiles_of_events_are_a_release_in_ledger_statement_and_report(private):
  text = "Quantiles of the times of events (data.interval_bounds=quantiles): exact sums or values"
  record = json.loads((private[1] / "privacy.json").read_text())
  assert any(gap.startswith(text) for gap in record["not_covered"])
  assert text in (private[1] / "privacy_statement.md").read_text()
  page = html.unescape((private[1] / "report.html").read_text(encoding="utf-8"))
  assert text in page
  assert "Kaplan-Meier estimates of all test records in three groups" in page
  words = re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
  assert not re.search(r"(?<![\w./])images?\b(?!_)", words)
  curves = json.loads((private[1] / "summary.json").read_text())["kaplan_meier"]
  assert sum(third["n"] for third in curves["thirds"]) == 30


@pytest.mark.slow
def test_baselines_are_measured_as_the_federation(tmp_path):
  config = survival_config(tmp_path, eval__local_baselines=True)
  reported_run.run(config, tmp_path / "run", "survival", "test")
  baselines = json.loads((tmp_path / "run" / "summary.json").read_text())["baselines"]
  assert [0 <= entry["own"]["c_index"] <= 1 for entry in baselines["alone"]] == [True] * 3
  assert baselines["pooled"]["c_index"] > 0.6


def test_metrics_of_both_sides_are_in_the_files(cox):
  summary = json.loads((cox[1] / "summary.json").read_text())
  assert 0.6 < summary["test"]["c_index"] <= 1
  lines = [json.loads(line) for line in (cox[1] / "metrics.jsonl").read_text().splitlines()]
  test = [line for line in lines if line["split"] == "test"]
  assert test[0]["c_index"] == 0.5  # all risks are 0 before the first round
  assert test[-1]["loss"] < test[0]["loss"]
  train = [line for line in lines if line["split"] == "train"]
  assert 0.5 < train[-1]["pairs in order"] <= 1


def test_cox_is_refused_where_single_losses_are_needed_and_attacks_too(cox, tmp_path):
  config = survival_config(tmp_path, **PRIVATE)
  with pytest.raises(UserError, match=r"the partial likelihood of a record is made of .*; use a l"):
    federation(config, load_hospitals(config))
  config = survival_config(tmp_path, execution__microbatch=8)
  with pytest.raises(UserError, match=r"execution.microbatch=8 with the task 'survival_cox'"):
    federation(config, load_hospitals(config))
  config = survival_config(tmp_path, client__label_smoothing=0.1)
  with pytest.raises(UserError, match=r"client.label_smoothing=0.1 is of classes"):
    build(config, load_hospitals(config))
  config = survival_config(tmp_path)
  with pytest.raises(UserError, match=r"attacks probabilities of classes, and the task is 'surviv"):
    shadow_models.prepare(config, load_hospitals(config), 4, 0)


def test_a_hospital_without_an_event_sends_nothing_and_the_others_learn(tmp_path):
  config = survival_config(tmp_path, server__num_rounds=2)
  path = tmp_path / "tables" / "east.csv"
  path.write_text(re.sub(r"(?m)^([\d.]+),1,", r"\1,0,", path.read_text()))
  experiment = build(config, load_hospitals(config))
  outcome = train_rounds(experiment)
  by_name = {client["name"]: client for client in outcome.last.clients}
  assert by_name["east"]["c_index"] is None
  assert outcome.last.test["c_index"] > 0.5


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity", "shards"])
def test_every_partition_deals_records_of_survival(tmp_path, scheme):
  config = survival_config(tmp_path, partition__scheme=scheme, partition__num_clients=3)
  hospitals = load_hospitals(config)
  assert hospitals.train.counts.sum() + hospitals.test.counts.sum() == 150


@pytest.mark.slow
def test_a_resumed_run_and_a_point_of_a_sweep_are_the_run(tmp_path):
  changes = {"data__scaling": "federated", **HAZARDS, "data__interval_bounds": "quantiles"}
  config = survival_config(tmp_path, server__num_rounds=2, **changes)
  reported_run.run(config, tmp_path / "run", "survival", "test")
  config.server.num_rounds = 4
  reported_run.run(config, tmp_path / "run", "survival", "test")
  resumed = json.loads((tmp_path / "run" / "summary.json").read_text())
  whole = train_rounds(build(config, load_hospitals(config))).last.test
  assert resumed["test"]["loss"] == pytest.approx(whole["loss"], rel=1e-6)
  table = sweep(tmp_path / "sweep", [{"data.seed": seed} for seed in (0, 1)], config)
  assert table["all.c_index"][0] == pytest.approx(whole["c_index"], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
  {"server__algorithm": "scaffold"}, {"server__algorithm": "performance"},
  {**HAZARDS, "server__algorithm": "fedper", "server__personal_layers": "head/bias"},
  {"server__algorithm": "ditto", "model__name": "mlp"},
  {"client_privacy__mechanism": "dp_fedavg", "client_privacy__noise_multiplier": 0.5,
   "server__weighting": "uniform"},
  {**PRIVATE, **HAZARDS, "privacy__unit": "patient"},
])  # fmt: skip
def test_algorithms_and_units_train_survival(tmp_path, changes):
  config = survival_config(tmp_path, **changes)
  if changes.get("privacy__unit") == "patient":  # a patient with two records
    with (tmp_path / "tables" / "north.csv").open("a") as file:
      file.write("10,1,P0-1,50,1\n")
  summary = train_rounds(build(config, load_hospitals(config))).last
  assert summary.test["c_index"] is not None
  assert np.isfinite(summary.probabilities).all()


@pytest.mark.slow
def test_pooled_cox_to_the_end_has_the_weights_of_the_partial_likelihood(tmp_path):
  """Those of lifelines' CoxPHFitter: ``newton`` has them in tests/tasks/test_survival.py."""
  rows, time, event = covariates()
  rows = rows.round(4)
  manifest = "\n".join(
    ['time = "t"', 'event = "e"', "[columns]"]
    + [f'{name} = {{ kind = "number", low = -4, high = 4, required = true }}' for name in "abc"]
  )
  config = survival_config(tmp_path, manifest, partition__scheme="iid", partition__num_clients=1)
  lines = [f"{t:.9g},{int(e)},{','.join(map(str, row))}" for t, e, row in
           zip(time, event, rows, strict=True)]  # fmt: skip
  path = tmp_path / "one.csv"
  path.write_text("\n".join(["t,e,a,b,c", *lines]) + "\n")
  config.data.path = str(path)
  config.client.batch_size, config.client.num_local_steps = 128, 300
  config.client.learning_rate, config.server.num_rounds, config.eval.every = 20.0, 4, 4
  validate(config)
  experiment = build(config, load_hospitals(config))
  outcome = train_rounds(experiment)
  weights = evaluated(experiment.program.parts, outcome.state)
  head = experiment.program.parts.spec.trees(weights.params, weights.state)[0]["head"]
  train = experiment.hospitals.split.train
  exact = newton(rows[train], time[train], event[train])
  np.testing.assert_allclose(np.asarray(head["kernel"])[:, 0] / 4, exact, atol=1e-3)
