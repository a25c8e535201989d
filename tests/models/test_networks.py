"""Every registered network keeps the same promises; the published ones have the published size."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.models import registry
from fedjax_med.models.layers import num_norm_groups
from fedjax_med.models.registry import MODELS, create_model, create_module
from fedjax_med.models.se_resnext import Bottleneck, around_max_pool, ceil_max_pool
from fedjax_med.privacy.clipping import clipped_sum

LARGE = ("se_resnext50_32x4d",)  # shapes only: compiling it takes half a minute
SMALL = tuple(name for name in MODELS if name not in LARGE)
CLASSES, SIDE = 3, 16

IMAGES = np.random.default_rng(0).normal(size=(4, SIDE, SIDE, 1)).astype(np.float32)


def shapes(name, *, side=SIDE, channels=1, classes=CLASSES, **config):
  """Parameter, state and logit shapes of a network, without running it."""
  model = create_model(ModelConfig(name=name, **config), classes)
  images = jnp.zeros((1, side, side, channels))
  params, state = jax.eval_shape(model.init, jax.random.key(0), images)
  return params, state, jax.eval_shape(model.apply, params, state, images)[0]


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def with_weights(name, **config):
  """A network with NumPy's weights, which spares compiling its initialisation."""
  params, state, _ = shapes(name, **config)
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    kind = path[-1].key
    spread = math.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.1
    values = rng.normal(float(kind in ("scale", "var")), spread, leaf.shape)
    return values.astype(leaf.dtype)

  params, state = (jax.tree_util.tree_map_with_path(draw, tree) for tree in (params, state))
  return create_model(ModelConfig(name=name, **config), CLASSES), params, state


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_finite_repeatable_and_of_one_example_each(name):
  model, params, state = with_weights(name)
  apply = jax.jit(lambda images: model.apply(params, state, images)[0])
  logits = apply(IMAGES)
  assert logits.shape == (4, CLASSES)
  assert logits.dtype == jnp.float32
  assert np.isfinite(logits).all()
  assert np.ptp(logits, axis=0).min() > 0  # the images are seen
  np.testing.assert_array_equal(logits, apply(IMAGES))
  changed = apply(np.concatenate([100 * IMAGES[:1] + 7, IMAGES[1:]]))
  assert np.abs(changed[0] - logits[0]).max() > 1e-3
  np.testing.assert_allclose(changed[1:], logits[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["group", "frozen_batch"])
def test_every_parameter_is_covered_by_exact_clipping(name, norm):
  model = create_model(ModelConfig(name=name, norm=norm), CLASSES)
  images = jnp.zeros((1, 32, 32, 1))
  params, state = jax.eval_shape(model.init, jax.random.key(0), images)
  assert model.uncovered(params, state, images)["book_keeping"] == ()


def test_a_new_bottleneck_has_unit_scales_and_a_gradient_in_every_parameter():
  block = Bottleneck(8, 16, 2, groups=2, reduction=4, norm="group", dtype=jnp.float32)
  x = np.random.default_rng(2).normal(size=(2, 4, 4, 8)).astype(np.float32)

  @jax.jit
  def start(x):
    params = block.init(jax.random.key(0), x, False)["params"]

    def loss(params):
      outputs = jnp.asarray(block.apply({"params": params}, x, False))
      return jnp.square(outputs).sum()

    return params, jax.grad(loss)(params)

  params, gradient = start(x)
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  assert len(leaves) == 16
  for (path, leaf), slope in zip(leaves, jax.tree.leaves(gradient), strict=True):
    assert leaf.dtype == jnp.float32
    assert float(jnp.abs(slope).max()) > 0, path
    if path[-1].key != "kernel":
      assert (leaf == (1 if path[-1].key == "scale" else 0)).all()
  spread = float(params["conv2"]["kernel"].std())  # He's deviation for a fan-in of 3 * 3 * 4
  assert spread == pytest.approx(math.sqrt(2 / 36), rel=0.15)


def se_resnext_size(stem, groups, reduction, stages):
  """Parameters before the head, summed layer by layer as in Hu et al. (2018), table 1."""
  kernel, features = stem
  total = kernel**2 * 3 * features + 2 * features
  for width, out, blocks in stages:
    for block in range(blocks):
      total += features * width + 2 * width
      total += 3 * 3 * (width // groups) * width + 2 * width
      total += width * out + 2 * out
      total += 2 * out * (out // reduction) + out // reduction + out
      total += (features * out + 2 * out) if block == 0 else 0
      features = out
  return total + features * 1000 + 1000


def published_stages():
  """Cadene's arithmetic: width = floor(planes * base_width / 64) * groups, expansion 4."""
  table = ((64, 3), (128, 4), (256, 6), (512, 3))
  return [(math.floor(p * (4 / 64)) * 32, 4 * p, blocks) for p, blocks in table]


SIZES = {
  "se_resnext50_32x4d": se_resnext_size((7, 64), 32, 16, published_stages()),
  "se_resnext_tiny": se_resnext_size((3, 16), 8, 8, [(w, w, 1) for w in (32, 64, 128)]),
  "se_resnext_micro": se_resnext_size((3, 8), 4, 4, [(8, 16, 1), (16, 32, 1)]),
  "cnn_small": (9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + 33 * 1000,
  "mlp": (32 * 32 * 3 + 1) * 32 + 33 * 1000,
  "linear": (32 * 32 * 3 + 1) * 1000,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_at_three_channels_and_a_thousand_classes(name):
  for norm in ("group", "batch"):
    params, state, logits = shapes(name, side=32, channels=3, classes=1000, norm=norm)
    assert count(params) == SIZES[name]
    assert logits.shape == (1, 1000)
    assert bool(state) == (norm == "batch" and name not in ("mlp", "linear"))


def test_large_network_has_the_published_size():
  params, _, _ = shapes("se_resnext50_32x4d", channels=3, classes=1000, norm="batch")
  assert count(params) == SIZES["se_resnext50_32x4d"] == 27_559_896


@pytest.mark.parametrize("side", [32, 33, 64, 224])
def test_the_large_network_takes_32_pixels_and_more(side):
  assert shapes("se_resnext50_32x4d", side=side)[2].shape == (1, CLASSES)


@pytest.mark.parametrize("side", [32, 33, 64, 112, 113])
def test_stem_pool_rounds_up_like_ceil_mode(side):
  image = np.random.default_rng(side).normal(size=(1, side, side, 1)).astype(np.float32)
  size = math.ceil((side - 3) / 2) + 1
  expected = [
    [image[0, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3].max() for x in range(size)] for y in range(size)
  ]
  np.testing.assert_array_equal(ceil_max_pool(jnp.asarray(image))[0, :, :, 0], expected)


@pytest.mark.parametrize("side", [7, 8, 32, 33])
def test_the_other_stem_pool_pads_one_pixel_all_around(side):
  image = np.random.default_rng(side).normal(size=(1, side, side, 1)).astype(np.float32)
  padded = np.pad(image[0, :, :, 0], 1, constant_values=-np.inf)
  size = (side + 2 - 3) // 2 + 1
  expected = [
    [padded[2 * y : 2 * y + 3, 2 * x : 2 * x + 3].max() for x in range(size)] for y in range(size)
  ]
  np.testing.assert_array_equal(around_max_pool(jnp.asarray(image))[0, :, :, 0], expected)


@pytest.mark.parametrize(
  "name",
  # se_resnext_tiny has the blocks of micro, only more of them
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in {*LARGE, "se_resnext_tiny"}))
    for name in MODELS
  ],
)
def test_lowering_changes_logits_and_gradients_by_rounding_only(name):
  params, state = with_weights(name)[1:]
  batch = np.random.default_rng(2).normal(size=(2, 32, 32, 1)).astype(np.float32)
  if name in ("mlp", "linear"):  # whose weights fit one size of image
    batch = IMAGES[:2]

  def run(lowering):
    model = create_model(ModelConfig(name=name), CLASSES, lowering=lowering)

    def total(params):
      logits = model.apply(params, state, batch, key=jax.random.key(1), train=True)[0]
      return jnp.square(logits).sum(), logits

    return jax.jit(jax.grad(total, has_aux=True))(params)

  want, logits = run("matmul")
  size = optax.tree.norm(want)
  for lowering in ("auto", "native"):
    got, others = run(lowering)
    np.testing.assert_allclose(others, logits, rtol=1e-3, atol=1e-4)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, got, want)) < 1e-3 * size


