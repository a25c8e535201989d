"""A run by itself: its program, its blocks, and checkpoints that it is resumed from."""

import concurrent.futures
import contextlib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fedjax_med.core.errors import UserError, require
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.run import checkpoints, writer
from fedjax_med.run.drive import DIVERGED, Advance, Outcome, Reached, drive
from fedjax_med.run.measure import Listener, LogPoint, evaluated, evaluation_groups, log_lines
from fedjax_med.simulation.mesh import replicate, replicated
from fedjax_med.simulation.rounds import NEVER, SimulationState


def block_arguments(experiment: Experiment, rounds: int) -> tuple[Any, ...]:
  """Arguments of ``program.block`` after the state, to run that many rounds."""
  # A NumPy scalar: jax.numpy's would be another type to the compiled program, and compile again.
  data = (experiment.clients, experiment.pool, experiment.hyper, experiment.key)
  return *data, np.int32(rounds)


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


def advance_from(
  experiment: Experiment, state: SimulationState
) -> tuple[Advance, Callable[[], SimulationState]]:
  """Builds the function that advances a run by itself, and one that returns its current state.

  A block donates the state: one that was returned before a block must not be used after it.
  """
  program = experiment.program
  groups = evaluation_groups(program.parts, experiment.hospitals)

  def advance(lengths: np.ndarray) -> Sequence[Reached]:
    nonlocal state
    metrics = None
    if lengths[0]:
      state, metrics = program.block(state, *block_arguments(experiment, lengths[0]))
      metrics = jax.device_get(metrics)
    probabilities = program.predict(evaluated(program.parts, state), experiment.pool, groups)
    return [
      Reached(
        rounds=int(state.server.round),
        steps=np.asarray(state.steps),
        metrics=metrics,
        probabilities=probabilities,
      )
    ]

  return advance, lambda: state


def train_rounds(
  experiment: Experiment,
  folder: pathlib.Path | None = None,
  listen: Listener = lambda point: None,
  *,
  compiling: Callable[[], float] | None = None,
  command: str = "",
  tell: Callable[[str], Any] = print,
) -> Outcome:
  """Runs or resumes all rounds; equal configs end in equal weights, bit for bit.

  The caller writes the end of the run (``writer.finish``).

  Args:
    experiment: the run.
    folder: the workdir, with checkpoints to resume from; None writes nothing and begins anew.
    listen: called at every log point, when it is written and before its checkpoint is.
    compiling: from ``start_compiling``, which is called here if it was not before.
    command: command that starts the run, for config.json.
    tell: called with a sentence on each repair of the folder.

  Raises:
    UserError: a foreign or damaged checkpoint or folder, a loss that is not finite (with round and
      hospital; the last good checkpoint stays).
  """
  compiling = compiling or start_compiling(experiment)
  manager = state = saved = book = last = None
  with contextlib.ExitStack() as stack:
    if folder is not None:
      manager = stack.enter_context(checkpoints.open_checkpoints(folder))
      state, head = _restored(experiment, manager, folder)
      saved = None if state is None else int(state.server.round)
      book = writer.begin(experiment, folder, command, saved, head, tell)
    if state is None:
      state = experiment.program.initial()
    advance, state_now = advance_from(experiment, state)
    seconds = {"compile": compiling()}
    started = time.monotonic()

    def log(_: int, point: LogPoint, reached: Reached) -> None:
      nonlocal book, saved, last
      if reached.stopped == DIVERGED:
        raise _divergence(experiment, reached, saved)
      trained = reached.metrics is not None
      if folder is not None:
        lines = log_lines(experiment, point, reached.metrics, time.monotonic() - started)
        lines = lines if trained or saved is None else []  # a resumed run has them
        book = writer.log(experiment, folder, book, point.rounds, reached.steps, lines)
      listen(point)
      if manager is not None and trained:
        checkpoints.save(manager, state_now(), experiment.run_id, book and book.head)
        saved = point.rounds
      last = point

    (stopped,) = drive([experiment], advance, log)
  assert last is not None
  seconds["train"] = time.monotonic() - started
  return Outcome(state=state_now(), stopped=stopped, last=last, seconds=seconds)


def _restored(
  experiment: Experiment, manager: checkpoints.Manager, folder: pathlib.Path
) -> tuple[SimulationState | None, str | None]:
  """The state of the newest checkpoint on the run's devices, and the ledger's head at it."""
  program, rounds = experiment.program, experiment.config.server.num_rounds
  shapes = jax.eval_shape(program.initial)
  restored, head = checkpoints.restore(manager, shapes, experiment.run_id)
  if restored is None:
    return None, None
  saved = int(restored.server.round)
  require(
    saved <= rounds,
    f"server.num_rounds={rounds} is under the {saved} rounds done in {folder}",
    "ask for at least as many, or use another --workdir",
  )
  return replicate(restored, program.devices.mesh), head


def _divergence(experiment: Experiment, reached: Reached, saved: int | None) -> UserError:
  """The sentence of a run whose loss or predictions are not finite."""
  config, metrics = experiment.config, reached.metrics
  if metrics is None or experiment.goes_on or (metrics.bad_round == NEVER).all():
    return UserError(
      f"round {reached.rounds}: the predictions of the model are not finite; lower"
      f" client.learning_rate={config.client.learning_rate:g}"
      f" or server.learning_rate={config.server.learning_rate:g}"
    )
  client = int(metrics.bad_round.argmin())
  return UserError(
    f"round {int(metrics.bad_round[client]) + 1}: the loss at '{experiment.names[client]}' became"
    f" NaN or infinite ({'no round was saved' if saved is None else f'round {saved} is saved'});"
    f" lower client.learning_rate={config.client.learning_rate:g}, in another --workdir"
  )
