"""Patients as privacy units: drawn, seen and clipped as a whole; copies of an image count once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.data.augmentation import Changes, change, draw_changes
from fedjax_med.data.dataset import client_rows, client_table, unit_table
from fedjax_med.data.normalisation import normalise
from fedjax_med.federated.algorithm import Client, Pool, Units
from fedjax_med.federated.local import BatchShape, StepContext, private_gradient
from fedjax_med.models.registry import create_model
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.tasks.classification import cross_entropy
from tests.federated.toy import make_hyper

SIZES = (1, 3, 2, 5, 1, 4, 2, 2)  # images of each patient
ROWS = np.random.default_rng(1).permutation(sum(SIZES))  # where they lie in the pool
CLIP = 0.05
LOSS = cross_entropy(0.0)


def make_pool():
  random = np.random.default_rng(0)
  return Pool(
    jnp.asarray(random.integers(0, 256, (len(ROWS), 4, 4, 1)), jnp.uint8),
    jnp.asarray(random.integers(0, 2, len(ROWS)), jnp.int32),
  )


def make_client(sigma=0.0, q=0.6):
  ends = np.cumsum(SIZES)
  units = Units(
    jnp.asarray(ends - SIZES, jnp.int32), jnp.asarray(SIZES, jnp.int32), jnp.int32(len(SIZES))
  )
  return Client(
    number=jnp.int32(3),
    indices=jnp.asarray(ROWS, jnp.int32),
    num_examples=jnp.int32(len(ROWS)),
    weight=jnp.float32(1),
    num_steps=jnp.int32(1),
    sampling_probability=jnp.float32(q),
    expected_batch_size=jnp.float32(1),
    noise_multiplier=jnp.float32(sigma),
    units=units,
  )


def make(rows_per_unit, copies=1, augmentation="none", microbatch=0, clipping="book_keeping"):
  """(jitted gradient of pool, client and key; loss of one row)."""
  model = create_model(ModelConfig(name="linear"), 2)
  params, state = model.init(base_key(0), jnp.zeros((1, 4, 4, 1)))
  shape = BatchShape(
    slots=8,
    max_examples=len(ROWS),
    normalisation="fixed",
    augmentation=augmentation,
    rows_per_unit=rows_per_unit,
    copies=copies,
    microbatch=microbatch,
  )
  gradient = private_gradient(model, LOSS, clipping, shape)

  @jax.jit
  def run(pool, client, key):
    zero = jnp.zeros((), jnp.int32)
    context = StepContext(client, pool, make_hyper(clip_norm=CLIP), key, zero, zero)
    total, _, _, metrics = gradient(params, state, (), context)
    return total, metrics

  def row_gradient(pool, row):
    def loss(params):
      logits, _ = model.apply(params, state, normalise(pool.inputs[row][None], "fixed"))
      return LOSS(logits, pool.labels[row][None])[0]

    return flat(jax.grad(loss)(params))

  return run, row_gradient


def flat(tree):
  return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def drawn_units(key, client):
  slots, mask = poisson_batch(
    key_for(key, Stream.SAMPLE, 3, 0, 0),
    len(SIZES),
    client.sampling_probability,
    max_examples=len(SIZES),
    batch_cap=8,
  )
  return np.asarray(slots)[np.asarray(mask)]


@pytest.mark.parametrize("microbatch", [0, 3])
def test_each_patient_is_clipped_once_over_all_their_images(microbatch):
  run, row_gradient = make(rows_per_unit=5, microbatch=microbatch)
  pool, client, key = make_pool(), make_client(), base_key(4)
  ends = np.cumsum(SIZES)
  chosen = drawn_units(key, client)
  assert 2 <= len(chosen) < len(SIZES)
  expected = 0
  for unit in chosen:
    rows = ROWS[ends[unit] - SIZES[unit] : ends[unit]]
    mean = np.mean([row_gradient(pool, row) for row in rows], axis=0)
    expected = expected + mean * min(1, CLIP / np.linalg.norm(mean))
  total, metrics = run(pool, client, key)
  np.testing.assert_allclose(flat(total), expected, rtol=1e-4, atol=1e-7)
  assert float(metrics.units) == len(chosen)
  assert float(metrics.examples) == sum(SIZES[unit] for unit in chosen)


@pytest.mark.parametrize("rows_per_unit", [1, 2, 5])
def test_taking_a_patient_away_moves_the_sum_by_at_most_the_clip_norm(rows_per_unit):
  run, _ = make(rows_per_unit)
  client = make_client(q=1.0)
  pool = make_pool()
  whole = flat(run(pool, client, base_key(2))[0])
  random = np.random.default_rng(5)
  for unit, size in enumerate(SIZES):
    start = sum(SIZES[:unit])
    rows = ROWS[start : start + size]
    # Whatever the patient's images were: the others' part of the sum is the same.
    other = pool._replace(
      inputs=pool.inputs.at[rows].set(
        jnp.asarray(random.integers(0, 256, (size, 4, 4, 1)), jnp.uint8)
      ),
      labels=pool.labels.at[rows].set(1 - pool.labels[rows]),
    )
    moved = np.linalg.norm(flat(run(other, client, base_key(2))[0]) - whole)
    assert moved <= 2 * CLIP * (1 + 1e-5)


def test_a_patient_of_many_images_shows_each_of_them_in_turn():
  run, row_gradient = make(rows_per_unit=2)
  pool, client = make_pool(), make_client(q=1.0)
  only = client._replace(units=Units(jnp.zeros(8, jnp.int32), jnp.full(8, 5), jnp.int32(1)))
  one = {}
  for first in range(5):
    rows = [ROWS[first], ROWS[(first + 1) % 5]]
    mean = np.mean([row_gradient(pool, row) for row in rows], axis=0)
    one[first] = mean * min(1, CLIP / np.linalg.norm(mean))
  gradients = [flat(run(pool, only, base_key(seed))[0]) for seed in range(40)]
  firsts = [min(one, key=lambda f: np.abs(one[f] - g).max()) for g in gradients]
  assert max(np.abs(one[f] - g).max() for f, g in zip(firsts, gradients, strict=True)) < 1e-6
  assert set(firsts) == set(range(5))


def test_copies_of_an_image_are_one_unit_with_the_mean_gradient():
  pool, client, key = make_pool(), make_client(q=1.0)._replace(units=None), base_key(6)
  plain = flat(make(rows_per_unit=1)[0](pool, client, key)[0])
  same = flat(make(rows_per_unit=1, copies=4)[0](pool, client, key)[0])
  np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-7)
  run, _ = make(rows_per_unit=1, copies=4, augmentation="flip_shift")
  changed, metrics = run(pool, client, key)
  assert np.abs(flat(changed) - plain).max() > 1e-4
  assert np.linalg.norm(flat(changed)) <= CLIP * float(metrics.units) * (1 + 1e-5)
  assert float(metrics.examples) == 4 * float(metrics.units)


def test_the_noise_does_not_depend_on_patients_or_copies():
  pool, key = make_pool(), base_key(7)

  def noise(**settings):
    run, _ = make(**settings)
    return flat(run(pool, make_client(sigma=2.0), key)[0]) - flat(run(pool, make_client(), key)[0])

  first = noise(rows_per_unit=2)
  np.testing.assert_allclose(noise(rows_per_unit=5), first, rtol=1e-4, atol=1e-6)
  changed = noise(rows_per_unit=2, copies=3, augmentation="flip")
  np.testing.assert_allclose(changed, first, rtol=1e-4, atol=1e-6)


def test_unit_table_keeps_every_row_and_groups_a_patients_rows_together():
  groups = np.array([4, 4, 0, 7, 7, 7, 0, 2, 9], np.int32)
  rows = [np.array([5, 0, 3, 1, 4]), np.array([8, 2, 7, 6])]
  table = unit_table(client_table(rows), groups)
  assert table.counts.tolist() == [2, 3]
  for given, found, starts, sizes, count in zip(
    rows, client_rows(table.rows), table.starts, table.sizes, table.counts, strict=True
  ):
    assert sorted(found) == sorted(given)
    seen = []
    for start, size in zip(starts[:count], sizes[:count], strict=True):
      stretch = groups[found[start : start + size]]
      assert len(set(stretch)) == 1
      seen += [stretch[0]] * size
    assert seen == sorted(groups[given])
  assert (table.sizes >= 1).all()  # a divisor, in padding too


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.0, -1.0), (0.5, 0.25)])
def test_a_change_is_a_mirror_image_and_a_shift_with_repeated_border(flip, shift):
  image = np.random.default_rng(0).integers(0, 256, (16, 8, 2)).astype(np.uint8)
  changes = Changes(jnp.array([flip]), jnp.array([shift], jnp.float32))
  found = np.asarray(change(jnp.asarray(image[None]), changes)[0])
  down, right = round(shift[0] * 16 / 8), round(shift[1] * 8 / 8)
  source = image[:, ::-1] if flip else image
  padded = np.pad(source, ((2, 2), (1, 1), (0, 0)), mode="edge")
  np.testing.assert_array_equal(found, padded[2 - down : 18 - down, 1 - right : 9 - right])


def test_changes_are_drawn_for_every_image_as_asked_for():
  key = base_key(0)
  both = draw_changes(key, (500, 4), "flip_shift")
  assert 0.45 < np.asarray(both.flip).mean() < 0.55
  assert -1 <= float(both.shift.min()) < -0.98
  assert 0.98 < float(both.shift.max()) <= 1
  assert not np.asarray(draw_changes(key, (9,), "shift").flip).any()
  assert (np.asarray(draw_changes(key, (9,), "flip").shift) == 0).all()
