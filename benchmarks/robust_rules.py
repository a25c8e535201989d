"""Time and memory that robust rules add to a round of 16 hospitals with cnn_small at 32 pixels.

Prints a JSON object a rule: seconds of a round (the least of several blocks of one round), the
excess over the mean's, working memory of the compiled rounds, and what the plan estimated.

Example: python -m benchmarks.robust_rules median geometric_median krum
"""

import json
import sys
import time

import jax
import numpy as np

from fedjax_med.core.config import (
  ClientConfig,
  Config,
  DataConfig,
  ExecutionConfig,
  ModelConfig,
  PartitionConfig,
  ServerConfig,
)
from fedjax_med.core.unread import drop_unread
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.exchange.robust.rules import RULES
from fedjax_med.prepare.experiment import build
from fedjax_med.prepare.memory import block_memory
from fedjax_med.run.single import block_arguments

REPEATS = 5


def config_of(rule: str) -> Config:
  """16 like hospitals that take 8 steps of 32 images, with the mean or a rule for f = 3."""
  config = Config(
    data=DataConfig(source="phantoms", image_size=32, num_examples=4000),
    partition=PartitionConfig(scheme="iid", num_clients=16),
    model=ModelConfig(name="cnn_small"),
    client=ClientConfig(learning_rate=0.05, batch_size=32, num_local_steps=8),
    server=ServerConfig(num_rounds=1, aggregator=rule),
    execution=ExecutionConfig(devices=1, layout="scan", compilation_cache=""),
  )
  config.robust.assumed_byzantine = 3
  drop_unread(config, ["robust.assumed_byzantine"])
  return config


def measure(rule: str) -> dict[str, float]:
  """Seconds of a round, and bytes."""
  config = config_of(rule)
  experiment = build(config, load_hospitals(config))
  program, seconds = experiment.program, []
  state = program.initial()
  for _ in range(1 + REPEATS):  # the first one compiles
    begun = time.perf_counter()
    state, _ = program.block(state, *block_arguments(experiment, 1))
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - begun)
  memory = block_memory(program.block, program.arguments) or {}
  return {
    "seconds": float(np.min(seconds[1:])),
    "compiled_bytes": float(sum(memory.values())),
    "planned_bytes": float(program.needs),
  }


def main(rules: list[str]) -> None:
  plain = measure("mean")
  print(json.dumps({"rule": "mean", **plain}), flush=True)
  for rule in rules or list(RULES):
    found = measure(rule)
    excess = found["seconds"] / plain["seconds"] - 1
    print(json.dumps({"rule": rule, **found, "excess": round(excess, 4)}), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
