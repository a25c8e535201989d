"""Several whole runs of one experiment as one program: other seeds, or other shares of the data."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedjax_med.core.errors import UserError
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.run.drive import DIVERGED, Reached, drive
from fedjax_med.run.measure import evaluated
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

  A run equals the same run by itself to rounding. Runs are shared out over the devices of this
  process; nothing is measured, saved or resumed, and no budget stops a run.

  Raises:
    UserError: a weight of a run became NaN or infinite.
  """
  parts, number = experiment.program.parts, len(runs.seeds)
  devices = min(local_devices(), number)
  at_once = 1 if jax.default_backend() == "cpu" else RUNS_AT_ONCE

  def one(shared, row: tuple[Replicas, jax.Array]):
    (clients, pool, hyper), pretrained = shared
    run, rounds = row
    state = parts.initial(run.seeds, *pretrained)
    clients = clients._replace(indices=run.indices)
    state, metrics = parts.block(state, clients, pool, hyper, run.keys, rounds)
    return state.server.round, state.steps, metrics, evaluated(parts, state)

  inputs = experiment.clients, experiment.pool, experiment.hyper
  shared = jax.device_get((inputs, parts.pretrained))
  program = map_over_devices(one, devices, at_once)
  models: list[EvaluatedModel] = []

  def advance(lengths: np.ndarray) -> Sequence[Reached]:
    rows = program(shared, (runs, lengths))
    reached = []
    for k in range(number):
      rounds, steps, metrics, model = jax.tree.map(lambda leaf, k=k: leaf[k], rows)
      models.append(model)
      reached.append(Reached(rounds=int(rounds), steps=steps, metrics=metrics, probabilities=None))
    return reached

  stopped = drive([experiment] * number, advance)
  if DIVERGED in stopped:
    raise UserError(
      f"run {stopped.index(DIVERGED) + 1} of {number} at once: a weight became NaN or infinite;"
      f" lower client.learning_rate={experiment.config.client.learning_rate:g}"
    )
  return models
