"""Coverage is proved for the rows that the compiled private gradient gets, whatever the plan."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.models import coverage, registry
from fedjax_med.prepare import plan_search
from fedjax_med.prepare.experiment import build, build_baselines
from tests.running import smoke_config


@pytest.fixture
def rows(monkeypatch):
  """Registers 'noted'; returns the rows that it is traced with, and those that are proved."""
  traced, proved, examine = [], [], coverage.examine

  class Noted(nn.Module):
    @nn.compact
    def __call__(self, x):
      traced.append(x.shape[0])
      x = x.reshape(x.shape[0], -1)
      if x.shape[0] % 8 == 0:  # ghost batch norm
        grouped = x.reshape(-1, 8, x.shape[1])
        x = (grouped - grouped.mean(1, keepdims=True)).reshape(x.shape)
      return nn.Dense(2)(x)

  def noted(*arguments):
    proved.append(arguments[-1])
    return examine(*arguments)

  monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
  registry.MODELS["noted"] = lambda num_classes, **_: Noted()
  monkeypatch.setattr(coverage, "examine", noted)
  return traced, proved


def executed(program, traced) -> set[int]:
  """Rows that the network gets while a block of rounds is traced."""
  traced.clear()
  *arguments, _ = program.arguments
  jax.eval_shape(lambda *some: program.parts.block(*some, jnp.asarray(1)), *arguments)
  return set(traced)


GROUPS = {"privacy__unit": "group", "privacy__rows_per_unit": 3}
COPIES = {"client__augmentation": "flip", "privacy__augmentation_multiplicity": 2}


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"execution__microbatch": 5},
    {"execution__layout": "vmap"},
    {"privacy__batch_cap": 30, "execution__layout": "vmap", **COPIES},
    {"execution__microbatch": 7, **GROUPS},
    {"execution__microbatch": 3, **GROUPS, **COPIES},
    {"privacy__bands": 2, "client__batch_size": 6, "execution__layout": "vmap"},
  ],
  ids=lambda changes: " ".join(f"{key.split('__')[1]}={changes[key]}" for key in changes) or "auto",
)
def test_what_is_proved_is_what_runs(changes, rows):
  traced, proved = rows
  config = smoke_config(model__name="noted", **changes)
  hospitals = load_hospitals(config)
  if config.privacy.unit == "group":  # of four images each
    units = np.arange(len(hospitals.dataset.labels), dtype=np.int32) // 4
    split = dataclasses.replace(hospitals.split, units=units)
    hospitals = dataclasses.replace(hospitals, split=split)
  program = build(config, hospitals).program
  images = changes.get("privacy__rows_per_unit", 1) * config.privacy.augmentation_multiplicity
  expected = program.plan.microbatch * images
  assert set(proved) == {expected}
  covered = expected % 8 != 0
  assert program.plan.clipping == ("book_keeping" if covered else "reference")
  assert executed(program, traced) == {expected if covered else images}


@pytest.mark.parametrize(
  ("fits", "method"), [(17, "book_keeping"), (8, "reference"), (4, "book_keeping")]
)
def test_a_batch_that_is_cut_to_save_memory_is_proved_again(fits, method, rows, monkeypatch):
  traced, proved = rows
  config = smoke_config(model__name="noted", execution__layout="vmap", execution__devices=1)
  config.privacy.batch_cap, config.execution.memory_gib = 34, float(fits)
  estimates = []

  def estimate(choice, *_):  # a GiB a slot, of the compiled program too
    estimates.append(choice.microbatch << 30)
    return float(estimates[-1])

  monkeypatch.setattr(plan_search, "rough_bytes", estimate)
  monkeypatch.setattr(plan_search, "block_memory", lambda *_: {"all": estimates[-1]})
  program = build(config, load_hospitals(config)).program
  assert program.plan.microbatch == proved[-1] == fits
  assert program.plan.clipping == method
  assert executed(program, traced) == {fits if method == "book_keeping" else 1}


@pytest.mark.parametrize("best", [1, 3])
def test_each_layout_that_a_probe_may_choose_is_proved(best, rows, monkeypatch):
  traced, proved = rows
  config = smoke_config(model__name="noted", execution__probe="on")
  monkeypatch.setattr(
    plan_search,
    "cached_seconds",
    lambda *given: {chunk: abs(chunk - best) + 1.0 for chunk in given[-1]},
  )
  program = build(config, load_hospitals(config)).program
  assert program.plan.chunk == best
  assert len(set(proved)) == 2  # one client at a time cuts its batch
  assert executed(program, traced) <= {*proved, 1}
  assert (program.plan.clipping == "reference") == (program.plan.microbatch % 8 == 0)


def test_baselines_are_proved_at_their_own_sizes(rows):
  traced, proved = rows
  config = smoke_config(model__name="noted", execution__layout="vmap", server__num_rounds=2)
  federation = build(config, load_hospitals(config))
  proved.clear()
  for name, run in build_baselines(federation).items():
    plan = run.program.plan
    assert plan.microbatch in proved, name
    size = plan.microbatch if plan.clipping == "book_keeping" else 1
    assert executed(run.program, traced) == {size}, name


def test_a_method_that_is_asked_for_is_refused_at_the_size_that_runs(rows):
  config = smoke_config(
    model__name="noted", privacy__clipping="book_keeping", execution__microbatch=16
  )
  with pytest.raises(UserError, match=r"does not cover this model .*16 rows.*clipping=auto"):
    build(config, load_hospitals(config))
  config.execution.microbatch = 15
  assert build(config, load_hospitals(config)).program.plan.clipping == "book_keeping"
