"""Heart disease at eight hospitals of which two are hostile: rules of aggregation against attacks.

FLamby's rows; each of the four hospitals is dealt to two at random. data.seed draws that, and which
third of the patients of each hospital are test.
experiments/exchange/robust.sh runs it: this file is its --config and its --sweep.
"""

import dataclasses
from typing import Any

import numpy as np

from fedjax_med.core.config import (
  ClientConfig,
  Config,
  DataConfig,
  EvalConfig,
  ModelConfig,
  PartitionConfig,
  ServerConfig,
)
from fedjax_med.data import sources
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.heart_disease import load_heart_disease

SEEDS, F = 3, 2
ROUNDS = (3, 30)  # after a few the model that is turned round has not yet lost all it says
ATTACKS = (
  ("none", 0.0),
  ("sign_flip", 0.0),
  ("ipm", 2.0),
  ("ipm", 20.0),
  ("alie", 0.0),
  ("gaussian", 0.0),
  ("mimic", 0.0),
  ("label_flip", 0.0),
)
# (server.aggregator, robust.pre, robust.weiszfeld); the last one is read by one rule.
RULES = (
  ("mean", "none", "equivariant"),
  ("median", "none", "equivariant"),
  ("trimmed_mean", "none", "equivariant"),
  ("krum", "none", "equivariant"),
  ("multi_krum", "none", "equivariant"),
  ("meamed", "none", "equivariant"),
  ("centered_clipping", "none", "equivariant"),
  ("geometric_median", "none", "equivariant"),
  ("geometric_median", "none", "byzfl"),
  ("trimmed_mean", "nnm", "equivariant"),
  ("geometric_median", "nnm", "equivariant"),
)
COUNTS = ("trimmed_mean", "krum", "multi_krum", "meamed")  # rules that f is told


def halves(data: DataConfig) -> Dataset:
  """The dataset of heart_disease, each hospital of which is dealt to two, class by class."""
  whole = load_heart_disease(dataclasses.replace(data, split="paper"))
  assert whole.sites is not None
  random = np.random.default_rng(data.seed)
  halves = np.zeros(len(whole.labels), np.int32)
  for site, label in np.unique(np.stack([whole.sites, whole.labels]), axis=1).T:
    rows = np.flatnonzero((whole.sites == site) & (whole.labels == label))
    halves[random.permutation(rows)] = (random.integers(2) + np.arange(len(rows))) % 2
  return dataclasses.replace(
    whole,
    in_test=None,
    sites=(2 * whole.sites + halves).astype(np.int32),
    site_names=tuple(f"{name} {half}" for name in whole.site_names for half in (1, 2)),
  )


facts = sources.SOURCES["heart_disease"].facts._replace(own_split=False)
sources.register("heart_disease_halves", sources.Source(load=halves, facts=facts, seeded=True))


def get_config() -> Config:
  return Config(
    data=DataConfig(source="heart_disease_halves", path="data/heart-disease", test_fraction=0.34),
    partition=PartitionConfig(scheme="site", num_clients=0, min_client_size=1),
    model=ModelConfig(name="linear"),
    client=ClientConfig(optimizer="sgd", learning_rate=0.3, batch_size=256, num_local_steps=10),
    server=ServerConfig(num_rounds=30, weighting="uniform"),
    eval=EvalConfig(every=3),
  )


def get_sweep() -> list[dict[str, Any]]:
  return [
    {
      "server.aggregator": rule,
      "robust.pre": pre,
      "robust.weiszfeld": weiszfeld,
      "robust.assumed_byzantine": F if rule in COUNTS or pre == "nnm" else 0,
      "attack.kind": kind,
      "attack.strength": strength,
      "attack.number": 1 if kind == "none" else F,
      "server.num_rounds": rounds,
      "data.seed": seed,
    }
    for rule, pre, weiszfeld in RULES
    for kind, strength in ATTACKS
    for rounds in ROUNDS
    for seed in range(SEEDS)
  ]
