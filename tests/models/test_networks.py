"""Parts of the networks against NumPy, norms and dropout, and the registry's answers."""

import math
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.models import registry
from fedjax_med.models.model import from_flax
from fedjax_med.models.networks.blocks import (
  adaptive_mean_pool,
  around_max_pool,
  ceil_max_pool,
  mean_pool,
)
from fedjax_med.models.networks.norms import normalise, num_norm_groups
from fedjax_med.models.networks.se_resnext import Bottleneck
from fedjax_med.models.registry import MODELS, create_model, create_module, has_remat
from fedjax_med.privacy.clipping import Rows, clipped_sum
from tests.models.networks import (
  CLASSES,
  IMAGES,
  INPUTS,
  LARGE,
  MASK,
  TARGETS,
  full_module,
  gradients_of,
  loss,
  network,
  shapes,
)
from tests.privacy.clipping_cases import assert_close, loop, quick_jit


def test_a_new_bottleneck_has_unit_scales_and_a_gradient_in_every_parameter():
  block = Bottleneck(8, 16, 2, groups=2, reduction=4, project=True, norm="group", dtype=jnp.float32)
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


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (8, 6), (16, 15)])
def test_adaptive_means_are_of_cells_that_cover_the_image(size):
  image = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
  expected = np.zeros((2, 7, 7, 3))
  for i in range(7):
    for j in range(7):
      (top, bottom), (left, right) = (
        (math.floor(k * n / 7), math.ceil((k + 1) * n / 7))
        for k, n in zip((i, j), size, strict=True)
      )
      expected[:, i, j] = image[:, top:bottom, left:right].mean((1, 2))
  np.testing.assert_allclose(adaptive_mean_pool(jnp.asarray(image), 7), expected, atol=1e-6)


def test_mean_pool_leaves_out_a_last_odd_row():
  image = np.random.default_rng(0).normal(size=(1, 5, 4, 2)).astype(np.float32)
  expected = [
    [image[0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((0, 1)) for x in (0, 1)] for y in (0, 1)
  ]
  np.testing.assert_allclose(mean_pool(jnp.asarray(image))[0], expected, atol=1e-6)


def test_batch_norm_mixes_examples_and_frozen_batch_norm_does_not():
  def change_of_the_others(norm):
    model, params, state = network("cnn_small", norm=norm)[1:]
    apply = jax.jit(lambda x: model.apply(params, state, x, key=jax.random.key(1), train=True))
    first, second = (apply(x)[0] for x in (IMAGES, np.concatenate([-IMAGES[:1], IMAGES[1:]])))
    return np.abs(first[1:] - second[1:]).max()

  assert change_of_the_others("batch") > 1e-3
  assert change_of_the_others("frozen_batch") == 0


def test_training_moves_running_averages_of_batch_norm_but_not_frozen_ones():
  for norm, moves in (("batch", True), ("frozen_batch", False)):
    model, params, state = network("cnn_small", norm=norm)[1:]
    run = jax.jit(lambda s, m=model, p=params: m.apply(p, s, IMAGES, train=True)[1])
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(run(state)), strict=True)
    assert any((np.asarray(a) != b).any() for a, b in pairs) == moves


def test_dropout_draws_in_training_only():
  _, _, params, state = network("cnn_small")
  model = create_model(ModelConfig(name="cnn_small", dropout=0.5), CLASSES)

  def run(seed, train):
    return model.apply(params, state, IMAGES, key=jax.random.key(seed), train=train)[0]

  run = jax.jit(run, static_argnums=1)
  assert (run(0, True) != run(1, True)).any()
  np.testing.assert_array_equal(run(0, True), run(0, True))
  np.testing.assert_array_equal(run(0, False), run(1, False))


def test_bfloat16_networks_are_initialised_in_float32():
  with jax.numpy_dtype_promotion("standard"):  # flax's own layers need it
    params, _, logits = shapes(full_module("se_resnext_micro", dtype="bfloat16"))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", ["mlp", "linear"])
@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 2, 2, 1)])
def test_flat_networks_take_inputs_of_any_rank(name, shape):
  model = create_model(ModelConfig(name=name), 2)
  params, state = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
  assert jax.eval_shape(model.apply, params, state, jnp.zeros((7, *shape)))[0].shape == (7, 2)


def test_linear_is_the_affine_map_of_the_pixels():
  model, params, state = network("linear")[1:]
  kernel, bias = (np.asarray(params["head"][leaf]) for leaf in ("kernel", "bias"))
  expected = IMAGES.reshape(4, -1) @ kernel + bias
  np.testing.assert_allclose(model.apply(params, state, IMAGES)[0], expected, rtol=1e-4, atol=1e-5)


def test_norm_groups_divide_the_channels_and_never_hold_one_alone():
  channels = (1, 2, 3, 8, 16, 64, 96, 100, 2048)
  found = {number: num_norm_groups(number, 64) for number in channels}
  assert found == {1: 1, 2: 1, 3: 1, 8: 4, 16: 8, 64: 32, 96: 32, 100: 25, 2048: 32}


