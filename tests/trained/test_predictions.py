"""A trained model on pictures: equal to the run's numbers, robust to whatever a folder holds."""

import csv
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.errors import UserError
from fedjax_med.run.checkpoints import digest
from fedjax_med.tasks import registry as tasks
from fedjax_med.tasks.classification import classification_metrics, confusion_matrix
from fedjax_med.trained import heat_page, loading, predictions
from tests.command import start
from tests.learning import learning_config, write_test_images
from tests.running import smoke_config


def silent(text):
  del text


@pytest.fixture(scope="module")
def model(finished):
  return loading.load(finished)


def table(path):
  with path.open(newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def predict(model, images, output, layer=None):
  counts = predictions.predict_files(model, images, output, layer, silent)
  return counts, table(output)


def require_what_the_run_measured(folder, config, tmp_path):
  model = loading.load(folder)
  labels = write_test_images(tmp_path / "images", config)
  counts, rows = predict(model, tmp_path / "images", tmp_path / "table.csv")
  assert counts == (len(labels), [])
  names = [f"probability of {name}" for name in model.class_names]
  probabilities = np.array([[float(row[name]) for name in names] for row in rows])
  summary = json.loads((folder / "summary.json").read_text())
  assert confusion_matrix(probabilities, labels).tolist() == summary["confusion"]
  found = classification_metrics(probabilities, labels)
  expected = {key: summary["test"][key] for key in ("loss", "auroc", "accuracy", "ece")}
  assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
  best = [model.class_names[k] for k in probabilities.argmax(1)]
  assert [row["predicted"] for row in rows] == best
  assert model.rounds == summary["rounds"]


def test_predictions_on_test_images_are_what_the_run_measured(finished, tmp_path):
  require_what_the_run_measured(finished, smoke_config(), tmp_path)


@pytest.mark.slow
def test_predictions_of_an_averaged_network_are_those_of_the_average(learned, tmp_path):
  require_what_the_run_measured(learned, learning_config(), tmp_path)
  summary = json.loads((learned / "summary.json").read_text())
  assert digest(loading.load(learned).params) == summary["weights_sha256"]


@pytest.mark.slow
def test_overlays_lie_beside_the_table_under_the_names_of_the_pictures(learned, tmp_path):
  model, folder = loading.load(learned), tmp_path / "images"
  (folder / "a").mkdir(parents=True)
  Image.fromarray(np.zeros((300, 40), np.uint8)).save(folder / "tall.tif")
  Image.fromarray(np.full((24, 24), 9, np.uint8)).save(folder / "a" / "small.png")
  (folder / "broken.png").write_text("no picture")
  layer = predictions.choose_layer(model)
  for _ in range(2):  # the overlays of a first start are no pictures of a second one
    counts, rows = predict(model, folder, folder / "table.csv", layer)
    assert (counts.read, len(counts.errors)) == (2, 1)
    maps = {row["file"]: row["map"] for row in rows}
    assert maps == {
      "tall.tif": "table_maps/tall.tif.png",
      "a/small.png": "table_maps/a/small.png.png",
      "broken.png": "",
    }
  overlays = folder / "table_maps"
  written = {path.relative_to(overlays).as_posix() for path in overlays.rglob("*.png")}
  assert written == {"tall.tif.png", "a/small.png.png"}
  with Image.open(overlays / "tall.tif.png") as picture:
    assert picture.size == (256, 1920)


def test_pictures_of_every_mode_and_size_are_read_as_in_training(model, tmp_path):
  folder = tmp_path / "images"
  (folder / "a" / "b").mkdir(parents=True)
  grey = np.random.default_rng(0).integers(0, 256, (24, 24)).astype(np.uint8)
  picture = Image.fromarray(grey)
  picture.save(folder / "grey.png")
  picture.convert("RGB").save(folder / "a" / "colour.bmp")
  picture.convert("RGBA").save(folder / "a" / "b" / "transparent.png")
  picture.convert("P").save(folder / "palette.gif")
  Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
  Image.fromarray(np.zeros((300, 40), np.uint8)).save(folder / "large.tif")
  whole = (folder / "grey.png").read_bytes()
  (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
  (folder / "empty.jpg").write_bytes(b"")
  (folder / "notes.txt").write_text("no picture")
  (folder / ".hidden.png").write_bytes(whole)
  counts, rows = predict(model, folder, tmp_path / "out" / "table.csv")
  by_name = {row["file"]: row for row in rows}
  assert counts.read == 5
  errors = dict(counts.errors)
  assert sorted(errors) == [".hidden.png", "cut.png", "deep.png", "empty.jpg", "notes.txt"]
  assert errors["deep.png"].startswith(
    "more than 8 bits, and the run was trained on pictures of 8;"
  )
  assert list(rows[0]) == [
    "file",
    "predicted",
    "probability of healthy",
    "probability of tumour",
    "error",
  ]
  equal = [
    "grey.png",
    "a/colour.bmp",
    "a/b/transparent.png",
    "palette.gif",
  ]
  values = {by_name[name]["probability of tumour"] for name in equal}
  assert len(values) == 1
  assert values != {by_name["large.tif"]["probability of tumour"]}
  for name in ("cut.png", "empty.jpg"):
    assert "cannot be read" in by_name[name]["error"]
    assert by_name[name]["predicted"] == ""


def test_files_whose_names_are_no_text_are_told_apart_in_table_and_overlays(model, tmp_path):
  folder, beside = tmp_path / "images", tmp_path / "maps"
  folder.mkdir()
  names = ["頭".encode("shift_jis") + b".png", b"\\x93\\xaa.png", b"a\n.png", b"n" * 251 + b".png"]
  for name in names:
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(folder / os.fsdecode(name))
  (folder / os.fsdecode(b"\x95\x94.png")).write_text("no picture")
  counts, rows = predict(model, folder, tmp_path / "table.csv")
  assert (counts.read, counts.errors[0][0]) == (4, "\\x95\\x94.png")
  shown = ["\\x93\\xaa.png", "\\x5cx93\\x5cxaa.png", "a\\x0a.png", os.fsdecode(names[3])]
  assert {row["file"] for row in rows} == {*shown, "\\x95\\x94.png"}
  for name, file in zip(shown, names, strict=True):
    picture = predictions.Picture(
      path=folder / os.fsdecode(file), part=0, name=name, pixels=None, error=""
    )
    place = predictions._write_overlay(model, picture, np.ones((2, 2)), beside)
    assert place.name == f"{name}.png" or len(name) > 240
  assert len([place for place in beside.iterdir() if place.suffix == ".png"]) == 4


def test_batches_and_one_picture_agree(model, tmp_path):
  rng = np.random.default_rng(1)
  folder = tmp_path / "many"
  folder.mkdir()
  for number in range(70):  # a batch holds 64
    pixels = rng.integers(0, 256, (30, 30)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
  _, rows = predict(model, folder, tmp_path / "many.csv")
  _, (one,) = predict(model, folder / "69.png", tmp_path / "one.csv")
  (same,) = [row for row in rows if row["file"] == "69.png"]
  key = "probability of tumour"
  assert float(one[key]) == pytest.approx(float(same[key]), rel=1e-5)


def without(*names):
  def change(folder):
    for name in names:
      path = folder / name
      shutil.rmtree(path) if path.is_dir() else path.unlink()

  return change


def other_network(folder):
  record = json.loads((folder / "config.json").read_text())
  record["config"]["model"]["name"] = "mlp"
  (folder / "config.json").write_text(json.dumps(record))


def own_network(folder):
  record = json.loads((folder / "config.json").read_text())
  record["config"]["model"]["name"] = "of_mine"
  (folder / "config.json").write_text(json.dumps(record))


def another_version(folder):
  record = json.loads((folder / "config.json").read_text())
  record["versions"]["fedjax_med"] = "0.0.9"
  (folder / "config.json").write_text(json.dumps(record))


def another_run(folder):
  record = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**record, "run_id": "0" * 12}))


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (without("config.json"), r"has no config.json; give the folder of a run"),
    (without("checkpoints"), r"holds no checkpoint, because .*; train it by itself"),
    (other_network, r"holds arrays of another model; "),
    (own_network, r"'of_mine' is not part of this package; give --network=FILE.py"),
    (another_version, r"was trained by fedjax_med 0.0.9 and this is .*; use the version that"),
    (another_run, r"belongs to run .*, config.json is run 000000000000; "),
    (lambda folder: (folder / "sweep.json").write_text("{}"), r"is a sweep, whose .*; train"),
    (lambda folder: (folder / "hospitals.json").write_text("{"), r"is not what a run writes"),
  ],
)
def test_a_folder_without_a_model_is_refused_in_one_sentence(change, sentence, finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "run")
  change(folder)
  with pytest.raises(UserError, match=sentence):
    loading.load(folder)


