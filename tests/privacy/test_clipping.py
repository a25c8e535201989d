"""Clipped sums equal a plain loop over examples of stock Flax and jax.grad; padding is inert."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.models.gradients import keeps_factors
from fedjax_med.models.model import from_flax
from fedjax_med.models.ops import Lowering
from fedjax_med.models.registry import create_module
from fedjax_med.privacy.clipping import METHODS, clipped_sum, resolve_method

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


class Layer(nn.Module):
  """A dense layer and a nonlinearity, as nn.scan wants it."""

  @nn.compact
  def __call__(self, x, _):
    return jnp.tanh(nn.Dense(40)(x)), None


class Wide(nn.Module):
  """Three such layers under nn.scan."""

  @nn.compact
  def __call__(self, x):
    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return nn.Dense(NUM_CLASSES)(stack()(x, None)[0])


class Attention(nn.Module):
  """A transformer block, whose attention is dense layers over two axes."""

  @nn.compact
  def __call__(self, x):
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
    return nn.Dense(NUM_CLASSES)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))).mean(1))


class Dropped(nn.Module):
  """A model with dropout and a ``train`` argument."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(16)(x)))
    return nn.Dense(NUM_CLASSES)(x)


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
def program(method: str, name: str, lowering: Lowering = "auto") -> Any:
  """Jitted: (params, state, inputs, labels, mask, C) -> (clipped sum, metrics) of a case."""
  model = from_flax(CASES[name][0], lowering)

  def run(params, state, inputs, labels, mask, clip_norm):
    return clipped_sum(
      method, model, squared_loss, params, state, inputs, labels, mask, clip_norm, None
    )

  return jax.jit(run)


EVERY = np.ones(6, bool)
# Every method that covers the case: layers in a loop have no record of their own.
PAIRS = [
  (name, method)
  for name in CASES
  for method in METHODS
  if (name, method) != ("scanned_se_blocks", "book_keeping")
]
every_pair = pytest.mark.parametrize(("name", "method"), PAIRS)


@every_pair
def test_equals_a_loop_over_examples_in_float32(name, method):
  norms = norms_of(gradients(name))
  clip_norm = float(np.sort(norms)[2:4].mean())  # three examples on each side
  got, metrics = program(method, name)(*setting(name), EVERY, clip_norm)
  assert_close(got, loop(gradients(name), clip_norm), 1e-5)
  np.testing.assert_allclose(metrics.norm, norms, rtol=1e-5)


@pytest.mark.parametrize(("name", "method"), [p for p in PAIRS if p[1] != "reference"])
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


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_covered_and_a_loop_by_taps_alone(name):
  params, state, inputs, _ = setting(name)
  model = from_flax(CASES[name][0])
  reasons = model.uncovered(params, state, inputs)
  assert reasons["two_pass"] == ()
  looped = reasons["book_keeping"]
  assert bool(looped) == (name == "scanned_se_blocks")
  assert all("in a loop" in reason for reason in looped)


def test_cases_reach_both_forms_of_the_kernel_norm():
  factors = [(4, 9 * 16, 16), (4, 32, 32), (3, 20, 24)]
  formed = [(6 * 5, 49, 8), (5 * 8, 9 * 2, 4), (4 * 6, 9 * 12, 6)]
  assert all(keeps_factors(*sizes) for sizes in factors)
  assert not any(keeps_factors(*sizes) for sizes in formed)


