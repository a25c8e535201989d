"""Rows of padding and examples that are not finite change no bit of a clipped sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.privacy.clipping_cases import (
  EVERY,
  PAIRS,
  assert_close,
  gradients,
  loop,
  program,
  same_bits,
  setting,
)

# These cases hold every kind of layer but LayerNorm, which is like GroupNorm.
PADDED = ["grouped_dilated_frozen_norm_valid", "gram", "scanned_se_blocks"]
padded_pair = pytest.mark.parametrize(("name", "method"), [p for p in PAIRS if p[0] in PADDED])


@padded_pair
def test_padding_changes_no_bit(name, method):
  params, state, inputs, labels = setting(name)
  mask = np.array([True, False, True, True, False, False])
  run = program(method, name)
  first = run(params, state, inputs, labels, mask, 1.0)
  for garbage, label in ((np.nan, 7), (np.inf, -3), (1e30, 0)):
    rows = jnp.asarray(mask).reshape((6,) + (1,) * (inputs.ndim - 1))
    other = jnp.where(rows, inputs, garbage)
    same_bits(first, run(params, state, other, jnp.where(mask, labels, label), mask, 1.0))
  assert_close(
    first[0], loop([g for g, m in zip(gradients(name), mask, strict=True) if m], 1), 1e-5
  )
  assert not np.asarray(first[1].norm)[~mask].any()


@padded_pair
def test_an_empty_batch_is_exactly_zero(name, method):
  params, state, inputs, labels = setting(name)
  total, _ = program(method, name)(params, state, inputs * jnp.nan, labels, np.zeros(6, bool), 1.0)
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(total))


@padded_pair
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_non_finite_example_contributes_exactly_zero(name, method, bad):
  params, state, inputs, labels = setting(name)
  run = program(method, name)
  # One bad pixel, so that finite and non-finite values meet in one example.
  spoiled = inputs.at[(2,) + (0,) * (inputs.ndim - 1)].set(bad)
  got, metrics = run(params, state, spoiled, labels, EVERY, 1.0)
  without, other = run(params, state, inputs, labels, EVERY & (np.arange(6) != 2), 1.0)
  assert not np.isfinite(metrics.norm[2])
  same_bits(got, without)
  np.testing.assert_array_equal(np.delete(metrics.norm, 2), np.delete(other.norm, 2))
