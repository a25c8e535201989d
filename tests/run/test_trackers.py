"""Trackers get the numbers of metrics.jsonl; one without its package is refused in a sentence."""

import contextlib
import importlib
import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from configs.smoke import get_config
from fedjax_med.core.errors import UserError
from fedjax_med.report import reported_run as runs
from fedjax_med.run import trackers
from fedjax_med.tasks.classification import CLASSIFICATION, NAMES


def events(folder):
  """(tag, step) -> value of the event files: records of length, checksum, bytes, checksum."""
  found = {}
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data, place = path.read_bytes(), 0
    while place < len(data):
      (length,) = struct.unpack_from("<Q", data, place)
      event = event_pb2.Event.FromString(data[place + 12 : place + 12 + length])  # pyright: ignore[reportAttributeAccessIssue]
      found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
      place += 16 + length
  return found


def test_tensorboard_files_hold_the_metrics_of_every_log_point(tmp_path):
  config = get_config()
  config.model.name, config.eval.tracker, config.server.num_rounds = "linear", "tensorboard", 4
  runs.run(config, tmp_path, "smoke", "")
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  found = events(tmp_path / "tensorboard")
  tests = [line for line in lines if line["split"] == "test"]
  assert [line["round"] for line in tests] == [0, 2, 4]
  for line in tests:
    assert found["test/auroc", line["round"]] == pytest.approx(line["auroc"])
    assert found["epsilon", line["round"]] == pytest.approx(line["epsilon_max"])
    own = line["clients"][1]
    assert found["hospital_2/loss", line["round"]] == pytest.approx(own["loss"])


def test_undefined_values_are_left_out_and_names_hold_no_odd_characters():
  client = {**dict.fromkeys(NAMES, 0.5), "auroc": None, "name": "St. Anna (Zürich)"}
  line = {**dict.fromkeys(NAMES, 0.25), "f1": None, "clients": [client]}
  found = trackers.values_of({**line, "epsilon_max": float("inf")}, CLASSIFICATION)
  assert found["St. Anna _Zürich_/accuracy"] == 0.5
  assert "test/f1" not in found
  assert "epsilon" not in found
  assert all(not key.endswith("auroc") or key == "test/auroc" for key in found)


def test_hospitals_that_differ_in_odd_characters_only_keep_their_own_values():
  names = ("A?", "A!")
  clients = [{**dict.fromkeys(NAMES, k), "name": name} for k, name in enumerate(names)]
  clients[0]["f1"] = None  # a gap moves no other value to its name
  line = {**dict.fromkeys(NAMES, 0.25), "clients": clients}
  found = trackers.values_of(line, CLASSIFICATION)
  assert (found["A_/loss"], found["A_/loss_"]) == (0, 1)
  assert "A_/f1" not in found
  assert found["A_/f1_"] == 1


def test_a_tracker_gets_text_that_it_can_store(monkeypatch, tmp_path):
  given = []

  @contextlib.contextmanager
  def keep(folder, run_id, config):
    given.append(config)
    yield lambda *_: None

  monkeypatch.setitem(trackers.TRACKERS, "mlflow", keep)
  with trackers.track(
    "mlflow", tmp_path, "id", {"data": {"path": "/a/\udc93", "size": 1}}, CLASSIFICATION
  ):
    pass
  assert given == [{"data": {"path": "/a/\\x93", "size": 1}}]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_without_its_package_is_refused_in_a_sentence(monkeypatch, tmp_path, name):
  def missing(module):
    raise ImportError(module)

  monkeypatch.setattr(importlib, "import_module", missing)
  sentence = rf"eval.tracker={name} needs the package .*; run python -m pip install .*\[{name}\]"
  with (
    pytest.raises(UserError, match=sentence),
    trackers.track(name, tmp_path, "a", {}, CLASSIFICATION),
  ):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow asks SQLAlchemy for old things
def test_mlflow_gets_the_metrics(tmp_path):
  tracking = pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed")
  line = {**dict.fromkeys(NAMES, 0.25), "clients": [], "epsilon_max": 3.0}
  with trackers.track(
    "mlflow", tmp_path, "abc", {"seed": 1, "client": {"rate": 0.1}}, CLASSIFICATION
  ) as record:
    record({**line, "round": 0})
    record({**line, "round": 2, "auroc": 0.75})
  client = tracking.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
  (run,) = client.search_runs([client.get_experiment_by_name("fedjax_med").experiment_id])
  history = client.get_metric_history(run.info.run_id, "test/auroc")
  assert [(point.step, point.value) for point in history] == [(0, 0.25), (2, 0.75)]
  assert run.data.params["client.rate"] == "0.1"


def test_wandb_gets_the_metrics_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="the extra wandb is not installed")
  monkeypatch.setenv("WANDB_MODE", "offline")
  line = {**dict.fromkeys(NAMES, 0.25), "clients": [], "epsilon_max": 3.0, "round": 2}
  with trackers.track("wandb", tmp_path, "abc", {"seed": 1}, CLASSIFICATION) as record:
    record(line)
  assert list((tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb"))
