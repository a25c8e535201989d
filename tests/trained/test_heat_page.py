"""The page of where a network looks: a row for each hospital, maps that find the tumours."""

import contextlib
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fedjax_med.core.errors import UserError
from fedjax_med.models.grad_cam import Gated
from fedjax_med.report import run_page
from fedjax_med.report.run_page import write_report
from fedjax_med.trained import heat_pictures, loading
from fedjax_med.trained.heat_page import _gate_shown, explain
from fedjax_med.trained.heat_pictures import Seen
from fedjax_med.trained.predictions import Looked
from tests.command import start


def page_of(folder, **changes):
  options = {
    "images": None, "num_images": 3, "target": "predicted", "layer_name": "", "data_path": "",
    "show_patients": False, "tell": lambda text: None,
  }  # fmt: skip
  return explain(loading.load(folder), **{**options, **changes})


@pytest.fixture
def undrawn(monkeypatch):
  """Reports without their other figures, which take a second each to draw."""
  monkeypatch.setattr(run_page, "_draw_all", lambda *_: None)


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
def test_what_fails_half_way_leaves_the_old_page(explained, tmp_path, monkeypatch):
  folder = shutil.copytree(explained, tmp_path / "run")
  before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  draw = heat_pictures.draw_grid

  def fails(path, *rest):
    if path.name == "group-2.png":
      raise OSError("disk full")
    draw(path, *rest)

  monkeypatch.setattr(heat_pictures, "draw_grid", fails)
  with pytest.raises(OSError, match="disk full"):
    page_of(folder, num_images=1)
  assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_page_names_the_positive_class_and_what_pictures_show_for_a_name(learned, tmp_path):
  folder = shutil.copytree(learned, tmp_path / "run")
  held = json.loads((folder / "hospitals.json").read_text())
  held["class_names"] = ["healthy", "\U000f0000"]
  (folder / "hospitals.json").write_text(json.dumps(held))
  Image.new("L", (40, 40)).save(tmp_path / "1.png")
  page = page_of(folder, images=tmp_path / "1.png", target="\U000f0000").read_text(encoding="utf-8")
  assert "The positive class is “\U000f0000”." in page
  assert "“class 2” is “\U000f0000”" in page


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
def test_the_command_shows_a_hospitals_own_model_with_its_gates(gated, tmp_path):
  folder = shutil.copytree(gated, tmp_path / "run")
  result = start("explain", f"--workdir={folder}", "--hospital=hospital 2", "--num_images=2")
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[0] == str(folder / "explain" / "index.html")
  html = (folder / "explain" / "index.html").read_text()
  assert "the model of hospital 2" in html
  assert "stage2_block1/se" in html
  record = record_of(folder)
  assert [figure["file"] for figure in record["figures"]] == ["group-1.png", "gates.png"]
  assert record["figures"][0]["caption"].startswith("hospital 2: predicted ")
  refused = start("explain", f"--workdir={folder}")
  assert refused.returncode == 2
  assert "say whose model is meant, such as --hospital='hospital 1'" in refused.stderr


def test_the_gated_map_is_a_row_of_its_own(tmp_path):
  ramp = np.arange(16.0).reshape(4, 4)
  heights, pictures = [], []
  for gated in (None, ramp, ramp.T):
    seen = [Seen(np.zeros((8, 8), np.uint8), ramp, gated, "tumour", 0.9, "healthy")] * 2
    heat_pictures.draw_grid(
      tmp_path / "grid.png", "Ahorn", seen, "block" if gated is not None else ""
    )
    with Image.open(tmp_path / "grid.png") as picture:
      heights.append(picture.height)
      pictures.append(picture.convert("RGB").tobytes())
  assert heights[0] < heights[1] == heights[2]
  assert pictures[1] != pictures[2]


def test_the_chart_of_gates_holds_the_median_of_all_and_the_mean_of_each_hospital(monkeypatch):
  rng = np.random.default_rng(0)
  groups = [(name, [rng.uniform(size=(3, 5)), rng.uniform(size=(3, 7))]) for name in "AB"]
  figure = Figure()
  monkeypatch.setattr(heat_pictures, "new_figure", lambda *_: contextlib.nullcontext(figure))
  heat_pictures.draw_gates(pathlib.Path("unused"), ["first", "second"], groups)
  lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[0].lines}
  for name, gates in groups:
    np.testing.assert_allclose(lines[f"mean, {name}"], [each.mean() for each in gates])
  middle = [np.median(np.stack([gates[k] for _, gates in groups])) for k in range(2)]
  assert any(np.allclose(values, middle) for values in lines.values())


@pytest.mark.parametrize(("sides", "shown"), [([8, 4, 2], "1"), ([2, 2, 1], "1"), ([1], "")])
def test_the_gates_drawn_are_the_last_with_places_to_tell_apart(sides, shown):
  gated = {str(k): Gated(np.zeros((1, 3)), np.zeros((1, s, s))) for k, s in enumerate(sides)}
  assert _gate_shown(list(gated), Looked(np.zeros((1, 2)), np.zeros((1, 2, 2)), gated)) == shown


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
  told = []
  images = tmp_path / "images"
  page = page_of(folder, images=images, target="healthy", tell=told.append).read_text()
  assert page.count("<img ") == 1
  assert len(told) == 1
  assert told[0].startswith("2.png: cannot be read")
  assert "for the class “healthy”" in page
  assert record_of(folder)["pointing"] is None
  assert "Pictures of images" not in write_report(folder).read_text()  # linked, not shown


@pytest.mark.slow
def test_patients_of_a_private_run_are_not_shown_unasked(learned, tmp_path, monkeypatch):
  folder = shutil.copytree(learned, tmp_path / "run")
  record = json.loads((folder / "config.json").read_text())
  record["config"]["privacy"]["mechanism"] = "dp_sgd"
  record["config"]["data"].update(source="folder", path="/nowhere")
  (folder / "config.json").write_text(json.dumps(record))
  monkeypatch.setattr(loading, "_require_counted", lambda *_: None)  # it has no ledger
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


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"show_patients": True}, r"--show_patients is read where .* they are phantoms; leave it out"),
    ({"data_path": "scans"}, r"--data_path=scans is read for runs on files only, and .*; leave"),
  ],
)
def test_what_phantoms_do_not_need_is_refused(changes, sentence, finished):
  with pytest.raises(UserError, match=sentence):
    page_of(finished, **changes)


def test_a_linear_model_has_nothing_to_show(finished):
  with pytest.raises(UserError, match="no layer that returns a map"):
    page_of(finished)
