"""How often a backdoor's patch fools a trained model: on test pictures of honest hospitals."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_med.data.dataset import client_rows
from fedjax_med.data.poisoning import TARGET, hostile_hospitals, patched
from fedjax_med.federated.algorithm import Pool
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.simulation.evaluation import EvaluatedModel
from fedjax_med.simulation.mesh import replicate


def backdoor_record(experiment: Experiment, weights: EvaluatedModel) -> dict[str, Any]:
  """Share of pictures of other classes that the model takes for the target; {} without a backdoor.

  Args:
    experiment: the run, whose test pictures carry no patch.
    weights: the model that is measured.

  Returns:
    Number of pictures, and the share with the patch and without it.
  """
  if experiment.config.attack.kind != "backdoor":
    return {}
  hospitals = experiment.hospitals
  dataset, hostile = hospitals.dataset, hostile_hospitals(experiment.config, hospitals.names)
  own = [
    rows[dataset.labels[rows] != TARGET] if not bad else rows[:0]
    for rows, bad in zip(client_rows(hospitals.test), hostile, strict=True)
  ]
  rows = np.concatenate(own)
  if not len(rows):
    return {"backdoor": {"pictures": 0, "fooled": None, "fooled_without_patch": None}}
  plain = dataset.inputs[rows]
  ends = np.cumsum([len(part) for part in own])
  groups = np.split(np.arange(len(rows), dtype=np.int32), ends[:-1])
  if not experiment.program.parts.personal:
    groups = [np.concatenate(groups)]

  def fooled(pictures: np.ndarray) -> float:
    pool = Pool(inputs=jnp.asarray(pictures), labels=jnp.asarray(dataset.labels[rows]))
    pool = replicate(pool, experiment.program.devices.mesh)
    probabilities = experiment.program.predict(weights, pool, groups)
    return float((np.asarray(probabilities).argmax(1) == TARGET).mean())

  return {
    "backdoor": {
      "pictures": len(rows),
      "fooled": fooled(patched(plain)),
      "fooled_without_patch": fooled(plain),
    }
  }
