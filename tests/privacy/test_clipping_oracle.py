"""Clipped sums against jax-privacy's clipped_grad, which forms every unit's gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_privacy import clipped_grad

from fedjax_med.models.model import from_flax
from fedjax_med.privacy.clipping import METHODS, Rows, clipped_sum
from tests.privacy.clipping_cases import CASES, assert_close, quick_jit, setting, squared_loss

# jax-privacy 2.0 asks optax for norms by a name that optax 0.2.8 has moved.
pytestmark = pytest.mark.filterwarnings("ignore:.*global_norm:DeprecationWarning")
# A linear model, a small convolutional network with GroupNorm, and one with norms from factors.
NAMES = ("dense", "stem_group_norm_pointwise", "gram")
# Of the largest value of the sum. Its entries are sums of up to 6 rows times 30 positions, so two
# orders of summation may differ by 180 eps: 2e-5 in float32, 4e-14 in float64.
TOLERANCES = {"float32": 1e-5, "float64": 1e-13}
# C by the norms of the units: all under it, all over it, on both sides, and one equal to it.
PLACES = {
  "under": lambda norms: 2 * norms.max(),
  "over": lambda norms: norms.min() / 2,
  "around": lambda norms: float(np.median(norms)) * 1.01,
  "equal": lambda norms: np.sort(norms)[len(norms) // 2],
}


def loss(logits, labels):
  """A row with a negative label has a gradient of 0."""
  counts = (labels >= 0).astype(logits.dtype)
  return counts * squared_loss(logits, jnp.maximum(labels, 0))


@functools.cache
def oracle(name: str, rows: int) -> Any:
  """Jitted: (params, state, inputs, labels, C) -> (sum, norms); the model is stock Flax."""
  module = CASES[name][0]

  def run(params, state, inputs, labels, clip_norm):
    def value(params, inputs, labels):
      logits: Any = module.apply({"params": params, **state}, inputs)
      return loss(logits, labels).mean()

    clipped = clipped_grad(
      value,
      l2_clip_norm=clip_norm,
      batch_argnums=(1, 2),
      keep_batch_dim=False,
      return_grad_norms=True,
    )
    units = (x.reshape(-1, rows, *x.shape[1:]) for x in (inputs, labels))
    total, extra = clipped(params, *units)
    return total, extra.grad_norms

  return quick_jit(run)


@functools.cache
def program(method: str, name: str, rows: int) -> Any:
  """Jitted: the same by this package."""
  model = from_flax(CASES[name][0])

  def run(params, state, inputs, labels, clip_norm):
    batch = Rows(inputs, labels, jnp.ones(len(inputs), bool), per_unit=rows)
    total, metrics = clipped_sum(method, model, loss, params, state, batch, clip_norm, None)
    return total, metrics.norm

  return quick_jit(run)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_clipped_sum_equals_jax_privacys_clipped_grad(name, method, rows, dtype):
  # Stock normalisation promotes float64 with float32, which strict promotion forbids.
  with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
    arguments = setting(name, dtype)
    _, norms = oracle(name, rows)(*arguments, np.asarray(1, dtype))
    for place in PLACES.values():
      clip_norm = np.asarray(place(np.asarray(norms)), dtype)
      want, norms = oracle(name, rows)(*arguments, clip_norm)
      got, our_norms = program(method, name, rows)(*arguments, clip_norm)
      assert_close(got, want, TOLERANCES[dtype])
      np.testing.assert_allclose(our_norms, norms, rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_unit_without_gradient_adds_nothing_as_with_jax_privacy(name, method):
  params, state, inputs, labels = setting(name)
  arguments = (params, state, inputs, labels.at[:2].set(-1), np.float32(0.7))
  want, norms = oracle(name, 2)(*arguments)
  got, our_norms = program(method, name, 2)(*arguments)
  assert our_norms[0] == norms[0] == 0
  assert our_norms[1] > 0
  assert_close(got, want, TOLERANCES["float32"])
