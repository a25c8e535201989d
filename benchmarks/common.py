"""Common parts of the benchmarks: arguments, envelope of a result, and timing."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def parser(description: str) -> argparse.ArgumentParser:
  """A parser with the arguments of every benchmark; the CPU is split as in a run."""
  from fedjax_med.simulation.mesh import split_cpu

  split_cpu(0)
  made = argparse.ArgumentParser(description=description)
  made.add_argument("--json", action="store_true", help="one JSON object on stdout, no table")
  made.add_argument("--out", help="file that gets the JSON object as well")
  made.add_argument("--repeats", type=int, default=5, help="measurements; the median counts")
  return made


def envelope(benchmark: str) -> dict[str, Any]:
  """Device, date, commit, command and versions: what a number is worth nothing without."""
  import jax

  device = jax.devices()[0]
  return {
    "benchmark": benchmark,
    "device": {
      "kind": device.device_kind,
      "platform": device.platform,
      "count": jax.device_count(),
      "cpu": _cpu_name(),
      "cores": os.cpu_count(),
    },
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": commit(),
    "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
    "versions": {
      "python": platform.python_version(),
      **{package: importlib.metadata.version(package) for package in PACKAGES},
    },
  }


def commit() -> str:
  """The commit of the working tree, with -dirty where files but results differ; '' outside git."""

  def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()

  try:
    tracked = git("diff", "HEAD", "--name-only", "--", ":/", ":(top,exclude)benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if tracked else "")
  except (OSError, subprocess.CalledProcessError):
    return ""


def _module() -> str:
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  return spec.name if spec else sys.argv[0]


def _cpu_name() -> str:
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
      return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor()


def in_checkout(
  checkout: pathlib.Path, code: str, arguments: Sequence[str], prefix: Sequence[str] = ()
) -> Any:
  """Runs Python code in a process of its own in a checkout; the JSON of its last line.

  Args:
    checkout: folder whose package and benchmarks are imported.
    code: source.
    arguments: of the code.
    prefix: command that starts the interpreter, such as taskset.

  Raises:
    RuntimeError: it failed; the message is the end of what it wrote.
  """
  path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH", ""))))
  done = subprocess.run(
    [*prefix, sys.executable, "-c", code, *arguments],
    cwd=checkout,
    env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    encoding="utf-8",
    check=False,
  )
  if done.returncode:
    raise RuntimeError(done.stderr[-2000:])
  return json.loads(done.stdout.splitlines()[-1])


def checkouts(against: Sequence[str], here: pathlib.Path) -> dict[str, pathlib.Path]:
  """Folders by name of the arguments NAME=FOLDER, and this checkout as ``now``."""
  named = [each.split("=", 1) for each in against]
  return {name: pathlib.Path(folder).resolve() for name, folder in named} | {"now": here}


def finish(result: dict[str, Any], arguments: argparse.Namespace) -> None:
  """Prints the result, one object on stdout, and writes it to --out."""
  text = json.dumps(result, indent=None if arguments.json else 2)
  print(text, flush=True)
  if arguments.out:
    with open(arguments.out, "w", encoding="utf-8") as file:
      file.write(json.dumps(result, indent=2) + "\n")


def say(text: str) -> None:
  """Progress, on stderr."""
  print(text, file=sys.stderr, flush=True)


def seconds(run: Callable[[], Any]) -> float:
  """Seconds of one call, which must wait for its own result."""
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def alternate(
  systems: dict[str, Callable[[], float]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
  """Times of each system, taken in turns so that a slow minute of the machine slows them all.

  Args:
    systems: name to a function that runs once and returns the seconds that count.
    repeats: turns.
    warm_up: turns before them that are not counted.
  """
  times: dict[str, list[float]] = {name: [] for name in systems}
  for turn in range(warm_up + repeats):
    for name, run in systems.items():
      took = run()
      if turn >= warm_up:
        times[name].append(took)
  return times


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
  """Median of the ratios of times taken in the same turn."""
  return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
