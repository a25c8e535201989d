"""Grad-CAM against its derivation, gates against their formula, the choice of a layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.models import grad_cam
from fedjax_med.models.grad_cam import MapLayer
from fedjax_med.models.model import from_flax
from fedjax_med.models.networks.se_resnext import SqueezeExcite
from fedjax_med.models.registry import create_model

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)
TARGET = jnp.asarray([1, 0, 1])


class Averaged(nn.Module):
  """A map, its mean over space, a dense head: Grad-CAM is CAM here."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), strides=(2, 2), name="features")(x)
    return nn.Dense(2, name="head")(x.mean((1, 2)))


class Gates(nn.Module):
  """One squeeze-and-excitation block."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3), name="conv")(x)
    x = SqueezeExcite(2, jnp.float32, name="gate")(x)
    return nn.Dense(2)(x.mean((1, 2)))


class Twice(nn.Module):
  """A layer that is called twice, and a map of one position behind it."""

  @nn.compact
  def __call__(self, x):
    conv = nn.Conv(1, (3, 3), name="shared")
    x = conv(nn.tanh(conv(x)))
    x = nn.Conv(3, (8, 8), padding="VALID", name="whole")(x)
    return x[:, 0, 0, :]


class Turn(nn.Module):
  """One turn of a loop."""

  @nn.compact
  def __call__(self, x, _):
    return nn.relu(nn.Conv(2, (3, 3), name="inside")(x)), None


class Looped(nn.Module):
  """A layer, then two that are scanned."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(2, (3, 3), name="before")(x)
    turns = nn.scan(Turn, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    x, _ = turns(name="turns")(x, None)
    return x.mean((1, 2))


def made(module):
  return initial(from_flax(module))


def initial(model):
  """The model with random weights; NumPy's, for an init takes seconds to compile."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(model.init, base_key(0), IMAGES[:1])
  fill = lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype)  # noqa: E731
  return model, *jax.tree.map(fill, shapes)


def heat(model, params, state, layer):
  run = jax.jit(lambda p, s, x, t: grad_cam.grad_cam(model, p, s, x, t, layer))
  return run(params, state, IMAGES, TARGET)


def layer_of(model, params, state, name=""):
  return grad_cam.choose_layer(grad_cam.find_layers(model, params, state, IMAGES), name)


def test_under_a_mean_and_a_dense_head_it_is_cam():
  model, params, state = made(Averaged())
  layer = layer_of(model, params, state)
  assert layer == MapLayer("features", 1, "Conv", (4, 4, 4))
  maps = heat(model, params, state, layer)
  # Selvaraju et al. 2017, section 3.1: the gradient of a logit is its head weight, over H' W'.
  padded = np.pad(np.asarray(IMAGES, np.float64), ((0, 0), (0, 1), (0, 1), (0, 0)))
  kernel = np.asarray(params["features"]["kernel"], np.float64)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
  features = np.einsum("byxcij,ijck->byxk", windows, kernel) + np.asarray(
    params["features"]["bias"]
  )
  head = np.asarray(params["head"]["kernel"], np.float64)[:, np.asarray(TARGET)].T
  expected = np.maximum(np.einsum("byxk,bk->byx", features, head) / 16, 0)
  assert expected.max() > 0
  np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)


def test_it_is_the_gradient_through_the_rest_of_the_network():
  model, params, state = initial(create_model(ModelConfig(name="cnn_small"), 2))
  layer = layer_of(model, params, state)
  assert layer.name == "norm2"

  def first(params, x):
    for k in (1, 2):
      # Stock Flax, not this package's lowering.
      conv = nn.Conv(16 * k, (3, 3), use_bias=False)
      x = conv.apply({"params": params[f"conv{k}"]}, x if k == 1 else pooled(x))
      x = nn.GroupNorm(num_groups=8 * k, epsilon=1e-5).apply({"params": params[f"norm{k}"]}, x)
    return x

  def pooled(x):
    return nn.max_pool(nn.relu(x), (2, 2), (2, 2))

  def last(features, head, target):
    return (pooled(features[None]).mean((1, 2)) @ head["kernel"] + head["bias"][None])[0, target]

  @jax.jit
  def derived(params):
    features = first(params, IMAGES)
    gradients = jax.vmap(jax.grad(last), (0, None, 0))(features, params["head"], TARGET)
    return features, gradients

  maps = heat(model, params, state, layer)
  assert maps.dtype == jnp.float32
  features, gradients = map(np.asarray, derived(params))
  for found, own, gradient in zip(maps, features, gradients, strict=True):
    expected = np.maximum(own @ gradient.mean((0, 1)), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_last_call_of_a_shared_layer_counts():
  model, params, state = made(Twice())
  layer = layer_of(model, params, state)
  assert (layer.name, layer.calls) == ("shared", 2)
  maps = heat(model, params, state, layer)

  @jax.jit
  def twice(params):
    conv = from_flax(nn.Conv(1, (3, 3))).apply
    return conv(params, {}, jnp.tanh(conv(params, {}, IMAGES)[0]))[0]

  features = np.asarray(twice(params["shared"]))
  kernel = np.asarray(params["whole"]["kernel"])[:, :, 0, :]  # the rest of the network is linear
  for image in range(3):
    weight = kernel[:, :, int(TARGET[image])].mean()
    expected = np.maximum(weight * features[image, :, :, 0], 0)
    np.testing.assert_allclose(maps[image], expected, rtol=1e-4, atol=1e-6)


def test_a_layer_inside_a_loop_is_an_error_and_no_map():
  model, params, state = made(Looped())
  inside, before = (layer_of(model, params, state, name) for name in ("", "before"))
  assert inside.name == "turns/inside"
  with pytest.raises(jax.errors.UnexpectedTracerError):
    heat(model, params, state, inside)
  assert heat(model, params, state, before).shape == (3, 8, 8)


def test_gates_are_the_sigmoid_of_their_formula():
  model, params, state = made(Gates())

  @jax.jit
  def run(params, state):
    conv = nn.Conv(6, (3, 3)).apply({"params": params["conv"]}, IMAGES)
    return grad_cam.gated(model, params, state, IMAGES), conv

  by_name, x = jax.device_get(run(params, state))
  (found,) = by_name.values()
  dense = {
    name: {k: np.asarray(v) for k, v in params["gate"][name].items()} for name in params["gate"]
  }
  squeezed = np.maximum(x.mean((1, 2)) @ dense["squeeze"]["kernel"] + dense["squeeze"]["bias"], 0)
  excited = squeezed @ dense["excite"]["kernel"] + dense["excite"]["bias"]
  gates = 1 / (1 + np.exp(-excited))
  np.testing.assert_allclose(found.gates, gates, rtol=1e-4)
  expected = np.abs(x * gates[:, None, None]).mean(-1)
  np.testing.assert_allclose(found.activation, expected, rtol=1e-4, atol=1e-6)


def layers(*shapes):
  return [MapLayer(name, 1, "Conv", (side, side, 8)) for name, side in shapes]


def test_the_outermost_map_of_enough_positions_is_chosen():
  found = layers(
    ("stem", 16), ("stage1/conv", 8), ("stage1", 8), ("stage2/conv1", 8), ("stage2/conv2", 2),
    ("stage2", 2), ("stage3", 1),
  )  # fmt: skip
  assert grad_cam.choose_layer(found).name == "stage1"  # not the inside of stage2
  assert grad_cam.choose_layer(found[4:]).name == "stage2"
  assert grad_cam.choose_layer(found, "stage2/conv1").name == "stage2/conv1"


def test_the_inside_of_an_encoder_that_returns_a_vector_is_seen():
  assert grad_cam.choose_layer(layers(("stem", 8), ("encoder/a", 8), ("encoder/b", 4))).name == (
    "encoder/b"
  )


def test_a_network_without_a_map_and_an_unknown_layer_are_refused():
  model, params, state = initial(create_model(ModelConfig(name="mlp"), 2))
  found = grad_cam.find_layers(model, params, state, IMAGES)
  with pytest.raises(UserError, match=r"no layer that returns a map .*; train a convolutional"):
    grad_cam.choose_layer(found)
  with pytest.raises(
    UserError, match="--layer=stag1 is no layer with a map; did you mean 'stage1'"
  ):
    grad_cam.choose_layer(layers(("stage1", 4)), "stag1")
