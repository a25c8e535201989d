"""A task of another kind is one record: a run trains, is measured, reported and loaded by it."""

import dataclasses
import html
import json

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.report import reported_run
from fedjax_med.tasks import registry
from fedjax_med.tasks.classification import labels_of
from fedjax_med.tasks.task import Metric, Task, qualified
from fedjax_med.trained.loading import load
from fedjax_med.trained.predictions import make_probabilities
from tests.running import metrics, smoke_config


def severities(dataset):
  """A number for each example, as a scale of severity has."""
  return {"score": dataset.labels.astype(np.float32) * 2 - 1}


def error_metrics(predictions, targets):
  errors = np.abs(predictions[:, 0].astype(np.float64) - targets["score"])
  return {"mae": float(errors.mean()) if len(errors) else None, "n": len(errors)}


def squared_error(outputs, targets):
  return jnp.square(outputs[:, 0] - targets["score"])


SEVERITY = Task(
  name="severity",
  targets=severities,
  columns=lambda dataset: 1,
  loss=lambda label_smoothing: (
    lambda outputs, targets: jnp.square(outputs[:, 0] - targets["score"])
  ),
  predict=lambda outputs: outputs.astype(jnp.float32),
  tally=lambda outputs, targets: jnp.exp(-jnp.abs(outputs[:, 0] - targets["score"])),
  tallied="closeness",
  metrics=error_metrics,
  details=lambda predictions, targets: {},
  problem=lambda summary, class_names: "",
  shown=(Metric(name="mae", label="mean absolute error", better="lower", unit="points"),),
  strata=labels_of,
  figures=(),
  positive=lambda class_names: "",
  about=lambda positives: "",
  explained=lambda class_names: "The error is in points of the scale.",
)


@pytest.fixture(scope="module", params=["none", "dp_sgd"])
def ran(request, tmp_path_factory):
  """(hospitals, workdir of a run) of the dummy task, plain and private."""
  folder = tmp_path_factory.mktemp("severity")
  plain = {"privacy__noise_multiplier": 0.0} if request.param == "none" else {}
  config = smoke_config(
    server__num_rounds=2,
    eval__every=1,
    client__learning_rate=1e-3,
    privacy__mechanism=request.param,
    **plain,
  )
  hospitals = load_hospitals(config)
  dataset = dataclasses.replace(hospitals.dataset, task="severity")
  hospitals = dataclasses.replace(hospitals, dataset=dataset)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registry.TASKS, "severity", SEVERITY)
    reported_run.run(config, folder, "smoke", "test", lambda: hospitals)
    yield hospitals, folder


def test_metrics_of_the_task_are_in_every_file(ran):
  hospitals, folder = ran
  record = json.loads((folder / "config.json").read_text())
  assert (record["task"], record["num_columns"]) == ("severity", 1)
  summary = json.loads((folder / "summary.json").read_text())
  assert set(summary["test"]) == {"mae", "n"}
  assert "confusion" not in summary
  last = metrics(folder)[-1]
  assert last["split"] == "train"
  assert 0 < last["closeness"] < 1
  counts = [client["n"] for client in summary["clients"]]
  assert counts == hospitals.test.counts.tolist()


def test_the_loss_of_the_task_is_trained(ran):
  losses = [line["loss"] for line in metrics(ran[1]) if line["split"] == "train"]
  assert len(losses) == 2
  assert losses[0] != losses[1]


def test_the_report_shows_the_task_and_no_classes_of_predictions(ran):
  page = html.unescape((ran[1] / "report.html").read_text(encoding="utf-8"))
  assert "Mean absolute error" in page
  assert "The error is in points of the scale." in page
  assert "AUROC" not in page
  assert not (ran[1] / "figures" / "confusion.png").exists()


def test_the_model_of_a_finished_run_predicts_as_it_was_measured(ran):
  hospitals, folder = ran
  trained = load(folder)
  assert trained.task.name == "severity"
  rows = hospitals.test.indices[0, : hospitals.test.counts[0]]
  predictions = make_probabilities(trained)(hospitals.dataset.inputs[rows])
  expected = SEVERITY.metrics(predictions, {"score": severities(hospitals.dataset)["score"][rows]})
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["clients"][0]["mae"] == pytest.approx(expected["mae"], rel=1e-5)


def test_headings_name_the_class_that_a_metric_is_of():
  auroc, accuracy, f1, *_ = registry.TASKS["classification"].shown
  assert [qualified(metric, "tumour") for metric in (auroc, accuracy, f1)] == [
    "",
    "",
    " (positive: tumour)",
  ]
  assert [qualified(metric, "") for metric in (auroc, accuracy, f1)] == [" (macro)", "", " (macro)"]
