"""Points of a sweep: what they move, which share a program, which train together."""

import dataclasses
import math

import numpy as np
import pytest

from fedjax_med.core.config import from_dict, init_seed, to_dict
from fedjax_med.core.errors import UserError
from fedjax_med.sweep.points import (
  SEED_AXES,
  chunks,
  configure,
  groups,
  require_read,
  static_key,
)
from fedjax_med.tasks.task import Targets
from tests.sweep.sweeping import AXES, base, plan


def test_sets_of_images_share_a_chunk_that_would_leave_devices_idle_up_to_the_limit():
  points = [
    {"seed": seed, "client.learning_rate": rate} for seed in (0, 1, 2) for rate in (0.1, 0.2)
  ]
  (group,) = groups(plan(points, seed_axes=SEED_AXES))
  images = group[0].case.hospitals.dataset.inputs.nbytes

  def numbers(size, fill, limit):
    return [[each.key.number for each in part] for part in chunks(group, size, fill, limit)]

  assert numbers(6, 6, 3 * images) == [[0, 1, 2, 3, 4, 5]]
  assert numbers(6, 6, 3 * images - 1) == [[0, 1, 2, 3], [4, 5]]
  assert numbers(6, 6, 1) == [[0, 1], [2, 3], [4, 5]]  # a set that is too large is there alone
  assert numbers(3, 6, 2 * images) == [[0, 1, 2], [3, 4, 5]]
  assert numbers(6, 3, 3 * images) == [[0, 1, 2, 3], [4, 5]]
  assert numbers(6, 2, 3 * images) == [[0, 1], [2, 3], [4, 5]]  # both devices have work


def test_fields_that_are_not_traced_make_another_program():
  config = base()
  case = plan([{"seed": 0}])[0].case
  key = static_key(case)
  for name, value in (("client.batch_size", 8), ("model.dropout", 0.1), ("privacy.bands", 2)):
    section, _, field = name.partition(".")
    values = to_dict(config)
    values[section][field] = value
    other = case._replace(config=from_dict(values))
    assert static_key(other) != key, name


@pytest.mark.parametrize(
  "axes",
  [("partition",), ("init",), ("sampling",), AXES, ("partition", *AXES)],
)
def test_seeds_move_what_was_asked_and_nothing_else(axes):
  zero, one = (plan([{"seed": k}], seed_axes=axes)[0].case for k in (0, 7))
  moved = {
    "partition": zero.rows.indices.tolist() != one.rows.indices.tolist(),
    "init": init_seed(zero.config) != init_seed(one.config),
    "sampling": zero.config.seed != one.config.seed,
  }
  assert {axis for axis, has in moved.items() if has} == set(axes)


@pytest.mark.parametrize(
  ("points", "sentence"),
  [
    (
      [{"privacy.noise_multiplier": -1.0}],
      r"point privacy.noise_multiplier=-1: privacy.noise_multiplier=-1.0 must",
    ),
    ([{"partition.num_clients": 5000}], r"point partition.num_clients=5000: "),
    ([{"privacy.delta": 0.5}], r"point privacy.delta=0.5: .*under 1/n"),
    ([{"seed": 1, "model.init_seed": 2}], "model.init_seed has an axis, and seed moves it too"),
    (
      [{"server.participation_rate": 0.5}],
      r"point server.participation_rate=0.5: .* read with server.participation=poisson only, and",
    ),
    ([{"model.norm": "batch", "model.name": "cnn_small"}], "mixes the examples of a batch"),
    (
      [{"model.norm": "frozen_batch"}],
      r"point model.norm=frozen_batch: model.norm='frozen_batch' is not read by .*='linear'",
    ),
  ],
)
def test_a_point_that_breaks_a_rule_is_named_before_anything_compiles(points, sentence):
  with pytest.raises(UserError, match=sentence):
    plan(points)


def checked(points, config, excused=()):
  configs = [configure(config, point, AXES) for point in points]
  require_read(config, points, configs, AXES, excused)
  return configs


