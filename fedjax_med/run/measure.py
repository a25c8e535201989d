"""Log points: metrics of the model at every hospital, ε beside them, and the lines of the log."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.data.dataset import Hospitals, client_rows
from fedjax_med.data.poisoning import hostile_hospitals
from fedjax_med.data.recordings import of_recordings
from fedjax_med.federated.algorithm import RoundMetrics
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.prepare.program import Parts
from fedjax_med.run.budget import hides_who_takes_part
from fedjax_med.simulation.evaluation import EvaluatedModel
from fedjax_med.simulation.rounds import NEVER, BlockMetrics, SimulationState
from fedjax_med.tasks.registry import task_named


class LogPoint(NamedTuple):
  """Results of a run after some rounds.

  Attributes:
    rounds: finished rounds.
    test: metrics on the whole test set, under an attack on that of the honest hospitals.
    clients: the same for each hospital's test set, with its ε where its records are protected, and
      "hostile": True of an attacker.
    probabilities: [n_test, classes] of the test examples, in the order of ``evaluation_rows``.
    epsilons: ε of each training client's records or patients (empty where none protects them).
    client_epsilon: ε of whole hospitals, None where none protects them.
    recordings: metrics of whole recordings of the test set, each predicted by the mean of its
      windows; None of other examples.
  """

  rounds: int
  test: dict[str, Any]
  clients: list[dict[str, Any]]
  probabilities: np.ndarray
  epsilons: tuple[float, ...]
  client_epsilon: float | None
  recordings: dict[str, Any] | None = None


Listener = Callable[[LogPoint], None]


def evaluation_rows(experiment: Experiment) -> np.ndarray:
  """Pool rows of every hospital's test examples, hospital by hospital."""
  return np.concatenate(client_rows(experiment.hospitals.test)).astype(np.int32)


def evaluation_groups(parts: Parts, hospitals: Hospitals) -> list[np.ndarray]:
  """The same rows: each hospital's by themselves where it predicts with a model of its own."""
  groups = [rows.astype(np.int32) for rows in client_rows(hospitals.test)]
  return groups if parts.personal else [np.concatenate(groups)]


def evaluated(parts: Parts, state: SimulationState) -> EvaluatedModel:
  """The weights that are measured: the average over rounds where the run keeps one."""
  server = state.server
  client_states = state.client_states if parts.personal else ()
  return EvaluatedModel(
    params=server.params if server.average is None else server.average,
    state=server.state,
    client_states=client_states,
  )


def honest_examples(experiment: Experiment) -> np.ndarray | slice:
  """The test examples that scores of all are of: those of honest hospitals.

  They index arrays in the order of ``evaluation_rows``; without an attack they are all.
  """
  hospitals = experiment.hospitals
  hostile = hostile_hospitals(experiment.config, hospitals.names)
  return np.repeat(~hostile, hospitals.test.counts) if hostile.any() else slice(None)


def measure(
  experiment: Experiment,
  rounds: int,
  probabilities: np.ndarray,
  epsilons: tuple[float, ...],
  client_epsilon: float | None,
) -> LogPoint:
  """The log point of predictions [n_test, classes], in the order of ``evaluation_rows``."""
  task, rows = task_named(experiment.hospitals.dataset.task), evaluation_rows(experiment)
  targets = jax.tree.map(lambda leaf: leaf[rows], task.targets(experiment.hospitals.dataset))
  by_name = dict(zip(experiment.names, epsilons, strict=False))
  ends = np.cumsum(experiment.hospitals.test.counts)
  hostile = hostile_hospitals(experiment.config, experiment.hospitals.names)
  clients = []
  for name, part, bad in zip(
    experiment.hospitals.names, np.split(np.arange(len(rows)), ends[:-1]), hostile, strict=True
  ):
    part_targets = jax.tree.map(lambda leaf, part=part: leaf[part], targets)
    line = {"name": name, **task.measure(probabilities[part], part_targets)}
    line |= {"hostile": True} if bad else {}
    clients.append({**line, "epsilon": by_name.get(name)} if by_name else line)
  honest = [line for line in clients if "hostile" not in line]
  across = {} if task.across is None else task.across(honest)
  shown = honest_examples(experiment)
  shown_targets = jax.tree.map(lambda leaf: leaf[shown], targets)
  return LogPoint(
    rounds=rounds,
    test={**task.measure(probabilities[shown], shown_targets), **across},
    clients=clients,
    probabilities=probabilities,
    epsilons=epsilons,
    client_epsilon=client_epsilon,
    recordings=_of_recordings(experiment, probabilities, targets),
  )


def _of_recordings(
  experiment: Experiment, probabilities: np.ndarray, targets: Any
) -> dict[str, Any] | None:
  """Metrics of whole recordings; None where examples are no windows of any."""
  dataset = experiment.hospitals.dataset
  if dataset.series is None:
    return None
  shown = honest_examples(experiment)
  rows, targets = evaluation_rows(experiment)[shown], jax.tree.map(lambda x: x[shown], targets)
  means, first = of_recordings(probabilities[shown], dataset.series.recordings[rows])
  return task_named(dataset.task).measure(means, jax.tree.map(lambda leaf: leaf[first], targets))


def test_line(experiment: Experiment, point: LogPoint) -> dict[str, Any]:
  """The line of metrics.jsonl on the test images, but for the seconds."""
  return {
    "round": point.rounds,
    "split": "test",
    **point.test,
    **({} if point.recordings is None else {"recordings": point.recordings}),
    "epsilon_max": max(point.epsilons, default=point.client_epsilon),
    **({"client_epsilon": point.client_epsilon} if experiment.central else {}),
    "clients": point.clients,
  }


def log_lines(
  experiment: Experiment, point: LogPoint, metrics: BlockMetrics | None, seconds: float
) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl at a log point: test, and train where a block was trained."""
  test = {**test_line(experiment, point), "seconds": round(seconds, 3)}
  if metrics is None:
    return [test]
  shared = ("round", "epsilon_max", "client_epsilon", "seconds")
  common = {key: test[key] for key in shared if key in test}
  return [test, {"split": "train", **train_line(experiment, metrics), **common}]


def train_line(experiment: Experiment, metrics: BlockMetrics) -> dict[str, Any]:
  """Means over a block's local steps; null for a client that took no part.

  Means are over all clients together if participation is to stay secret. Where the run
  goes on without them, the line also counts hospitals that sent an update that was not finite.
  """
  sums = jax.device_get(metrics.clients)
  tallied = task_named(experiment.hospitals.dataset.task).tallied

  def means(part: RoundMetrics) -> dict[str, Any]:
    examples = float(part.examples)
    if examples == 0:
      return {"loss": None, tallied: None, "steps": int(part.steps)}
    line: dict[str, Any] = {"loss": float(part.loss) / examples}
    if not math.isfinite(line["loss"]):
      line["loss"] = None
    line |= {tallied: float(part.tally) / examples, "steps": int(part.steps)}
    if experiment.local:
      norm = float(part.norm) / float(part.units)
      line["mean_gradient_norm"] = norm if math.isfinite(norm) else None
      line["clipped_fraction"] = float(part.clipped) / float(part.units)
    return line

  total = jax.tree.map(np.sum, sums)
  clients = [
    {"name": name, **means(jax.tree.map(lambda leaf, k=k: leaf[k], sums))}
    for k, name in enumerate(experiment.names)
  ]
  line = {**means(total), "clients": clients}
  if hides_who_takes_part(experiment):
    del line["clients"], line["steps"]
  if experiment.goes_on:
    line["hospitals_not_finite"] = int((np.asarray(metrics.bad_round) != NEVER).sum())
  return line