OWN_TASK = """
from fedjax_med.tasks import registry

registry.register(registry.task_named("classification")._replace(name="of_mine"))
"""


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("x = 1\n", r"mine.py registers no network, task, source .*; leave it out"),
    ("1 / 0\n", r"mine.py cannot be run \(ZeroDivisionError: .*; correct the file"),
    (None, r"mine.py is not a file; give the Python file that registers"),
  ],
)
def test_a_file_that_registers_nothing_is_refused(finished, tmp_path, text, sentence):
  if text is not None:
    (tmp_path / "mine.py").write_text(text)
  with pytest.raises(UserError, match=sentence):
    loading.load(finished, network=str(tmp_path / "mine.py"))


def test_a_file_that_registers_a_task_is_read_before_the_run_that_has_it(
  finished, tmp_path, monkeypatch
):
  monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
  folder, mine = shutil.copytree(finished, tmp_path / "run"), tmp_path / "mine.py"
  record = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**record, "task": "of_mine"}))
  mine.write_text(OWN_TASK)
  with pytest.raises(UserError, match=r"task 'of_mine' is not part of .*; give --network=FILE.py"):
    loading.load(folder)
  for _ in range(2):  # read once more it registers nothing new
    assert loading.load(folder, network=str(mine)).task.name == "of_mine"