TARGET = "privacy.target_epsilon"


@pytest.mark.parametrize(
  ("points", "changes", "sentence"),
  [
    (
      [{"server.participation_rate": 1.0}],
      {},
      "axis server.participation_rate is read at no point of the sweep: it is read with"
      " server.participation=poisson only, and server.participation is 'full'; use"
      " --config.server.participation=poisson, or leave"
      " the axis out",
    ),
    (
      [{TARGET: math.inf, "privacy.delta": delta} for delta in (1e-5, 1e-6)],
      {"privacy__noise_multiplier": 0.0},
      "axis privacy.delta is read at no point of the sweep: it is read with privacy.mechanism="
      "dp_sgd only, and privacy.mechanism is 'none'; use --config.privacy.mechanism=dp_sgd, or"
      " leave the axis out",
    ),
    (
      [{TARGET: math.inf}],
      {"privacy__mechanism": "none", "privacy__noise_multiplier": 0.0},
      f"axis {TARGET} is read at no point of the sweep: it is read with privacy.mechanism=dp_sgd",
    ),
    (
      [{"model.norm": "group"}],
      {},
      "axis model.norm is read at no point of the sweep: model.name='linear' has no such setting;"
      " use another network, or leave the axis out",
    ),
    (
      [{"seed": 0}, {"seed": 1}],
      {"client__momentum": 0.5},
      "client.momentum=0.5 is read at no point of the sweep: it is read with client.optimizer="
      "momentum only, and client.optimizer is 'sgd'; use --config.client.optimizer=momentum, or"
      " leave it at 0.9",
    ),
  ],
)
def test_an_axis_or_a_setting_that_no_point_reads_is_refused(points, changes, sentence):
  with pytest.raises(UserError) as caught:
    checked(points, base(**changes))
  assert str(caught.value).startswith(sentence)


def test_what_some_points_read_is_accepted_and_at_its_default_elsewhere():
  config = base(client__momentum=0.5, privacy__noise_multiplier=0.0, privacy__clip_norm=0.3)
  points = [
    {"client.optimizer": optimizer, TARGET: target, "privacy.unit": "patient"}
    for optimizer in ("sgd", "momentum")
    for target in (3.0, math.inf)
  ]
  configs = checked(points, config)
  assert [each.client.momentum for each in configs] == [0.9, 0.9, 0.5, 0.5]
  assert [each.privacy.clip_norm for each in configs] == [0.3, 1.0, 0.3, 1.0]
  assert [each.privacy.unit for each in configs] == ["patient", "record"] * 2
  checked([{TARGET: math.inf}], base(privacy__noise_multiplier=0.0))  # it switches privacy off


def test_settings_of_a_preset_that_its_axes_leave_without_effect_are_excused():
  config, points = base(), [{"partition.scheme": "iid", "seed": 0}]
  assert config.partition.alpha == 1
  with pytest.raises(UserError, match=r"partition.alpha=1 is read at no point"):
    checked(points, config)
  (found,) = checked(points, config, ["partition.alpha"])
  assert found.partition.alpha == 0.5


def test_an_axis_of_seeds_that_moves_nothing_is_refused():
  points = [{"seed": 0}, {"seed": 1}]
  with pytest.raises(UserError, match="axis seed is read at no point, because --seed"):
    require_read(base(), points, [configure(base(), p, ()) for p in points], ())


def test_another_task_makes_another_program():
  case = plan([{"seed": 0}])[0].case
  dataset = case.hospitals.dataset
  values = np.zeros((len(dataset.labels), len(dataset.class_names)), np.float32)
  targets = Targets(values=values, names=tuple(map(str, dataset.class_names)))
  other = dataclasses.replace(dataset, task="multilabel", targets=targets)
  hospitals = dataclasses.replace(case.hospitals, dataset=other)
  assert static_key(case._replace(hospitals=hospitals)) != static_key(case)
