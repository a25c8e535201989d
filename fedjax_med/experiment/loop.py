"""The rounds of one run on the host: blocks, log points, checkpoints, the budget's stop."""

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.core.metrics import classification_metrics
from fedjax_med.data.dataset import client_rows
from fedjax_med.experiment import checkpoints, workdir as files
from fedjax_med.experiment.build import Experiment
from fedjax_med.federated.algorithm import RoundMetrics, Tree
from fedjax_med.privacy.accounting import affordable_steps, epsilon
from fedjax_med.simulation.rounds import NEVER, BlockMetrics, SimulationState


class Outcome(NamedTuple):
  """Where a run ended.

  Attributes:
    state: final state.
    rounds: finished rounds.
    stopped: completed, or budget where the next round would have crossed the ε budget.
    test: metrics of the last log point on the whole test set.
    clients: the same for each hospital's test set.
    probabilities: [n_test, classes] of the test examples, in the order of ``test_rows``.
    epsilons: ε spent by each training client (empty without privacy).
    seconds: wall time to compile and to train, in this process.
  """

  state: SimulationState
  rounds: int
  stopped: str
  test: dict[str, Any]
  clients: list[dict[str, Any]]
  probabilities: np.ndarray
  epsilons: tuple[float, ...]
  seconds: dict[str, float]


# (rounds done, test metrics, largest ε or None) at every log point
Listener = Callable[[int, dict[str, Any], float | None], None]


def test_rows(experiment: Experiment) -> np.ndarray:
  """Pool rows of every hospital's test examples, hospital by hospital."""
  return np.concatenate(client_rows(experiment.hospitals.test)).astype(np.int32)


def evaluated_params(state: SimulationState) -> Tree:
  """The weights that are measured: the average over rounds where one is kept."""
  return state.server.average or state.server.params


def spent(experiment: Experiment, steps: np.ndarray) -> tuple[float, ...]:
  """ε of each training client after ``steps`` local steps; empty without privacy."""
  return tuple(
    epsilon(mechanism, int(count), delta)
    for mechanism, count, delta in zip(
      experiment.mechanisms or (), steps, experiment.deltas, strict=False
    )
  )


def affordable(experiment: Experiment) -> np.ndarray | None:
  """[K] steps each client can take within the ε budget, or None where there is no budget.

  A calibrated run has its budget built into σ; a given σ with a target ε is a budget.
  """
  privacy = experiment.config.privacy
  if not experiment.mechanisms or not (privacy.noise_multiplier and privacy.target_epsilon):
    return None
  return np.array(
    [
      affordable_steps(mechanism, delta, privacy.target_epsilon)
      for mechanism, delta in zip(experiment.mechanisms, experiment.deltas, strict=True)
    ]
  )


def evaluate(
  experiment: Experiment, state: SimulationState
) -> tuple[dict[str, Any], list[dict[str, Any]], np.ndarray]:
  """Metrics on the whole test set, per hospital, and the probabilities behind them."""
  rows = test_rows(experiment)
  labels = experiment.hospitals.dataset.labels[rows]
  probabilities = experiment.program.predict(
    evaluated_params(state), state.server.state, experiment.pool, rows
  )
  if not np.isfinite(probabilities).all():
    raise UserError(
      f"round {int(state.server.round)}: the global model's predictions are not finite; lower"
      f" client.learning_rate={experiment.config.client.learning_rate:g}"
      f" or server.learning_rate={experiment.config.server.learning_rate:g}"
    )
  ends = np.cumsum(experiment.hospitals.test.counts)
  parts = zip(np.split(probabilities, ends[:-1]), np.split(labels, ends[:-1]), strict=True)
  clients = [
    {"name": name, **classification_metrics(*part)}
    for name, part in zip(experiment.hospitals.names, parts, strict=True)
  ]
  return classification_metrics(probabilities, labels), clients, probabilities


