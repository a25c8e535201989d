"""The rounds of one run on the host: blocks, log points, checkpoints, the budget's stop."""

import concurrent.futures
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med import __version__
from fedjax_med.core.errors import UserError, require
from fedjax_med.data.dataset import Hospitals, client_rows
from fedjax_med.federated.algorithm import RoundMetrics
from fedjax_med.folder import writing as files
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.prepare.program import Parts
from fedjax_med.privacy import claims, ledger
from fedjax_med.privacy.calibration import affordable_steps
from fedjax_med.privacy.guarantees import (
  NO_PRIVACY,
  SYNTHETIC_GAP,
  Guarantee,
  accountant_version,
)
from fedjax_med.privacy.guarantees import spent as epsilons_of
from fedjax_med.run import checkpoints, ledger_repair
from fedjax_med.simulation.evaluation import EvaluatedModel
from fedjax_med.simulation.mesh import replicate, replicated
from fedjax_med.simulation.processes import is_first
from fedjax_med.simulation.rounds import NEVER, BlockMetrics, SimulationState
from fedjax_med.tasks.registry import task_named


class LogPoint(NamedTuple):
  """What is known of a run after some rounds.

  Attributes:
    rounds: finished rounds.
    test: metrics on the whole test set.
    clients: the same for each hospital's test set, with its ε where its records are protected.
    probabilities: [n_test, classes] of the test examples, in the order of ``evaluation_rows``.
    epsilons: ε of each training client's records or patients (empty where none protects them).
    client_epsilon: ε of whole hospitals, None where none protects them.
  """

  rounds: int
  test: dict[str, Any]
  clients: list[dict[str, Any]]
  probabilities: np.ndarray
  epsilons: tuple[float, ...]
  client_epsilon: float | None


class Outcome(NamedTuple):
  """Where a run ended.

  Attributes:
    state: final state.
    stopped: completed; budget where the next round would have crossed the ε budget; in a sweep
      also diverged, where a weight or a prediction was not finite.
    last: the last log point.
    seconds: wall time to compile and to train, in this process.
  """

  state: SimulationState
  stopped: str
  last: LogPoint
  seconds: dict[str, float]


Listener = Callable[[LogPoint], None]


def evaluation_rows(experiment: Experiment) -> np.ndarray:
  """Pool rows of every hospital's test examples, hospital by hospital."""
  return np.concatenate(client_rows(experiment.hospitals.test)).astype(np.int32)


def evaluation_groups(parts: Parts, hospitals: Hospitals) -> list[np.ndarray]:
  """The same rows: each hospital's by themselves where it predicts with a model of its own."""
  groups = [rows.astype(np.int32) for rows in client_rows(hospitals.test)]
  return groups if parts.personal else [np.concatenate(groups)]


def evaluated(parts: Parts, state: SimulationState) -> EvaluatedModel:
  """The weights that are measured: the average over rounds where one is kept."""
  server = state.server
  client_states = state.client_states if parts.personal else ()
  return EvaluatedModel(
    server.params if server.average is None else server.average, server.state, client_states
  )


def hides_who_takes_part(experiment: Experiment) -> bool:
  """Whether ε of whole hospitals rests on nobody knowing who took part in a round."""
  central = experiment.central
  return central is not None and central.mechanisms[0].sampling_probability < 1


def counted_steps(experiment: Experiment, rounds: int, steps: np.ndarray) -> np.ndarray:
  """[K] local steps that ε of records is told for: those executed, ``steps`` [K].

  Where it is to stay secret who took part, it is as many as ``rounds`` can hold: any other count,
  and any ε of it, the largest over the hospitals too, would tell how often one of them did.
  """
  return experiment.steps * rounds if hides_who_takes_part(experiment) else np.asarray(steps)


def releases(experiment: Experiment, rounds: int, steps: np.ndarray) -> list[list[int]]:
  """What counts for each party of each guarantee after ``rounds`` and ``steps`` [K]."""
  counted = counted_steps(experiment, rounds, steps)
  return [
    [rounds] if guarantee is experiment.central else [int(count) for count in counted]
    for guarantee in experiment.guarantees
  ]


