"""FedXNet's attention and penalties against NumPy loops; each penalty is of one image alone."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.models import grad_cam
from fedjax_med.models.networks.fedxnet import (
  CHARBONNIER,
  TEMPERATURE,
  WINDOW,
  contrastive_penalty,
  edge_penalty,
  halved,
  num_heads,
  perceptual_penalty,
  relative_offsets,
  sobel,
  window_attention,
)
from fedjax_med.models.registry import create_model
from fedjax_med.privacy.clipping import Rows, clipped_sum
from tests.models.networks import CLASSES, IMAGES, INPUTS, MASK, TARGETS, loss, network
from tests.privacy.clipping_cases import norms_of, quick_jit

RNG = np.random.default_rng(3)


def summed(penalty):
  """Jitted: (predicted, features) -> the penalty of each image, both gradients of their sum."""

  def total(*arrays):
    values = penalty(*arrays)
    return values.sum(), values

  def run(*arrays):
    slopes, values = jax.grad(total, (0, 1), has_aux=True)(*arrays)
    return values, slopes

  return quick_jit(run)


def attended(values, table, shift):
  """Position by position: softmax over the keys of its window, which is cut off at the edges."""
  batch, height, width, channels = values.shape
  heads = table.shape[1]
  split = values.reshape(batch, height, width, 3, heads, channels // (3 * heads))
  out = np.zeros((batch, height, width, heads, split.shape[-1]))
  row_shift, column_shift = (shift if side > WINDOW else 0 for side in (height, width))

  def window(y, x):
    return (y - row_shift) // WINDOW, (x - column_shift) // WINDOW

  places = list(itertools.product(range(height), range(width)))
  for (y, x), image, head in itertools.product(places, range(batch), range(heads)):
    keys = [place for place in places if window(*place) == window(y, x)]
    query = split[image, y, x, 0, head] / math.sqrt(split.shape[-1])
    scores = []
    for row, column in keys:
      offset = (y - row + WINDOW - 1) * (2 * WINDOW - 1) + x - column + WINDOW - 1
      scores.append(query @ split[image, row, column, 1, head] + table[offset, head])
    weights = np.exp(np.array(scores) - max(scores))
    seen = np.array([split[image, row, column, 2, head] for row, column in keys])
    out[image, y, x, head] = weights @ seen / weights.sum()
  return out.reshape(batch, height, width, -1)


@pytest.mark.parametrize(
  ("size", "shift"),
  [((8, 8), 0), ((8, 8), 2), ((6, 9), 0), ((6, 9), 2), ((4, 3), 2), ((5, 4), 2), ((1, 1), 2)],
)
def test_attention_is_inside_shifted_windows_with_a_relative_bias(size, shift):
  values = RNG.normal(size=(2, *size, 12)).astype(np.float32)
  table = RNG.normal(size=((2 * WINDOW - 1) ** 2, 2)).astype(np.float32)
  bias = np.broadcast_to(relative_offsets() @ table, (2, WINDOW**4, 2))
  got = quick_jit(window_attention, static_argnums=2)(values, bias, shift)
  np.testing.assert_allclose(got, attended(values, table, shift), rtol=0, atol=1e-5)


def test_heads_divide_the_features():
  found = {features: num_heads(features) for features in (8, 16, 24, 32, 56, 64, 128)}
  assert found == {8: 1, 16: 1, 24: 1, 32: 2, 56: 2, 64: 4, 128: 8}


def test_sobel_is_the_slope_of_a_ramp_and_the_loop_of_its_masks():
  y, x = np.mgrid[:5, :6].astype(np.float32)
  ramp = np.broadcast_to((3 * y + 4 * x)[None, :, :, None], (1, 5, 6, 3))
  images = np.concatenate([ramp, RNG.normal(size=(1, 5, 6, 3))]).astype(np.float32)
  got = quick_jit(sobel)(images)
  np.testing.assert_allclose(got[0, 1:-1, 1:-1, 0], 5, rtol=1e-6)
  grey = np.pad(images.mean(3), ((0, 0), (1, 1), (1, 1)), mode="edge")
  mask = np.outer([1, 2, 1], [-1, 0, 1]) / 8
  want = np.zeros((2, 5, 6, 1))
  for image, row, column in itertools.product(range(2), range(5), range(6)):
    seen = grey[image, row : row + 3, column : column + 3]
    want[image, row, column] = np.hypot((mask * seen).sum(), (mask.T * seen).sum())
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_halves_are_means_and_a_last_odd_row_counts_twice(size):
  x = RNG.normal(size=(1, *size, 2)).astype(np.float32)
  even = np.pad(x, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
  want = even.reshape(1, even.shape[1] // 2, 2, even.shape[2] // 2, 2, 2).mean((2, 4))
  np.testing.assert_allclose(quick_jit(halved)(x), want, rtol=1e-5, atol=1e-6)


def test_the_edge_penalty_is_charbonnier_s():
  predicted, edges = RNG.normal(size=(2, 2, 3, 4, 1)).astype(np.float32)
  want = np.sqrt((predicted - edges) ** 2 + CHARBONNIER**2).mean((1, 2, 3))
  np.testing.assert_allclose(edge_penalty(predicted, edges), want, rtol=1e-5)


def test_the_perceptual_penalty_compares_with_standardised_features_that_stay():
  predicted, features = RNG.normal(size=(2, 2, 3, 4, 8)).astype(np.float32)
  centred = features - features.mean(3, keepdims=True)
  target = centred / np.sqrt((centred**2).mean(3, keepdims=True) + 1e-5)
  want = ((predicted - target) ** 2).mean((1, 2, 3))
  value, slopes = summed(perceptual_penalty)(predicted, features)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert np.abs(slopes[0]).max() > 0
  assert not slopes[1].any()


def test_the_contrastive_penalty_finds_a_place_among_those_of_its_image():
  deep, shallow = RNG.normal(size=(2, 2, 3, 2, 5)).astype(np.float32)
  want = []
  for image in range(2):
    ours, theirs = (x[image].reshape(6, 5).astype(np.float64) for x in (deep, shallow))
    ours, theirs = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs))
    scores = ours @ theirs.T / TEMPERATURE
    missed = [np.log(np.exp(scores[i]).sum()) - scores[i, i] for i in range(6)]
    want.append(np.mean(missed) / np.log(6))
  np.testing.assert_allclose(quick_jit(contrastive_penalty)(deep, shallow), want, rtol=1e-5)


def test_contrast_costs_nothing_at_one_place_and_a_blind_guess_costs_one():
  one = jnp.asarray(RNG.normal(size=(2, 1, 1, 3)), jnp.float32)
  blind = jnp.zeros((2, 2, 2, 3))
  for x, cost in ((one, 0), (blind, 1)):
    value, slopes = summed(contrastive_penalty)(x, x)
    np.testing.assert_allclose(value, cost, rtol=1e-6)
    assert all(np.isfinite(slope).all() for slope in slopes)


def trained(dtype="float32"):
  """Jitted: (params, images) -> columns of a training pass."""
  model = network("fedxnet", dtype=dtype).model
  return quick_jit(lambda params, images: model.apply(params, {}, images, train=True)[0])


@pytest.mark.slow
def test_penalties_are_columns_of_a_training_pass_and_of_one_image_each():
  found = network("fedxnet")
  columns = trained()(found.params, IMAGES)
  assert columns.shape == (4, CLASSES + 3)
  assert columns.dtype == jnp.float32
  assert (columns[:, CLASSES:] > 0).all()
  logits = quick_jit(lambda params: found.model.apply(params, {}, IMAGES)[0])(found.params)
  np.testing.assert_allclose(columns[:, :CLASSES], logits, rtol=0, atol=1e-5)
  others = trained()(found.params, np.concatenate([100 * IMAGES[:1] + 7, IMAGES[1:]]))
  assert np.abs(others[0] - columns[0]).min() > 1e-4
  np.testing.assert_allclose(others[1:], columns[1:], rtol=0, atol=1e-6)
  rounded = trained("bfloat16")(found.params, IMAGES)
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, columns, atol=0.05 * np.abs(columns).max())


@pytest.mark.slow
def test_penalties_move_every_head_and_blank_images_clip_to_finite_sums():
  found = network("fedxnet")

  def run(inputs):
    rows = Rows(inputs, TARGETS[0], MASK[0])
    arguments = (found.params, {}, rows, jnp.float32(1e6), None)
    return clipped_sum("book_keeping", found.model, loss, *arguments)[0]

  run = quick_jit(run)
  gradient = run(INPUTS[0])
  for name in ("edge", "perceptual", "contrastive_deep", "contrastive_shallow"):
    assert np.abs(gradient[name]["kernel"]).max() > 0, name
  assert np.isfinite(norms_of([run(np.zeros_like(INPUTS[0]))])).all()


@pytest.mark.parametrize(
  ("side", "name", "map_side"), [(32, "norm", 4), (64, "norm", 8), (17, "stage2", 5)]
)
def test_grad_cam_finds_a_map_of_the_classifier_and_no_head_of_a_penalty(side, name, map_side):
  model = create_model(ModelConfig(name="fedxnet", width=0.25), 2)
  images = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0), images)
  layers = grad_cam.find_layers(model, params, state, images)
  assert not {"edge", "perceptual", "contrastive_deep"} & {layer.name for layer in layers}
  assert {"stage1", "stage2", "stage3", "norm"} <= {layer.name for layer in layers}
  chosen = grad_cam.choose_layer(layers)
  assert (chosen.name, min(chosen.shape[:2])) == (name, map_side)