def _train_line(experiment: Experiment, metrics: BlockMetrics) -> dict[str, Any]:
  """Means over a block's local steps; null for a client that took no part."""
  sums = jax.device_get(metrics.clients)

  def means(part: RoundMetrics) -> dict[str, Any]:
    examples = float(part.examples)
    if examples == 0:
      return {"loss": None, "accuracy": None, "steps": int(part.steps)}
    line: dict[str, Any] = {"loss": float(part.loss) / examples}
    if not math.isfinite(line["loss"]):
      line["loss"] = None
    line |= {"accuracy": float(part.correct) / examples, "steps": int(part.steps)}
    if experiment.mechanisms:
      norm = float(part.norm) / examples
      line["mean_gradient_norm"] = norm if math.isfinite(norm) else None
      line["clipped_fraction"] = float(part.clipped) / examples
    return line

  total = RoundMetrics(*(np.sum(leaf) for leaf in sums))
  clients = [
    {"name": name, **means(RoundMetrics(*(leaf[k] for leaf in sums)))}
    for k, name in enumerate(experiment.names)
  ]
  return {**means(total), "clients": clients}


def _require_finite(experiment: Experiment, metrics: BlockMetrics) -> None:
  bad = np.asarray(metrics.first_bad_round)
  if (bad == NEVER).all():
    return
  client = int(bad.argmin())
  config = experiment.config
  raise UserError(
    f"round {int(bad[client]) + 1}: the loss at '{experiment.names[client]}' became NaN or infinite;"
    f" lower client.learning_rate={config.client.learning_rate:g} (the last good checkpoint is kept)"
  )


def train_rounds(experiment: Experiment, folder: pathlib.Path, listen: Listener) -> Outcome:
  """Runs or resumes all rounds in ``folder``; equal configs end in equal weights, bit for bit.

  Raises:
    UserError: a foreign or damaged checkpoint, a loss that is not finite (with round and
      hospital; the last good checkpoint stays).
  """
  config, program = experiment.config, experiment.program
  key, allowance = base_key(config.seed), affordable(experiment)
  started = time.monotonic()

  with checkpoints.open_checkpoints(folder) as manager:
    initial = program.initial()
    restored = checkpoints.restore(manager, initial, experiment.run_id)
    state = initial if restored is None else restored
    files.keep_metrics_to(folder, -1 if restored is None else int(state.server.round))

    def run(state: SimulationState, rounds: int) -> tuple[SimulationState, BlockMetrics]:
      return program.block(
        state, experiment.clients, experiment.pool, experiment.hyper, key, jnp.asarray(rounds)
      )

    # No round at all: compiles, so that its time is known apart from training's.
    state, _ = jax.block_until_ready(run(state, 0))
    seconds = {"compile": time.monotonic() - started}
    started = time.monotonic()

    def log(state: SimulationState, train: dict[str, Any] | None):
      done = int(state.server.round)
      test, clients, probabilities = evaluate(experiment, state)
      epsilons = spent(experiment, np.asarray(state.steps))
      largest = max(epsilons, default=None)
      by_name = dict(zip(experiment.names, epsilons, strict=False))
      if by_name:
        clients = [{**line, "epsilon": by_name.get(line["name"])} for line in clients]
      common = {"epsilon_max": largest, "seconds": round(time.monotonic() - started, 3)}
      lines = [{"round": done, "split": "test", **test, **common, "clients": clients}]
      if train is not None:
        lines.append({"round": done, "split": "train", **train, **common})
      listen(done, test, largest)
      return lines, test, clients, probabilities, epsilons

    stopped = "completed"
    lines, *result = log(state, None)
    if restored is None:
      files.append_metrics(folder, lines)
    while (done := int(state.server.round)) < config.server.num_rounds:
      length = min(config.eval.every - done % config.eval.every, config.server.num_rounds - done)
      if allowance is not None:
        left = int(((allowance - np.asarray(state.steps)) // experiment.steps).min())
        if left <= 0:
          stopped = "budget"
          break
        length = min(length, left)
      state, metrics = run(state, length)
      _require_finite(experiment, metrics)
      lines, *result = log(state, _train_line(experiment, metrics))
      files.append_metrics(folder, lines)
      checkpoints.save(manager, state, experiment.run_id)

  seconds["train"] = time.monotonic() - started
  test, clients, probabilities, epsilons = result
  return Outcome(
    state, int(state.server.round), stopped, test, clients, probabilities, epsilons, seconds
  )
