"""A Flax module behind ``Model`` computes what stock Flax computes, and coverage fails closed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.models.model import Model, from_flax
from fedjax_med.models.registry import create_model

# Layers stock Flax and this package must agree on, with the input shape of an example.
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
  "same_odd_sizes": (nn.Conv(4, (3, 5), strides=(2, 3)), (7, 8, 3)),
  "valid": (nn.Conv(4, (3, 3), padding="VALID"), (7, 8, 3)),
  "one_number": (nn.Conv(4, (3, 3), padding=2, strides=2, use_bias=False), (7, 8, 3)),
  "a_number_a_side": (nn.Conv(4, (3, 3), padding=(0, 2), kernel_dilation=2), (7, 8, 3)),
  "pairs": (nn.Conv(4, (2, 3), padding=((1, 0), (0, 3)), kernel_dilation=(1, 2)), (7, 8, 3)),
  "same_dilated_grouped": (
    nn.Conv(6, (3, 3), strides=(1, 2), kernel_dilation=(2, 1), feature_group_count=3),
    (7, 8, 9),
  ),
  "depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), (5, 5, 4)),
  "circular_is_stock": (nn.Conv(4, (3, 3), padding="CIRCULAR"), (5, 5, 3)),
  "masked_is_stock": (nn.Conv(2, (3, 3), mask=jnp.ones((3, 3, 3, 2)).at[0].set(0)), (5, 5, 3)),
  "dilated_input_is_stock": (nn.Conv(2, (3, 3), padding=1, input_dilation=2), (5, 5, 3)),
  "one_dimensional_is_stock": (nn.Conv(4, (3,)), (7, 3)),
  "dense": (nn.Dense(4), (3, 5)),
  "dense_of_two_axes": (nn.DenseGeneral((2, 3), axis=(-2, -1)), (4, 3, 5)),
  "dense_of_a_middle_axis_is_stock": (nn.DenseGeneral(4, axis=1), (3, 5)),
  "group_norm": (nn.GroupNorm(num_groups=2, epsilon=1e-3), (3, 4, 6)),
  "group_size": (nn.GroupNorm(num_groups=None, group_size=3, use_scale=False), (4, 6)),
  "group_norm_over_some_axes_is_stock": (
    nn.GroupNorm(num_groups=2, reduction_axes=(2, 3)),
    (3, 4, 6),
  ),
  "slow_variance_is_stock": (nn.GroupNorm(num_groups=2, use_fast_variance=False), (3, 4, 6)),
  "layer_norm": (nn.LayerNorm(epsilon=1e-3), (4, 6)),
  "layer_norm_over_space_is_stock": (nn.LayerNorm(reduction_axes=(1, 2)), (4, 6)),
  "frozen_batch_norm": (nn.BatchNorm(use_running_average=True, epsilon=1e-2), (4, 6)),
  "frozen_batch_norm_of_rows_is_stock": (nn.BatchNorm(use_running_average=True, axis=1), (4, 6)),
}


def random_like(tree: Any, seed: int = 0) -> Any:
  """A tree of the same shapes with positive values around 1, so that no weight is special."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.3, 1.7, x.shape), x.dtype), tree)


@pytest.mark.parametrize("lowering", ["auto", "matmul", "native"])
@pytest.mark.parametrize("name", LAYERS)
def test_apply_equals_stock_flax(name, lowering):
  module, shape = LAYERS[name]
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape)), jnp.float32)
  model = from_flax(module, lowering)
  params, state = random_like(jax.eval_shape(model.init, jax.random.key(0), inputs[:1]))
  want: Any = module.apply({"params": params, **state}, inputs)
  got, _ = jax.jit(model.apply)(params, state, inputs)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_left_to_stock_flax_are_not_covered(name):
  module, shape = LAYERS[name]
  inputs = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  model = from_flax(nn.Sequential([module, lambda x: x.reshape(x.shape[0], -1)]))
  params, state = jax.eval_shape(model.init, jax.random.key(0), inputs)
  for method in ("two_pass", "book_keeping"):
    assert (model.uncovered(params, state, inputs, 6)[method] != ()) == name.endswith("stock")


class Bfloat16(nn.Module):
  """The covered layers with bfloat16 activations."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x)
    x = nn.GroupNorm(4, dtype=jnp.bfloat16)(x)
    assert x.dtype == jnp.bfloat16
    return nn.Dense(2, dtype=jnp.bfloat16)(x.mean((1, 2)))


@pytest.mark.slow
def test_bfloat16_layers_follow_their_dtype_and_logits_are_float32():
  inputs = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
  model = from_flax(Bfloat16())
  # Stock normalisation promotes bfloat16 with float32, which strict promotion forbids.
  with jax.numpy_dtype_promotion("standard"):
    params, state = random_like(model.init(jax.random.key(0), inputs[:1]))
    want: Any = Bfloat16().apply({"params": params}, inputs)
    got, _ = model.apply(params, state, inputs)
  assert got.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  np.testing.assert_allclose(got, want.astype(jnp.float32), rtol=0.03, atol=0.03)


class Full(nn.Module):
  """Batch norm, dropout and a ``train`` argument."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
    return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


