"""The page of where a network looks: a row for each hospital, maps that find the tumours."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.errors import UserError
from fedjax_med.experiment import report, trained
from fedjax_med.experiment.explain import explain
from fedjax_med.experiment.report import write_report


def page_of(folder, **changes):
  options = {
    "images": None, "num_images": 3, "target": "predicted", "layer_name": "", "data_path": "",
    "show_patients": False,
  }  # fmt: skip
  return explain(trained.load(folder), **{**options, **changes})


@pytest.fixture
def undrawn(monkeypatch):
  """Reports without their other figures, which take a second each to draw."""
  monkeypatch.setattr(report, "_draw_all", lambda *_: None)


@pytest.fixture(scope="module")
def explained(learned, tmp_path_factory):
  folder = shutil.copytree(learned, tmp_path_factory.mktemp("explained") / "run")
  page_of(folder)
  return folder


def record_of(folder):
  return json.loads((folder / "explain" / "explain.json").read_text())


def test_the_page_holds_a_row_for_each_hospital_and_needs_no_other_file(explained):
  html = (explained / "explain" / "index.html").read_text()
  hospitals = json.loads((explained / "hospitals.json").read_text())["hospitals"]
  assert html.count("<img ") == len(hospitals)
  for hospital in hospitals:
    assert f'alt="{hospital["name"]}: predicted ' in html
  assert re.findall(r'(?:src|href)="(?!data:)', html) == []
  assert len(list((explained / "explain").glob("*.png"))) == len(hospitals)


def test_the_maps_point_at_the_tumours(explained):
  pointing = record_of(explained)["pointing"]
  assert pointing["images"] >= 30
  # Chance knows where tumours usually lie. Of 30 images a fifth more would be two deviations.
  assert pointing["hits"] > pointing["chance"] + 0.2


@pytest.mark.usefixtures("undrawn")
def test_the_report_shows_the_same_pictures_and_says_if_the_weights_are_others(explained, tmp_path):
  folder = shutil.copytree(explained, tmp_path / "run")
  before = write_report(folder).read_text()
  assert "Where the network looks" in before
  hospitals = json.loads((folder / "hospitals.json").read_text())["hospitals"]
  for hospital in hospitals:
    assert f'alt="{hospital["name"]}: predicted ' in before
  assert "not of the weights" not in before
  record = record_of(folder)
  (folder / "explain" / "explain.json").write_text(json.dumps({**record, "rounds": 3}))
  assert "after round 3, not of the weights this report is on" in write_report(folder).read_text()
  (folder / "explain" / "explain.json").write_text(json.dumps({**record, "run_id": "another"}))
  assert "Where the network looks" not in write_report(folder).read_text()


@pytest.mark.slow
def test_pictures_of_ones_own_have_a_row_and_the_class_asked_for(learned, tmp_path):
  folder = shutil.copytree(learned, tmp_path / "run")
  (tmp_path / "images").mkdir()
  Image.fromarray(np.arange(1600, dtype=np.uint8).reshape(40, 40)).save(
    tmp_path / "images" / "1.png"
  )
  (tmp_path / "images" / "2.png").write_text("broken")
  page = page_of(folder, images=tmp_path / "images", target="healthy").read_text()
  assert page.count("<img ") == 1
  assert "for the class “healthy”" in page
  assert record_of(folder)["pointing"] is None
  assert "Pictures of images" not in write_report(folder).read_text()  # linked, not shown


def private(folder, **data):
  record = json.loads((folder / "config.json").read_text())
  record["config"]["privacy"]["mechanism"] = "dp_sgd"
  record["config"]["data"].update(data)
  (folder / "config.json").write_text(json.dumps(record))


def test_patients_of_a_private_run_are_not_shown_unasked(learned, tmp_path):
  folder = shutil.copytree(learned, tmp_path / "run")
  private(folder, source="folder", path="/nowhere")
  with pytest.raises(UserError, match=r"no ε covers; give --images=FOLDER .* --show_patients"):
    page_of(folder)
  assert not (folder / "explain").exists()
  with pytest.raises(UserError, match=r"data of the run cannot be read .*; say .* --data_path"):
    page_of(folder, show_patients=True)


@pytest.mark.usefixtures("undrawn")
def test_a_page_with_patients_says_so_and_stays_out_of_the_report(explained, tmp_path):
  folder = shutil.copytree(explained, tmp_path / "run")
  record = {**record_of(folder), "patients_of_private_run": True, "shown": "test images"}
  (folder / "explain" / "explain.json").write_text(json.dumps(record))
  report = write_report(folder).read_text()
  assert "not part of this report, and not for release" in report
  assert ": predicted " not in report


def test_other_data_than_the_runs_are_refused(learned, tmp_path):
  folder = shutil.copytree(learned, tmp_path / "run")
  record = json.loads((folder / "config.json").read_text())
  record["config"]["data"]["num_examples"] = 400
  (folder / "config.json").write_text(json.dumps(record))
  with pytest.raises(UserError, match=r"are not those of the run.*; say where those lie"):
    page_of(folder)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"target": "tumor"}, r"--target='tumor' is unknown; did you mean 'tumour'"),
    ({"num_images": 0}, r"--num_images=0 is under 1; ask"),
    ({"layer_name": "conv3"}, r"--layer=conv3 is no layer with a map; did you mean"),
  ],
)
def test_bad_requests_are_one_sentence(changes, sentence, learned):
  with pytest.raises(UserError, match=sentence):
    page_of(learned, **changes)


def test_a_linear_model_has_nothing_to_show(finished):
  with pytest.raises(UserError, match="no layer that returns a map"):
    page_of(finished)