def test_batch_norm_mixes_examples_and_frozen_batch_norm_does_not():
  def change_of_the_others(norm):
    model, params, state = with_weights("cnn_small", norm=norm)
    apply = jax.jit(lambda x: model.apply(params, state, x, key=jax.random.key(1), train=True))
    first, second = (apply(x)[0] for x in (IMAGES, np.concatenate([-IMAGES[:1], IMAGES[1:]])))
    return np.abs(first[1:] - second[1:]).max()

  assert change_of_the_others("batch") > 1e-3
  assert change_of_the_others("frozen_batch") == 0


def test_training_moves_running_averages_of_batch_norm_but_not_frozen_ones():
  for norm, moves in (("batch", True), ("frozen_batch", False)):
    model, params, state = with_weights("cnn_small", norm=norm)
    run = jax.jit(lambda s, m=model, p=params: m.apply(p, s, IMAGES, train=True)[1])
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(run(state)), strict=True)
    assert any((np.asarray(a) != b).any() for a, b in pairs) == moves


def test_dropout_draws_in_training_only():
  model, params, state = with_weights("cnn_small", dropout=0.5)

  def run(seed, train):
    return model.apply(params, state, IMAGES, key=jax.random.key(seed), train=train)[0]

  run = jax.jit(run, static_argnums=1)
  assert (run(0, True) != run(1, True)).any()
  np.testing.assert_array_equal(run(0, True), run(0, True))
  np.testing.assert_array_equal(run(0, False), run(1, False))


