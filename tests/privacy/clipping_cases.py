"""Cases of clipping: networks, their data, gradients in a plain loop, programs compiled once."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_med.models.model import from_flax
from fedjax_med.models.ops import Lowering
from fedjax_med.privacy.clipping import METHODS, Rows, clipped_sum

NUM_CLASSES = 3
# Compiles in half the time; for programs that are compared to a tolerance and run a few times.
quick_jit = functools.partial(
  jax.jit,
  compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)
loss = optax.softmax_cross_entropy_with_integer_labels


class Head(nn.Module):
  """Layers in a row, a nonlinearity, the mean over positions, and a dense head."""

  layers: tuple[nn.Module, ...]

  @nn.compact
  def __call__(self, x):
    for layer in self.layers:
      x = nn.silu(layer(x))
    return nn.Dense(NUM_CLASSES)(x.mean(tuple(range(1, x.ndim - 1))))


class Block(nn.Module):
  """One rematerialised, scanned residual block with a gate, as the networks here have."""

  @nn.compact
  def __call__(self, x, _):
    y = nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False)(x)
    y = nn.relu(nn.GroupNorm(4)(y))
    gate = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(4)(y.mean((1, 2))))))
    return nn.relu(x + y * gate[:, None, None, :]), None


class Scanned(nn.Module):
  """Two such blocks under nn.scan and nn.remat."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), strides=2)(x)
    block = nn.remat(Block, prevent_cse=False)
    stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return nn.Dense(NUM_CLASSES)(stack()(x, None)[0].mean((1, 2)))


class Attention(nn.Module):
  """A transformer block, whose attention is dense layers over two axes."""

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
    return nn.Dense(NUM_CLASSES)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))).mean(1))


PADS = ((1, 0), (2, 2))


def conv(features, size, **settings) -> nn.Conv:
  return nn.Conv(features, (size, size), **settings)


# name: (module, input shape of an example); together every layer and form of norm that is covered
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
  "stem_group_norm_pointwise": (
    Head(
      (
        conv(8, 7, strides=2),
        nn.GroupNorm(num_groups=4),
        conv(6, 1, strides=(2, 1), use_bias=False),
        nn.GroupNorm(num_groups=None, group_size=3, use_bias=False),
      )
    ),
    (11, 9, 1),
  ),
  "grouped_dilated_frozen_norm_valid": (
    Head(
      (
        conv(12, 3, strides=(2, 1), kernel_dilation=(1, 2), feature_group_count=3, padding=PADS),
        nn.BatchNorm(use_running_average=True),
        conv(6, 3, padding="VALID"),
      )
    ),
    (9, 8, 6),
  ),
  "gram": (Head((conv(32, 3, feature_group_count=2), conv(32, 1))), (2, 2, 32)),
  "sequence": (Head((nn.Dense(24), nn.LayerNorm(), nn.Dense(2))), (3, 20)),
  "dense": (nn.Dense(NUM_CLASSES), (7,)),
  "attention": (Attention(), (5, 6)),
  "depthwise": (
    Head((conv(12, 3, feature_group_count=6), conv(6, 5, strides=2, feature_group_count=6))),
    (6, 6, 6),
  ),
  "scanned_se_blocks": (Scanned(), (9, 9, 1)),
}
MANY = [0.4, 3.0, 1.0, 0.05, 1.5, 2.0]  # size of each example, so that norms lie on both sides of C


@functools.cache
def setting(name: str, dtype: str = "float32") -> tuple[Any, ...]:
  """(params, state, inputs [6, ...], labels [6]) of a case, weights away from special values."""
  module, shape = CASES[name]
  rng = np.random.default_rng(len(name))
  inputs = rng.normal(size=(6, *shape)) * np.reshape(MANY, (6,) + (1,) * len(shape))
  labels = jnp.asarray(rng.integers(0, NUM_CLASSES, 6), jnp.int32)
  ones = jnp.ones((1, *shape), jnp.float32)
  params, state = jax.jit(from_flax(module).init)(jax.random.key(1), ones)

  def perturbed(x):
    return jnp.asarray(np.asarray(x) + 0.3 * rng.uniform(0.1, 1, x.shape), dtype)

  return (*jax.tree.map(perturbed, (params, state)), jnp.asarray(inputs, dtype), labels)


@functools.cache
def gradients(name: str, dtype: str = "float32") -> list[Any]:
  """Gradient of each example of a case by stock Flax, one at a time, as float64 NumPy trees."""
  params, state, inputs, labels = setting(name, dtype)

  @quick_jit
  def gradient(params, x, label):
    def value(params):
      logits: Any = CASES[name][0].apply({"params": params, **state}, x[None])
      return squared_loss(logits, label[None])[0]

    return jax.grad(value)(params)

  examples = zip(inputs, labels, strict=True)
  return [jax.tree.map(np.float64, gradient(params, x, label)) for x, label in examples]


def norms_of(trees) -> np.ndarray:
  return np.array([np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(t))) for t in trees])


def loop(trees, clip_norm):
  """Sum of the gradients, each scaled by min(1, C / norm), in NumPy."""
  factors = np.minimum(1, clip_norm / norms_of(trees))
  return jax.tree.map(lambda *x: sum(f * v for f, v in zip(factors, x, strict=True)), *trees)


def squared_loss(logits, labels):
  """A loss whose gradient does not vanish for one class either."""
  return loss(logits, labels) + 0.1 * jnp.square(logits).sum(-1)


def assert_close(got, want, tolerance):
  """Every leaf to ``tolerance`` of the largest value of the whole tree."""
  size = max(np.abs(x).max() for x in jax.tree.leaves(want))
  jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 0, tolerance * size), got, want)


def same_bits(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


@functools.cache
def program(method: str, name: str, lowering: Lowering = "auto", rows_per_unit: int = 1) -> Any:
  """Jitted: (params, state, inputs, labels, mask, C) -> (clipped sum, metrics) of a case."""
  model = from_flax(CASES[name][0], lowering)

  def run(params, state, inputs, labels, mask, clip_norm):
    rows = Rows(inputs, labels, mask, per_unit=rows_per_unit)
    return clipped_sum(method, model, squared_loss, params, state, rows, clip_norm, None)

  return jax.jit(run)


def jitted(method: str, model: Any, loss: Any) -> Any:
  """Jitted: (params, state, inputs, labels, mask, C, key) -> (clipped sum, metrics)."""

  def run(params, state, inputs, labels, mask, clip_norm, key):
    rows = Rows(inputs, labels, mask)
    return clipped_sum(method, model, loss, params, state, rows, clip_norm, key)

  return jax.jit(run)


EVERY = np.ones(6, bool)
# Every method that covers the case: layers in a loop have no record of their own.
PAIRS = [
  (name, method)
  for name in CASES
  for method in METHODS
  if (name, method) != ("scanned_se_blocks", "book_keeping")
]


def over(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
  """Parametrises over pairs; those whose programs take longest to compile are slow."""
  long = {"scanned_se_blocks", "depthwise"}
  marked = [pytest.param(*p, marks=[pytest.mark.slow] * (p[0] in long)) for p in pairs]
  return pytest.mark.parametrize(("name", "method"), marked)


every_pair = over(PAIRS)
