"""Layers as plain functions that know the gradient of each privacy unit, cheaply.

A unit is one or more consecutive rows of the batch (an image; all images of a patient). A layer
keeps of each unit either its gradient, or the two factors whose product it is, whichever
costs less; norms and weighted sums follow from either (Goodfellow 2015; Li et al. 2022; Bu et al.
2023, "book-keeping"; here also for grouped convolutions, group by group).

Shapes: B rows, U units of B / U rows, T positions of a unit (rows times output positions), G
groups, d = kh kw C_in / G inputs and p = C_out / G outputs of a group at one position.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_med.core.rounding import NORM_SLACK
from fedjax_med.models import ops
from fedjax_med.models.group_norm import group_norm, group_norm_scale_gradients

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
  """The gradient of a kernel as the factors of its product.

  Attributes:
    inputs: [B, H, W, C_in] inputs of the layer.
    cotangent: [B, H', W', C_out] cotangent of its outputs.
    units: U; B / U consecutive rows are one unit.
    geometry: strides, padding and dilation of the kernel.
    shape: shape of the kernel.
    lowering: lowering of its products.
  """

  inputs: jax.Array
  cotangent: jax.Array
  units: int = dataclasses.field(metadata={"static": True})
  geometry: ops.Geometry = dataclasses.field(metadata={"static": True})
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
  lowering: ops.Lowering = dataclasses.field(metadata={"static": True})


# By parameter name: the gradient of every unit [U, *shape of the parameter], or its factors.
Record = dict[str, jax.Array | Factors]


class Layer(NamedTuple):
  """One call of a layer, as plain functions of its arrays.

  Attributes:
    params: trainable arrays by name.
    constants: other arrays the layer reads (stored statistics).
    forward: (params, constants, inputs [B, ...]) -> outputs [B, ...].
    record: (params, constants, inputs, cotangent of outputs, units) -> Record.
    total: (params, constants, inputs, cotangent of outputs) -> gradient of the params summed over
      rows, in which a row whose factors are zero or not finite counts exactly 0.
  """

  params: Params
  constants: tuple[jax.Array, ...]
  forward: Callable[..., jax.Array]
  record: Callable[..., Record]
  total: Callable[..., Params]


def sq_norms(record: Record) -> jax.Array:  # [U]
  """Squared norm of each unit's gradient; one that is not finite stays visible.

  In float32 ``weighted_sum`` of one unit has a norm of at most its weight times the square root of
  this times 1 + NORM_SLACK, whatever the numbers (about 1e-6 in place of NORM_SLACK where positions
  do not cancel), down to norms of 1e-12.
  """
  return functools.reduce(jnp.add, map(_sq_norms, record.values()))


def weighted_sum(record: Record, weights: jax.Array) -> Params:  # weights [U], at least 0
  """Sum over units of weight times gradient; a weight of 0 adds exactly 0, whatever it is of."""
  return {name: _weighted_sum(entry, weights) for name, entry in record.items()}


def conv_layer(
  params: Params,  # kernel [kh, kw, c, C_out], bias [C_out] or absent
  *,
  strides: ops.Pair,
  padding: ops.Padding,
  dilation: ops.Pair,
  groups: int,
  dtype: Any,
  lowering: ops.Lowering,
) -> Layer:
  """Convolution of [B, H, W, C_in] computed in ``dtype``."""
  shape = params["kernel"].shape
  geometry = ops.Geometry(
    window=(shape[0], shape[1]), strides=strides, padding=padding, dilation=dilation, groups=groups
  )

  def run(inputs, kernel):
    return ops.conv(
      inputs,
      kernel,
      strides=strides,
      padding=padding,
      dilation=dilation,
      groups=groups,
      lowering=lowering,
    )

  def forward(params, constants, inputs):
    del constants
    outputs = run(inputs.astype(dtype), params["kernel"].astype(dtype))
    return _add_bias(outputs, params, dtype)

  def record(params, constants, inputs, cotangent, units):
    del constants
    kernel = _kernel_record(inputs.astype(dtype), cotangent, units, geometry, shape, lowering)
    return {"kernel": kernel} | _bias_record(params, cotangent, units)

  def total(params, constants, inputs, cotangent):
    del constants
    inputs, cotangent = _finite_float32(inputs.astype(dtype), cotangent)
    if lowering == "native":
      kernel = params["kernel"].astype(inputs.dtype)
      (gradient,) = jax.vjp(lambda k: run(inputs, k), kernel)[1](cotangent)
    else:
      gradient = ops.conv_gradients(inputs, cotangent, geometry, units=1, lowering=lowering)[0]
    return _cast({"kernel": gradient} | _bias_total(params, cotangent), params)

  return Layer(params=params, constants=(), forward=forward, record=record, total=total)


def dense_layer(
  params: Params,  # kernel [*inputs' last axes, *features], bias [*features] or absent
  *,
  axes: int,
  dtype: Any,
  precision: Any,
) -> Layer:
  """Product of the last ``axes`` axes of [B, ...] with the kernel, computed in ``dtype``."""
  shape = params["kernel"].shape
  fan_in, features = math.prod(shape[:axes]), shape[axes:]
  fan_out = math.prod(features)

  def forward(params, constants, inputs):
    del constants
    kernel = params["kernel"].astype(dtype).reshape(fan_in, fan_out)
    rows = inputs.astype(dtype).reshape(-1, fan_in)
    outputs = jnp.matmul(rows, kernel, precision=precision)
    return _add_bias(outputs.reshape(*inputs.shape[: inputs.ndim - axes], *features), params, dtype)

  def record(params, constants, inputs, cotangent, units):
    del constants
    batch = inputs.shape[0]  # a 1x1 convolution of a column of positions
    images = inputs.astype(dtype).reshape(batch, -1, 1, fan_in)
    errors = cotangent.reshape(batch, -1, 1, fan_out)
    kernel = _kernel_record(images, errors, units, ops.Geometry((1, 1)), shape, "matmul")
    return {"kernel": kernel} | _bias_record(params, cotangent, units)

  def total(params, constants, inputs, cotangent):
    del constants
    inputs, cotangent = _finite_float32(inputs.astype(dtype), cotangent)
    rows, errors = inputs.reshape(-1, fan_in), cotangent.reshape(-1, fan_out)
    kernel = jnp.einsum("td,tp->dp", rows, errors, precision=precision).reshape(shape)
    return _cast({"kernel": kernel} | _bias_total(params, cotangent), params)

  return Layer(params=params, constants=(), forward=forward, record=record, total=total)


def norm_layer(
  params: Params,  # scale [C] and bias [C], either may be absent
  constants: tuple[jax.Array, ...],
  normalise: Callable[[tuple[jax.Array, ...], jax.Array], jax.Array],
  *,
  dtype: Any,
) -> Layer:
  """``normalise(constants, inputs)``, then scale and bias along the last axis, in ``dtype``."""

  def forward(params, constants, inputs):
    outputs = normalise(constants, inputs)
    for name, apply in (("scale", jnp.multiply), ("bias", jnp.add)):
      if name in params:
        outputs = apply(outputs, _broadcast(params[name].astype(outputs.dtype), outputs.ndim))
    return outputs.astype(dtype)

  def scale_gradients(constants, inputs, cotangent):
    return _sum_positions(normalise(constants, inputs) * cotangent, cotangent.shape[0], 1)

  return _scale_and_bias_layer(params, constants, forward, scale_gradients)


def group_norm_layer(params: Params, *, num_groups: int, epsilon: float, dtype: Any) -> Layer:
  """``group_norm`` with the scale and bias of ``params``, either of which may be absent."""

  def forward(params, constants, inputs):
    del constants
    inputs = inputs.astype(np.promote_types(inputs.dtype, dtype))
    outputs = group_norm(
      inputs, params.get("scale"), params.get("bias"), num_groups=num_groups, epsilon=epsilon
    )
    return outputs.astype(dtype)

  def scale_gradients(constants, inputs, cotangent):
    del constants
    return group_norm_scale_gradients(inputs, cotangent, num_groups=num_groups, epsilon=epsilon)

  return _scale_and_bias_layer(params, (), forward, scale_gradients)


def _scale_and_bias_layer(params, constants, forward, scale_gradients) -> Layer:
  """``scale_gradients``: (constants, inputs, cotangent) -> the scale's gradient of each row."""

  def record(params, constants, inputs, cotangent, units):
    inputs, cotangent = _float32(inputs, cotangent)
    entries = {}
    if "scale" in params:
      rows = scale_gradients(constants, inputs, cotangent)
      entries["scale"] = rows.reshape(units, -1, rows.shape[1]).sum(1)
    return entries | _bias_record(params, cotangent, units)

  def total(params, constants, inputs, cotangent):
    every_row = record(params, constants, inputs, cotangent, cotangent.shape[0])
    weights = jnp.ones(cotangent.shape[0], at_least_float32(cotangent.dtype))
    return _cast(weighted_sum(every_row, weights), params)

  return Layer(params=params, constants=constants, forward=forward, record=record, total=total)


