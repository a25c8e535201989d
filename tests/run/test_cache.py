"""The persistent cache: the second start of a configuration compiles nothing."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fedjax_med.simulation.mesh import MAX_CPU_DEVICES, cpu_cores

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The entry point as users start it, and then what the compiler was asked for and what it answered.
START = """
import collections, json, sys
import jax
from fedjax_med import flags, train
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))
flags.run_main(train.main)
asked = events["/jax/compilation_cache/compile_requests_use_cache"]
found = events["/jax/compilation_cache/cache_hits"]
print("EVENTS", json.dumps({"asked": asked, "found": found}))
"""


def start(folder: pathlib.Path, name: str) -> dict[str, int]:
  arguments = ["--config=configs/smoke.py", "--config.server.num_rounds=2", "--config.seed=5"]
  arguments += [f"--workdir={folder / name}", f"--config.execution.compilation_cache={folder}/xla"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", START, *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.rpartition("EVENTS ")[2])


@pytest.mark.slow
def test_the_second_start_of_the_same_config_compiles_nothing(tmp_path):
  first = start(tmp_path, "first")
  assert first["asked"] > first["found"]
  programs = {path.name for path in (tmp_path / "xla").glob("*-cache")}
  assert any(name.startswith("jit_block-") for name in programs)
  second = start(tmp_path, "second")
  assert second["asked"] > 2
  assert second["asked"] == second["found"]
  assert {path.name for path in (tmp_path / "xla").glob("*-cache")} == programs
  # Started like this a CPU is a device a core, each with a client of its own.
  plan = json.loads((tmp_path / "second" / "summary.json").read_text())["plan"]
  devices = min(3, cpu_cores(), MAX_CPU_DEVICES)
  assert plan["devices"] == devices
  assert plan["lowering"] == ("matmul" if cpu_cores() // devices > 1 else "auto")
