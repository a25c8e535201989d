"""The command line of training: dry runs and one-sentence errors, exit code 2, no traceback."""

import functools
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.command import smoke

train = functools.partial(smoke, ("-m", "fedjax_med.train"))


def pictures(folder: pathlib.Path, classes: int = 2, count: int = 12, side: int = 40) -> str:
  random = np.random.default_rng(0)
  for label in range(classes):
    (folder / f"class{label}").mkdir(parents=True)
    for number in range(count):
      pixels = random.integers(0, 255, (side, side, 3), np.uint8)
      Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
  return f"--config.data.path={folder}"


def test_dry_run_says_all_and_trains_nothing(tmp_path):
  result = train("--dry_run", f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 0, result.stderr
  for word in (
    '"noise_multiplier": 1.0',
    "hospital 3",
    "plan:",
    "Memory estimate",
    "would spend ε",
  ):
    assert word in result.stdout
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_of_seven_classes_of_colour_pictures_trains(tmp_path):
  path = pictures(tmp_path / "data", classes=7, count=24)
  result = train(path, "--config.data.source=folder", f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 0, result.stderr
  assert "class6" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--config.data.source=folder", "--config.data.path=/nowhere"], "is not a folder"),
    (["--config.partition.alpha=-1"], "partition.alpha=-1.0 must be above 0"),
    (["--config.partition.num_clients=5000"], "partition.num_clients=5000"),
    (["--config.partition.min_client_size=200"], "exceeds the"),
    (["--config.model.norm=batch"], "mixes the examples of a batch"),
    (["--config.privacy.delta=0.5"], "under 1/n"),
    (["--config.privacy.batch_cap=3"], "batch_cap"),
    (["--config.model.name=linea"], "did you mean"),
    (["--config.server.algorithm=fedavgg"], "did you mean 'fedavg'"),
    (["--config.execution.compilation_cache=/proc/x"], "cannot be made or written"),
  ],
)
def test_bad_input_is_one_sentence_with_a_remedy(arguments, sentence, tmp_path):
  result = train(*arguments, f"--workdir={tmp_path}")
  assert result.returncode == 2
  assert sentence in result.stderr
  *_, last = result.stderr.splitlines()  # a note on the preset may stand before it
  assert last.startswith("error: ")
  assert ";" in result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("workdir", ["/proc/run", ""])
def test_a_workdir_that_is_missing_or_cannot_be_written_is_a_sentence(workdir):
  result = train(f"--workdir={workdir}")
  assert result.returncode == 2
  assert "--workdir" in result.stderr
  assert "Traceback" not in result.stderr
