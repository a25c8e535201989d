"""A whole run in a workdir: its files, its resumption, its refusals."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.models.registry import MODELS
from fedjax_med.prepare import memory
from fedjax_med.prepare.experiment import build
from tests.running import metrics, run, smoke_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_run_leaves_every_promised_file(finished):
  for name in (
    "config.json",
    "metrics.jsonl",
    "privacy.json",
    "ledger.jsonl",
    "privacy_statement.md",
    "summary.json",
    "hospitals.json",
    "timing.json",
    "report.html",
    "figures/partition.png",
    "figures/rounds.png",
    "figures/hospitals.png",
    "figures/confusion.png",
    "figures/examples.png",
  ):
    assert (finished / name).stat().st_size > 0, name
  assert any((finished / "checkpoints").iterdir())


def test_metrics_hold_a_line_a_log_point_with_every_hospital(finished):
  lines = metrics(finished)
  test = [line for line in lines if line["split"] == "test"]
  assert [line["round"] for line in test] == [0, 2, 4, 6]
  keys = {"loss", "accuracy", "precision", "recall", "specificity", "f1", "auroc", "epsilon_max"}
  for line in test:
    assert keys <= line.keys()
    assert len(line["clients"]) == 3
    for client in line["clients"]:
      assert (keys - {"epsilon_max"}) | {"epsilon"} <= client.keys()
  epsilons = [line["epsilon_max"] for line in test]
  assert epsilons[0] == 0
  assert epsilons == sorted(epsilons)
  assert [line["round"] for line in lines if line["split"] == "train"] == [2, 4, 6]


def test_summary_agrees_with_its_own_parts(finished):
  summary = json.loads((finished / "summary.json").read_text())
  confusion = np.array(summary["confusion"])
  assert confusion.sum() == summary["test"]["n"] == sum(c["n"] for c in summary["clients"])
  assert summary["test"]["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())


def test_three_rounds_and_three_more_equal_six(finished, tmp_path):
  run(tmp_path, server__num_rounds=3)
  assert run(tmp_path) == json.loads((finished / "summary.json").read_text())


def test_a_finished_run_started_again_changes_nothing(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "copy")
  before = (folder / "metrics.jsonl").read_bytes()
  assert run(folder) == json.loads((finished / "summary.json").read_text())
  assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_layouts_change_results_by_rounding_only(finished, tmp_path):
  reference = json.loads((finished / "summary.json").read_text())["test"]
  vmapped = run(tmp_path / "vmap", execution__layout="vmap")["test"]
  chunked = run(tmp_path / "chunk", execution__layout="chunk", execution__chunk_size=2)["test"]
  for other in (vmapped, chunked):
    assert other["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    assert other["auroc"] == pytest.approx(reference["auroc"], abs=0.02)


@pytest.mark.slow
def test_one_hospital_is_central_training_and_no_statement_says_otherwise(tmp_path):
  alone = {"partition__num_clients": 1, "privacy__mechanism": "none"}
  summary = run(tmp_path, **alone, privacy__noise_multiplier=0.0)
  assert summary["stopped"] == "completed"
  assert len(summary["clients"]) == 1
  for name in ("privacy_statement.md", "report.html"):
    text = (tmp_path / name).read_text()
    assert "All images lie in one place" in text, name
    assert "stay at their hospital" not in text, name
  baselines = {**alone, "privacy__noise_multiplier": 0.0, "eval__local_baselines": True}
  with pytest.raises(UserError, match=r"num_clients=1 with eval.local_baselines"):
    validate(smoke_config(**baselines))


@pytest.mark.slow
def test_killed_at_random_moments_and_rerun_equals_the_unbroken_run(tmp_path):
  (tmp_path / "noise.key").write_text("07" * 16)  # two runs of one secret draw alike
  command = [sys.executable, "-m", "fedjax_med.train", "--config=configs/smoke.py"]
  command += ["--config.server.num_rounds=300", "--config.eval.every=5"]
  command += [f"--noise_key={tmp_path / 'noise.key'}"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

  def start(name):
    return subprocess.Popen(
      [*command, f"--workdir={tmp_path / name}"],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  whole = start("whole")
  _, errors = whole.communicate(timeout=300)
  assert whole.returncode == 0, errors
  chance = random.Random(3)
  kills = 0
  for _ in range(3):
    process = start("broken")
    with contextlib.suppress(subprocess.TimeoutExpired):
      lines = tmp_path / "broken" / "metrics.jsonl"
      seen = lines.stat().st_size if lines.exists() else 0
      while process.poll() is None and not (lines.exists() and lines.stat().st_size > seen + 500):
        time.sleep(0.02)
      process.wait(chance.uniform(0, 1.0))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.communicate()
  last = start("broken")
  _, errors = last.communicate(timeout=300)
  assert last.returncode == 0, errors
  assert kills >= 2
  for name in ("summary.json", "privacy.json", "hospitals.json", "ledger.jsonl"):
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

  def lines_of(name):
    return [{**line, "seconds": 0} for line in metrics(tmp_path / name)]

  assert lines_of("broken") == lines_of("whole")


def test_another_configuration_is_refused_in_the_same_workdir(finished):
  with pytest.raises(UserError, match=r"holds run \w+, this configuration is run \w+; use another"):
    run(finished, client__learning_rate=0.25)


def newest_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))


def test_a_damaged_checkpoint_is_refused_with_its_reason(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "copy")
  for path in newest_checkpoint(folder).rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      data = bytearray(path.read_bytes())
      data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)
      path.write_bytes(bytes(data))
  with pytest.raises(UserError, match=r"checkpoint .* (cannot be read|was altered).*; delete"):
    run(folder)


def test_a_foreign_checkpoint_is_refused(finished, tmp_path):
  run(tmp_path / "other", seed=5)
  shutil.rmtree(tmp_path / "other" / "checkpoints")
  shutil.copytree(finished / "checkpoints", tmp_path / "other" / "checkpoints")
  with pytest.raises(UserError, match="belongs to run"):
    run(tmp_path / "other", seed=5)


def test_a_loss_that_breaks_stops_with_round_and_hospital_and_keeps_the_checkpoint(tmp_path):
  # Each step multiplies the weights by 1 - 3 * 10: some rounds pass before they overflow.
  with (
    jax.numpy_dtype_promotion("standard"),  # optax's adam mixes int32 counts and floats
    pytest.raises(UserError) as caught,
  ):
    run(
      tmp_path,
      client__optimizer="adamw",
      client__weight_decay=10.0,
      privacy__mechanism="none",
      privacy__noise_multiplier=0.0,
      client__learning_rate=3.0,
      server__num_rounds=60,
      eval__every=1,
    )
  sentence = r"round (\d+): the loss at 'hospital \d' became .* \(round (\d+) is saved\); lower"
  found = re.match(sentence, str(caught.value))
  assert found, str(caught.value)
  assert int(found[1]) == int(found[2]) + 1
  assert newest_checkpoint(tmp_path).name == found[2]
  assert metrics(tmp_path)[-1]["round"] == int(found[2])
  assert not (tmp_path / "summary.json").exists()


def test_a_loss_that_breaks_at_once_says_that_nothing_was_saved(tmp_path):
  changes = {"privacy__mechanism": "none", "privacy__noise_multiplier": 0.0}
  with pytest.raises(UserError, match=r"round 1: the loss at .*\(no round was saved\); lower"):
    run(tmp_path, **changes, client__learning_rate=3e38)


def test_fewer_rounds_than_are_done_are_refused(finished):
  with pytest.raises(UserError, match=r"server.num_rounds=3 is under the 6 rounds done"):
    run(finished, server__num_rounds=3)


def test_an_unwritable_workdir_is_a_sentence(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--workdir=.* cannot be written .*; choose"):
    run(tmp_path / "file" / "run")


def test_a_network_with_more_columns_than_classes_is_refused_before_it_is_planned(monkeypatch):
  monkeypatch.setitem(MODELS, "mine", lambda num_classes, **_: MODELS["linear"](num_classes + 1))
  monkeypatch.setattr(memory, "block_arguments", None)
  monkeypatch.setattr(memory, "footprint", None)
  message = r"shape \[2, 3\] for 2 images in training, where 2 classes make \[2, 2\]"
  with pytest.raises(UserError, match=message):
    build(smoke_config(model__name="mine"), load_hospitals(smoke_config()))


def test_more_clients_than_examples_is_a_sentence(tmp_path):
  config = get_config()
  config.partition.num_clients = 1000
  with pytest.raises(UserError, match=r"partition.num_clients=1000 exceeds the \d+ training units"):
    load_hospitals(config)


def test_a_start_that_is_refused_leaves_what_an_earlier_one_wrote(tmp_path):
  run(tmp_path, server__num_rounds=2)
  before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
  assert {"summary.json", "report.html", "privacy_statement.md"} < {path.name for path in before}
  with pytest.raises(UserError, match=r"server\.num_rounds=1 is under the 2 rounds done"):
    run(tmp_path, server__num_rounds=1)
  assert {path: path.read_bytes() for path in before} == before
  (tmp_path / "ledger.jsonl").unlink()
  with pytest.raises(UserError, match=r"ledger\.jsonl is missing.*; restore the ledger"):
    run(tmp_path, server__num_rounds=3)
  assert not (tmp_path / "ledger.jsonl").exists()


def test_a_workdir_inside_the_data_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"lies in data\.path=.*; choose a folder outside"):
    run(tmp_path / "runs" / "one", data__source="folder", data__path=str(tmp_path))
  assert not (tmp_path / "runs").exists()
