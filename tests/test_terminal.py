"""No entry point ends because a terminal lacks a letter, or a name holds bytes that are no text."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = '''
"""Prints ε ≤ σ."""
import sys
from fedjax_med.core.errors import UserError
from fedjax_med.flags import run_main

def main(argv):
  print("ε ≤ 3 – 正常", argv[1])
  print("σ × 2", file=sys.stderr)
  raise UserError(f"{argv[1]} is not a folder; give one\\nof a run")

if __name__ == "__main__":
  run_main(main)
'''
NAME = b"\x93\xaa\n.png"


def run(encoding, arguments, cwd=ROOT):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
  command = [os.fsencode(sys.executable), *arguments]
  return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=60)


@pytest.mark.parametrize(
  ("encoding", "out"),
  [
    ("ascii", "epsilon <= 3 - \\u6b63\\u5e38 \\x93\\xaa\n.png\n"),
    ("latin-1:strict", "epsilon <= 3 - \\u6b63\\u5e38 \\x93\\xaa\n.png\n"),
    ("utf-8:strict", "ε ≤ 3 – 正常 \\x93\\xaa\n.png\n"),
  ],
)
def test_what_a_terminal_lacks_is_spelt_out_and_an_error_is_one_line(tmp_path, encoding, out):
  (tmp_path / "script.py").write_text(SCRIPT.lstrip(), encoding="utf-8")
  done = run(encoding, ["script.py", NAME], tmp_path)
  code = encoding.partition(":")[0]
  assert done.returncode == 2
  assert done.stdout.decode(code) == out
  first, *error = done.stderr.decode(code).splitlines()
  assert first == (
    "sigma x 2" if code == "ascii" else "sigma × 2" if code == "latin-1" else "σ × 2"
  )
  assert error == ["error: \\x93\\xaa\\x0a.png is not a folder; give one\\x0aof a run"]


def test_the_help_and_the_errors_of_commands_are_shown_on_any_terminal():
  shown = run("ascii", ["-m", "fedjax_med.sweep", "--help"])
  assert (shown.returncode, shown.stderr) == (0, b"")
  assert b"Print the points, the programs and the epsilon; train nothing." in shown.stdout
  failed = run("ascii", ["-m", "fedjax_med.report", b"--workdir=\x93\xaa"])
  assert failed.returncode == 2
  assert failed.stderr.startswith(b"error: workdir=\\x93\\xaa is not a folder; ")


def test_every_command_is_run_by_run_main():
  started = [
    path
    for folder in ("fedjax_med", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
  ]
  assert len(started) >= 8
  assert [p.name for p in started if "run_main(" not in p.read_text(encoding="utf-8")] == []
