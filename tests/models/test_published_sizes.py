"""Networks have the size their papers and reference implementations have, whatever the image."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from fedjax_med.models.model import from_flax
from fedjax_med.models.networks.blocks import halvings, scaled
from fedjax_med.models.registry import MODELS
from tests.models.networks import LARGE, count, full_module, shapes, small_module


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


def fedxnet_size(features, embedded):
  """Parameters of FedXNet, summed layer by layer: our own number, for the paper gives us none."""
  total = 9 * 3 * features[0] + 2 * features[0]
  for number, width in enumerate(features):
    if number:
      total += (4 * features[number - 1]) * (2 + width)
    total += (9 * width + 2 * width) + (width**2 + 2 * width)
    heads = width // 16
    attention = (width * 3 * width + 3 * width) + 7 * 7 * heads + (width**2 + width)
    perceptron = (width * 4 * width + 4 * width) + (4 * width * width + width)
    total += 2 * (2 * width + attention + 2 * width + perceptron)
  first, last = features[0], features[-1]
  total += 2 * last + (last + 1) * 1000
  return total + (first + 1) + (last + 1) * first + (last + 1 + first + 1) * embedded


# Parameters (scales and biases of norms among them, statistics not), convolutions, dense layers.
# The large ones are what torchvision's model table prints for the same network (vgg16 as vgg16_bn;
# SE-ResNeXt-50 as Cadene's). Layers: 16 residual blocks of 3 convolutions, 4 projections and a stem
# (SE: 2 dense layers of gates a block); VGG's 13 + 3; 3 convolutions and 9 inceptions of 6; a stem,
# 58 dense layers of 2 and 3 transitions; a stem, 17 (16) blocks of 3 but for the expansion that the
# first has not, and a last one (gates as above). FedXNet: a stem and 2 convolutions a
# stage; 5 dense layers in each of 6 blocks, 2 between stages, the head and 4 heads of penalties.
SIZES = {
  "se_resnext50_32x4d": (27_559_896, 53, 33),
  "resnet50": (25_557_032, 53, 1),
  "resnext50_32x4d": (25_028_904, 53, 1),
  "vgg16": (138_365_992, 13, 3),
  "googlenet": (6_624_904, 57, 1),
  "densenet121": (7_978_856, 120, 1),
  "mobilenet_v2": (3_504_872, 52, 1),
  "efficientnet_b0": (5_288_548, 49, 33),
  "efficientnet_b0_texture": (5_288_548 + (22 + 1) * 64 + 64 * 1000, 49, 34),
  "se_resnext_tiny": (se_resnext_size((3, 16), 8, 8, [(w, w, 1) for w in (32, 64, 128)]), 13, 7),
  "se_resnext_micro": (se_resnext_size((3, 8), 4, 4, [(8, 16, 1), (16, 32, 1)]), 9, 5),
  "fedxnet": (fedxnet_size((32, 64, 128), 32), 7, 37),
  "cnn_small": ((9 * 3 * 16 + 2 * 16) + (9 * 16 * 32 + 2 * 32) + 33 * 1000, 2, 1),
  "mlp": ((32 * 32 * 3 + 1) * 32 + 33 * 1000, 0, 2),
  "linear": ((32 * 32 * 3 + 1) * 1000, 0, 1),
  "cnn1d": (
    9 * 3 * 32 + 7 * 32 * 48 + 5 * 48 * 64 + 2 * (32 + 48 + 64) + (2 * 64 + 1) * 1000,
    3,
    1,
  ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_layers_at_three_channels_and_a_thousand_classes(name):
  module = full_module(name, classes=1000, norm="batch")
  params, state, logits = shapes(module, side=32, channels=3)
  ranks = [
    len(leaf.shape)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    if path[-1].key == "kernel"
  ]
  assert (count(params), ranks.count(4), ranks.count(2)) == SIZES[name]
  assert logits.shape == (1, 1000)
  assert bool(state) == (name not in ("mlp", "linear"))


def test_se_resnext_50_is_the_sum_of_its_published_layers():
  assert se_resnext_size((7, 64), 32, 16, published_stages()) == SIZES["se_resnext50_32x4d"][0]


@pytest.mark.parametrize("name", ["se_resnext_micro", "cnn_small"])
def test_group_norm_has_as_many_parameters_as_batch_norm_and_no_state(name):
  params, state, _ = shapes(full_module(name, classes=1000), side=32, channels=3)
  assert count(params) == SIZES[name][0]
  assert not state


# Convolutions and dense layers on the longest way from image to logits, as the papers count.
DEPTHS = {
  "vgg16": (16, lambda convs, denses: convs + denses),
  "resnet50": (50, lambda convs, denses: convs - 4 + denses),  # projections lie beside the blocks
  "googlenet": (22, lambda convs, denses: 3 + (convs - 3) // 6 * 2 + denses),
  "densenet121": (121, lambda convs, denses: convs + denses),
  "mobilenet_v2": (53, lambda convs, denses: convs + denses),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_the_published_one(name):
  depth, of = DEPTHS[name]
  assert of(*SIZES[name][1:]) == depth


@pytest.mark.parametrize(
  ("side", "strides"),
  [
    (224, (2, 2, 2, 2, 2)),
    (32, (2, 2, 2, 2, 2)),
    (31, (1, 2, 2, 2, 2)),
    (16, (1, 2, 2, 2, 2)),
    (8, (1, 1, 2, 2, 2)),
    (1, (1, 1, 1, 1, 1)),
  ],
)
def test_small_images_leave_out_the_first_halvings(side, strides):
  assert halvings(jnp.zeros((1, side, side + 9, 1)), 5) == strides


@functools.cache
def parameters(name, side):
  params, _, logits = shapes(small_module(name), side=side)
  assert logits.shape == (1, 3)
  return params


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("side", [1, 7, 33])
def test_parameters_do_not_depend_on_the_size_of_the_image(name, side):
  assert parameters(name, side) == parameters(name, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_whole_networks_take_the_published_size(name):
  assert shapes(full_module(name), side=224)[2].shape == (1, 3)


def test_scaled_channels_are_multiples_of_eight_and_published_ones_stay():
  assert scaled(((64, 128), 24), 1) == ((64, 128), 24)
  assert scaled((64, 24, 16, 8), 0.3) == (16, 8, 8, 8)
  assert scaled((64, 20), 1.5) == (96, 32)
  assert scaled(100, 0.5, multiple=32) == 64
  assert scaled(3, 0.1, multiple=32) == 32


@pytest.mark.parametrize(
  ("width", "channels", "groups"),
  [
    (1, (128, 256, 512, 1024), (32, 32, 32, 32)),
    (0.4, (64, 96, 192, 416), (32, 32, 32, 32)),
    (0.25, (32, 64, 128, 256), (32, 32, 32, 32)),
    (0.125, (16, 32, 64, 128), (16, 32, 32, 32)),  # a group has at least one channel
    (0.01, (8, 8, 8, 8), (8, 8, 8, 8)),
  ],
)
def test_width_keeps_the_groups_as_long_as_each_has_a_channel(width, channels, groups):
  module = full_module("resnext50_32x4d", width=width).clone(stage_blocks=(1, 1, 1, 1))
  params, _, _ = shapes(module)
  kernels = [params[f"stage{stage}_block1"]["conv2"]["kernel"] for stage in (1, 2, 3, 4)]
  assert tuple(kernel.shape[3] for kernel in kernels) == channels
  assert tuple(kernel.shape[3] // kernel.shape[2] for kernel in kernels) == groups


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("linear", *LARGE)])
def test_width_makes_networks_narrower_and_wider_but_not_the_classes(name):
  narrow, normal, wide = (shapes(full_module(name, width=w)) for w in (0.5, 1.0, 2.0))
  if name != "se_resnext_micro":  # whose 8 channels are the least
    assert count(narrow[0]) < count(normal[0])
  assert count(normal[0]) < count(wide[0])
  assert narrow[2].shape == wide[2].shape == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_quarter_of_the_width_is_a_small_network(name):
  assert count(shapes(full_module(name, width=0.25))[0]) < SIZES[name][0] / 8


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in MODELS]
)
@pytest.mark.parametrize("norm", ["group", "frozen_batch"])
def test_every_parameter_is_covered_by_exact_clipping(name, norm):
  whole = norm == "group" or name not in LARGE
  module = full_module(name, norm=norm, dropout=0.1) if whole else small_module(name, norm)
  model = from_flax(module)
  inputs = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0), inputs)
  assert model.uncovered(params, state, inputs, 16) == {"book_keeping": (), "two_pass": ()}
