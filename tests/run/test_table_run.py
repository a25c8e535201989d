"""Runs on tables end to end: results, files, report, statement, predictions, and refusals."""

import csv
import html
import json
import re

import numpy as np
import pytest
from jax import export
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.prepare.case import federation
from fedjax_med.prepare.experiment import build
from fedjax_med.report import reported_run
from fedjax_med.run.measure import evaluated
from fedjax_med.run.single import train_rounds
from fedjax_med.run.summaries import hospital_record
from fedjax_med.trained import exporting, heat_page
from fedjax_med.trained.loading import load
from fedjax_med.trained.predictions import make_probabilities
from fedjax_med.trained.table_predictions import predict_table
from tests.data.table_cases import MANIFEST, columns_file, hospitals_folder, table_file
from tests.running import AT_SITES, config_of


def table_config(folder, manifest=MANIFEST, **changes) -> Config:
  """Logistic regression on three small hospitals, changed as by ``server__num_rounds=4``."""
  data = {
    "data.source": "table",
    "data.path": str(hospitals_folder(folder / "tables")),
    "data.columns": columns_file(folder, manifest),
  }
  return config_of(AT_SITES | data, **changes)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """(config, workdir) of a private run whose numbers are scaled by federated sums."""
  folder = tmp_path_factory.mktemp("table run")
  config = table_config(
    folder,
    data__scaling="federated",
    privacy__mechanism="dp_sgd",
    privacy__noise_multiplier=2.0,
  )
  with (folder / "tables" / "north.csv").open("a") as file:
    file.write("yes,Y1,95,120,x,none\n,Y2,40,120,f,none\n")
  reported_run.run(config, folder / "run", "table", "test")
  return config, folder / "run"


def test_hospitals_json_has_the_manifest_and_counts_of_what_was_met(ran):
  held = json.loads((ran[1] / "hospitals.json").read_text())
  table = held["table"]
  assert (table["outside"], table["unknown"]) == ({"age": 1}, {"sex": 1})
  assert set(table["missing"]) == {"east", "north", "south"}
  assert 0 < table["missing"]["north"]["pressure"] < 0.2
  assert len(held["skipped"]) == 1
  assert held["skipped"][0][0] == ""  # whose record it is stands in files.json
  assert "north.csv" in (ran[1] / "files.json").read_text()
  assert "grey" not in held


def test_the_statement_lists_the_sums_that_scale_as_a_release(ran):
  text = (ran[1] / "privacy_statement.md").read_text()
  assert "one training record of one hospital" in text
  assert "exact sums or values over the records leave every hospital, and no ε counts them" in text
  assert not re.search(r"\bimages?\b", text)


def test_the_report_speaks_of_records(ran):
  page = html.unescape((ran[1] / "report.html").read_text(encoding="utf-8"))
  words = re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
  assert "training records" in words
  assert "'age' 1" in words
  assert not re.search(r"(?<![\w./])images?\b(?!_)", words)
  assert not re.search(r"\bpixels\b", words)


def test_predictions_on_a_table_are_those_of_the_run(ran, tmp_path):
  config, folder = ran
  trained = load(folder)
  number, met = predict_table(trained, tmp_path.parent / config.data.path, tmp_path / "out.csv")
  assert number == 152
  assert met == "1 values of 'age' outside its range; 1 unknown categories of 'sex'"
  with (tmp_path / "out.csv").open() as file:
    found = {f"{row['file']}:{row['line']}": float(row["probability of yes"])
             for row in csv.DictReader(file)}  # fmt: skip
  hospitals = load_hospitals(config)
  summary = json.loads((folder / "summary.json").read_text())
  rows = hospitals.split.test
  scores = [found[hospitals.dataset.names[row]] for row in rows]
  auroc = roc_auc_score(hospitals.dataset.labels[rows], scores)
  assert summary["test"]["auroc"] == pytest.approx(auroc, abs=1e-6)


def test_predictions_need_the_columns_and_required_values(ran, tmp_path):
  trained = load(ran[1])
  path = tmp_path / "new.csv"
  path.write_text("age,pressure\n40,120\n")
  with pytest.raises(UserError, match=r"new.csv has no column 'sex', which the model reads; its"):
    predict_table(trained, path, tmp_path / "out.csv")
  path.write_text("age,pressure,sex\n40,120,f\n,120,f\n")
  with pytest.raises(UserError, match=r"new.csv, line 3: no value of the required column 'age'"):
    predict_table(trained, path, tmp_path / "out.csv")
  path.write_text("age,pressure,sex\n40,,f\n")
  assert predict_table(trained, path, tmp_path / "out.csv") == (1, "")
  alone = trained._replace(table={**(trained.table or {}), "scaling": "hospital"})
  with pytest.raises(UserError, match=r"scaled numbers by statistics of each hospital .*; train"):
    predict_table(alone, path, tmp_path / "out.csv")


