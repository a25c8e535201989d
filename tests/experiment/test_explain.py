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


@pytest.mark.slow
def test_the_page_holds_a_row_for_each_hospital_and_needs_no_other_file(explained):
  html = (explained / "explain" / "index.html").read_text()
  hospitals = json.loads((explained / "hospitals.json").read_text())["hospitals"]
  assert html.count("<img ") == len(hospitals)
  for hospital in hospitals:
    assert f'alt="{hospital["name"]}: predicted ' in html
  assert re.findall(r'(?:src|href)="(?!data:)', html) == []
  assert len(list((explained / "explain").glob("*.png"))) == len(hospitals)


@pytest.mark.slow
def test_the_maps_point_at_the_tumours(explained):
  pointing = record_of(explained)["pointing"]
  assert pointing["images"] >= 30
  # Chance knows where tumours usually lie. Of 30 images a fifth more would be two deviations.
  assert pointing["hits"] > pointing["chance"] + 0.2


def pretend(folder, **changes):
  """Writes what ``explain`` leaves, one picture."""
  record = {
    "run_id": json.loads((folder / "config.json").read_text())["run_id"],
    "rounds": json.loads((folder / "summary.json").read_text())["rounds"],
    "layer": "norm2", "map": [8, 8], "target": "predicted", "shown": "phantoms",
    "patients_of_private_run": False,
    "figures": [{"file": "group-1.png", "caption": "Ahorn: predicted healthy"}],
  }  # fmt: skip
  (folder / "explain").mkdir(exist_ok=True)
  Image.new("L", (4, 4)).save(folder / "explain" / "group-1.png")
  (folder / "explain" / "explain.json").write_text(json.dumps({**record, **changes}))


@pytest.mark.usefixtures("undrawn")
def test_the_report_shows_the_pictures_that_may_be_shown(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "run")
  assert "Where the network looks" not in write_report(folder).read_text()
  pretend(folder)
  shown = write_report(folder).read_text()
  assert 'alt="Ahorn: predicted healthy"' in shown
  assert "not of the weights" not in shown
  pretend(folder, rounds=3)
  assert "after round 3, not of the weights this report is on" in write_report(folder).read_text()
  pretend(folder, run_id="another")
  assert "Where the network looks" not in write_report(folder).read_text()
  pretend(folder, patients_of_private_run=True, shown="test images")
  secret = write_report(folder).read_text()
  assert "not part of this report, and not for release" in secret
  assert "Ahorn: predicted" not in secret
  pretend(folder, shown="given pictures")
  assert "Ahorn: predicted" not in write_report(folder).read_text()  # linked


@pytest.mark.slow
def test_the_report_of_a_run_shows_every_row_of_its_page(explained, tmp_path):
  folder = shutil.copytree(explained, tmp_path / "run")
  html = write_report(folder).read_text()
  for hospital in json.loads((folder / "hospitals.json").read_text())["hospitals"]:
    assert f'alt="{hospital["name"]}: predicted ' in html


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


@pytest.mark.slow
def test_patients_of_a_private_run_are_not_shown_unasked(learned, tmp_path):
  folder = shutil.copytree(learned, tmp_path / "run")
  private(folder, source="folder", path="/nowhere")
  with pytest.raises(UserError, match=r"no ε covers; give --images=FOLDER .* --show_patients"):
    page_of(folder)
  assert not (folder / "explain").exists()
  with pytest.raises(UserError, match=r"data of the run cannot be read .*; say .* --data_path"):
    page_of(folder, show_patients=True)


@pytest.mark.slow
def test_other_data_than_the_runs_are_refused(learned, tmp_path):
  folder = shutil.copytree(learned, tmp_path / "run")
  record = json.loads((folder / "config.json").read_text())
  record["config"]["data"]["num_examples"] = 400
  (folder / "config.json").write_text(json.dumps(record))
  with pytest.raises(UserError, match=r"are not those of the run.*; say where those lie"):
    page_of(folder)


@pytest.mark.slow
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
