"""Group normalisation with few full-size steps, forward, backward and for each image's gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_med.models.ops import accumulator


def group_norm(
  inputs: jax.Array,  # [B, ..., C]
  scale: jax.Array | None,  # [C]
  bias: jax.Array | None,  # [C]
  *,
  num_groups: int,
  epsilon: float,
) -> jax.Array:  # shape and dtype of inputs
  """Normalises each image over space and each group of channels (Wu and He 2018, equation 7).

  Statistics are at least float32. Channels are summed one by one and combined into groups, so that
  the only full-size step, forward and backward, is one scale-and-shift; a channel's mean may exceed
  its standard deviation a hundredfold before float32 cancellation shows in the third digit.
  """
  dtype, channels = accumulator(inputs.dtype), inputs.shape[-1]
  x = inputs.astype(dtype).reshape(inputs.shape[0], -1, channels)
  scale = jnp.ones(channels, dtype) if scale is None else scale.astype(dtype)
  bias = jnp.zeros(channels, dtype) if bias is None else bias.astype(dtype)
  out: jax.Array = _group_norm_once(x, scale, bias, num_groups, epsilon)  # pyright: ignore
  return out.reshape(inputs.shape).astype(inputs.dtype)


def group_norm_scale_gradients(
  inputs: jax.Array,  # [B, ..., C], at least float32
  cotangent: jax.Array,  # [B, ..., C], of the outputs, at least float32
  *,
  num_groups: int,
  epsilon: float,
) -> jax.Array:  # [B, C]
  """Gradient of the scale for each image: normalised input times cotangent, summed over space."""
  x, g = (v.reshape(v.shape[0], -1, v.shape[-1]) for v in (inputs, cotangent))
  mean, inverse = _channel_statistics(x, num_groups, epsilon)
  return ((g * x).sum(1) - mean * g.sum(1)) * inverse


def _channel_statistics(
  x: jax.Array,  # [B, T, C]
  num_groups: int,
  epsilon: float,
) -> tuple[jax.Array, jax.Array]:  # [B, C] each
  """Mean and inverse standard deviation of each channel's group."""
  channel_mean = x.mean(axis=1)
  channel_variance = jnp.square(x).mean(axis=1) - jnp.square(channel_mean)
  mean = _over_group(channel_mean, num_groups, jnp.mean)
  variance = _over_group(channel_variance + jnp.square(channel_mean - mean), num_groups, jnp.mean)
  return mean, lax.rsqrt(jnp.maximum(variance, 0) + epsilon)


def _over_group(values: jax.Array, num_groups: int, reduce: Any) -> jax.Array:
  """[B, C] -> [B, C]: each channel gets the result of ``reduce`` on its group."""
  grouped = values.reshape(values.shape[0], num_groups, -1)
  return jnp.broadcast_to(reduce(grouped, axis=2, keepdims=True), grouped.shape).reshape(
    values.shape
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _group_norm(x, scale, bias, num_groups, epsilon) -> jax.Array:
  return _group_norm_forward(x, scale, bias, num_groups, epsilon)[0]


def _group_norm_forward(x, scale, bias, num_groups, epsilon):
  mean, inverse = _channel_statistics(x, num_groups, epsilon)
  gain = inverse * scale[None]
  shift = bias[None] - mean * gain
  return x * gain[:, None] + shift[:, None], (x, scale, mean, inverse)


def _group_norm_backward(num_groups, epsilon, residuals, cotangent):
  """With sums over space s = sum(g), r = sum(g x_hat): dx = (gain g - A - x_hat B) of its group."""
  del epsilon
  x, scale, mean, inverse = residuals
  total = cotangent.sum(1)
  product = ((cotangent * x).sum(1) - mean * total) * inverse
  size = x.shape[1] * (x.shape[2] // num_groups)
  a = _over_group(total * scale[None], num_groups, jnp.sum) * inverse / size
  b = _over_group(product * scale[None], num_groups, jnp.sum) * jnp.square(inverse) / size
  gain, shift = inverse * scale[None], mean * b - a
  d_inputs = cotangent * gain[:, None] - x * b[:, None] + shift[:, None]
  return d_inputs, product.sum(0), total.sum(0)


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)
_group_norm_once = jax.jit(_group_norm, static_argnums=(3, 4), inline=True)
