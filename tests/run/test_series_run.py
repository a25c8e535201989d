"""Runs on series end to end: results of windows and recordings, files, report, predictions."""

import csv
import html
import json
import re

import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.prepare.case import federation
from fedjax_med.prepare.experiment import build
from fedjax_med.report import reported_run
from fedjax_med.run.summaries import hospital_record
from fedjax_med.trained import exporting, heat_page
from fedjax_med.trained.loading import load
from fedjax_med.trained.series_predictions import predict_series, windows_output
from tests.data.series_cases import RATE, samples, series_folder, write
from tests.running import AT_SITES, config_of


def series_config(folder, **changes) -> Config:
  """A narrow cnn1d on four small people, changed as by ``server__num_rounds=4``."""
  fields = {
    "data.source": "series",
    "data.path": str(series_folder(folder / "series") / "people"),
    "data.rate": RATE,
    "data.window_seconds": 2.0,
    "data.hop_seconds": 1.0,
    "data.signals": "ax,ay",
    "data.ranges": "-2,2",
    "data.test_persons": "p3",
    "model.name": "cnn1d",
    "model.width": 0.25,
    "client.batch_size": 8,
    "client.num_local_steps": 2,
    "client.learning_rate": 0.1,
    "server.num_rounds": 2,
  }
  return config_of(AT_SITES | fields, **changes)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """(config, workdir) of a private mlp with augmentation, one recording of which is short."""
  folder = tmp_path_factory.mktemp("series run")
  config = series_config(
    folder,
    model__name="mlp",
    model__width=1.0,
    client__augmentation="jitter_scale_shift",
    privacy__mechanism="dp_sgd",
    privacy__noise_multiplier=1.0,
  )
  write(folder / "series/people/p1/normal/0.csv", samples(0, 0, 0)[:15])
  reported_run.run(config, folder / "run", "series", "test")
  return config, folder / "run"


def test_results_are_of_windows_and_of_recordings(ran):
  folder = ran[1]
  summary = json.loads((folder / "summary.json").read_text())
  held = json.loads((folder / "hospitals.json").read_text())
  assert (held["series"]["test_recordings"], summary["recordings"]["n"]) == (6, 6)
  assert summary["test"]["n"] == held["split"]["num_test"] > 6
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [line["recordings"] for line in lines if line["split"] == "test"][-1] == (
    summary["recordings"]
  )
  assert held["visiting"] == {"p3": "p1"}
  assert [row["name"] for row in held["hospitals"]] == ["p1", "p2", "p4"]
  assert [client["n"] for client in summary["clients"]] == [summary["test"]["n"], 0, 0]


def test_predictions_of_windows_and_recordings_are_those_of_the_run(ran, tmp_path):
  folder = ran[1]
  trained = load(folder)
  place, output = folder.parent / "series/people/p3", tmp_path / "out.csv"
  counts = predict_series(trained, place, output)
  assert (counts.recordings, counts.errors) == (6, [])
  windows, whole = pd.read_csv(windows_output(output)), pd.read_csv(output)
  assert counts.windows == len(windows) == whole.windows.sum()
  column = "probability of tremor"
  means = windows.groupby("file")[column].mean()
  np.testing.assert_allclose(whole.set_index("file")[column], means, atol=1e-6)
  summary = json.loads((folder / "summary.json").read_text())
  for frame, name in ((windows, "test"), (whole, "recordings")):
    truth = frame.file.str.startswith("tremor")
    expected = roc_auc_score(truth, frame[column])
    assert summary[name]["auroc"] == pytest.approx(expected, abs=1e-5)
    right = ((frame.predicted == "tremor") == truth).mean()
    assert summary[name]["accuracy"] == pytest.approx(right, abs=1e-6)


def test_recordings_that_cannot_be_read_are_named_in_the_table(ran, tmp_path):
  trained = load(ran[1])
  (tmp_path / "in").mkdir()
  write(tmp_path / "in" / "a.csv", samples(0, 1, 0), header="t,ax,az")
  write(tmp_path / "in" / "b.csv", samples(0, 1, 0))
  (tmp_path / "in" / "c.pdf").write_bytes(b"none")
  counts = predict_series(trained, tmp_path / "in", tmp_path / "in" / "out.csv")
  assert (counts.recordings, counts.windows, len(counts.errors)) == (1, 4, 2)
  with (tmp_path / "in" / "out.csv").open() as file:
    rows = {row["file"]: row["error"] for row in csv.DictReader(file)}
  assert "has no column 'ay' but t, ax, az" in rows["a.csv"]
  assert rows["b.csv"] == ""
  assert rows["c.pdf"] == "no recording (CSV, text or .npy)"
  again = predict_series(trained, tmp_path / "in" / "b.csv", tmp_path / "in" / "out.csv")
  assert (again.recordings, again.windows) == (1, 4)
  with pytest.raises(UserError, match=r"--series=.*none does not exist; give a folder or a reco"):
    predict_series(trained, tmp_path / "none", tmp_path / "out.csv")