@pytest.mark.parametrize("name", ["se_resnext_micro", "cnn_small"])
def test_bfloat16_changes_logits_a_little_and_keeps_them_float32(name):
  model, params, state = with_weights(name)
  halved = create_model(ModelConfig(name=name, dtype="bfloat16"), CLASSES)
  apply = lambda m: jax.jit(m.apply)(params, state, IMAGES)[0]  # noqa: E731
  logits, reference = apply(halved), apply(model)
  assert logits.dtype == jnp.float32
  assert (logits != reference).any()
  np.testing.assert_allclose(logits, reference, atol=0.05 * np.abs(reference).max())


def test_bfloat16_networks_are_initialised_in_float32():
  with jax.numpy_dtype_promotion("standard"):  # flax's own layers need it
    params, _, logits = shapes("se_resnext_micro", dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", ["mlp", "linear"])
@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 2, 2, 1)])
def test_flat_networks_take_inputs_of_any_rank(name, shape):
  model = create_model(ModelConfig(name=name), 2)
  params, state = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
  assert jax.eval_shape(model.apply, params, state, jnp.zeros((7, *shape)))[0].shape == (7, 2)


def test_linear_is_the_affine_map_of_the_pixels():
  model, params, state = with_weights("linear")
  kernel, bias = (np.asarray(params["head"][leaf]) for leaf in ("kernel", "bias"))
  expected = IMAGES.reshape(4, -1) @ kernel + bias
  np.testing.assert_allclose(model.apply(params, state, IMAGES)[0], expected, rtol=1e-4, atol=1e-5)


def test_norm_groups_divide_the_channels_and_never_hold_one_alone():
  found = {channels: num_norm_groups(channels) for channels in (1, 2, 3, 8, 16, 64, 96, 100, 2048)}
  assert found == {1: 1, 2: 1, 3: 1, 8: 4, 16: 8, 64: 32, 96: 32, 100: 25, 2048: 32}


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (ModelConfig(name="se_resnext_tinny"), "did you mean 'se_resnext_tiny'"),
    (ModelConfig(norm="layer"), "model.norm='layer'"),
    (ModelConfig(dtype="float8"), "model.dtype='float8'"),
  ],
)
def test_an_unknown_name_is_answered_with_the_nearest(config, message):
  with pytest.raises(UserError, match=message):
    create_module(config, 2)


def test_a_registered_constructor_is_used_and_cannot_be_replaced(monkeypatch):
  monkeypatch.setattr(registry, "MODELS", dict(MODELS))
  constructor = lambda num_classes, **kwargs: MODELS["linear"](num_classes + 1, **kwargs)  # noqa: E731
  registry.register("mine", constructor)
  registry.register("mine", constructor)
  assert create_module(ModelConfig(name="mine"), 4) == MODELS["linear"](5)
  with pytest.raises(UserError, match="'mine' is registered already"):
    registry.register("mine", MODELS["linear"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["book_keeping", "two_pass"])
def test_blocks_computed_again_change_no_clipped_sum_and_stay_covered(method):
  kept, params, state = with_weights("se_resnext_micro")
  again = create_model(ModelConfig(name="se_resnext_micro"), CLASSES, remat=True)
  assert again.uncovered(params, state, IMAGES)[method] == ()
  images, labels, mask = jnp.asarray(IMAGES), jnp.arange(4) % CLASSES, jnp.arange(4) < 3

  def total(model):
    def run(params):
      norm = jnp.float32(0.5)
      loss = cross_entropy
      return clipped_sum(method, model, loss, params, state, images, labels, mask, norm, None)[0]

    return jax.jit(run)(params)

  def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]

  chex.assert_trees_all_close(total(again), total(kept), rtol=1e-5, atol=1e-6)


def test_a_network_without_blocks_refuses_to_compute_them_again():
  with pytest.raises(UserError, match=r"execution.remat='blocks' needs .*; use execution.remat"):
    create_model(ModelConfig(name="linear"), CLASSES, remat=True)
