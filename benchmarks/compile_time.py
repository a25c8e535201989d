"""How long a run takes to start: compiling the rounds, and process start to first finished round.

Every figure comes from processes of its own and a compilation cache in a temporary folder. Prints
one JSON object on stdout and, without --json, nothing more than that; progress goes to stderr.

Example: python -m benchmarks.compile_time --json
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parents[1]

CONFIG = """
from fedjax_med.core.config import *

def get_config():
  return Config(
    data=DataConfig(source="phantoms", image_size={pixels}, num_examples={examples}),
    partition=PartitionConfig(scheme="iid", num_clients={hospitals}),
    model=ModelConfig(name="{model}"),
    client=ClientConfig(learning_rate=0.05, batch_size={batch}, num_local_steps={steps}),
    server=ServerConfig(num_rounds=1),
    privacy=PrivacyConfig(mechanism="dp_sgd", noise_multiplier=1.0),
  )
"""
# One local step at each of two hospitals: what is measured is the start, not the training.
LARGE = {"model": "se_resnext50_32x4d", "pixels": 64, "examples": 500, "hospitals": 2}
LARGE |= {"batch": 8, "steps": 1}
# Workload W3: 20 hospitals x 200 training images (a fifth of all images is the test set).
SMALL = {"model": "cnn_small", "pixels": 28, "examples": 5000, "hospitals": 20}
SMALL |= {"batch": 20, "steps": 10}

COMPILE = """
import json, runpy, sys, time
import jax
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.experiment import build
from fedjax_med.run.single import block_arguments
from fedjax_med.simulation.mesh import split_cpu
split_cpu(0)
config = runpy.run_path(sys.argv[1])["get_config"]()
config.execution.memory_gib = 4096.0  # else build may compile the rounds, to look at their memory
hospitals = load_hospitals(config)
times = [time.perf_counter()]
experiment = build(config, hospitals)
state = jax.eval_shape(experiment.program.initial)
times.append(time.perf_counter())
traced = experiment.program.block.trace(state, *block_arguments(experiment, 1))
times.append(time.perf_counter())
lowered = traced.lower()
times.append(time.perf_counter())
lowered.compile()
times.append(time.perf_counter())
names = ("build_s", "trace_s", "lower_s", "compile_s")
seconds = {name: b - a for name, a, b in zip(names, times, times[1:])}
print(json.dumps(seconds | {"device": jax.devices()[0].device_kind}))
"""


def environment() -> dict[str, str]:
  return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def compile_once(config: pathlib.Path) -> dict[str, Any]:
  """Seconds to build, trace, lower and compile the rounds in a fresh process without a cache."""
  done = subprocess.run(
    [sys.executable, "-c", COMPILE, str(config)],
    env={**environment(), "JAX_ENABLE_COMPILATION_CACHE": "false"},
    stdout=subprocess.PIPE,
    encoding="utf-8",
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def first_round(config: pathlib.Path, cache: pathlib.Path) -> float:
  """Seconds from process start until the log line of round 1 is on disk."""
  with tempfile.TemporaryDirectory() as workdir:
    log = pathlib.Path(workdir) / "metrics.jsonl"
    started = time.perf_counter()
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "fedjax_med.train", f"--config={config}"),
        *(f"--workdir={workdir}", f"--config.execution.compilation_cache={cache}"),
      ],
      cwd=ROOT,
      env=environment(),
      stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not (
      log.exists() and '"round": 1' in log.read_text(encoding="utf-8")
    ):
      time.sleep(0.01)
    seconds = time.perf_counter() - started
    if process.wait() != 0:
      raise SystemExit(f"{config.name}: the run failed with exit code {process.returncode}")
  return seconds


def measure(folder: pathlib.Path, repeats: int) -> dict[str, Any]:
  """Medians over ``repeats`` processes each, in seconds."""
  results: dict[str, Any] = {}

  def note(name: str, values: list[float]) -> None:
    results[name] = round(statistics.median(values), 2)
    print(f"{name}: {results[name]} (of {[round(v, 2) for v in values]})", file=sys.stderr)

  for name, prefix, settings in (("large", "", LARGE), ("w3", "w3_", SMALL)):
    config = folder / f"{name}.py"
    config.write_text(CONFIG.format(**settings), encoding="utf-8")
    if name == "large":
      found = [compile_once(config) for _ in range(repeats)]
      note("cold_s", [one["compile_s"] for one in found])
      for part in ("build_s", "trace_s", "lower_s"):
        note(part, [one[part] for one in found])
    caches = [folder / f"{name}_cache{number}" for number in range(repeats)]
    note(f"{prefix or 'large_'}start_cold_s", [first_round(config, cache) for cache in caches])
    note(f"{prefix}warm_s", [first_round(config, caches[0]) for _ in range(repeats)])
  results["w3_cold_s"] = results.pop("w3_start_cold_s")
  return results


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.set_defaults(repeats=1)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    results = measure(pathlib.Path(folder), options.repeats)
  common.finish(common.envelope("compile_time") | results, options)


if __name__ == "__main__":
  main()
