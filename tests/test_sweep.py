"""The command line of sweeps: results, bad grids in one sentence, kills, shards, merging."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from tests.command import ROOT, smoke

sweep = functools.partial(smoke, ("-m", "fedjax_med.sweep"))
GRID = ("--grid=privacy.noise_multiplier=0.5,2", "--grid=seed=0:2")


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--grid=privacy.noise=1"], "axis 'privacy.noise' is no field that can vary; did you mean"),
    (["--grid=seed=3:3"], "seed=3:3 is empty; give values such as 0.5,1,2 or 0:5"),
    (["--grid=seed=0:2", "--shard=2/2"], "--shard=2/2 is not I/N with 0 ≤ I < N; use 0/4"),
    (["--grid=seed=0:2", "--shard=3/4"], "--shard=3/4 has none of 2 points; use fewer shards"),
    (["--grid=seed=0:2", "--sweep=nowhere.py"], "--sweep=nowhere.py is not a file; give a .py"),
    (["--grid=seed=0:2", "--seed_axes=noise"], "--seed_axes='noise' is unknown; choose one of"),
    (["--grid=seed=-3,0"], "point seed=-3: seed=-3 must be at least 0"),
    (["--grid=seed=0:2", "--workdir="], "--workdir is missing; name the folder"),
    (["--grid=data.seed=0:2", "--seed_axes=init"], "--seed_axes is read with an axis named seed"),
    (["--grid=seed=0:2", "--random_seed=1"], "--random_seed is read with --random only; add that"),
    (["--grid=seed=0:2", "--shards=2"], "--shards is read with --submit only; add that, or leave"),
    (["--grid=seed=0:2", "--submit_options=a=1"], "--submit_options is read with --submit only"),
    (["--grid=seed=0:2", "--submit=local", "--shard=0/2"], "--shard=0/2 with --submit, whose jobs"),
    (
      ["--grid=client.momentum=0.9"],
      "axis client.momentum is read at no point of the sweep: it",
    ),
    (
      ["--grid=seed=0:2", "--config.client.momentum=0.5"],
      "client.momentum=0.5 is read at no point of the sweep: it is read with client.optimizer=mom",
    ),
  ],
)
def test_what_cannot_be_swept_is_one_sentence(tmp_path, arguments, sentence):
  result = sweep(f"--workdir={tmp_path / 'sweep'}", *arguments)
  assert result.returncode == 2
  assert result.stderr.startswith(f"error: {sentence}")
  assert result.stderr.count("\n") == 1
  assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_dry_run_names_points_programs_and_epsilon_and_writes_nothing(tmp_path):
  file = tmp_path / "points.py"
  file.write_text(
    'def get_sweep():\n  return [{"client.batch_size": 8}, {"client.batch_size": 16}]\n'
  )
  folder = f"--workdir={tmp_path / 'sweep'}"
  result = sweep("--dry_run", folder, f"--sweep={file}", "--grid=seed=0:2")
  assert result.returncode == 0, result.stderr
  for words in ("Program 2 of 2", "client.batch_size=16, seed=1", "ε planned"):
    assert words in result.stdout
  assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_its_report_and_its_points_by_themselves(tmp_path):
  folder = tmp_path / "sweep"
  result = sweep(f"--workdir={folder}", *GRID)
  assert result.returncode == 0, result.stderr
  assert "(4 points, " in result.stdout
  frame = pd.read_parquet(folder / "results.parquet")
  assert len(frame) == 4 * 3
  again = sweep(f"--workdir={folder}", *GRID)
  assert again.returncode == 2
  assert "has 4 finished points of this sweep; add --resume" in again.stderr
  report = subprocess.run(
    [sys.executable, "-m", "fedjax_med.report", f"--workdir={folder}"],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert report.stdout.strip() == str(folder / "report.html")
  point = folder / "points" / "00003"
  command = shlex.split(json.loads((point / "config.json").read_text())["command"])
  command = [sys.executable, *command[1:]]
  command[command.index("--workdir=DIR")] = f"--workdir={tmp_path / 'alone'}"
  command.append(f"--noise_key={point / 'noise.key'}")
  subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  ours, theirs = (
    json.loads((place / "summary.json").read_text()) for place in (point, tmp_path / "alone")
  )
  assert ours["run_id"] == theirs["run_id"]
  assert ours["test"] == pytest.approx(theirs["test"], rel=1e-4)
  spent = subprocess.run(
    [sys.executable, "-m", "fedjax_med.privacy", f"--workdir={point}", "--json"],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert json.loads(spent.stdout)["epsilon_max"] == ours["epsilon_max"]


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_table_as_unbroken_and_in_shards(tmp_path):
  long = (*GRID, "--points_at_once=2", "--config.server.num_rounds=200", "--config.eval.every=50")
  whole = sweep(f"--workdir={tmp_path / 'whole'}", *long)
  assert whole.returncode == 0, whole.stderr
  said = whole.stdout + whole.stderr
  notes = [
    said.index(f"program 1 of 1{note}") for note in (": planning", ": compiling", ": 2 runs")
  ]
  assert notes == sorted(notes)
  long = (*long, f"--noise_key={tmp_path / 'whole' / 'noise.key'}")
  broken = tmp_path / "broken"
  command = [sys.executable, "-m", "fedjax_med.sweep", "--config=configs/smoke.py"]
  command += ["--config.model.name=linear", f"--workdir={broken}", *long]
  process = subprocess.Popen(
    command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
  )  # fmt: skip
  first = broken / "points" / "00000" / "summary.json"
  while process.poll() is None and not first.exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert first.exists()
  assert not (broken / "results.parquet").exists()
  resumed = sweep(f"--workdir={broken}", "--resume", *long)
  assert resumed.returncode == 0, resumed.stderr
  expected = (tmp_path / "whole" / "results.parquet").read_bytes()
  assert (broken / "results.parquet").read_bytes() == expected

  for index in (0, 1):
    part = sweep(f"--workdir={tmp_path / 'shards'}", f"--shard={index}/2", *long)
    assert part.returncode == 0, part.stderr
    assert "sweep merge --workdir=" in part.stdout
  assert not (tmp_path / "shards" / "results.parquet").exists()
  merged = subprocess.run(
    [sys.executable, "-m", "fedjax_med.sweep", "merge", f"--workdir={tmp_path / 'shards'}"],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert "4 of 4 points" in merged.stdout
  pd.testing.assert_frame_equal(
    pd.read_parquet(tmp_path / "shards" / "results.parquet"),
    pd.read_parquet(tmp_path / "whole" / "results.parquet"),
    rtol=1e-3,
    atol=1e-4,
  )


@pytest.mark.slow
def test_jobs_of_a_scheduler_run_the_shards_and_merge(tmp_path):
  folder = tmp_path / "jobs"
  result = sweep(f"--workdir={folder}", *GRID, "--submit", "local", "--shards=2")
  assert result.returncode == 0, result.stderr
  assert "4 of 4 points" in result.stdout
  assert len(pd.read_parquet(folder / "results.parquet")) == 4 * 3
  assert list((folder / "submitit").glob("*_log.out"))


def test_a_scheduler_that_is_not_known_is_a_sentence(tmp_path):
  result = sweep(f"--workdir={tmp_path / 'jobs'}", *GRID, "--submit=pbs")
  assert result.returncode == 2
  assert result.stderr.startswith("error: --submit='pbs' is unknown; choose one of local, slurm")
