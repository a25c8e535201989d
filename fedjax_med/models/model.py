"""A Flax Linen module as plain functions, its convolutions and norms lowered for many clients.

Stock layers are computed by this package's operations through ``nn.intercept_methods``, so a user's
own Flax model works unchanged; everything outside ``models/`` sees only ``Model``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from jax import lax

from fedjax_med.models import coverage, gradients, ops, taps

Params = Any
State = dict[str, Any]
Records = dict[tuple[str, ...], gradients.Record]


class Call(NamedTuple):
  """One call of a layer or block.

  Attributes:
    path: names from the network's root to the module; () is the network itself.
    kind: name of the module's class.
    inputs: its first argument, None where it has none.
    outputs: its result.
  """

  path: tuple[str, ...]
  kind: str
  inputs: Any
  outputs: Any


class Model(NamedTuple):
  """A network as pure functions.

  A unit is one row of the batch or several consecutive ones; U units are B / U rows each.

  Attributes:
    init: (key, inputs [1, ...]) -> (params, state); state holds the collections that are not
      trained (stored statistics), {} where there are none.
    apply: (params, state, inputs [B, ...], *, key=None, train=False) -> (logits [B, classes], new
      state). ``key`` draws dropout; without training the state comes back as it went in. In
      training ``penalties`` columns follow the logits, each example's own additions to its loss.
    tapped_apply: (params, state, inputs [B, ...], taps [U], *, key=None) -> what ``apply`` returns
      in training [B, classes + penalties]. The cotangent of ``taps`` is the squared l2 norm of each
      unit's gradient of the parameters, provided that ``uncovered`` is empty. The state stays as it
      is.
    blank_records: (params, state, inputs [B, ...], units, *, key=None) -> zeros in the shape of the
      ``Record`` of every layer, by the layer's path.
    recorded_apply: (params, state, inputs [B, ...], blank records, units, *, key=None) -> the
      same. The cotangent of the blank records is each layer's ``Record``.
    uncovered: (params, state, inputs, rows) -> for clipping methods 'book_keeping' and 'two_pass',
      reasons not to trust them with batches of B = ``rows``, one phrase each, empty if they
      can. ``inputs`` needs a shape [any, ...] and a dtype only.
    watched_apply: (params, state, inputs [B, ...], watch) -> logits outside training. Every module
      is shown to ``watch`` when it is done, as a ``Call``, and ``watch(call)`` goes on in the place
      of its outputs.
    penalties: columns after the classes in training.

  Logits are float32, or float64 where the network computes so.
  """

  init: Callable[..., tuple[Params, State]]
  apply: Callable[..., tuple[jax.Array, State]]
  tapped_apply: Callable[..., jax.Array]
  blank_records: Callable[..., Records]
  recorded_apply: Callable[..., jax.Array]
  uncovered: Callable[..., dict[str, tuple[str, ...]]]
  watched_apply: Callable[..., jax.Array]
  penalties: int = 0


def from_flax(module: nn.Module, lowering: ops.Lowering = "matmul") -> Model:
  """Wraps a Linen module whose ``__call__`` takes inputs [B, ...] and returns logits [B, classes].

  ``train=`` is passed if ``__call__`` has such an argument; the random stream is 'dropout'.
  ``lowering`` says how convolutions run: 'matmul', 'native' or 'auto' (see ``ops.conv``). A module
  with an attribute ``penalties`` returns that many more columns in training (see ``Model``).
  """
  takes_train = "train" in inspect.signature(type(module).__call__).parameters
  network = _Network(module=module, lowering=lowering, takes_train=takes_train)
  return Model(
    init=functools.partial(_init, network),
    apply=functools.partial(_apply, network),
    tapped_apply=functools.partial(_tapped_apply, network),
    blank_records=functools.partial(_blank_records, network),
    recorded_apply=functools.partial(_recorded_apply, network),
    uncovered=functools.partial(_uncovered, network),
    watched_apply=functools.partial(_watched_apply, network),
    penalties=getattr(module, "penalties", 0),
  )


class _Network(NamedTuple):
  """A Linen module and how it is called.

  Attributes:
    module: the module.
    lowering: lowering of its convolutions.
    takes_train: whether its ``__call__`` has an argument ``train``.
  """

  module: nn.Module
  lowering: ops.Lowering
  takes_train: bool

  def train_argument(self, train: bool) -> dict[str, Any]:
    """``train`` as keyword arguments of the module; {} if it takes none."""
    return {"train": train} if self.takes_train else {}


def _init(network: _Network, key, inputs):
  keys = {"params": key, "dropout": jax.random.fold_in(key, 1)}
  variables = meta.unbox(network.module.init(keys, inputs, **network.train_argument(False)))
  state = {name: variables[name] for name in variables if name not in ("params", "intermediates")}
  return variables.get("params", {}), state


def _run(network: _Network, interceptor, params, state, inputs, *, key, train):
  """Calls the module with its methods intercepted; returns (logits, new state)."""
  rngs = {} if key is None else {"dropout": key}
  mutable = list(state) if train else []
  arguments = network.train_argument(train)
  with nn.intercept_methods(interceptor):
    logits, changed = network.module.apply(
      {"params": params, **state}, inputs, rngs=rngs, mutable=mutable, **arguments
    )
  logits = logits.astype(gradients.at_least_float32(logits.dtype))
  return logits, {**state, **changed}


def _train(network: _Network, call, params, state, inputs, key):
  """Outputs in training, with the known layers run by ``call``."""
  interceptor = _interceptor(call, network.lowering)
  return _run(network, interceptor, params, state, inputs, key=key, train=True)[0]


def _apply(network: _Network, params, state, inputs, *, key=None, train=False):
  interceptor = _interceptor(_plain, network.lowering)
  return _run(network, interceptor, params, state, inputs, key=key, train=train)


def _tapped_apply(network: _Network, params, state, inputs, norm_taps, *, key=None):
  def call(layer, layer_inputs, path):
    del path
    return taps.tapped(layer, layer_inputs, norm_taps)

  return _train(network, call, params, state, inputs, key)


def _blank_records(network: _Network, params, state, inputs, units, *, key=None):
  records = {}

  def call(layer, layer_inputs, path):
    outputs = layer.forward(layer.params, layer.constants, layer_inputs)
    records[path] = taps.blank_record(layer, layer_inputs, outputs, units)
    return outputs

  def shapes(params, state, inputs):
    return _train(network, call, params, state, inputs, key)

  jax.eval_shape(shapes, params, state, inputs)
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), records)


def _recorded_apply(network: _Network, params, state, inputs, blank, units, *, key=None):
  def call(layer, layer_inputs, path):
    return taps.recorded(layer, layer_inputs, blank[path], units)

  return _train(network, call, params, state, inputs, key)


def _uncovered(network: _Network, params, state, inputs, rows):
  names = set()

  def marked_apply(params, state, inputs, key):
    def call(layer, layer_inputs, path):
      names.update("/".join((*path, name)) for name in layer.params)
      return coverage.marked(layer, layer_inputs)

    return _train(network, call, params, state, inputs, key)

  findings = coverage.examine(marked_apply, params, state, inputs, rows)
  looped = [f"{name} runs layers in a loop" for name in findings.looped]
  elsewhere = [f"{name} has another path" for name in sorted(findings.parameters - names)]
  return {
    "book_keeping": (*findings.problems, *looped, *elsewhere),
    "two_pass": findings.problems,
  }


def _watched_apply(network: _Network, params, state, inputs, watch):
  lowered = _interceptor(_plain, network.lowering)

  def intercept(next_method, args, kwargs, context):
    outputs = lowered(next_method, args, kwargs, context)
    if context.method_name != "__call__":
      return outputs
    module = context.module
    return watch(
      Call(
        path=module.path,
        kind=type(module).__name__,
        inputs=args[0] if args else None,
        outputs=outputs,
      )
    )

  return _run(network, intercept, params, state, inputs, key=None, train=False)[0]


def _plain(layer: gradients.Layer, inputs: jax.Array, path: tuple[str, ...]) -> jax.Array:
  del path
  return layer.forward(layer.params, layer.constants, inputs)


def _interceptor(
  call: Callable[[gradients.Layer, jax.Array, tuple[str, ...]], jax.Array],
  lowering: ops.Lowering,
) -> Callable[..., Any]:
  """Runs the layers known here through ``call`` and leaves every other method alone."""

  def intercept(next_method, args, kwargs, context):
    module = context.module
    # The exact type: a subclass may compute something else.
    known = _LAYERS.get(type(module)) if context.method_name == "__call__" else None
    layer = known(module, lowering, *args, **kwargs) if known and args else None
    return next_method(*args, **kwargs) if layer is None else call(layer, args[0], module.path)

  return intercept


def _conv(module: nn.Conv, lowering: ops.Lowering, inputs: jax.Array) -> gradients.Layer | None:
  padding, batch_and_size = module.padding, inputs.shape[:-1]
  stock = (
    inputs.ndim != 4
    or isinstance(module.kernel_size, int)
    or len(module.kernel_size) != 2
    or _pair(module.input_dilation) != (1, 1)
    or (isinstance(padding, str) and padding not in ("SAME", "VALID"))
    or module.mask is not None
    or module.precision is not None
    or module.conv_general_dilated is not None
    or module.conv_general_dilated_cls is not None
    or _own_promotion(module)
  )
  params = _params(module, kernel=True, bias=module.use_bias)
  if stock or params is None:
    return None
  _, height, width = batch_and_size
  window, strides, dilation = map(
    _pair, (module.kernel_size, module.strides, module.kernel_dilation)
  )
  return gradients.conv_layer(
    params,
    strides=strides,
    padding=_pixels(padding, (height, width), window, strides, dilation),
    dilation=dilation,
    groups=module.feature_group_count,
    dtype=_result_dtype(module, inputs, params),
    lowering=lowering,
  )


def _dense(module: nn.Dense, lowering: ops.Lowering, inputs: jax.Array) -> gradients.Layer | None:
  del lowering
  params = _params(module, kernel=True, bias=module.use_bias)
  own_product = module.dot_general is not None or module.dot_general_cls is not None
  if params is None or inputs.ndim < 2 or own_product or _own_promotion(module):
    return None
  dtype = _result_dtype(module, inputs, params)
  return gradients.dense_layer(params, axes=1, dtype=dtype, precision=module.precision)


def _dense_general(
  module: nn.DenseGeneral, lowering: ops.Lowering, inputs: jax.Array
) -> gradients.Layer | None:
  del lowering
  params = _params(module, kernel=True, bias=module.use_bias)
  axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
  last = tuple(range(inputs.ndim - len(axes), inputs.ndim))
  stock = (
    tuple(axis % inputs.ndim for axis in axes) != last
    or len(axes) == inputs.ndim
    or bool(module.batch_dims)
    or module.dot_general is not None
    or module.dot_general_cls is not None
    or _own_promotion(module)
  )
  if params is None or stock:
    return None
  dtype = _result_dtype(module, inputs, params)
  return gradients.dense_layer(params, axes=len(axes), dtype=dtype, precision=module.precision)


def _group_norm(
  module: nn.GroupNorm, lowering: ops.Lowering, inputs: jax.Array, *, mask: Any = None
) -> gradients.Layer | None:
  del lowering
  params = _params(module, scale=module.use_scale, bias=module.use_bias)
  if params is None or inputs.ndim < 2 or mask is not None or _unusual_statistics(module):
    return None
  if module.reduction_axes is not None or (module.num_groups is None) == (
    module.group_size is None
  ):
    return None
  num_groups = module.num_groups or inputs.shape[-1] // (module.group_size or 1)
  dtype = _result_dtype(module, inputs, params)
  return gradients.group_norm_layer(
    params, num_groups=num_groups, epsilon=module.epsilon, dtype=dtype
  )


def _layer_norm(
  module: nn.LayerNorm, lowering: ops.Lowering, inputs: jax.Array, *, mask: Any = None
) -> gradients.Layer | None:
  del lowering
  params = _params(module, scale=module.use_scale, bias=module.use_bias)
  last = (-1, inputs.ndim - 1)
  other_axes = module.reduction_axes not in last or module.feature_axes not in last
  if params is None or inputs.ndim < 2 or mask is not None or other_axes:
    return None
  if _unusual_statistics(module):
    return None

  def normalise(constants, inputs):
    del constants
    inputs = _at_least_float32(inputs)
    mean = inputs.mean(-1, keepdims=True)
    variance = jnp.square(inputs).mean(-1, keepdims=True) - jnp.square(mean)
    return (inputs - mean) * lax.rsqrt(jnp.maximum(variance, 0) + module.epsilon)

  return gradients.norm_layer(params, (), normalise, dtype=_result_dtype(module, inputs, params))


def _frozen_batch_norm(
  module: nn.BatchNorm,
  lowering: ops.Lowering,
  inputs: jax.Array,
  use_running_average: bool | None = None,
  *,
  mask: Any = None,
) -> gradients.Layer | None:
  del lowering, mask  # stored statistics do not depend on the mask
  params = _params(module, scale=module.use_scale, bias=module.use_bias)
  frozen = _merged(module.use_running_average, use_running_average)
  mean, variance = (module.get_variable("batch_stats", name) for name in ("mean", "var"))
  other_axis = module.axis not in (-1, inputs.ndim - 1)
  if params is None or not frozen or mean is None or inputs.ndim < 2 or other_axis:
    return None
  if not module.force_float32_reductions:
    return None

  def normalise(constants, inputs):
    inputs = _at_least_float32(inputs)
    mean, inverse = (
      value.astype(inputs.dtype).reshape((1,) * (inputs.ndim - 1) + (-1,))
      for value in (constants[0], lax.rsqrt(constants[1] + module.epsilon))
    )
    return (inputs - mean) * inverse

  dtype = _result_dtype(module, inputs, params)
  return gradients.norm_layer(params, (mean, variance), normalise, dtype=dtype)


_LAYERS: dict[type, Callable[..., gradients.Layer | None]] = {
  nn.Conv: _conv,
  nn.Dense: _dense,
  nn.DenseGeneral: _dense_general,
  nn.GroupNorm: _group_norm,
  nn.LayerNorm: _layer_norm,
  nn.BatchNorm: _frozen_batch_norm,
}


def _params(module: nn.Module, **used: bool) -> gradients.Params | None:
  """The named parameters of a bound layer, or None if one is missing (the stock layer says so)."""
  params = {name: module.get_variable("params", name) for name, use in used.items() if use}
  return None if any(value is None for value in params.values()) else meta.unbox(params)


def _result_dtype(module: Any, inputs: jax.Array, params: gradients.Params) -> Any:
  """Flax's rule: the layer's dtype, else what inputs and parameters promote to."""
  if module.dtype is not None:
    return module.dtype
  dtype = inputs.dtype
  for value in params.values():
    dtype = np.promote_types(dtype, value.dtype)
  return dtype


def _merged(attribute: bool | None, argument: bool | None) -> bool:
  """Whether a choice made at construction or at the call is true (Flax refuses both or neither)."""
  return bool(argument if attribute is None else attribute)


def _own_promotion(module: Any) -> bool:
  return module.promote_dtype is not type(module).promote_dtype


def _unusual_statistics(module: Any) -> bool:
  return not (
    module.axis_name is None and module.use_fast_variance and module.force_float32_reductions
  )


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(gradients.at_least_float32(x.dtype))


def _pair(value: Any) -> ops.Pair:
  """Flax's spelling of two numbers: a pair, one number for both, or None for 1."""
  if value is None or isinstance(value, int):
    value = (1, 1) if value is None else (value, value)
  first, second = value
  return first, second


def _pixels(
  padding: Any, size: ops.Pair, window: ops.Pair, strides: ops.Pair, dilation: ops.Pair
) -> ops.Padding:
  """Flax's spelling of padding as (before, after) pixels of both dimensions."""
  if isinstance(padding, str):
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    sides = lax.padtype_to_pads(size, reach, strides, padding)
  else:
    sides = (padding, padding) if isinstance(padding, int) else padding
  first, second = map(_pair, sides)
  return first, second