@pytest.mark.parametrize("method", ["book_keeping", "two_pass"])
def test_clients_with_their_own_weights_equal_loops_on_an_se_resnext(method):
  module = create_module(ModelConfig(name="se_resnext_micro"), NUM_CLASSES)
  model = from_flax(module)
  inputs = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 1))
  labels = jnp.asarray([[0, 1, 2], [2, 2, 0]], jnp.int32)
  mask = np.array([[True, True, True], [True, False, True]])
  keys = jax.random.split(jax.random.key(1), 2)
  params, state = jax.jit(jax.vmap(model.init, (0, None)))(keys, inputs[0, :1])

  def run(params, inputs, labels, mask):
    return clipped_sum(
      method, model, loss, params, state, inputs, labels, mask, jnp.float32(3.3), None
    )

  got, metrics = quick_jit(jax.vmap(run))(params, inputs, labels, mask)

  @quick_jit
  def gradient(params, x, label):
    def value(params):
      logits: Any = module.apply({"params": params}, x[None])
      return loss(logits, label[None])[0]

    return jax.grad(value)(params)

  for client in range(2):
    own = jax.tree.map(lambda x, c=client: x[c], params)
    rows = [row for row in range(3) if mask[client, row]]
    trees = [
      jax.tree.map(np.float64, gradient(own, inputs[client, row], labels[client, row]))
      for row in rows
    ]
    assert_close(jax.tree.map(lambda x, c=client: x[c], got), loop(trees, 3.3), 1e-5)
    np.testing.assert_allclose(metrics.norm[client, rows], norms_of(trees), rtol=1e-5)


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
    run = jax.jit(functools.partial(clipped_sum, method, model, loss))
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
    run = jax.jit(functools.partial(clipped_sum, method, model, flat))
    total, metrics = run(params, state, inputs, labels, mask, 1.0, None)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves((total, metrics.norm)))


def test_one_trace_serves_every_mask_and_clip_norm():
  traces = []
  model = from_flax(nn.Dense(NUM_CLASSES))
  params, state = model.init(jax.random.key(0), jnp.ones((1, 4)))

  @jax.jit
  def run(mask, clip_norm):
    traces.append(None)
    inputs, labels = jnp.ones((2, 4)), jnp.zeros(2, jnp.int32)
    return clipped_sum(
      "two_pass", model, loss, params, state, inputs, labels, mask, clip_norm, None
    )

  for mask in ([True, True], [False, True], [False, False]):
    for clip_norm in (0.1, 10.0):
      run(jnp.array(mask), jnp.float32(clip_norm))
  assert len(traces) == 1


@pytest.mark.parametrize("method", METHODS)
def test_dropout_draws_from_the_key(method):
  model = from_flax(Dropped())
  inputs, labels = jax.random.normal(jax.random.key(2), (4, 5)), jnp.zeros(4, jnp.int32)
  params, state = model.init(jax.random.key(0), inputs[:1])

  compiled = jax.jit(functools.partial(clipped_sum, method, model, loss))

  def run(seed):
    return compiled(params, state, inputs, labels, jnp.ones(4, bool), 0.5, jax.random.key(seed))

  same_bits(run(0), run(0))
  assert not np.array_equal(run(0)[1].loss, run(1)[1].loss)
  single, metrics = run(0)
  assert norms_of([single])[0] <= 4 * 0.5 * (1 + 1e-6)
  assert np.isfinite(metrics.norm).all()


def test_the_norm_pass_forms_no_weight_gradient():
  """Of a scanned layer wider than the batch, XLA keeps the products each pass needs and no more."""
  model = from_flax(Wide())
  inputs = jnp.ones((3, 40))
  params, state = model.init(jax.random.key(0), inputs[:1])

  def norms(params):
    def losses(params, taps):
      return jnp.square(model.tapped_apply(params, state, inputs, taps)).sum(1)

    return jax.vjp(losses, params, jnp.zeros(3))[1](jnp.ones(3))[1]

  program = jax.jit(norms).lower(params).compile().as_text()
  assert program is not None
  assert " dot(" in program
  assert "f32[40,40]{1,0} dot(" not in program


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

  run = jax.jit(functools.partial(clipped_sum, method, model, linear))
  total, _ = run(params, state, inputs, jnp.zeros(1, jnp.int32), jnp.ones(1, bool), 1.0, None)
  assert norms_of([jax.tree.map(np.float64, total)])[0] <= 1 + 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_only_the_reference_holds_the_gradient_of_every_example_of_a_wide_layer(method):
  model = from_flax(nn.Sequential([nn.Dense(96), nn.relu, nn.Dense(96), nn.relu, nn.Dense(3)]))
  inputs, labels, mask = jnp.ones((5, 96)), jnp.zeros(5, jnp.int32), jnp.ones(5, bool)
  params, state = model.init(jax.random.key(0), inputs[:1])

  def run(params):
    return clipped_sum(
      method, model, loss, params, state, inputs, labels, mask, jnp.float32(1), None
    )

  program = jax.jit(run).lower(params).compile().as_text()
  assert program is not None
  assert ("f32[5,96,96]" in program) == (method == "reference")


