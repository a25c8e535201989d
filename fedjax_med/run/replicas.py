"""Several whole runs of one experiment as one program: other seeds, or other shares of the data."""

from typing import NamedTuple

import jax
import numpy as np

from fedjax_med.prepare.experiment import Experiment
from fedjax_med.run.loop import evaluated
from fedjax_med.simulation.evaluation import EvaluatedModel
from fedjax_med.simulation.mesh import RUNS_AT_ONCE, local_devices, map_over_devices


class Replicas(NamedTuple):
  """Seeds, keys and rows of R runs of one experiment, each field with a leading axis of R.

  Attributes:
    seeds: [R] int32, of the initial weights.
    keys: [R] key of every other draw.
    indices: [R, K, n_max] int32 rows of the clients, as many in each run.
  """

  seeds: np.ndarray
  keys: jax.Array
  indices: np.ndarray


def train_replicas(experiment: Experiment, runs: Replicas) -> list[EvaluatedModel]:
  """The evaluated weights of every run after all rounds, on the host.

  A run equals the same run by itself to rounding, and ends early where a weight is not finite. Runs
  are shared out over the devices of this process; nothing is logged, saved or resumed, and no
  budget stops a run.
  """
  parts, rounds = experiment.program.parts, experiment.config.server.num_rounds
  devices = min(local_devices(), len(runs.seeds))
  at_once = 1 if jax.default_backend() == "cpu" else RUNS_AT_ONCE

  def one(shared, run: Replicas):
    (clients, pool, hyper), pretrained = shared
    own = clients._replace(indices=run.indices)
    state = parts.initial(run.seeds, *pretrained)
    state, _ = parts.block(state, own, pool, hyper, run.keys, rounds)
    return evaluated(parts, state)

  inputs = experiment.clients, experiment.pool, experiment.hyper
  shared = jax.device_get((inputs, parts.pretrained))
  found = map_over_devices(one, devices, at_once)(shared, runs)
  return [jax.tree.map(lambda leaf, k=k: leaf[k], found) for k in range(len(runs.seeds))]