def with_own_source(model):
  """The model as of a run whose source is not registered here."""
  data = dataclasses.replace(model.config.data, source="of_mine", min_size=1)
  return model._replace(config=dataclasses.replace(model.config, data=data))


def test_pictures_are_predicted_where_the_source_of_the_run_is_not_registered(model, tmp_path):
  write_test_images(tmp_path / "images", smoke_config())
  _, known = predict(model, tmp_path / "images", tmp_path / "known.csv")
  counts, rows = predict(with_own_source(model), tmp_path / "images", tmp_path / "unknown.csv")
  assert counts == (len(known), [])
  assert rows == known


@pytest.mark.slow
def test_pictures_are_explained_where_the_source_of_the_run_is_not_registered(learned, tmp_path):
  write_test_images(tmp_path / "images", learning_config())
  model = with_own_source(loading.load(shutil.copytree(learned, tmp_path / "run")))
  given = {"num_images": 1, "target": "predicted", "layer_name": "", "show_patients": False}
  place = tmp_path / "images"
  assert heat_page.explain(model, images=place, data_path="", tell=silent, **given).exists()
  with pytest.raises(UserError, match=r"data\.source='of_mine' is not part of this package; give"):
    heat_page.explain(model, images=None, data_path="", tell=silent, **given)


def test_loading_a_model_writes_nothing(finished):
  before = sorted(finished.rglob("*"))
  loading.load(finished)
  assert sorted(finished.rglob("*")) == before


@pytest.mark.slow
def test_the_command_predicts_with_a_hospitals_own_model_and_maps(gated, tmp_path):
  config = learning_config()
  write_test_images(tmp_path / "images", config)
  (tmp_path / "images" / "broken.png").write_text("no picture")
  options = f"--workdir={gated}", "--images=images", "--hospital=hospital 2", "--maps"
  result = start("predict", *options, "--output=own.csv", cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  assert "broken.png: cannot be read" in result.stderr
  assert result.stdout.splitlines()[0].endswith("1 not (run " + described(gated) + ")")
  rows = table(tmp_path / "own.csv")
  model = loading.load(gated, hospital="hospital 2")
  counts, expected = predict(model, tmp_path / "images", tmp_path / "expected.csv")
  assert counts.read == len(rows) - 1
  for row, other in zip(rows, expected, strict=True):
    assert row["predicted"] == other["predicted"]
    assert (tmp_path / row["map"]).is_file() == (not row["error"])


def described(folder):
  run_id = json.loads((folder / "config.json").read_text())["run_id"]
  return f"{run_id} after round 1, the model of hospital 2"


@pytest.mark.slow
def test_a_folder_of_broken_pictures_ends_with_code_2_and_names_them(finished, tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "broken.png").write_text("no picture")
  result = start("predict", f"--workdir={finished}", "--images=images", cwd=tmp_path)
  assert result.returncode == 2
  assert "broken.png: cannot be read" in result.stderr
  assert result.stderr.splitlines()[-1].startswith("error: none of the 1 files")
  assert table(tmp_path / "predictions.csv")[0]["file"] == "broken.png"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--images=images"], "--workdir is missing"),
    (["--workdir=images"], "--images is missing"),
    (["--workdir=images", "--images=nowhere"], "--images=nowhere does not exist"),
    (["--workdir=images", "--images=images"], "--images=images holds no pictures"),
    (["--workdir=nowhere", "--images=one.png"], "--workdir=nowhere is not a folder"),
  ],
)
def test_bad_input_is_one_sentence_with_a_remedy(arguments, sentence, tmp_path):
  (tmp_path / "images").mkdir()
  Image.new("L", (40, 40)).save(tmp_path / "one.png")
  result = start("predict", *arguments, cwd=tmp_path)
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: {sentence}")
  assert ";" in result.stderr
  assert "Traceback" not in result.stderr
