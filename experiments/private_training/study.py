"""The study of private training at ε = 3: each of the usual helps alone, five seeds a program.

python -m experiments.private_training.study --path=FOLDER
"""

import datetime
import json
import pathlib
import subprocess
import time
from typing import Any

import numpy as np
from absl import flags
from scipy import stats

from configs.br35h_small_private import get_config
from fedjax_med.core.config import Config, to_dict
from fedjax_med.core.errors import require_choice
from fedjax_med.core.validation import validate
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.flags import run_main
from fedjax_med.tasks.classification import classification_metrics

_PATH = flags.DEFINE_string("path", "data/Br35H", "Folder with yes/ and no/ of Br35H.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds 0, 1, ... of each arm.")
_ONLY = flags.DEFINE_list("only", [], "Arms to run; none runs all that are missing.")

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.json"
AUGMENTED = {"client.augmentation": "flip_shift", "privacy.augmentation_multiplicity": 4}
LARGE = {"client.batch_size": 256}
AVERAGED = {"server.ema_decay": 0.9}
SMALL_CLIP = {"privacy.clip_norm": 0.1, "client.learning_rate": 5.0}
# Every private arm has ε = 3 for one image, but the last, whose unit is the patient.
ARMS: dict[str, dict[str, Any]] = {
  "no privacy": {
    "privacy.mechanism": "none",
    "privacy.target_epsilon": 0.0,
    "client.learning_rate": 0.05,
  },
  "plain": {},
  "augmentation, one copy": {"client.augmentation": "flip_shift"},
  "augmentation, four copies": AUGMENTED,
  "average over rounds": AVERAGED,
  "batch 256": LARGE,
  "clip norm 0.1, ten times the learning rate": SMALL_CLIP,
  "clip norm 0.1, the same learning rate": {"privacy.clip_norm": 0.1},
  "all but the learning rate": {**AUGMENTED, **AVERAGED, **LARGE},
  "unit: near-duplicate group": {"privacy.unit": "group"},
}


def config_of(arm: str, path: str) -> Config:
  """The base config with the arm's changes."""
  config = get_config()
  config.data.path = path
  for name, value in ARMS[arm].items():
    section, _, field = name.partition(".")
    setattr(getattr(config, section), field, value)
  validate(config)
  return config


def run_arm(config: Config, seeds: int) -> dict[str, Any]:
  """Trains all seeds as one program; test metrics of each, ε and seconds."""
  import jax

  from fedjax_med.prepare.experiment import build, run_key
  from fedjax_med.run.budget import spent
  from fedjax_med.run.measure import evaluation_rows
  from fedjax_med.run.replicas import Replicas, train_replicas

  experiment = build(config, load_hospitals(config))
  numbers = np.arange(seeds, dtype=np.int32)
  keys = jax.numpy.stack([run_key(experiment, seed) for seed in range(seeds)])
  indices = np.asarray(experiment.clients.indices)
  started = time.monotonic()
  replicas = Replicas(seeds=numbers, keys=keys, indices=np.stack([indices] * seeds))
  trained = train_replicas(experiment, replicas)
  seconds = time.monotonic() - started
  rows = evaluation_rows(experiment)
  labels = experiment.hospitals.dataset.labels[rows]
  metrics = [
    classification_metrics(experiment.program.predict(weights, experiment.pool, [rows]), labels)
    for weights in trained
  ]
  rounds = config.server.num_rounds
  local, _ = spent(experiment, rounds, experiment.steps * rounds)
  return {
    "config": to_dict(experiment.config) | {"data": {**vars(config.data), "path": ""}},
    "epsilon_max": max(local, default=None),
    "noise_multipliers": [m.noise_multiplier for m in experiment.local.mechanisms]
    if experiment.local
    else [],
    "seconds": round(seconds, 1),
    "seeds": [{key: line[key] for key in ("accuracy", "auroc", "loss")} for line in metrics],
  }


def interval(values: list[float]) -> tuple[float, float]:
  """Mean and half width of its 95% t interval."""
  half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
  return float(np.mean(values)), float(half)


def table(results: dict[str, Any]) -> str:
  """Markdown table of the arms."""
  lines = ["| arm | ε | AUROC | accuracy |", "|---|---|---|---|"]
  for name in (arm for arm in ARMS if arm in results["arms"]):
    arm = results["arms"][name]
    cells = [
      "{:.3f} ± {:.3f}".format(*interval([seed[key] for seed in arm["seeds"]]))
      for key in ("auroc", "accuracy")
    ]
    spent = "none" if arm["epsilon_max"] is None else f"{arm['epsilon_max']:.2f}"
    lines.append(f"| {name} | {spent} | {cells[0]} | {cells[1]} |")
  return "\n".join(lines)


def main(_: list[str]) -> None:
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.simulation.mesh import split_cpu

  for name in _ONLY.value:
    require_choice("--only", name, ARMS)
  split_cpu(0)
  use_compilation_cache("~/.cache/fedjax_med/xla")
  git = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--exclude=*"],
    cwd=HERE,
    capture_output=True,
    encoding="utf-8",
    check=False,
  )
  known = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else '{"arms": {}}'
  results: dict[str, Any] = json.loads(known)
  for name in _ONLY.value or [arm for arm in ARMS if arm not in results["arms"]]:
    found = run_arm(config_of(name, _PATH.value), _SEEDS.value)
    found["commit"] = git.stdout.strip()
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results["arms"][name] = found
    results["command"] = "python -m experiments.private_training.study --path=FOLDER"
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {found['seconds']} s", flush=True)
  print(table(results))


if __name__ == "__main__":
  run_main(main)