def spent(
  experiment: Experiment, rounds: int, steps: np.ndarray
) -> tuple[tuple[float, ...], float | None]:
  """ε of each training client after ``steps`` local steps (empty without), and of whole clients."""
  local, central = experiment.local, experiment.central
  return (
    epsilons_of(local, counted_steps(experiment, rounds, steps)) if local else (),
    epsilons_of(central, [rounds])[0] if central else None,
  )


def affordable_rounds(experiment: Experiment, steps: np.ndarray, done: int) -> float:
  """Rounds still allowed by the ε budgets after ``steps`` [K]; infinite where there is none.

  A calibrated run has its budget built into σ; a given σ with a target ε is a budget.
  """
  left = [math.inf]
  config = experiment.config
  if experiment.local and config.privacy.noise_multiplier and config.privacy.target_epsilon:
    allowed = _affordable(experiment.local, config.privacy.target_epsilon)
    counted = counted_steps(experiment, done, steps)
    left.append(int(((allowed - counted) // experiment.steps).min()))
  client = config.client_privacy
  if experiment.central and client.noise_multiplier and client.target_epsilon:
    left.append(int(_affordable(experiment.central, client.target_epsilon)[0]) - done)
  return min(left)


def planned_rounds(experiment: Experiment) -> int:
  """Rounds of a whole run: as configured, or as many as the budgets allow."""
  allowed = affordable_rounds(experiment, np.zeros_like(experiment.steps), 0)
  return int(min(experiment.config.server.num_rounds, allowed))


def next_rounds(experiment: Experiment, steps: np.ndarray, done: int) -> int:
  """Rounds up to the next log point; 0 at the end, or where a budget ends the run before."""
  every, total = experiment.config.eval.every, experiment.config.server.num_rounds
  length = min(every - done % every, total - done)
  return int(max(0, min(length, affordable_rounds(experiment, steps, done)))) if length else 0


def _affordable(guarantee: Guarantee, budget: float) -> np.ndarray:
  rows = zip(guarantee.mechanisms, guarantee.deltas, strict=True)
  return np.array([affordable_steps(mechanism, delta, budget) for mechanism, delta in rows])


def write_privacy(
  experiment: Experiment,
  folder: pathlib.Path,
  book: ledger.Ledger | None,
  rounds: int,
  steps: np.ndarray,
) -> ledger.Ledger | None:
  """Brings ledger and privacy.json up to ``rounds``; returns the ledger, None without one.

  privacy.json says what the ledger says: of a resumed run also the rounds that it does again.
  """
  if book is None:
    if not experiment.guarantees:
      record = dict(NO_PRIVACY)
      if experiment.hospitals.dataset.num_synthetic:
        record["not_covered"] = [SYNTHETIC_GAP]
      if experiment.config.partition.num_clients == 1:
        record["pooled"] = True
      files.write_json(folder / claims.FILE, record)
    return None
  ran = ledger.Ran(
    fedjax_med=__version__,
    dp_accounting=accountant_version(),
    clipping=experiment.program.plan.clipping,
    baselines=experiment.config.eval.local_baselines or (folder / "baselines").exists(),
  )
  book = ledger.record(folder, book, rounds, releases(experiment, rounds, steps), ran)
  files.write_json(folder / claims.FILE, claims.record_of(book, folder))
  return book


def observe(experiment: Experiment, state: SimulationState) -> LogPoint:
  """Evaluates the model on every hospital's test set and computes the ε spent.

  Raises:
    UserError: a prediction is not finite.
  """
  rounds = int(state.server.round)
  program = experiment.program
  groups = evaluation_groups(program.parts, experiment.hospitals)
  probabilities = program.predict(evaluated(program.parts, state), experiment.pool, groups)
  config = experiment.config
  require(
    bool(np.isfinite(probabilities).all()),
    f"round {rounds}: the predictions of the model are not finite",
    f"lower client.learning_rate={config.client.learning_rate:g}"
    f" or server.learning_rate={config.server.learning_rate:g}",
  )
  return measure(
    experiment, rounds, probabilities, *spent(experiment, rounds, np.asarray(state.steps))
  )


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
  clients = []
  for name, part in zip(
    experiment.hospitals.names, np.split(np.arange(len(rows)), ends[:-1]), strict=True
  ):
    part_targets = jax.tree.map(lambda leaf, part=part: leaf[part], targets)
    line = {"name": name, **task.metrics(probabilities[part], part_targets)}
    clients.append({**line, "epsilon": by_name.get(name)} if by_name else line)
  test = task.metrics(probabilities, targets)
  return LogPoint(rounds, test, clients, probabilities, epsilons, client_epsilon)


def test_line(experiment: Experiment, point: LogPoint) -> dict[str, Any]:
  """The line of metrics.jsonl on the test images, but for the seconds."""
  return {
    "round": point.rounds,
    "split": "test",
    **point.test,
    "epsilon_max": max(point.epsilons, default=point.client_epsilon),
    **({"client_epsilon": point.client_epsilon} if experiment.central else {}),
    "clients": point.clients,
  }


def log_lines(
  experiment: Experiment, point: LogPoint, train: dict[str, Any] | None, seconds: float
) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl at a log point: test, and what ``train_line`` has of the training."""
  test = {**test_line(experiment, point), "seconds": round(seconds, 3)}
  if train is None:
    return [test]
  shared = ("round", "epsilon_max", "client_epsilon", "seconds")
  common = {key: test[key] for key in shared if key in test}
  return [test, {"split": "train", **train, **common}]


def train_line(experiment: Experiment, metrics: BlockMetrics) -> dict[str, Any]:
  """Means over a block's local steps; null for a client that took no part.

  Only of all clients together where who took part is to stay secret. Under client-level privacy
  also how many hospitals sent any update that counted 0, as it was not finite.
  """
  sums = jax.device_get(metrics.clients)

  def means(part: RoundMetrics) -> dict[str, Any]:
    examples = float(part.examples)
    if examples == 0:
      return {"loss": None, "accuracy": None, "steps": int(part.steps)}
    line: dict[str, Any] = {"loss": float(part.loss) / examples}
    if not math.isfinite(line["loss"]):
      line["loss"] = None
    line |= {"accuracy": float(part.correct) / examples, "steps": int(part.steps)}
    if experiment.local:
      norm = float(part.norm) / float(part.units)
      line["mean_gradient_norm"] = norm if math.isfinite(norm) else None
      line["clipped_fraction"] = float(part.clipped) / float(part.units)
    return line

  total = RoundMetrics(*(np.sum(leaf) for leaf in sums))
  clients = [
    {"name": name, **means(RoundMetrics(*(leaf[k] for leaf in sums)))}
    for k, name in enumerate(experiment.names)
  ]
  line = {**means(total), "clients": clients}
  if hides_who_takes_part(experiment):
    del line["clients"], line["steps"]
  if experiment.central:  # the run goes on without them
    line["hospitals_not_finite"] = int((np.asarray(metrics.bad_round) != NEVER).sum())
  return line


def _require_finite(experiment: Experiment, metrics: BlockMetrics, saved: int | None) -> None:
  bad = np.asarray(metrics.bad_round)
  if (bad == NEVER).all() or experiment.central:
    return
  client = int(bad.argmin())
  config = experiment.config
  raise UserError(
    f"round {int(bad[client]) + 1}: the loss at '{experiment.names[client]}' became NaN or"
    f" infinite ({'no round was saved' if saved is None else f'round {saved} is saved'}); lower"
    f" client.learning_rate={config.client.learning_rate:g}, in another --workdir"
  )


def start_compiling(experiment: Experiment) -> Callable[[], float]:
  """Compiles rounds and evaluation in threads; the function returned waits and gives the seconds.

  The compiler works without Python's lock, so that a start plans privacy and writes its first
  files meanwhile. ``program.block`` and ``program.predict`` then find what was compiled here.
  """
  program, started = experiment.program, time.monotonic()
  # With the placing of the arrays to come, or the program would be compiled again for them.
  mesh = program.devices.mesh
  sharding = None if mesh is None else replicated(mesh)
  state = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    jax.eval_shape(program.initial),
  )
  threads = concurrent.futures.ThreadPoolExecutor(2)

  def compile(lowered: jax.stages.Lowered) -> float:
    lowered.compile()
    return time.monotonic() - started

  # Traced here: jax's settings may belong to this thread.
  rounds = threads.submit(compile, program.block.lower(state, *block_arguments(experiment, 0)))
  weights = evaluated(program.parts, state)
  groups = evaluation_groups(program.parts, experiment.hospitals)
  lowered = program.lower_predict(weights, experiment.pool, groups)
  tasks = rounds, threads.submit(compile, lowered)
  threads.shutdown(wait=False)
  return lambda: max(task.result() for task in tasks)


def block_arguments(experiment: Experiment, rounds: int) -> tuple[Any, ...]:
  """What ``program.block`` is called with after the state, to run that many rounds."""
  # A NumPy scalar: jax.numpy's would be another type to the compiled program, and compile again.
  data = (experiment.clients, experiment.pool, experiment.hyper, experiment.key)
  return *data, np.int32(rounds)


def train_rounds(
  experiment: Experiment,
  folder: pathlib.Path,
  listen: Listener,
  compiling: Callable[[], float] | None = None,
  begin: Callable[[], Any] = lambda: None,
) -> Outcome:
  """Runs or resumes all rounds in ``folder``; equal configs end in equal weights, bit for bit.

  Args:
    experiment: what to run.
    folder: the workdir.
    listen: called at every log point.
    compiling: from ``start_compiling``, which is called here if it was not before.
    begin: called when nothing speaks against going on, before the first file is changed.

  Raises:
    UserError: a foreign or damaged checkpoint, a loss that is not finite (with round and
      hospital; the last good checkpoint stays).
  """
  config, program = experiment.config, experiment.program
  compiling = compiling or start_compiling(experiment)
  with checkpoints.open_checkpoints(folder) as manager:
    shapes = jax.eval_shape(program.initial)
    restored, head = checkpoints.restore(manager, shapes, experiment.run_id)
    mesh = program.devices.mesh
    state = program.initial() if restored is None else replicate(restored, mesh)
    saved = None if restored is None else int(state.server.round)
    require(
      (saved or 0) <= config.server.num_rounds,
      f"server.num_rounds={config.server.num_rounds} is under the {saved} rounds done in {folder}",
      "ask for at least as many, or use another --workdir",
    )
    book = None
    if experiment.guarantees and is_first():
      if saved is not None:
        ledger.require_there(folder)
        ledger_repair.mend(experiment, folder, head, print)
      book = ledger.start(folder, experiment.run_id, experiment.guarantees)
      if saved is not None:
        ledger.require_covers(book, folder, head, saved)
    begin()
    files.keep_metrics_to(folder, -1 if saved is None else saved)

    seconds = {"compile": compiling()}
    started = time.monotonic()

    def log(
      book: ledger.Ledger | None, state: SimulationState, train: dict[str, Any] | None
    ) -> tuple[LogPoint, ledger.Ledger | None]:
      """Writes a log point; returns it and the ledger with it."""
      point = observe(experiment, state)
      lines = log_lines(experiment, point, train, time.monotonic() - started)
      # Before the log line and the checkpoint: what is on disk never understates ε.
      book = write_privacy(experiment, folder, book, point.rounds, np.asarray(state.steps))
      if train is not None or saved is None:
        files.append_metrics(folder, lines)
      listen(point)
      return point, book

    stopped = "completed"
    point, book = log(book, state, None)
    while (done := point.rounds) < config.server.num_rounds:
      length = next_rounds(experiment, np.asarray(state.steps), done)
      if not length:
        stopped = "budget"
        break
      state, metrics = program.block(state, *block_arguments(experiment, length))
      _require_finite(experiment, metrics, saved)
      point, book = log(book, state, train_line(experiment, metrics))
      checkpoints.save(manager, state, experiment.run_id, book and book.head)
      saved = point.rounds

  seconds["train"] = time.monotonic() - started
  return Outcome(state, stopped, point, seconds)
