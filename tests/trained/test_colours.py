"""Runs on colours and on DICOM from training to predictions, heat maps, exports and GANs."""

import csv
import pathlib

import numpy as np
import pandas as pd
import pytest
from jax import export
from PIL import Image

from configs.smoke import get_config
from fedjax_med.core.config import Config
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.synthetic_images import make_images, reserve_synthetic
from fedjax_med.report import reported_run as runs
from fedjax_med.trained import heat_page, loading, predictions
from fedjax_med.trained.exporting import export_model
from tests.learning import learn

SIDE, ROWS = 24, 60


def config_of(path: pathlib.Path, **data) -> Config:
  """Two hospitals of a few pictures, one round of a small network, without privacy."""
  config = get_config()
  values = {"source": "manifest", "path": str(path), "image_size": SIDE, "min_size": 8, **data}
  for name, value in values.items():
    setattr(config.data, name, value)
  config.data.num_examples = 4000
  config.partition.scheme, config.partition.num_clients = "iid", 2
  config.model.name = "cnn_small"
  config.client.batch_size, config.client.num_local_steps = 8, 2
  config.server.num_rounds, config.privacy.mechanism = 1, "none"
  config.privacy.noise_multiplier = 0.0
  config.execution.devices, config.execution.layout = 1, "scan"
  config.execution.probe = "off"
  return config


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
  """A manifest of coloured noise, reddish in one class and bluish in the other."""
  folder = tmp_path_factory.mktemp("colours")
  labels = np.where(np.arange(ROWS) % 2, "no", "yes")
  for number in range(ROWS):
    pixels = np.random.default_rng(number).integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
    pixels[..., 0 if number % 2 else 2] += 190
    Image.fromarray(pixels).save(folder / f"{number}.png")
  frame = pd.DataFrame({"path": [f"{number}.png" for number in range(ROWS)], "label": labels})
  frame.to_csv(folder / "list.csv", index=False)
  return folder / "list.csv"


def rows_of(path: pathlib.Path) -> list[dict[str, str]]:
  with path.open(newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_on_colours_is_predicted_explained_and_exported_in_three_channels(coloured, tmp_path):
  config, folder = config_of(coloured), tmp_path / "run"
  learn(folder, config)
  model = loading.load(folder)
  assert model.image_shape == (SIDE, SIDE, 3)
  layer = predictions.choose_layer(model)
  counts = predictions.predict_files(
    model, coloured.parent, tmp_path / "table.csv", layer, lambda text: None
  )
  assert counts.read == ROWS
  table = {row["file"]: row for row in rows_of(tmp_path / "table.csv")}
  dataset = load_hospitals(config).dataset
  expected = predictions.make_probabilities(model)(dataset.inputs[:8])
  for name, probabilities in zip(dataset.names[:8], expected, strict=True):
    found = float(table[name]["probability of yes"])
    assert found == pytest.approx(probabilities[model.class_names.index("yes")], abs=1e-5)
    with Image.open(tmp_path / table[name]["map"]) as drawn:
      assert drawn.mode == "RGB"
  page = heat_page.explain(
    model,
    images=None,
    num_images=2,
    target="predicted",
    layer_name="",
    data_path="",
    show_patients=False,
    tell=lambda text: None,
  )
  assert (page.parent / "group-1.png").is_file()
  said = export_model(model, "jax", tmp_path / "model.bin")
  assert f"uint8 images [b, {SIDE}, {SIDE}, 3] to probabilities" in said
  program = export.deserialize(bytearray((tmp_path / "model.bin").read_bytes()))
  np.testing.assert_allclose(program.call(dataset.inputs[:8]), expected, atol=1e-5)


@pytest.mark.slow
def test_gans_of_colours_make_colours(coloured):
  config = config_of(coloured)
  config.client.synthetic, config.client.gan_steps = "gan", 400
  hospitals = reserve_synthetic(config, load_hospitals(config))
  images = make_images(config, hospitals)
  assert images.shape[1:] == (SIDE, SIDE, 3)
  labels = hospitals.dataset.labels[hospitals.dataset.num_real :]
  names = hospitals.dataset.class_names
  means = {name: images[labels == k].mean((0, 1, 2)) for k, name in enumerate(names)}
  assert means["no"][0] > means["no"][2]  # reddish
  assert means["yes"][2] > means["yes"][0]


@pytest.mark.slow
def test_a_run_on_dicom_names_no_patient_in_any_file_and_predicts_dicom(tmp_path):
  pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
  scans = pathlib.Path(pydicom.__file__).parent / "data" / "test_files"
  folder = tmp_path / "scans"
  folder.mkdir()
  for number in range(ROWS):
    file = pydicom.dcmread(scans / "CT_small.dcm")
    noise = np.random.default_rng(number).integers(0, 2000, (SIDE, SIDE)).astype("<i2")
    noise[: SIDE // 2] += 800 * (number % 2)
    file.Rows = file.Columns = SIDE
    file.PatientID, file.PatientName = f"MRN77{number // 2}", "Doe^Jane"
    file.PixelData = noise.tobytes()
    file.save_as(folder / f"{number}.dcm")
  frame = pd.DataFrame({"path": [f"{number}.dcm" for number in range(ROWS)]})
  frame.assign(label=np.where(np.arange(ROWS) // 2 % 2, "no", "yes")).to_csv(
    folder / "list.csv", index=False
  )
  config = config_of(folder / "list.csv", window="-1000,2000")
  config.privacy.mechanism, config.privacy.noise_multiplier = "dp_sgd", 1.0
  config.privacy.unit = "patient"
  config.model.name = "linear"
  place = tmp_path / "run"
  runs.run(config, place, "dicom", "test")
  written = b"".join(path.read_bytes() for path in place.rglob("*") if path.is_file())
  assert b"PatientID of DICOM" in written
  for secret in (b"MRN77", b"Doe^Jane"):
    assert secret not in written
  model = loading.load(place)
  counts = predictions.predict_files(model, folder, tmp_path / "table.csv", None, lambda text: None)
  assert counts.read == ROWS
  assert counts.errors == [("list.csv", "a .csv file is no picture")]
  dataset = load_hospitals(config).dataset
  expected = predictions.make_probabilities(model)(dataset.inputs[:4])
  table = {row["file"]: row for row in rows_of(tmp_path / "table.csv")}
  for name, probabilities in zip(dataset.names[:4], expected, strict=True):
    found = float(table[name]["probability of yes"])
    assert found == pytest.approx(probabilities[model.class_names.index("yes")], abs=1e-5)
