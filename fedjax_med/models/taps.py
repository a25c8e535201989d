"""Two ways to run a layer so that its backward pass tells units apart (see ``gradients``).

Both hand the forward pass an extra argument that it ignores and use its cotangent to carry a
result out of the backward pass; JAX routes it through remat, jit and vmap over clients.
"""

import jax
import jax.numpy as jnp

from fedjax_med.models.gradients import Layer, Record, sq_norms


def tapped(layer: Layer, inputs: jax.Array, taps: jax.Array) -> jax.Array:
  """Runs ``layer`` on ``inputs`` [B, ...]; ``taps`` [U] receives squared gradient norms of units.

  The cotangent of the parameters stays what it is, the sum over rows, and JAX adds taps up over
  layers. So one ``jax.vjp`` pulled back twice, with ones and with clip coefficients, gives exact
  DP-SGD in one gradient's memory.
  """

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
    total = layer.total(params, constants, inputs, cotangent)
    norms = sq_norms(layer.record(params, constants, inputs, cotangent, taps.shape[0]))
    (d_inputs,) = pull_inputs(cotangent)
    return total, tuple(map(jnp.zeros_like, constants)), d_inputs, norms.astype(taps.dtype)

  call.defvjp(call_forward, call_backward)
  return call(layer.params, layer.constants, inputs, taps)


def recorded(layer: Layer, inputs: jax.Array, blank: Record, units: int) -> jax.Array:
  """Runs ``layer`` on ``inputs`` [B, ...]; ``blank``, zeros, receives its Record as a cotangent.

  Parameters get no gradient: the Record suffices for norms and weighted sums after one backward
  pass (book-keeping).
  """

  @jax.custom_vjp
  def call(params, constants, inputs, blank):
    del blank
    return layer.forward(params, constants, inputs)

  def call_forward(params, constants, inputs, blank):
    del blank
    outputs, pull_inputs = jax.vjp(lambda x: layer.forward(params, constants, x), inputs)
    return outputs, (params, constants, inputs, pull_inputs)

  def call_backward(residuals, cotangent):
    params, constants, inputs, pull_inputs = residuals
    record = layer.record(params, constants, inputs, cotangent, units)
    (d_inputs,) = pull_inputs(cotangent)
    none = jax.tree.map(jnp.zeros_like, (params, constants))
    return *none, d_inputs, record

  call.defvjp(call_forward, call_backward)
  return call(layer.params, layer.constants, inputs, blank)


def blank_record(layer: Layer, inputs: jax.Array, outputs: jax.Array, units: int) -> Record:
  """Shapes of the Record that ``recorded`` hands out for this call."""

  def record(params, constants, inputs, cotangent):
    return layer.record(params, constants, inputs, cotangent, units)

  return jax.eval_shape(record, layer.params, layer.constants, inputs, outputs)
