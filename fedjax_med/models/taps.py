"""Layers that report the squared norm of every example's parameter gradient (norm taps).

A tapped layer takes one extra number per example, which the forward pass ignores and whose
cotangent is the squared norm of that example's gradient of the layer's parameters; JAX adds these
up over layers. The cotangent of the parameters stays what it is, the sum over examples. So one
``jax.vjp`` pulled back twice, with ones and with clip coefficients, gives exact DP-SGD without a
gradient per example (Goodfellow 2015; Li et al. 2022, "ghost clipping"; here also for grouped
convolutions, where no more than one group's block is ever formed).

Shapes: B examples, T output positions of an example, G groups, d = kh kw C_in / G inputs and
p = C_out / G outputs of a group at one position, C channels in all, N = B G.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedjax_med.models import ops

Params = dict[str, jax.Array]

# Input channels of a group from which one shift of the window makes a product worth its own call.
_WIDE = 64


class Layer(NamedTuple):
  """One call of a layer, as plain functions of its arrays.

  Attributes:
    params: trainable arrays by name.
    constants: other arrays the layer reads (stored statistics).
    forward: (params, constants, inputs [B, ...]) -> outputs [B, ...].
    gradient: (params, constants, inputs, cotangent of outputs) -> (gradient of params summed over
      examples, squared norm of each example's gradient [B]). In the sum an example whose factors
      are zero or not finite counts exactly 0; in the norm non-finite values stay visible.
  """

  params: Params
  constants: tuple[jax.Array, ...]
  forward: Callable[..., jax.Array]
  gradient: Callable[..., tuple[Params, jax.Array]]


def tapped(layer: Layer, inputs: jax.Array, taps: jax.Array) -> jax.Array:
  """Runs ``layer`` on ``inputs`` [B, ...]; ``taps`` [B] receives the squared gradient norms."""

  @jax.custom_vjp
  def call(params, constants, inputs, taps):
    del taps
    return layer.forward(params, constants, inputs)

  def call_forward(params, constants, inputs, taps):
    outputs, pull_inputs = jax.vjp(lambda x: layer.forward(params, constants, x), inputs)
    return outputs, (params, constants, inputs, taps, pull_inputs)

  def call_backward(residuals, cotangent):
    params, constants, inputs, taps, pull_inputs = residuals
    # In the norm pass XLA drops `total`, in the sum pass it drops `norms`.
    total, norms = layer.gradient(params, constants, inputs, cotangent)
    (d_inputs,) = pull_inputs(cotangent)
    return total, tuple(map(jnp.zeros_like, constants)), d_inputs, norms.astype(taps.dtype)

  call.defvjp(call_forward, call_backward)
  return call(layer.params, layer.constants, inputs, taps)


def finite(values: jax.Array) -> jax.Array:
  """Replaces what is not finite by 0: a clip coefficient of 0 leaves 0 * inf = NaN behind."""
  return jnp.where(jnp.isfinite(values), values, jnp.zeros_like(values))


def kernel_sq_norm(
  inputs: jax.Array,  # [N, T, d]
  cotangent: jax.Array,  # [N, T, p]
) -> jax.Array:  # [N]
  """Squared norm of sum_t inputs_t (outer) cotangent_t.

  The Gram form <A A^T, Q Q^T> costs T^2 (d + p) products, forming the gradient T d p. The cheaper
  one runs; rounding may leave the first below 0, so it is clamped.
  """
  if uses_gram(inputs.shape[1], inputs.shape[2], cotangent.shape[2]):
    gram = _exact("ntd,nsd->nts", inputs, inputs) * _exact("ntp,nsp->nts", cotangent, cotangent)
    return jnp.maximum(gram.sum((1, 2)), 0)
  return jnp.square(_exact("ntd,ntp->ndp", inputs, cotangent)).sum((1, 2))


def at_least_float32(dtype: Any) -> Any:
  """float32, or ``dtype`` where that is wider (NumPy's rule, which strict promotion allows)."""
  return np.promote_types(dtype, np.float32)


def uses_gram(positions: int, fan_in: int, fan_out: int) -> bool:
  """Whether the Gram form needs no more products than the gradient: T (d + p) <= d p."""
  return positions * (fan_in + fan_out) <= fan_in * fan_out


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
  window = (params["kernel"].shape[0], params["kernel"].shape[1])

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

  def gradient(params, constants, inputs, cotangent):
    del constants
    inputs, cotangent = _accumulated(inputs.astype(dtype), cotangent)
    kernel = params["kernel"]
    norms = _conv_sq_norm(inputs, cotangent, window, strides, padding, dilation, groups)
    _, pull = jax.vjp(lambda k: run(finite(inputs), k), kernel.astype(inputs.dtype))
    total = {"kernel": pull(finite(cotangent))[0].astype(kernel.dtype)}
    return _with_bias(total, norms, params, cotangent)

  return Layer(params, (), forward, gradient)


def dense_layer(
  params: Params,  # kernel [d, p], bias [p] or absent
  *,
  dtype: Any,
  precision: Any,
) -> Layer:
  """Product of the last axis of [B, ..., d] with the kernel, computed in ``dtype``."""

  def forward(params, constants, inputs):
    del constants
    kernel = params["kernel"].astype(dtype)
    outputs = jnp.matmul(inputs.astype(dtype), kernel, precision=precision)
    return _add_bias(outputs, params, dtype)

  def gradient(params, constants, inputs, cotangent):
    del constants
    inputs, cotangent = _accumulated(inputs.astype(dtype), cotangent)
    batch, fan_in, fan_out = inputs.shape[0], inputs.shape[-1], cotangent.shape[-1]
    rows = inputs.reshape(batch, -1, fan_in)
    errors = cotangent.reshape(batch, -1, fan_out)
    norms = kernel_sq_norm(rows, errors)
    kernel = params["kernel"]
    product = jnp.einsum("btd,btp->dp", finite(rows), finite(errors), precision=precision)
    return _with_bias({"kernel": product.astype(kernel.dtype)}, norms, params, cotangent)

  return Layer(params, (), forward, gradient)


def norm_layer(
  params: Params,  # scale [C] and bias [C], either may be absent
  constants: tuple[jax.Array, ...],
  normalise: Callable[[tuple[jax.Array, ...], jax.Array], jax.Array],
  *,
  dtype: Any,
  forward: Callable[[Params, tuple[jax.Array, ...], jax.Array], jax.Array] | None = None,
) -> Layer:
  """``normalise(constants, inputs)`` followed by scale and bias along the last axis, in ``dtype``.

  ``forward`` computes the same in one go where there is a faster way.
  """

  def two_steps(params, constants, inputs):
    outputs = normalise(constants, inputs)
    for name, apply in (("scale", jnp.multiply), ("bias", jnp.add)):
      if name in params:
        outputs = apply(outputs, _broadcast(params[name].astype(outputs.dtype), outputs.ndim))
    return outputs.astype(dtype)

  def gradient(params, constants, inputs, cotangent):
    inputs, cotangent = _accumulated(inputs, cotangent)
    total: Params = {}
    norms = jnp.zeros(cotangent.shape[0], cotangent.dtype)
    if "scale" in params:
      per_example = _sum_positions(normalise(constants, inputs) * cotangent)
      total["scale"] = finite(per_example).sum(0).astype(params["scale"].dtype)
      norms = norms + jnp.square(per_example).sum(1)
    return _with_bias(total, norms, params, cotangent)

  return Layer(params, constants, forward or two_steps, gradient)


def _conv_sq_norm(
  inputs: jax.Array,  # [B, H, W, C_in]
  cotangent: jax.Array,  # [B, H', W', C_out]
  window: ops.Pair,
  strides: ops.Pair,
  padding: ops.Padding,
  dilation: ops.Pair,
  groups: int,
) -> jax.Array:  # [B]
  """Squared norm of each example's kernel gradient."""
  errors = _by_group(cotangent, groups)
  positions, width_out = errors.shape[1] * errors.shape[2], errors.shape[3]
  errors = errors.reshape(-1, positions, width_out)
  grouped = _by_group(inputs, groups)
  width_in = grouped.shape[3]
  if uses_gram(positions, math.prod(window) * width_in, width_out) or width_in < _WIDE:
    columns = ops.patches(grouped, window, strides, padding, dilation)
    norms = kernel_sq_norm(columns.reshape(errors.shape[0], positions, -1), errors)
  else:  # one shift's block of the gradient at a time
    norms = jnp.zeros(errors.shape[0], errors.dtype)
    for _, _, view in ops.shifted_views(grouped, window, strides, padding, dilation):
      block = _exact("ntd,ntp->ndp", view.reshape(-1, positions, width_in), errors)
      norms = norms + jnp.square(block).sum((1, 2))
  return norms.reshape(groups, -1).sum(0)


def _by_group(values: jax.Array, groups: int) -> jax.Array:
  """[B, H, W, C] -> [G * B, H, W, C / G]."""
  batch, height, width, _ = values.shape
  split = values.reshape(batch, height, width, groups, -1)
  return split.transpose(3, 0, 1, 2, 4).reshape(groups * batch, height, width, -1)


def _exact(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
  """Einsum without the reduced-precision shortcuts of accelerators: a norm bounds privacy."""
  return jnp.einsum(equation, left, right, precision=lax.Precision.HIGHEST)


def _accumulated(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Casts to at least float32, so that bfloat16 activations lose nothing in norms and sums."""
  return tuple(x.astype(at_least_float32(x.dtype)) for x in arrays)


def _broadcast(vector: jax.Array, ndim: int) -> jax.Array:
  return vector.reshape((1,) * (ndim - 1) + (-1,))


def _add_bias(outputs: jax.Array, params: Params, dtype: Any) -> jax.Array:
  if "bias" not in params:
    return outputs
  return outputs + _broadcast(params["bias"].astype(dtype), outputs.ndim)


def _sum_positions(values: jax.Array) -> jax.Array:
  """[B, ..., C] -> [B, C]."""
  return values.sum(tuple(range(1, values.ndim - 1)))


def _with_bias(
  total: Params, norms: jax.Array, params: Params, cotangent: jax.Array
) -> tuple[Params, jax.Array]:
  """Adds the bias, whose gradient is the cotangent summed over positions."""
  if "bias" not in params:
    return total, norms
  per_example = _sum_positions(cotangent)
  bias = finite(per_example).sum(0).astype(params["bias"].dtype)
  return total | {"bias": bias}, norms + jnp.square(per_example).sum(1)