def test_training_changes_state_and_draws_dropout_and_evaluation_does_neither():
  model = from_flax(Full())
  inputs = jax.random.normal(jax.random.key(0), (4, 3))
  params, state = model.init(jax.random.key(1), inputs[:1])
  logits, after = model.apply(params, state, inputs)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  np.testing.assert_array_equal(logits, model.apply(params, state, inputs)[0])
  apply = jax.jit(lambda key: model.apply(params, state, inputs, key=key, train=True))
  first, trained = apply(jax.random.key(2))
  assert not np.array_equal(first, apply(jax.random.key(3))[0])
  mean = trained["batch_stats"]["BatchNorm_0"]["mean"]
  hidden = inputs @ params["Dense_0"]["kernel"]
  np.testing.assert_allclose(mean, 0.5 * hidden.mean(0), rtol=1e-5)


def test_taps_leave_the_logits_alone():
  model = create_model(ModelConfig(name="cnn_small"), 2)
  inputs = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
  params, state = jax.jit(model.init)(jax.random.key(1), inputs[:1])
  plain, _ = jax.jit(model.apply)(params, state, inputs)
  for taps in (jnp.zeros(3), jnp.full(3, jnp.nan)):
    tapped = jax.jit(model.tapped_apply)(params, state, inputs, taps)
    np.testing.assert_allclose(tapped, plain, rtol=1e-6)


class Wrapped(nn.Module):
  """``body(module, x, train)`` before a dense head."""

  body: Callable[[nn.Module, jax.Array, bool], jax.Array]

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(2, name="head")(self.body(self, x, train))


class Inner(nn.Module):
  """One dense layer, as nn.scan, nn.jit and nn.vmap want it."""

  @nn.compact
  def __call__(self, x, _=None) -> Any:
    x = nn.relu(nn.Dense(4)(x))
    return (x, None) if _ is not None else x


class OwnDense(nn.Dense):
  """A subclass, which may compute anything."""


def twice(module, x, train):
  dense = nn.Dense(4, name="shared")
  return dense(nn.relu(dense(x)))


def also_read(module, x, train):
  dense = nn.Dense(4, name="tied")
  return dense(x) @ dense.variables["params"]["kernel"]


def in_a_loop(module, x, train):
  loop = nn.scan(Inner, variable_broadcast="params", split_rngs={"params": False}, length=3)
  return loop(name="loop")(x, jnp.zeros((3, 1)))[0]


def over_examples(module, x, train):
  return nn.vmap(Inner, variable_axes={"params": None}, split_rngs={"params": False})()(x)


@jax.custom_vjp
def own_backward(x):
  return x


own_backward.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent[::-1],))


@jax.custom_jvp
def own_rule(x):
  return x


own_rule.defjvp(lambda primals, tangents: (primals[0], tangents[0][::-1]))


def only_in_large_batches(module, x, train):
  return x - x.mean(0, keepdims=True) if x.shape[0] > 8 else x


def windows(x, strides, padding):
  return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1), strides, (padding, (0, 0)))


def example_by_example(module, x, train):
  return jax.lax.scan(lambda total, row: (total + row, total), jnp.zeros(4), x)[1]


# name: (body, phrase among the reasons)
UNCOVERED: dict[str, tuple[Callable[..., jax.Array], str]] = {
  "layer_called_twice": (twice, "shared/kernel is used twice"),
  "weight_also_read": (also_read, "tied/kernel is used outside"),
  "weight_in_a_loop": (in_a_loop, "loop/Dense_0/kernel is used 3 times"),
  "own_parameter": (
    lambda m, x, train: x * m.param("gain", nn.initializers.ones, (1, 4)),
    "gain is used outside",
  ),
  "unknown_layer": (
    lambda m, x, train: nn.Einsum((4, 4), "bi,io->bo")(x),
    "Einsum_0/kernel is used",
  ),
  "subclass": (lambda m, x, train: OwnDense(4)(x), "OwnDense_0/kernel is used outside"),
  "weight_norm": (lambda m, x, train: nn.WeightNorm(nn.Dense(4))(x), "is used outside"),
  "jitted_part": (lambda m, x, train: nn.jit(Inner)(name="part")(x), "part/Dense_0/kernel is used"),
  "layer_vmapped_over_examples": (over_examples, "is used outside"),
  "batch_norm": (
    lambda m, x, train: nn.BatchNorm(use_running_average=not train)(x),
    "BatchNorm_0 may mix examples",
  ),
  "mean": (lambda m, x, train: x - x.mean(0, keepdims=True), "may mix examples (reduce_sum)"),
  "largest": (lambda m, x, train: x / jnp.abs(x).max(), "may mix examples (reduce_max)"),
  "flip": (lambda m, x, train: x[::-1], "may mix examples (rev)"),
  "roll": (lambda m, x, train: jnp.roll(x, 1, 0), "may mix examples (slice)"),
  "shift": (
    lambda m, x, train: jax.lax.pad(x, 0.0, ((1, -1, 0), (0, 0, 0))),
    "may mix examples (pad)",
  ),
  "sort": (lambda m, x, train: jnp.sort(x, 0), "may mix examples (sort)"),
  "running_sum": (lambda m, x, train: jnp.cumsum(x, 0), "may mix examples (cumsum)"),
  "similarity": (lambda m, x, train: (x @ x.T) @ x, "may mix examples (dot_general)"),
  "one_for_all": (lambda m, x, train: x + x[:1], "may mix examples (slice)"),
  "lookup": (
    lambda m, x, train: jnp.take(x, 4 - jnp.arange(x.shape[0]), 0),
    "may mix examples (gather)",
  ),
  "merged_axes": (
    lambda m, x, train: nn.Dense(4)(x.reshape(-1, 2)).reshape(-1, 8),
    "does not have one row an example",
  ),
  "pool_over_the_batch": (
    lambda m, x, train: nn.max_pool(x[None, :, :, None], (3, 1), padding="SAME")[0, :, :, 0],
    "may mix examples (reduce_window_max)",
  ),
  "largest_of_the_batch": (
    lambda m, x, train: jax.lax.top_k(x, x.shape[0], axis=0)[0],
    "may mix examples (top_k)",
  ),
  "window_that_shifts": (
    lambda m, x, train: windows(x, (1, 1), (1, -1)),
    "may mix examples (reduce_window_sum)",
  ),
  "window_that_skips": (
    lambda m, x, train: windows(x, (2, 1), (0, x.shape[0] - 1)),
    "may mix examples (reduce_window_sum)",
  ),
  "own_derivative": (lambda m, x, train: own_rule(x), "may mix examples (rev)"),
  "only_in_large_batches": (only_in_large_batches, "the program depends on the batch size"),
  "own_backward_pass": (lambda m, x, train: own_backward(x), "(custom_vjp_call)"),
  "scan_over_examples": (example_by_example, "goes through the examples one by one"),
}