def keeps_factors(positions: int, fan_in: int, fan_out: int) -> bool:
  """Whether a unit's factors are kept: dp > T (d + p), else its gradient is.

  Both of its costs say so at once: the norm by Gram matrices needs T² (d + p) products and forming
  the gradient T d p; the factors (as patches) hold T (d + p) numbers and the gradient d p.
  """
  return positions * (fan_in + fan_out) < fan_in * fan_out


def at_least_float32(dtype: Any) -> Any:
  """float32, or ``dtype`` where that is wider (NumPy's rule, which strict promotion allows)."""
  return np.promote_types(dtype, np.float32)


def _kernel_record(
  inputs: jax.Array,  # [B, H, W, C_in]
  cotangent: jax.Array,  # [B, H', W', C_out]
  units: int,
  geometry: ops.Geometry,
  shape: tuple[int, ...],
  lowering: ops.Lowering,
) -> jax.Array | Factors:
  batch, height, width, channels_out = cotangent.shape
  fan_in = math.prod(geometry.window) * inputs.shape[3] // geometry.groups
  positions = batch // units * height * width
  if keeps_factors(positions, fan_in, channels_out // geometry.groups):
    return Factors(
      inputs=inputs,
      cotangent=cotangent,
      units=units,
      geometry=geometry,
      shape=shape,
      lowering=lowering,
    )
  inputs, cotangent = _float32(inputs, cotangent)
  gradients = ops.conv_gradients(inputs, cotangent, geometry, units=units, lowering=lowering)
  return gradients.reshape(units, *shape)


def _bias_record(params: Params, cotangent: jax.Array, units: int) -> Record:
  """The bias's gradient is the cotangent summed over positions."""
  if "bias" not in params:
    return {}
  (cotangent,) = _float32(cotangent)
  return {"bias": _sum_positions(cotangent, units, params["bias"].ndim)}


def _bias_total(params: Params, cotangent: jax.Array) -> Params:
  if "bias" not in params:
    return {}
  return {"bias": _sum_positions(cotangent, 1, params["bias"].ndim)[0]}


def _sq_norms(entry: jax.Array | Factors) -> jax.Array:
  if not isinstance(entry, Factors):
    return jnp.square(entry.reshape(entry.shape[0], -1)).sum(1)
  geometry, units = entry.geometry, entry.units
  inputs, cotangent = _float32(entry.inputs, entry.cotangent)
  groups, width = geometry.groups, cotangent.shape[3] // geometry.groups
  columns = ops.columns(inputs, geometry)  # [G, B T, d]
  rows = columns.reshape(groups * units, -1, columns.shape[2])
  errors = ops.by_group(cotangent, groups).reshape(groups * units, -1, width)
  return _gram_sq_norms(rows, errors).reshape(groups, units).sum(0)


def _gram_sq_norms(rows: jax.Array, errors: jax.Array) -> jax.Array:  # [N, T, d], [N, T, p] -> [N]
  """Squared norm of sum_t rows_t errors_t, which is sum_ts (rows rows')_ts (errors errors')_ts.

  Positions may cancel, and rounding can then exceed the small difference of large numbers. So the
  result is raised where need be: to an upper bound of the exact value, and to a size beside which
  the rounding of the sum over t is small. The bounds hold for any order of summation (n roundings
  are at most n eps / 2 of the sum of magnitudes: Higham 2002, section 3.1) and for products too
  small for float32.
  """
  (_, positions, fan_in), fan_out = rows.shape, errors.shape[2]
  eps = float(jnp.finfo(rows.dtype).eps)
  if positions == 1 and (fan_in + fan_out + 4) * eps <= NORM_SLACK:
    ours, theirs = jnp.square(rows).sum((1, 2)), jnp.square(errors).sum((1, 2))
    return ours * theirs + _underflow_bound(ours, theirs, fan_in, fan_out)
  ours, theirs = _exact("ntd,nsd->nts", rows, rows), _exact("ntp,nsp->nts", errors, errors)
  our_size, their_size = (
    jnp.sqrt(jnp.diagonal(products, axis1=1, axis2=2)) for products in (ours, theirs)
  )
  parts = ours * theirs
  rounding = (
    fan_in * jnp.abs(theirs) * our_size[:, :, None] * our_size[:, None]
    + fan_out * jnp.abs(ours) * their_size[:, :, None] * their_size[:, None]
    + (2 * positions + 4) * jnp.abs(parts)
  )
  # Stacked: a kernel a sum would be half of what this function takes to compile.
  squares, first_order = jnp.stack([parts, rounding]).sum(3).sum(2)
  size, our_total, their_total = jnp.square(
    jnp.stack([our_size * their_size, our_size, their_size]).sum(2)
  )
  second_order = 1 + eps * positions * (fan_in + fan_out)
  highest = squares + 0.5 * eps * second_order * first_order
  highest += _underflow_bound(our_total, their_total, fan_in, fan_out)
  # The 4 eps are what random numbers need to stay within 1e-6.
  raised = jnp.maximum(squares + 4 * eps * size, highest * (1 - NORM_SLACK))
  return jnp.maximum(raised, ((positions + 1) * eps / NORM_SLACK) ** 2 * size)


def _underflow_bound(ours: jax.Array, theirs: jax.Array, fan_in: int, fan_out: int) -> jax.Array:
  """Bound on the loss of d or p products that are too small for the dtype; 0 if negligible."""
  tiny = float(jnp.finfo(ours.dtype).tiny)
  most = (tiny * fan_in) * theirs + (tiny * fan_out) * ours
  return jnp.where(most <= 1e-30, jnp.zeros_like(most), most)  # NaN stays


def _weighted_sum(entry: jax.Array | Factors, weights: jax.Array) -> jax.Array:
  if not isinstance(entry, Factors):
    rows, weights = entry.reshape(entry.shape[0], -1), weights.astype(entry.dtype)
    # A weight of 0 alone does not do: 0 * inf = NaN.
    rows = _finite(rows)
    return _exact("u,up->p", weights, rows).reshape(entry.shape[1:])
  inputs, cotangent = _finite_float32(entry.inputs, entry.cotangent)
  rows = jnp.repeat(weights.astype(cotangent.dtype), cotangent.shape[0] // entry.units)
  scaled = cotangent * rows[:, None, None, None]
  total = ops.conv_gradients(inputs, scaled, entry.geometry, units=1, lowering=entry.lowering)
  return total.reshape(entry.shape)


def _exact(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """Einsum without the reduced-precision shortcuts of accelerators: a norm bounds privacy."""
  return jnp.einsum(equation, left, right, precision=lax.Precision.HIGHEST)


def _float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Casts to at least float32, so that bfloat16 activations lose nothing in norms and sums."""
  return tuple(x.astype(at_least_float32(x.dtype)) for x in arrays)


def _finite_float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(map(_finite, _float32(*arrays)))


def _finite(values: jax.Array) -> jax.Array:
  """Replaces non-finite numbers by 0: a clip coefficient of 0 leaves 0 * inf = NaN behind."""
  return jnp.where(jnp.isfinite(values), values, jnp.zeros_like(values))


def _cast(gradients: Params, params: Params) -> Params:
  return {name: value.astype(params[name].dtype) for name, value in gradients.items()}


def _broadcast(vector: jax.Array, ndim: int) -> jax.Array:
  return vector.reshape((1,) * (ndim - vector.ndim) + vector.shape)


def _add_bias(outputs: jax.Array, params: Params, dtype: Any) -> jax.Array:
  if "bias" not in params:
    return outputs
  return outputs + _broadcast(params["bias"].astype(dtype), outputs.ndim)


def _sum_positions(values: jax.Array, units: int, last: int) -> jax.Array:
  """[B, ..., C] -> [units, C], where C stands for the ``last`` axes."""
  kept = values.shape[values.ndim - last :]
  return values.reshape(units, -1, *kept).sum(1)