def test_maps_of_a_run_on_a_table_are_refused_and_its_program_is_exported(ran, tmp_path):
  trained = load(ran[1])
  with pytest.raises(UserError, match=r"was trained on records, over which no map is drawn"):
    heat_page.explain(
      trained, images=tmp_path, num_images=1, target="predicted", layer_name="", data_path="",
      show_patients=False, tell=print,
    )  # fmt: skip
  said = exporting.export_model(trained, "jax", tmp_path / "model.bin")
  dataset, made = load_hospitals(ran[0]).dataset, make_probabilities(trained)
  assert f"a program of float32 records [b, {dataset.inputs.shape[1]}] to prob" in said
  about = json.loads((tmp_path / "model.bin.json").read_text(encoding="utf-8"))
  assert dataset.table is not None
  assert about["inputs"] == list(dataset.table.features)
  assert about["columns"]["columns"]["age"]["low"] < about["columns"]["columns"]["age"]["high"]
  program = export.deserialize(bytearray((tmp_path / "model.bin").read_bytes()))
  np.testing.assert_allclose(program.call(dataset.inputs), made(dataset.inputs), atol=1e-6)
  exporting.export_model(trained, "safetensors", tmp_path / "model.safetensors")
  alone = trained._replace(table={**(trained.table or {}), "scaling": "hospital"})
  with pytest.raises(UserError, match=r"scaled numbers by statistics of each hospital .*; train"):
    exporting.export_model(alone, "jax", tmp_path / "other.bin")


def test_a_network_for_pictures_is_refused_with_its_reason(tmp_path):
  config = table_config(tmp_path, model__name="cnn_small")
  with pytest.raises(UserError, match=r"'cnn_small' is a network for pictures, and records of shape"
                     r" \[7\] are none; use --config.model.name=linear or mlp"):  # fmt: skip
    build(config, load_hospitals(config))


def test_units_that_records_have_not_are_refused(tmp_path):
  private = {"privacy__mechanism": "dp_sgd", "privacy__noise_multiplier": 1.0}
  config = table_config(tmp_path, **private, privacy__unit="group")
  with pytest.raises(UserError, match=r"privacy.unit='group' protects near-duplicates, which rec"):
    federation(config, load_hospitals(config))
  bare = MANIFEST.replace('patient = "person"', "")
  config = table_config(tmp_path, bare, **private, privacy__unit="patient")
  with pytest.raises(UserError, match=r"who is on every record: Nothing says which records are of"):
    federation(config, load_hospitals(config))


def test_all_records_of_a_patient_are_one_unit_and_equal_records_of_others_are_not(tmp_path):
  private = {"privacy__mechanism": "dp_sgd", "privacy__noise_multiplier": 1.0}
  config = table_config(tmp_path, **private, privacy__unit="patient")
  with (tmp_path / "tables" / "south.csv").open("a") as file:
    file.write("yes,P10,70,190,f,none\n" * 3 + "yes,Q1,70,190,f,none\nyes,Q2,70,190,f,none\n")
  hospitals = load_hospitals(config)
  local = federation(config, hospitals).protection.local
  assert local is not None
  names = hospitals.names
  south = hospitals.train.counts[names.index("south")]
  first = hospitals.dataset.names.index("south.csv:2")  # P10, whose other records are the last
  in_train = first in hospitals.split.train
  assert local.mechanisms[names.index("south")].num_units == south - 3 * in_train


def test_image_settings_have_no_effect_and_are_refused(tmp_path):
  for name, value in {"client__augmentation": "flip", "client__synthetic": "gan"}.items():
    with pytest.raises(
      UserError, match=r"is read with a data.source of pictures (or series )?only"
    ):
      table_config(tmp_path, **{name: value})


def test_a_hospital_of_one_class_is_named_and_its_auroc_is_none(tmp_path):
  config = table_config(tmp_path, server__num_rounds=1)
  path = tmp_path / "tables" / "south.csv"
  path.write_text(re.sub(r"^(yes|no),", "yes,", path.read_text(), flags=re.MULTILINE))
  experiment = build(config, load_hospitals(config))
  clients = train_rounds(experiment).last.clients
  assert [client["auroc"] is None for client in clients] == [False, False, True]
  notes = data_notes(hospital_record(experiment.hospitals), "record", show_names=True)
  text = "'south' has training records of one class only (yes): a model trained there alone learns"
  assert [note.warning for note in notes if note.text.startswith(text)] == [True]


def test_pooled_training_to_the_end_is_logistic_regression_of_scikit_learn(tmp_path):
  config = table_config(tmp_path, partition__scheme="iid", partition__num_clients=1)
  config.server.num_rounds = 30
  config.data.path = str(table_file(tmp_path / "one.csv", 120))
  config.client.batch_size, config.client.num_local_steps = 128, 100
  config.client.learning_rate, config.eval.every = 2.0, 30
  validate(config)
  experiment = build(config, load_hospitals(config))
  outcome = train_rounds(experiment)
  parts, hospitals = experiment.program.parts, experiment.hospitals
  weights = evaluated(parts, outcome.state)
  head = parts.spec.trees(weights.params, weights.state)[0]["head"]
  inputs = hospitals.dataset.inputs[hospitals.split.train].astype(np.float64)
  labels = hospitals.dataset.labels[hospitals.split.train]
  exact = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(inputs, labels)
  found = inputs @ np.diff(np.asarray(head["kernel"], np.float64))[:, 0]
  found += np.diff(np.asarray(head["bias"], np.float64))[0]
  np.testing.assert_allclose(found, exact.decision_function(inputs), atol=1e-3)
  kernel = np.diff(np.asarray(head["kernel"], np.float64))[:2, 0]
  np.testing.assert_allclose(kernel, exact.coef_[0, :2], atol=1e-3)  # of numbers: identified
