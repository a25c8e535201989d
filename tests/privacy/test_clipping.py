"""Clipped sums equal a plain loop over examples of stock Flax and jax.grad."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.models.gradients import keeps_factors
from fedjax_med.models.model import from_flax
from fedjax_med.privacy.clipping import METHODS
from tests.privacy.clipping_cases import (
  EVERY,
  NUM_CLASSES,
  PAIRS,
  Head,
  assert_close,
  conv,
  every_pair,
  gradients,
  jitted,
  loop,
  loss,
  norms_of,
  over,
  program,
  same_bits,
  setting,
)


class Dropped(nn.Module):
  """A model with dropout and a ``train`` argument."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(16)(x)))
    return nn.Dense(NUM_CLASSES)(x)


@every_pair
def test_equals_a_loop_over_examples_in_float32(name, method):
  norms = norms_of(gradients(name))
  clip_norm = float(np.sort(norms)[2:4].mean())  # three examples on each side
  got, metrics = program(method, name)(*setting(name), EVERY, clip_norm)
  assert_close(got, loop(gradients(name), clip_norm), 1e-5)
  np.testing.assert_allclose(metrics.norm, norms, rtol=1e-5)


@over([pair for pair in PAIRS if pair[1] != "reference"])
def test_equals_a_loop_over_examples_in_float64(name, method):
  # Stock normalisation promotes float64 with float32, which strict promotion forbids.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    trees = gradients(name, "float64")
    got, metrics = program(method, name)(*setting(name, "float64"), EVERY, 0.7)
    assert metrics.norm.dtype == np.float64
    assert_close(got, loop(trees, 0.7), 1e-11)
    np.testing.assert_allclose(metrics.norm, norms_of(trees), rtol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lowering", ["native", "matmul"])
def test_every_lowering_gives_the_same_sum(method, lowering):
  name = "grouped_dilated_frozen_norm_valid"
  got, metrics = program(method, name, lowering)(*setting(name), EVERY, 1.0)
  assert_close(got, loop(gradients(name), 1.0), 1e-5)
  np.testing.assert_allclose(metrics.norm, norms_of(gradients(name)), rtol=1e-5)


@every_pair
def test_under_the_clip_norm_it_is_the_plain_gradient_of_the_summed_loss(name, method):
  got, _ = program(method, name)(*setting(name), EVERY, 1e6)
  want = jax.tree.map(lambda *x: sum(x), *gradients(name))
  assert_close(got, want, 1e-5)


@every_pair
def test_over_the_clip_norm_each_contribution_has_norm_clip_norm(name, method):
  clip_norm = 0.9 * float(norms_of(gradients(name)).min())
  for row in range(6):
    only, _ = program(method, name)(*setting(name), np.arange(6) == row, clip_norm)
    norm = norms_of([jax.tree.map(np.float64, only)])[0]
    assert clip_norm * (1 - 1e-6) <= norm <= clip_norm * (1 + 1e-6)


@pytest.mark.parametrize(
  ("method", "slack"), [("book_keeping", 1e-6), ("two_pass", 0.01), ("reference", 1e-6)]
)
def test_bfloat16_carries_a_contribution_past_the_clip_norm_by_its_rounding_only(method, slack):
  module = Head((conv(8, 3, dtype=jnp.bfloat16), nn.GroupNorm(4, dtype=jnp.bfloat16)))
  model = from_flax(module)
  inputs = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
  # Stock normalisation promotes bfloat16 with float32, which strict promotion forbids.
  with jax.numpy_dtype_promotion("standard"):
    params, state = jax.jit(model.init)(jax.random.key(1), inputs[:1])
    run = jitted(method, model, loss)
    for row in range(4):
      mask = jnp.arange(4) == row
      total, metrics = run(params, state, inputs, jnp.zeros(4, jnp.int32), mask, 0.01, None)
      assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(total))
      assert metrics.norm[row] > 0.01
      norm = norms_of([jax.tree.map(np.float64, total)])[0]
      assert 0.01 * (1 - slack) <= norm <= 0.01 * (1 + slack)


def test_a_zero_gradient_stays_zero_and_finite():
  model = from_flax(nn.Dense(NUM_CLASSES))
  params, state = model.init(jax.random.key(0), jnp.ones((1, 4)))
  inputs, labels, mask = jnp.ones((2, 4)), jnp.zeros(2, jnp.int32), jnp.ones(2, bool)

  def flat(logits, labels):
    return 0.0 * logits.sum(-1) + labels.astype(jnp.float32)

  for method in METHODS:
    run = jitted(method, model, flat)
    total, metrics = run(params, state, inputs, labels, mask, 1.0, None)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves((total, metrics.norm)))


@pytest.mark.parametrize("method", METHODS)
def test_dropout_draws_from_the_key(method):
  model = from_flax(Dropped())
  inputs, labels = jax.random.normal(jax.random.key(2), (4, 5)), jnp.zeros(4, jnp.int32)
  params, state = model.init(jax.random.key(0), inputs[:1])

  compiled = jitted(method, model, loss)

  def run(seed):
    return compiled(params, state, inputs, labels, jnp.ones(4, bool), 0.5, jax.random.key(seed))

  same_bits(run(0), run(0))
  assert not np.array_equal(run(0)[1].loss, run(1)[1].loss)
  single, metrics = run(0)
  assert norms_of([single])[0] <= 4 * 0.5 * (1 + 1e-6)
  assert np.isfinite(metrics.norm).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", [1e-6, 1e-5, 1e-4, 1e-3])
def test_an_example_whose_positions_cancel_contributes_at_most_the_clip_norm(spread, method):
  positions, width = 4, 64
  assert keeps_factors(positions, width, width)
  rng = np.random.default_rng(0)
  module = nn.Sequential([nn.Dense(width, use_bias=False), lambda x: x.reshape(x.shape[0], -1)])
  model = from_flax(module)
  # Nearly the same input at every position, and cotangents that sum to 0.
  base = rng.normal(size=(1, 1, width))
  inputs = jnp.asarray(base + spread * rng.normal(size=(1, positions, width)), jnp.float32)
  cotangent = rng.normal(size=(positions, width))
  cotangent = jnp.asarray(1e3 * (cotangent - cotangent.mean(0)), jnp.float32).reshape(1, -1)
  params, state = model.init(jax.random.key(0), inputs)

  def linear(logits, labels):
    del labels
    return (logits * cotangent).sum(1)

  run = jitted(method, model, linear)
  total, _ = run(params, state, inputs, jnp.zeros(1, jnp.int32), jnp.ones(1, bool), 1.0, None)
  assert norms_of([jax.tree.map(np.float64, total)])[0] <= 1 + 1e-5
