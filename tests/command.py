"""Starts an entry point as a user would, on a CPU without the tests' fake devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def smoke(start: tuple[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
  """``python -m MODULE`` or ``-c CODE`` on configs/smoke.py with a linear model: it starts fast."""
  command = [sys.executable, *start, "--config=configs/smoke.py"]
  return subprocess.run(
    [*command, "--config.model.name=linear", *arguments],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
