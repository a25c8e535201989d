"""Membership inference on a whole run: shadow runs on random halves of every hospital's records."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.audit.membership import lira_scores, logit_confidence, tpr_at_fpr
from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError, require
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import Hospitals, client_rows, client_table
from fedjax_med.exchange.ckks import modelled
from fedjax_med.prepare.experiment import Experiment, build
from fedjax_med.run.replicas import Replicas, train_replicas
from fedjax_med.tasks.registry import task_named

FALSE_POSITIVES = 1e-3
LEAST_RUNS = 4  # each example in two of them and out of two, on average


class Shadows(NamedTuple):
  """Shadow runs that are ready to be trained.

  Attributes:
    experiment: a run on half of the data; all are of its size.
    rows: all training examples.
    halves: of each run, the examples of each hospital.
    seed: of the audit's own draws.
  """

  experiment: Experiment
  rows: np.ndarray
  halves: list[list[np.ndarray]]
  seed: int


def prepare(config: Config, hospitals: Hospitals, runs: int, seed: int) -> Shadows:
  """Halves the data for ``runs`` models. Every refusal comes here, before any training.

  Every run has the config's number of rounds, privacy and batch size, on half of each hospital's
  training examples (n is halved, so its ε is above that of the whole run at the same noise).

  Raises:
    UserError: too few runs, a unit that is not a record, or a config that halves do not allow.
  """
  require(
    runs >= LEAST_RUNS,
    f"--shadow_runs={runs} must be at least {LEAST_RUNS}, or 0 for none",
    "use 16",
  )
  require(
    config.privacy.unit == "record",
    f"--shadow_runs={runs} tells single records apart, and privacy.unit='{config.privacy.unit}'",
    "use --shadow_runs=0",
  )
  halves = [_halves(hospitals, seed, run) for run in range(runs)]
  half = dataclasses.replace(hospitals, train=client_table(halves[0]))
  try:
    experiment = build(modelled(config), half)
  except UserError as error:
    raise UserError(f"--shadow_runs={runs} trains on halves of the data: {error}") from error
  require(
    not experiment.program.parts.personal,
    f"--shadow_runs={runs} attacks the global model, and with server.algorithm="
    f"'{config.server.algorithm}' each hospital predicts with a model of its own",
    "use --shadow_runs=0",
  )
  dataset = hospitals.dataset
  require(
    task_named(dataset.task).has_classes,
    f"--shadow_runs={runs} attacks probabilities of classes, and the task is '{dataset.task}'",
    "use --shadow_runs=0",
  )
  rows = np.sort(np.concatenate(client_rows(hospitals.train)))
  return Shadows(experiment=experiment, rows=rows, halves=halves, seed=seed)


def attack(shadows: Shadows) -> dict[str, Any]:
  """Trains every model and attacks it with the others' help.

  The attacker knows the labels, the initial weights and all other runs.

  Returns:
    TPR at 0.1% FPR, and balanced accuracy of the best threshold, of two attacks: the loss, and the
    likelihood ratio (LiRA, Carlini et al. 2022), pooled over all runs and examples.
  """
  experiment, rows, halves = shadows.experiment, shadows.rows, shadows.halves
  member = np.stack([np.isin(rows, np.concatenate(half)) for half in halves])
  labels = experiment.hospitals.dataset.labels[rows]
  confidences = np.stack(
    [
      _confidence(experiment.program.predict(weights, experiment.pool, [rows]), labels)
      for weights in _train(experiment, halves, shadows.seed)
    ]
  )
  ratios = np.stack([lira_scores(confidences, member, run) for run in range(len(halves))])
  return {
    "runs": len(halves),
    "examples": len(rows),
    "false_positive_rate": FALSE_POSITIVES,
    "loss": _summary(confidences, member),
    "likelihood_ratio": _summary(ratios, member),
  }


def _halves(hospitals: Hospitals, seed: int, run: int) -> list[np.ndarray]:
  """Half of every hospital's rows; the same number of them in every run."""
  rng = np.random.default_rng([seed, run])
  return [
    np.sort(rng.permutation(row)[: max(1, len(row) // 2)]) for row in client_rows(hospitals.train)
  ]


def _train(experiment: Experiment, halves: list[list[np.ndarray]], seed: int) -> list[Any]:
  """(weights, state) after all rounds of every run; all begin with the same weights."""
  numbers = np.arange(len(halves), dtype=np.int32)
  keys = jax.vmap(functools.partial(jax.random.fold_in, base_key(seed)))(numbers)
  tables = np.stack([client_table(half).indices for half in halves])
  seeds = np.full(len(halves), experiment.config.seed, np.int32)
  return train_replicas(experiment, Replicas(seeds=seeds, keys=keys, indices=tables))


def _confidence(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """[examples] logit-scaled; probabilities that round to 0 or 1 are taken from just inside."""
  inside = np.clip(np.asarray(probabilities, np.float64), 1e-12, 1)
  return logit_confidence(inside, labels)


def _summary(scores: np.ndarray, member: np.ndarray) -> dict[str, float]:
  flat, bits = scores.ravel(), member.ravel()
  order = np.argsort(-flat, kind="stable")
  true = np.cumsum(bits[order]) / bits.sum()
  false = np.cumsum(~bits[order]) / (~bits).sum()
  last = np.append(np.diff(flat[order]) != 0, True)  # a threshold takes equal scores together
  return {
    "tpr": tpr_at_fpr(flat, bits, FALSE_POSITIVES),
    "balanced_accuracy": float((1 + (true - false)[last].max()) / 2),
  }