@pytest.mark.parametrize("channels", [1, 8, 20, 24, 64, 96, 512])
@pytest.mark.parametrize("pixels", [1, 4, 9, 16])
def test_norm_groups_of_small_maps_hold_numbers_enough_to_learn_from(channels, pixels):
  groups = num_norm_groups(channels, pixels)
  assert channels % groups == 0
  assert groups == 1 or channels // groups * pixels >= 16
  # And no fewer groups than that asks for.
  larger = [g for g in range(groups + 1, 33) if channels % g == 0]
  assert all(channels // g < 2 or channels // g * pixels < 16 for g in larger)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"linear", "mlp"}))  # these have no norm
def test_no_norm_group_of_a_narrow_network_at_32_pixels_is_too_small_to_learn_from(name):
  numbers = []

  def watch(call, args, kwargs, context):
    if isinstance(context.module, nn.GroupNorm) and context.method_name == "__call__":
      assert context.module.num_groups
      numbers.append(math.prod(args[0].shape[1:]) // context.module.num_groups)
    return call(*args, **kwargs)

  with nn.intercept_methods(watch):
    shapes(full_module(name, width=0.25 if name in LARGE else 1.0), side=32)
  assert min(numbers) >= 8  # 8 where a layer has no more channels


def test_a_norm_at_one_pixel_hands_the_gradient_on():
  class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
      return normalise(x, "group", train=True, dtype=jnp.float32, name="norm")

  rng = np.random.default_rng(0)
  x, toward = (jnp.asarray(rng.normal(size=(1, 1, 1, 32)), jnp.float32) for _ in range(2))
  value = lambda x: (Norm().init_with_output(jax.random.key(0), x)[0] * toward).sum()  # noqa: E731
  gradient = jax.grad(value)(x)
  assert float(jnp.linalg.norm(gradient)) > 0.5 * float(jnp.linalg.norm(toward))


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


def test_a_width_goes_to_constructors_that_take_one(monkeypatch):
  monkeypatch.setattr(registry, "MODELS", dict(MODELS))
  registry.register("wide", lambda num_classes, *, width=1.0, **_: MODELS["mlp"](int(9 * width)))
  registry.register("fixed", lambda num_classes, **_: MODELS["mlp"](num_classes))
  assert create_module(ModelConfig(name="wide", width=2.0), 3) == MODELS["mlp"](18)
  assert create_module(ModelConfig(name="fixed"), 3) == MODELS["mlp"](3)
  for name in ("fixed", "linear"):
    message = f"model.width=0.5 needs .*, which '{name}' cannot; use model.width=1, or give"
    with pytest.raises(UserError, match=message):
      create_module(ModelConfig(name=name, width=0.5), 3)


def test_a_file_that_registers_may_be_read_twice_but_takes_no_other_s_name(tmp_path, monkeypatch):
  monkeypatch.setattr(registry, "MODELS", dict(MODELS))
  text = "from fedjax_med.models import registry\n"
  text += "registry.register('mine', lambda n, *, width=1.0, **_: registry.MODELS['mlp'](n))\n"
  first, second = (tmp_path / name for name in ("first.py", "second.py"))
  for path in (first, second):
    path.write_text(text)
  for _ in range(2):
    runpy.run_path(str(first))
  with pytest.raises(UserError, match="'mine' is registered already"):
    runpy.run_path(str(second))
  first.write_text(text.replace("(n)", "(n + 1)"))
  with pytest.raises(UserError, match="'mine' is registered already"):
    runpy.run_path(str(first))
  made = [lambda n, factor=f, **_: MODELS["mlp"](n) for f in (1, 2)]
  registry.register("defaults", made[0])
  with pytest.raises(UserError, match="'defaults' is registered already"):
    registry.register("defaults", made[1])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "method"),
  [
    ("se_resnext_micro", "two_pass"),
    ("se_resnext_micro", "book_keeping"),
    ("googlenet", "book_keeping"),
    ("densenet121", "book_keeping"),
    ("mobilenet_v2", "book_keeping"),
    ("fedxnet", "book_keeping"),
  ],
)
def test_blocks_computed_again_change_no_clipped_sum_and_stay_covered(name, method):
  module, _, params, state = network(name)
  again = from_flax(module.clone(remat=True))
  assert not any(again.uncovered(params, state, IMAGES, len(INPUTS[0])).values())

  def run(params):
    rows = Rows(INPUTS[0], TARGETS[0], MASK[0])
    arguments = (params, state, rows, jnp.float32(0.5), None)
    return clipped_sum(method, again, loss, *arguments)[0]

  assert_close(quick_jit(run)(params), loop(gradients_of(name, 0), 0.5), 1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_networks_with_blocks_can_compute_them_again(name):
  without = ("vgg16", "cnn_small", "cnn1d", "mlp", "linear")
  assert has_remat(ModelConfig(name=name), CLASSES) == (name not in without)


def test_a_network_without_blocks_refuses_to_compute_them_again():
  with pytest.raises(UserError, match=r"execution.remat='blocks' needs .*; use execution.remat"):
    create_model(ModelConfig(name="linear"), CLASSES, remat=True)
