"""One process at a time in a workdir: who is refused, and that no kill leaves a lock behind."""

import concurrent.futures
import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.folder import lock
from fedjax_med.folder.writing import claim
from fedjax_med.privacy import ledger
from fedjax_med.report import reported_run as runs
from fedjax_med.sweep import merge, table
from tests.command import ROOT, smoke
from tests.running import metrics, smoke_config

HOLDER = """
import pathlib, sys, time
from fedjax_med.folder import lock
with lock.hold(pathlib.Path(sys.argv[1]), print):
  print("held", flush=True)
  time.sleep(120)
"""


@contextlib.contextmanager
def holder(folder):
  """A process that holds the lock of ``folder``."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  try:
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.communicate()


def never(*_):
  raise AssertionError("the data were waited for, or something was told")


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path):
  with holder(tmp_path) as process:
    said = rf"--workdir=.* is in use by process {process.pid} on {re.escape(socket.gethostname())}"
    for start in (lock.hold(tmp_path, never), lock.hold(tmp_path, never, 0, 2)):
      with pytest.raises(UserError, match=rf"{said} since \d{{4}}-.*; wait until it ends"), start:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.hold(tmp_path, never):
      pass


def test_a_run_in_a_locked_folder_is_refused_before_its_data_are_waited_for(tmp_path):
  with (
    lock.hold(tmp_path, never),
    pytest.raises(UserError, match=f"is in use by process {os.getpid()} on "),
  ):
    runs.run(smoke_config(), tmp_path, "smoke", "test", never)
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  ("running", "starting", "goes"),
  [
    ((0, 1), (0, 1), False),
    ((0, 2), (0, 2), False),
    ((0, 2), (1, 2), True),
    ((1, 12), (1, 2), False),
    ((1, 2), (1, 12), False),
    ((0, 2), (3, 4), False),
    ((0, 2), (0, 1), False),
    ((0, 1), (1, 2), False),
  ],
)
def test_shards_of_one_number_run_beside_each_other_and_nothing_else_does(
  tmp_path, running, starting, goes
):
  refused = pytest.raises(UserError, match="is in use by") if not goes else None
  with (
    lock.hold(tmp_path, never, *running),
    refused or contextlib.nullcontext(),
    lock.hold(tmp_path, never, *starting),
  ):
    pass
  with lock.hold(tmp_path, never, *starting):  # free again, also after a refusal
    pass


def test_of_many_that_start_at_once_one_holds_the_lock(tmp_path):
  barrier, holding, most = threading.Barrier(8), [], []

  def start(_):
    barrier.wait()
    with contextlib.suppress(UserError), lock.hold(tmp_path, never):
      holding.append(1)
      most.append(len(holding))
      time.sleep(0.05)
      holding.pop()

  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    list(threads.map(start, range(8)))
  assert most
  assert set(most) == {1}


def test_a_file_system_without_locks_is_told_and_stops_nobody(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(lock.fcntl, "flock", flock)
  messages = []
  with lock.hold(tmp_path, messages.append):
    pass
  assert len(messages) == 1
  assert "has no locks (No locks available): start no second process" in messages[0]


def test_a_folder_of_locks_is_neither_a_run_nor_a_sweep_but_a_sweep_is_no_place_for_a_run(tmp_path):
  with lock.hold(tmp_path, never):
    claim(tmp_path, "abc")
    table.begin(tmp_path, smoke_config(), [{"seed": 0}], ("sampling",))
    with pytest.raises(UserError, match="holds a sweep; use another --workdir for the run"):
      claim(tmp_path, "abc")


def test_nothing_is_merged_into_a_folder_that_a_shard_works_in(tmp_path):
  source, target = tmp_path / "source", tmp_path / "target"
  for folder in (source, target):
    table.begin(folder, smoke_config(), [{"seed": 0}], ("sampling",))
  with (
    lock.hold(target, never, 0, 2),
    pytest.raises(UserError, match=r"is in use by .*, shard 0/2 of a sweep; wait until it ends"),
  ):
    merge.join(target, [source])
  assert not (target / table.RESULTS).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("module", "arguments"),
  [
    ("train", ["--config.data.source=folder", "--config.data.path=/nowhere"]),
    ("audit", ["--config.data.source=folder", "--config.data.path=/nowhere"]),
    ("sweep", ["--grid=seed=0:2", "--shard=1/2"]),
  ],
)
def test_every_command_that_writes_in_a_workdir_is_refused_with_exit_code_2(
  tmp_path, module, arguments
):
  with holder(tmp_path) as process:
    result = smoke(("-m", f"fedjax_med.{module}"), f"--workdir={tmp_path}", *arguments)
  assert result.returncode == 2
  *_, last = result.stderr.splitlines()  # a note on the preset may stand before it
  assert last.startswith(f"error: --workdir={tmp_path} is in use by process {process.pid}")
  assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_of_two_trainings_in_one_workdir_the_first_ends_and_the_second_is_refused(tmp_path):
  command = [sys.executable, "-m", "fedjax_med.train", "--config=configs/smoke.py"]
  command += ["--config.model.name=linear", "--config.server.num_rounds=100"]
  command += ["--config.eval.every=1", f"--workdir={tmp_path}"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  first = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  while first.poll() is None and not (tmp_path / "metrics.jsonl").exists():
    time.sleep(0.02)
  second = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  still = first.poll() is None
  _, errors = first.communicate(timeout=240)
  assert still, "the first had ended before the second was refused: give it more rounds"
  assert second.returncode == 2
  assert f"is in use by process {first.pid} on " in second.stderr
  assert first.returncode == 0, errors
  assert ledger.read(tmp_path).rounds == 100
  assert json.loads((tmp_path / "summary.json").read_text())["rounds"] == 100
  rounds = [line["round"] for line in metrics(tmp_path) if line["split"] == "test"]
  assert rounds == list(range(101))
