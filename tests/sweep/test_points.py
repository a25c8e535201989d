"""Points of a sweep: what they move, which share a program, which train together."""

import pytest

from fedjax_med.core.config import flat, from_dict, init_seed, to_dict
from fedjax_med.core.errors import UserError
from fedjax_med.sweep.points import SEED_AXES, TRACED, chunks, groups, static_key
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


def test_traced_fields_are_fields_and_all_others_make_another_program():
  config = base()
  case = plan([{"seed": 0}])[0].case
  assert flat(to_dict(config)).keys() >= TRACED
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
  ],
)
def test_a_point_that_breaks_a_rule_is_named_before_anything_compiles(points, sentence):
  with pytest.raises(UserError, match=sentence):
    plan(points)
