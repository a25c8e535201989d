"""Grad-CAM at one of a network's maps, and the gates of squeeze-and-excitation.

All of it works on any ``Model``: layers are found by what they return, not by what they are called.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.errors import UserError, nearest
from fedjax_med.models.model import Call, Model, Params, State

# A map of fewer positions a side than this says no more than the quarter of the image.
LEAST_SIDE = 4


class MapLayer(NamedTuple):
  """A layer or block that returns a map.

  Attributes:
    name: its path, such as 'stage2_block1' or 'encoder/norm3'.
    calls: number of its calls for one image; the last one counts.
    kind: name of its class.
    shape: (H', W', C') of what it returns.
  """

  name: str
  calls: int
  kind: str
  shape: tuple[int, int, int]


class Gated(NamedTuple):
  """A squeeze-and-excitation block at work.

  Attributes:
    gates: [B, C] float32 factors of the channels, NaN for a channel that is 0 everywhere.
    activation: [B, H', W'] float32 mean over channels of the gated map's absolute values.
  """

  gates: Any
  activation: Any


def find_layers(model: Model, params: Params, state: State, inputs: Any) -> list[MapLayer]:
  """Every layer that returns a map [B, H', W', C'], in the order in which they are done.

  ``inputs`` [B, H, W, C] needs a shape and a dtype only; nothing is computed.
  """
  layers: dict[str, MapLayer] = {}

  def watch(call: Call) -> Any:
    name, out = "/".join(call.path), call.outputs
    if isinstance(out, jax.Array) and out.ndim == 4 and out.shape[0] == inputs.shape[0]:
      _, height, width, channels = out.shape
      calls = layers.pop(name).calls if name in layers else 0
      layers[name] = MapLayer(
        name=name, calls=calls + 1, kind=call.kind, shape=(height, width, channels)
      )
    return out

  jax.eval_shape(lambda *a: model.watched_apply(*a, watch), params, state, inputs)
  return [layer for layer in layers.values() if layer.name]  # '' is the network itself


def choose_layer(layers: list[MapLayer], name: str = "") -> MapLayer:
  """The layer of that name, or without one the last whose map tells places of an image apart.

  That is the last map of at least ``LEAST_SIDE`` positions a side, or failing that of more than
  one, among the outermost blocks: the output of a residual block, unlike that of a layer inside
  it, holds all that later layers see.

  Raises:
    UserError: there is no such layer, or none that has a map.
  """
  maps = {layer.name: layer for layer in layers if layer.shape[0] * layer.shape[1] > 1}
  if not maps:
    raise UserError(
      "the network has no layer that returns a map of more than one position (an MLP or a linear"
      " model sees pixels without a place), so Grad-CAM has nothing to show; train a convolutional"
      " network such as model.name=cnn_small"
    )
  if name:
    if name not in maps:
      raise UserError(f"--layer={name} is no layer with a map; {nearest(name, maps)}")
    return maps[name]
  # Outermost among all that return four axes: a block whose own map has one position hides its
  # inner layers too, for they are not all that goes on.
  names = [layer.name for layer in layers]
  outer = [
    layer
    for layer in maps.values()
    if not any(layer.name.startswith(f"{other}/") for other in names)
  ]
  large = [layer for layer in outer if min(layer.shape[:2]) >= LEAST_SIDE]
  return (large or outer or list(maps.values()))[-1]


def grad_cam(
  model: Model,
  params: Params,
  state: State,
  inputs: jax.Array,  # [B, H, W, C] float
  target: jax.Array,  # [B] integer class numbers
  layer: MapLayer,
) -> jax.Array:  # [B, H', W'] float32, at least 0
  """Gradient-weighted class activation map (Selvaraju et al. 2017, equations 1 and 2).

  The weight of a channel is the mean over positions of the gradient of the target's logit, and the
  map the positive part of the weighted sum of channels. Images do not see each other. The map of a
  layer inside a loop (``nn.scan``) does not leave it: jit raises UnexpectedTracerError.
  """

  def score(shift):
    kept = {}

    def watch(call: Call) -> Any:
      if "/".join(call.path) != layer.name:
        return call.outputs
      kept["calls"] = kept.get("calls", 0) + 1
      if kept["calls"] < layer.calls:
        return call.outputs
      kept["map"] = call.outputs
      return call.outputs + shift.astype(call.outputs.dtype)

    logits = model.watched_apply(params, state, inputs, watch)
    # The sum: a logit depends on its own image only, so each image gets its own gradient.
    chosen = jnp.take_along_axis(logits, target[:, None].astype(jnp.int32), axis=1)
    return chosen.sum(), kept["map"]

  shift = jnp.zeros((inputs.shape[0], *layer.shape), jnp.float32)
  gradient, features = jax.grad(score, has_aux=True)(shift)
  weights = gradient.mean(axis=(1, 2), keepdims=True)  # equation 1
  return jax.nn.relu((weights * features.astype(jnp.float32)).sum(-1))  # equation 2


def is_gate(layer: MapLayer) -> bool:
  """Whether a layer is a squeeze-and-excitation block, by the name of its class."""
  return "squeezeexcit" in layer.kind.lower()


def gated(
  model: Model,
  params: Params,
  state: State,
  inputs: jax.Array,  # [B, H, W, C] float
) -> dict[str, Gated]:
  """Every squeeze-and-excitation block (Hu et al. 2018) at work, by name, in order; {} if none.

  A block returns its input times a factor for each channel; the factor is read off as the least
  squares one, which is exact for a block that does just that.
  """
  blocks: dict[str, Gated] = {}

  def watch(call: Call) -> Any:
    x, y = call.inputs, call.outputs
    like = MapLayer(name="/".join(call.path), calls=1, kind=call.kind, shape=(0, 0, 0))
    if is_gate(like) and isinstance(y, jax.Array) and y.ndim == 4 and x.shape == y.shape:
      a, b = x.astype(jnp.float32), y.astype(jnp.float32)
      gates = (a * b).sum((1, 2)) / jnp.square(a).sum((1, 2))  # 0 / 0 is NaN
      blocks[like.name] = Gated(gates, jnp.abs(b).mean(-1))
    return y

  model.watched_apply(params, state, inputs, watch)
  return blocks
