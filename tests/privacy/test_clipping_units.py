"""Clipped sums of units of several rows, as patients are, equal a plain loop over the units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.models.model import from_flax
from fedjax_med.privacy.clipping import Rows, clipped_sum
from tests.privacy.clipping_cases import (
  CASES,
  EVERY,
  assert_close,
  every_pair,
  gradients,
  loop,
  loss,
  norms_of,
  program,
  setting,
)

UNIT_MASK = np.array([True, True, True, False, False, False])


@pytest.mark.parametrize("mask", [EVERY, UNIT_MASK], ids=["whole", "with_padding"])
@every_pair
def test_units_of_two_rows_equal_a_loop_over_patients(name, method, mask):
  trees = [
    jax.tree.map(lambda *x: sum(x) / len(x), *[gradients(name)[row] for row in rows])
    for rows in ([row for row in pair if mask[row]] for pair in ((0, 1), (2, 3), (4, 5)))
    if rows
  ]
  clip_norm = float(np.median(norms_of(trees)))

  run = program(method, name, rows_per_unit=2)
  got, metrics = run(*setting(name), mask, clip_norm)
  assert_close(got, loop(trees, clip_norm), 1e-5)
  np.testing.assert_allclose(metrics.norm[: len(trees)], norms_of(trees), rtol=1e-5)
  assert not np.asarray(metrics.norm)[len(trees) :].any()
  assert metrics.loss.shape == (6,)


def test_rows_that_are_no_whole_units_are_refused():
  params, state, inputs, labels = setting("dense")
  model, mask = from_flax(CASES["dense"][0]), jnp.asarray(EVERY)
  rows = Rows(inputs, labels, mask, per_unit=4)
  with pytest.raises(ValueError, match="6 rows are not whole units of 4"):
    clipped_sum("reference", model, loss, params, state, rows, jnp.float32(1), None)
