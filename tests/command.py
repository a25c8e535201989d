"""Starts an entry point as a user would, on a CPU without the tests' fake devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def smoke(start: tuple[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
  """``python -m MODULE`` or ``-c CODE`` on configs/smoke.py with a linear model: it starts fast."""
  return _run([*start, "--config=configs/smoke.py", "--config.model.name=linear", *arguments], ROOT)


def start(
  module: str, *arguments: str, cwd: pathlib.Path = ROOT
) -> subprocess.CompletedProcess[str]:
  """``python -m fedjax_med.MODULE`` in a folder."""
  return _run(["-m", f"fedjax_med.{module}", *arguments], cwd)


def _run(arguments: list[str], cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
