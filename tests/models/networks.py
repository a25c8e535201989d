"""Every registered network at a size that tests can afford, and what it is fed."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.models.model import Model, from_flax
from fedjax_med.models.ops import Lowering
from fedjax_med.models.registry import MODELS, create_module
from tests.privacy.clipping_cases import quick_jit

CLASSES, SIDE = 3, 16
IMAGES = np.random.default_rng(0).normal(size=(4, SIDE, SIDE, 1)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1], np.int32)

# name: (width, attributes cut down to one stage or block of each kind, every kind of layer kept);
# compiling the whole networks would take minutes each.
LARGE: dict[str, tuple[float, Any]] = {
  # 1 and 2 channels a group
  "se_resnext50_32x4d": (0.25, lambda m: _two_stages(m)),
  "resnext50_32x4d": (0.25, lambda m: _two_stages(m)),
  "resnet50": (0.125, lambda m: _two_stages(m)),
  "vgg16": (0.125, lambda m: {"stages": m.stages[:2]}),
  "googlenet": (0.125, lambda m: {"stages": (m.stages[0][:1],)}),
  "densenet121": (0.25, lambda m: {"stage_layers": (2, 1)}),
  # a block that does not expand, and strided and residual ones
  "mobilenet_v2": (0.5, lambda m: {"stages": (m.stages[0], m.stages[1])}),
  "efficientnet_b0": (0.5, lambda m: {"stages": (m.stages[0], m.stages[2])}),
  "efficientnet_b0_texture": (0.5, lambda m: {"stages": (m.stages[2],)}),
  # four windows and one, so that one pair of blocks is shifted
  "fedxnet": (0.25, lambda m: {"features": m.features[:2]}),
}
# The same blocks as micro has, only more of them.
SLOW = {*LARGE, "se_resnext_tiny"}
every_model = pytest.mark.parametrize(
  "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS]
)


def _two_stages(module: Any) -> dict[str, Any]:
  widths, features = module.widths[:2], module.features[:2]
  return {"stage_blocks": (2, 1), "widths": widths, "features": features}


class Network(NamedTuple):
  """A network with NumPy's weights, which spares compiling its initialisation."""

  module: nn.Module
  model: Model
  params: Any
  state: Any


@functools.cache
def small_module(name: str, norm: str = "group", dtype: str = "float32") -> nn.Module:
  """The network as the registry makes it, narrowed and cut down where it is large."""
  width, cut = LARGE.get(name, (1.0, lambda m: {}))
  module = create_module(ModelConfig(name=name, norm=norm, dtype=dtype, width=width), CLASSES)
  return module.clone(**cut(module))


@functools.cache
def network(
  name: str, seed: int = 1, *, lowering: Lowering = "matmul", norm="group", dtype="float32"
) -> Network:
  """``small_module`` as plain functions; equal seeds are equal weights."""
  model = from_flax(small_module(name, norm, dtype), lowering)
  shapes = from_flax(small_module(name, norm))  # stock layers refuse bfloat16 at first
  params, state = jax.eval_shape(shapes.init, jax.random.key(0), jnp.asarray(IMAGES[:1]))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    kind = path[-1].key
    spread = math.prod(leaf.shape[:-1]) ** -0.5 if kind == "kernel" else 0.1
    values = rng.normal(float(kind in ("scale", "var")), spread, leaf.shape)
    return values.astype(leaf.dtype)

  params, state = (jax.tree_util.tree_map_with_path(draw, tree) for tree in (params, state))
  return Network(small_module(name, norm, dtype), model, params, state)


def shapes(module: nn.Module, *, side: int = SIDE, channels: int = 1) -> tuple[Any, Any, Any]:
  """Shapes of parameters, state and logits of one image, without running the network."""
  images = jnp.zeros((1, side, side, channels))

  def start(images):
    logits, variables = module.init_with_output(jax.random.key(0), images)
    return variables.pop("params"), variables, logits

  return jax.eval_shape(start, images)


def count(tree: Any) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def full_module(name: str, classes: int = CLASSES, **config: Any) -> nn.Module:
  return create_module(ModelConfig(name=name, **config), classes)


def loss(outputs, labels):
  """Cross-entropy of the classes, plus the penalties that some networks return after them."""
  cost = optax.softmax_cross_entropy_with_integer_labels(outputs[:, :CLASSES], labels)
  return cost + outputs[:, CLASSES:].sum(1)


# Every client has other weights, other images in another order, another example outside its mask.
CLIENTS = 2
INPUTS = np.stack([IMAGES, -IMAGES[::-1]])
TARGETS = np.stack([LABELS, LABELS[::-1]])
MASK = np.array([[True, True, False, True], [True, False, True, True]])


def of_client(name: str, client: int) -> Network:
  return network(name, client + 1)


@functools.cache
def gradients_of(name: str, client: int) -> list[Any]:
  """Gradient of each example in the mask by stock Flax and vmap(grad), computed in float64."""
  module, _, params, state = of_client(name, client)

  def value(params, image, label):
    outputs: Any = module.apply({"params": params, **state}, image[None], train=True)
    return loss(outputs, label[None])[0]

  rows = MASK[client]
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    module = module.clone(dtype=jnp.float64)
    params, state = jax.tree.map(lambda leaf: leaf.astype(np.float64), (params, state))
    inputs = INPUTS[client, rows].astype(np.float64)
    run = quick_jit(jax.vmap(jax.grad(value), (None, 0, 0)))
    stacked = jax.device_get(run(params, inputs, TARGETS[client, rows]))
  return [jax.tree.map(lambda leaf, i=i: np.float64(leaf[i]), stacked) for i in range(rows.sum())]