CLEAR: dict[str, tuple[str, ...]] = {"book_keeping": (), "two_pass": ()}
TWICE = ("Dense_0/kernel is used twice",)
LOOPED = ("blocks runs layers in a loop",)


def test_auto_takes_the_cheapest_method_that_covers_the_model():
  assert resolve_method("auto", CLEAR)[0] == "book_keeping"
  method, reason = resolve_method("auto", {"book_keeping": LOOPED, "two_pass": ()})
  assert method == "reference"  # two_pass has no bound for adversarial numbers
  assert LOOPED[0] in reason
  for name in METHODS:
    assert resolve_method(name, CLEAR) == (name, "asked for")


def test_auto_falls_back_to_the_reference_and_says_why():
  method, reason = resolve_method("auto", dict.fromkeys(CLEAR, TWICE))
  assert method == "reference"
  assert "Dense_0/kernel is used twice" in reason


@pytest.mark.parametrize("method", ["book_keeping", "two_pass"])
def test_a_method_that_does_not_cover_the_model_is_refused_with_the_remedy(method):
  with pytest.raises(UserError, match=r"Dense_0/kernel is used twice.*privacy\.clipping=auto"):
    resolve_method(method, dict.fromkeys(CLEAR, TWICE))


def test_a_method_that_does_not_exist_is_refused():
  with pytest.raises(UserError, match="did you mean 'two_pass'"):
    resolve_method("two_passes", CLEAR)


# Units of several rows: a patient's images, or augmentations of one image.
UNIT_MASK = np.array([True, True, True, False, False, False])


@pytest.mark.parametrize("mask", [EVERY, UNIT_MASK], ids=["whole", "with_padding"])
@every_pair
def test_units_of_two_rows_equal_a_loop_over_patients(name, method, mask):
  model = from_flax(CASES[name][0])
  trees = [
    jax.tree.map(lambda *x: sum(x) / len(x), *[gradients(name)[row] for row in rows])
    for rows in ([row for row in pair if mask[row]] for pair in ((0, 1), (2, 3), (4, 5)))
    if rows
  ]
  clip_norm = float(np.median(norms_of(trees)))

  @jax.jit
  def run(params, state, inputs, labels, mask):
    return clipped_sum(
      method,
      model,
      squared_loss,
      params,
      state,
      inputs,
      labels,
      mask,
      jnp.float32(clip_norm),
      None,
      rows_per_unit=2,
    )

  got, metrics = run(*setting(name), mask)
  assert_close(got, loop(trees, clip_norm), 1e-5)
  np.testing.assert_allclose(metrics.norm[: len(trees)], norms_of(trees), rtol=1e-5)
  assert not np.asarray(metrics.norm)[len(trees) :].any()
  assert metrics.loss.shape == (6,)


def test_rows_that_are_no_whole_units_are_refused():
  params, state, inputs, labels = setting("dense")
  model, mask = from_flax(CASES["dense"][0]), jnp.asarray(EVERY)
  arguments = (params, state, inputs, labels, mask, jnp.float32(1), None)
  with pytest.raises(ValueError, match="6 rows are not whole units of 4"):
    clipped_sum("reference", model, loss, *arguments, rows_per_unit=4)