def coverage_of(body: Callable[..., jax.Array], rows: int = 5, size: int = 4) -> tuple[str, ...]:
  model: Model = from_flax(Wrapped(body))
  inputs = jax.ShapeDtypeStruct((1, size), jnp.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0), inputs)
  return model.uncovered(params, state, inputs, rows)["two_pass"]


@pytest.mark.parametrize("name", UNCOVERED)
def test_coverage_fails_closed_and_names_the_reason(name):
  body, phrase = UNCOVERED[name]
  assert phrase in "; ".join(coverage_of(body))


COVERED: dict[str, Callable[..., jax.Array]] = {
  "pool": lambda m, x, train: nn.max_pool(x.reshape(-1, 2, 2, 1), (2, 2)).reshape(-1, 1),
  "dropout": lambda m, x, train: nn.softmax(nn.Dropout(0.5, deterministic=not train)(nn.gelu(x))),
  "sort_within": lambda m, x, train: jnp.sort(x, 1),
  "roll_within": lambda m, x, train: jnp.roll(jnp.flip(x, 1), 1, 1),
  "pick_within": lambda m, x, train: jnp.take_along_axis(x, jnp.argsort(x, 1), 1),
  "vmapped_function": lambda m, x, train: jax.vmap(lambda row: row / jnp.linalg.norm(row))(x),
  "reshaped_norm": lambda m, x, train: nn.LayerNorm()(x.reshape(-1, 2, 2)).reshape(-1, 4),
  "rematerialised": lambda m, x, train: nn.remat(Inner)()(x),
  # Since jax 0.11 operations of their own.
  "logarithm_of_base_2": lambda m, x, train: jnp.log2(1 + x * x),
  "slope_of_tanh": lambda m, x, train: jax.jvp(jnp.tanh, (x,), (x,))[1],
}


@pytest.mark.parametrize("name", COVERED)
def test_what_happens_within_an_example_stays_covered(name):
  assert coverage_of(COVERED[name]) == ()


@pytest.mark.parametrize(
  ("name", "body"),
  [
    ("scan", in_a_loop),
    ("sort", lambda m, x, train: jax.lax.sort(x)),
    ("custom_jvp_call", lambda m, x, train: nn.relu(x)),
    ("jit", lambda m, x, train: x),  # how the layers that are covered are marked
  ],
)
def test_an_operation_that_jax_describes_in_an_unknown_way_is_refused(name, body, monkeypatch):
  trace = jax.make_jaxpr

  def renamed(eqn):
    names = {f"new_{key}": value for key, value in eqn.params.items()}
    return eqn.replace(params=names) if eqn.primitive.name == name else eqn

  def newer_jax(function):
    def traced(*args):
      program = trace(function)(*args).jaxpr
      return SimpleNamespace(jaxpr=program.replace(eqns=[renamed(eqn) for eqn in program.eqns]))

    return traced

  monkeypatch.setattr(jax, "make_jaxpr", newer_jax)
  assert f"cannot be followed in jax {jax.__version__} ({name})" in "; ".join(coverage_of(body))


def test_an_unused_parameter_needs_no_tap():
  def body(module, x, train):
    module.param("unused", nn.initializers.ones, (3,))
    return x

  assert coverage_of(body) == ()
