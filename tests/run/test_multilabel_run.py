"""A private run on images with several labels each: its files, page, figure and predictions."""

import csv
import html
import json

import numpy as np
import pytest
from PIL import Image

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.synthetic_images import reserve_synthetic
from fedjax_med.report import reported_run
from fedjax_med.run.console import make_console
from fedjax_med.trained.loading import load
from fedjax_med.trained.predictions import choose_layer, predict_files
from tests.running import AT_SITES, config_of

SIDE = 12


def arrays(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Images whose left and right halves are bright if they have labels 0 and 1; label 2 is rare."""
  random = np.random.default_rng(seed)
  labels = np.column_stack([random.random((count, 2)) < 0.5, np.arange(count) % 9 == 0])
  images = random.integers(0, 90, (count, SIDE, SIDE))
  for number in range(2):
    half = slice(number * SIDE // 2, (number + 1) * SIDE // 2)
    images[:, :, half] += 150 * labels[:, number, None, None]
  return images.astype(np.uint8), labels.astype(np.uint8)


def config(path, changes=None) -> Config:
  fields = AT_SITES | {
    "data.source": "npz",
    "data.path": str(path),
    "data.image_size": SIDE,
    "data.min_size": SIDE,
    "data.normalisation": "fixed",
    "partition.scheme": "iid",
    "partition.num_clients": 2,
    "model.name": "mlp",
    "client.learning_rate": 0.3,
    "client.batch_size": 16,
    "client.num_local_steps": 6,
    "server.num_rounds": 6,
    "privacy.mechanism": "dp_sgd",
    "privacy.target_epsilon": 50.0,
  }
  return config_of(fields | (changes or {}))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  """(config, workdir, text of the terminal, test images)."""
  place = tmp_path_factory.mktemp("several")
  (train, marks), (test, told) = arrays(240, 0), arrays(60, 1)
  held = {"train_images": train, "train_labels": marks, "test_images": test, "test_labels": told}
  np.savez(place / "set.npz", **held)  # pyright: ignore[reportArgumentType]
  made, console = config(place / "set.npz"), make_console()
  with console.capture() as said:
    reported_run.run(made, place / "run", "several", "test", console=console)
  return made, place / "run", said.get(), test


def test_labels_are_learned_privately_and_shown_by_label(ran):
  _, folder, said, _ = ran
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["epsilon_max"] == pytest.approx(50, abs=0.5)
  first, second, _ = summary["label"]["auroc"]
  assert min(first, second) > 0.9
  assert summary["test"]["auroc"] == pytest.approx(np.mean(summary["label"]["auroc"]))
  assert "task multilabel" in said
  page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
  assert "mean AUROC" in page
  assert "AUROC of each label over all test examples" in page
  with Image.open(folder / "figures" / "label.png") as figure:
    assert np.ptp(np.asarray(figure.convert("L"))) > 100


def test_predictions_of_files_are_what_the_run_measured(ran, tmp_path):
  made, folder, _, test = ran
  scans = tmp_path / "scans"
  scans.mkdir()
  for number in range(3):
    Image.fromarray(test[number]).save(scans / f"{number}.png")
  (scans / "broken.png").write_bytes(b"no picture")
  counts = predict_files(load(folder), scans, tmp_path / "out.csv", None, lambda text: None)
  assert counts.read == 3
  assert [name for name, _ in counts.errors] == ["broken.png"]
  with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == ["file", "label", "probability", "error"]
  seen = [row for row in rows if not row["error"]]
  assert [row["label"] for row in seen] == ["label 0", "label 1", "label 2"] * 3
  targets = load_hospitals(made).dataset.targets
  assert targets is not None
  truth = targets.values[-60:]
  bright = [(float(row["probability"]) > 0.5) == truth[k // 3, k % 3] for k, row in enumerate(seen)]
  assert sum(bright) >= 7


def test_what_needs_one_class_is_refused(ran):
  _, folder, _, _ = ran
  with pytest.raises(UserError, match="has the task 'multilabel', and a map is made for a class"):
    choose_layer(load(folder))
  changes = {"client.synthetic": "gan", "privacy.mechanism": "none", "privacy.target_epsilon": 0.0}
  made = config(folder.parent / "set.npz", changes)
  hospitals = load_hospitals(made)
  with pytest.raises(UserError, match="makes images of a class, and the task is 'multilabel'"):
    reserve_synthetic(made, hospitals)
