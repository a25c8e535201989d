"""What tells two configurations apart: data, plan, program, weights, files."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import Config, init_seed, to_dict
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.exchange import ckks
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.registry import make_exchange
from fedjax_med.exchange.transform import Wire
from fedjax_med.federated.algorithm import ClientDelta, Pool
from fedjax_med.models.networks.pretrained import overlay
from fedjax_med.prepare.case import federation
from fedjax_med.prepare.deployment import deployment_record
from fedjax_med.prepare.experiment import Experiment, build, make_experiment, make_shared_program
from fedjax_med.prepare.probe import wants_probe
from fedjax_med.prepare.synthetic_images import make_images, reserve_synthetic
from fedjax_med.run import trackers
from fedjax_med.run.budget import next_rounds, planned_rounds
from fedjax_med.run.checkpoints import digest
from fedjax_med.run.compilation_cache import use_compilation_cache
from fedjax_med.run.measure import evaluated
from fedjax_med.run.single import block_arguments
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.tasks.registry import task_named

KEPT: dict[str, Any] = {}  # of configurations that many cases share


def kept(make: Any) -> Any:
  """``make(config)``, made once for equal configurations."""

  @functools.wraps(make)
  def once(config: Config) -> Any:
    key = make.__name__ + json.dumps(to_dict(config))
    if key not in KEPT:
      KEPT[key] = make(config)
    return KEPT[key]

  return once


def differ(one: Any, other: Any) -> bool:
  """Whether two trees of arrays and values differ anywhere."""
  leaves = [jax.tree.leaves(tree) for tree in (one, other)]
  if len(leaves[0]) != len(leaves[1]):
    return True
  return not all(map(_equal, *leaves))


def _equal(one: Any, other: Any) -> bool:
  return np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == "f")


@kept
def dealt(config: Config) -> Any:
  return reserve_synthetic(config, load_hospitals(config))


@kept
def experiment_of(config: Config) -> Experiment:
  return build(config, dealt(config))


@kept
def text_of(config: Config) -> str:
  """The training program as it goes to the compiler; debug names are left out."""
  experiment = experiment_of(config)
  state = jax.eval_shape(experiment.program.initial)
  return experiment.program.block.lower(state, *block_arguments(experiment, 0)).as_text()


def holders(one: Config, other: Config) -> bool:
  """Images, their targets, or who holds them."""

  def seen(config: Config) -> Any:
    data = dealt(config)
    tables = [(table.indices, table.counts) for table in (data.train, data.test)]
    targets = task_named(data.dataset.task).targets(data.dataset)
    return [data.dataset.inputs, data.dataset.labels, targets, tables]

  return differ(seen(one), seen(other))


def plan(one: Config, other: Config) -> bool:
  """Local steps, mechanisms, planned rounds, or the ε that they spend."""

  def seen(config: Config) -> Any:
    case = federation(config, dealt(config))
    protection = case.protection
    mechanisms = [repr(guarantee.mechanisms) for guarantee in case.guarantees]
    deltas = [guarantee.deltas for guarantee in case.guarantees]
    solved = case.config.server.num_rounds, case.config.client.batch_size
    solved = solved if case.guarantees and config.privacy.solve_for != "noise" else ()
    units = protection.units and (protection.units.starts, protection.units.sizes)
    return [protection.steps, units, protection.rows_per_unit, mechanisms, deltas, solved]

  return differ(seen(one), seen(other))


def program(one: Config, other: Config) -> bool:
  """The training program, or the weights that it measures."""
  return text_of(one) != text_of(other)


def masked(one: Config, other: Config) -> bool:
  """The training program (tests/exchange/test_masks.py shows that weights do not move)."""
  return text_of(one) != text_of(other)


def traced(one: Config, other: Config) -> bool:
  """Numbers that one program gets as data."""
  assert text_of(one) == text_of(other)
  return differ(experiment_of(one).hyper, experiment_of(other).hyper)


def hostile(one: Config, other: Config) -> bool:
  """Which hospitals forge their messages."""
  return differ(experiment_of(one).clients.hostile, experiment_of(other).clients.hostile)


@kept
def shared(config: Config) -> Any:
  return make_shared_program([federation(config, dealt(config))])


def weights(one: Config, other: Config) -> bool:
  """Weights after all rounds, of the same compiled program."""

  def trained(config: Config) -> str:
    program, shapes = shared(one)
    case = federation(config, dealt(config))
    data = case.hospitals.dataset
    pool = Pool(jax.numpy.asarray(data.inputs), jax.numpy.asarray(data.labels))
    experiment = make_experiment(case, program, shapes, pool, None)
    start = program.initial(np.int32(init_seed(config)))
    return digest(program.block(start, *block_arguments(experiment, 2))[0].server.params)

  return trained(one) != trained(other)


@kept
def results(config: Config) -> str:
  """Digest of the weights that are measured after all rounds; compiles the run's own program.

  With the key of the seed alone: that of a private run follows from the whole configuration.
  """
  experiment = experiment_of(config)._replace(key=base_key(config.seed))
  rounds = planned_rounds(experiment)
  start = experiment.program.initial()
  state, _ = experiment.program.block(start, *block_arguments(experiment, rounds))
  return digest(evaluated(experiment.program.parts, state))


def deployment(one: Config, other: Config) -> bool:
  """What the rounds would cost, beside a measured time of a local step."""
  steps, names = np.full(3, 2), ("A", "B", "C")
  records = [deployment_record(c, names, (1000, 2000), steps, 5, 0.1, 1e6) for c in (one, other)]
  return records[0] != records[1]


def layout(one: Config, other: Config) -> bool:
  """The plan on this machine, its memory budget included."""

  def seen(config: Config) -> Any:
    made = experiment_of(config).program
    return [repr(made.plan), made.budget.size if config.execution.memory_gib else 0]

  return differ(seen(one), seen(other))


def refusal(one: Config, other: Config) -> bool:
  """Whether the data are accepted."""
  load_hospitals(one)
  with pytest.raises(UserError, match=r"mend or remove them, or set data\.strict=False"):
    load_hospitals(other)
  return True


def files(one: Config, other: Config) -> bool:
  """Whether files are looked at for it (tests/data/test_volumes.py has some that it moves)."""
  load_hospitals(one)
  with pytest.raises(UserError, match=r"is not read: no file that .* lists has several"):
    load_hospitals(other)
  return True


def cache(one: Config, other: Config) -> bool:
  """Where prepared records lie (tests/data/test_builders.py prepares some)."""
  from fedjax_med.data import sources

  seen = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "load_builder", lambda path, data: seen.append(data.cache_dir))
    for config in (one, other):
      sources.load_dataset(config.data)
  return seen[0] != seen[1]


def images(one: Config, other: Config) -> bool:
  """Images that GANs make."""
  return differ(*(make_images(config, dealt(config)) for config in (one, other)))


def pretrained(one: Config, other: Config) -> bool:
  """Initial values that a file gives: tests/prepare/test_pretrained_start.py starts runs so."""
  assert one.model.pretrained != other.model.pretrained
  return overlay.__module__ == "fedjax_med.models.networks.pretrained"


def log_points(one: Config, other: Config) -> bool:
  """Rounds up to the first log point: lines of metrics.jsonl."""
  done = [next_rounds(experiment_of(c), np.zeros(3, np.int32), 0) for c in (one, other)]
  return done[0] != done[1]


def prediction(one: Config, other: Config) -> bool:
  """The program that predicts; training and weights do not move."""
  assert text_of(one) == text_of(other)
  rows = [np.arange(20, dtype=np.int32)]

  def seen(config: Config) -> str:
    experiment = experiment_of(config)
    state = jax.eval_shape(experiment.program.initial)
    made = evaluated(experiment.program.parts, state)
    return experiment.program.lower_predict(made, experiment.pool, rows).as_text()

  return seen(one) != seen(other)


def runs(one: Config, other: Config) -> bool:
  """The runs of a sweep of one point."""
  from fedjax_med.sweep.points import plan_points

  counts = [len(plan_points([{"seed": 0}], [config], [0])) for config in (one, other)]
  return counts == [1, 5]


def tracked(one: Config, other: Config) -> bool:
  """Log lines that a tracker hears of."""
  heard = []

  def tracker(folder, run_id, config):
    heard.append(folder)
    raise UserError("heard")

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(trackers.TRACKERS, "tensorboard", tracker)
    for config in (one, other):
      try:
        with trackers.track(config.eval.tracker, "folder", "", {}, CLASSIFICATION):  # pyright: ignore
          pass
      except UserError:
        pass
  return len(heard) == 1


def probe(one: Config, other: Config) -> bool:
  """Whether local steps are timed before the run."""
  steps = np.full(3, 2)
  found = [wants_probe(config, steps, 100, "cpu") for config in (one, other)]
  return found == [False, True]


def compiled(one: Config, other: Config) -> bool:
  """Folder of compiled programs."""
  before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  least = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore
  seen = []
  try:
    for config in (one, other):
      use_compilation_cache(config.execution.compilation_cache)
      seen.append(jax.config.jax_compilation_cache_dir)  # pyright: ignore
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
  return seen[0] != seen[1]


def encryption(one: Config, other: Config) -> bool:
  """Bytes of a ciphertext, or how many messages are encrypted in four rounds of three hospitals."""

  def seen(config: Config) -> list[int]:
    calls = []

    def add(messages, keys, gain):
      calls.append(len(messages))
      return np.zeros(1, np.int64), None

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(ckks, "require_tenseal", lambda: None)
      patch.setattr(ckks, "make_keys", lambda preset: None)
      patch.setattr(ckks, "add_encrypted", add)
      patch.setattr(ckks, "_measured", [])
      exchange = make_exchange(config, 3)
      messages = ClientDelta(params=jnp.zeros((3, 1), jnp.int32), state=jnp.zeros((3, 0), int))
      for number in range(4):
        joint = Joint(key=base_key(0), last=jnp.int32(number))
        jax.block_until_ready(exchange.aggregator.combine(messages, jnp.ones(3), joint))
    return [exchange.transform.wire(Wire(dense=1, sent=1)).size, *calls]

  return seen(one) != seen(other)


def nothing(one: Config, other: Config) -> bool:
  """Nothing: the two are equal."""
  return one == other