def test_report_and_statement_speak_of_windows(ran):
  page = html.unescape((ran[1] / "report.html").read_text(encoding="utf-8"))
  words = re.sub(r"<[^>]*>", "", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))
  assert "Recordings of all hospitals, each by the mean over its windows" in words
  assert "Test are the people of data.test_persons: p3." in words
  assert "1 recording shorter than a window, padded at the end with masked samples." in words
  assert "is tested in the row of a hospital: 'p3' at 'p1'" in words
  assert not re.search(r"(?<![\w./])images?\b(?!_)", words)
  assert not re.search(r"\bpixels\b", words)
  text = (ran[1] / "privacy_statement.md").read_text()
  assert "one training window of one hospital" in text
  assert "a sample stands in up to 2 of them" in text
  assert not re.search(r"\bimages?\b", text)


def test_an_exported_program_takes_windows_in_the_units_of_the_recordings(ran, tmp_path):
  folder = ran[1]
  trained = load(folder, lowering="native")
  told = exporting.export_model(trained, "jax", tmp_path / "model.bin")
  assert told.startswith("a program of float32 windows [b, 20, 1, 2] to probabilities [b, 2]")
  about = json.loads((tmp_path / "model.bin.json").read_text())
  assert about["channels"] == ["ax", "ay"]
  assert about["normalisation"].startswith("ranges -2,2 become -1 to 1")
  assert "image_size" not in about
  program = jax.export.deserialize(bytearray((tmp_path / "model.bin").read_bytes()))
  window = samples(2, 1, 0)[None, :20, None].astype(np.float32)
  predict_series(load(folder), folder.parent / "series/people/p3/tremor/0.csv", tmp_path / "o.csv")
  expected = pd.read_csv(tmp_path / "o_windows.csv").iloc[0, 3:].to_numpy(np.float64)
  np.testing.assert_allclose(program.call(window)[0], expected, atol=1e-5)


def test_maps_of_windows_are_refused(ran, tmp_path):
  with pytest.raises(UserError, match=r"was trained on windows, over which no map is drawn"):
    heat_page.explain(
      load(ran[1]), images=tmp_path, num_images=1, target="predicted", layer_name="",
      data_path="", show_patients=False, tell=print,
    )  # fmt: skip


def test_networks_and_inputs_that_do_not_fit_are_refused(tmp_path):
  config = series_config(tmp_path, model__name="cnn_small", model__width=1.0)
  message = r"'cnn_small' is a network for pictures, and windows of shape \[20, 1, 2\] are none; us"
  with pytest.raises(UserError, match=message + "e --config.model.name=linear or mlp or cnn1d"):
    build(config, load_hospitals(config))
  config = Config()
  config.model.name, config.data.num_examples, config.data.image_size = "cnn1d", 200, 16
  with pytest.raises(UserError, match=r"'cnn1d' is a network for series, and images of shape \[16"):
    build(config, load_hospitals(config))


def test_all_windows_of_a_person_are_one_unit(tmp_path):
  frame = ["path,label,patient,site"]
  root = series_folder(tmp_path)
  for path in sorted((root / "people").rglob("*.csv")):
    person, label = path.parts[-3:-1]
    site = "north" if person in ("p1", "p2") else "south"
    frame.append(f"{path.relative_to(root).as_posix()},{label},{person},{site}")
  (root / "sites.csv").write_text("\n".join(frame))
  config = series_config(
    tmp_path,
    data__path=str(root / "sites.csv"),
    data__test_persons="p1",
    privacy__mechanism="dp_sgd",
    privacy__noise_multiplier=1.0,
    privacy__unit="patient",
    privacy__delta=0.1,
    client__batch_size=1,
  )
  local = federation(config, load_hospitals(config)).protection.local
  assert local is not None
  assert [mechanism.num_units for mechanism in local.mechanisms] == [1, 2]
  config.privacy.unit = "group"
  with pytest.raises(UserError, match=r"'group' protects near-duplicates, which windows have not"):
    federation(config, load_hospitals(config))


def test_the_random_split_is_labelled_with_the_share_that_overlaps(tmp_path):
  config = series_config(tmp_path, data__test_persons="", data__split="paper")
  hospitals = load_hospitals(config)
  held = hospital_record(hospitals)
  notes = data_notes(held, "record", show_names=True)
  texts = [note.text for note in notes if note.warning]
  overlap, total = held["series"]["test_overlapping"], held["split"]["num_test"]
  assert 0 < overlap <= total
  share = f"{overlap} test windows of {total} ({overlap / total:.0%}) overlap a training window"
  assert any(text.startswith(share) for text in texts)
  assert any("of patients who are in train as well" in text for text in texts)
