"""Two processes share one run: same result as one, files written once, killed and resumed."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from fedjax_med.folder import lock

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(workdir: pathlib.Path, *arguments: str) -> subprocess.Popen[str]:
  """Starts the smoke run with a linear model on one CPU device."""
  command = [sys.executable, "-m", "fedjax_med.train", "--config=configs/smoke.py"]
  return subprocess.Popen(
    [*command, "--config.model.name=linear", f"--workdir={workdir}", *arguments],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(workdir: pathlib.Path, *arguments: str, second: tuple[str, ...] = ()):
  """The same run as two processes; ``second`` goes to process 1 alone."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  place = (f"--coordinator_address=localhost:{port}", "--num_processes=2")
  return [
    start(workdir, *place, f"--process_id={k}", *arguments, *(second if k else ())) for k in (0, 1)
  ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
  """(exit code, stdout, stderr) of each."""
  try:
    outputs = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def assert_same_results(found: pathlib.Path, expected: pathlib.Path) -> None:
  """Equal summaries but for the plan and rounding, and equal ε."""

  def numbers(value):
    if isinstance(value, dict):
      return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list):
      return [numbers(item) for item in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value

  a, b = (json.loads((folder / "summary.json").read_text()) for folder in (found, expected))
  for summary in (a, b):
    del summary["plan"], summary["weights_sha256"]
  assert a == numbers(b)
  claims = [json.loads((folder / "privacy.json").read_text()) for folder in (found, expected)]
  for claim in claims:
    del claim["ledger"]  # its lines are log points, of which a resumed run may have others
  assert claims[0] == claims[1]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("one")
  [(code, _, stderr)] = finish([start(folder)])
  assert code == 0, stderr
  return folder


def secret_of(folder: pathlib.Path) -> str:
  """The flag that gives a run the secret of another: their noise can be compared."""
  return f"--noise_key={folder / 'noise.key'}"


@pytest.mark.slow
def test_two_processes_end_where_one_does_and_the_first_writes(one_process, tmp_path):
  first, second = finish(start_two(tmp_path, secret_of(one_process)))
  assert (first[0], second[0]) == (0, 0), first[2] + second[2]
  assert_same_results(tmp_path, one_process)
  assert "devices 2: all that 2 processes see" in first[1]
  assert "round 6/6" in first[1]
  ledgers = [(folder / "ledger.jsonl").read_text() for folder in (tmp_path, one_process)]
  assert ledgers[0] == ledgers[1]
  assert "round" not in second[1]
  assert "Report" not in second[1]
  names = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path, one_process)]
  assert names[0] == names[1]
  logs = [(folder / "metrics.jsonl").read_text() for folder in (tmp_path, one_process)]
  assert logs[0].count("\n") == logs[1].count("\n")
  rounds = [sorted(path.name for path in (tmp_path / "checkpoints").iterdir())]
  assert rounds == [sorted(path.name for path in (one_process / "checkpoints").iterdir())]


@pytest.mark.slow
def test_processes_with_unlike_data_are_refused_by_all(tmp_path):
  results = finish(start_two(tmp_path, second=("--config.data.seed=1",)))
  for code, _, stderr in results:
    assert code == 2
    assert "the processes of this run prepared different ones" in stderr
    assert "Traceback" not in stderr
  assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_all_processes_of_a_run_are_refused_where_another_run_works(tmp_path):
  with lock.hold(tmp_path, print):
    first, second = finish(start_two(tmp_path))
  assert f"is in use by process {os.getpid()} on " in first[2]
  assert "is in use, as the first process of this run says" in second[2]
  for code, _, stderr in (first, second):
    assert code == 2
    assert "Traceback" not in stderr
  assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_killed_processes_resume_together_or_as_one(one_process, tmp_path):
  processes = start_two(tmp_path, "--config.eval.every=1", secret_of(one_process))
  try:
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "2").exists():
      assert time.monotonic() < deadline
      assert all(process.poll() is None for process in processes)
      time.sleep(0.02)
  finally:
    for process in processes:
      process.send_signal(signal.SIGKILL)
      process.communicate()
  assert not (tmp_path / "summary.json").exists()
  for code, _, stderr in finish(start_two(tmp_path, "--config.server.num_rounds=5")):
    assert code == 0, stderr
  [(code, output, stderr)] = finish([start(tmp_path)])
  assert code == 0, stderr
  assert "round 5/6" in output
  assert "round 0/6" not in output
  assert_same_results(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--num_processes=2", "--process_id=0"], "--coordinator_address=None"),
    (["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"], "under"),
    (["--distributed"], "cannot be joined"),
  ],
)
def test_a_process_that_cannot_find_its_place_says_so(arguments, sentence, tmp_path):
  [(code, _, stderr)] = finish([start(tmp_path, *arguments)])
  assert code == 2
  assert stderr.startswith("error: ")
  assert sentence in stderr
  assert ";" in stderr
