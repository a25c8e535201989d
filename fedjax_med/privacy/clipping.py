"""The sum of clipped per-example gradients, exactly, with or without forming one per example."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.errors import UserError, require_choice
from fedjax_med.models.model import Model

METHODS = ("two_pass", "reference")

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class ClipMetrics(NamedTuple):
  """What clipping saw of each example; rows outside the mask hold 0.

  None of it is covered by the privacy of the sum. A non-finite example keeps its non-finite values.

  Attributes:
    loss: [B] float32.
    norm: [B] float32, l2 norm of the gradient before clipping.
    logits: [B, classes] float32.
  """

  loss: jax.Array
  norm: jax.Array
  logits: jax.Array


def resolve_method(requested: str, uncovered: tuple[str, ...]) -> tuple[str, str]:
  """Decides how gradients are clipped; returns (method, the reason in one phrase).

  Args:
    requested: privacy.clipping: auto, two_pass or reference.
    uncovered: ``Model.uncovered(...)``, empty if norm taps see every gradient.

  Raises:
    UserError: the method is unknown, or is two_pass on a model that taps do not cover.
  """
  require_choice("privacy.clipping", requested, ("auto", *METHODS))
  if requested == "reference":
    return "reference", "asked for"
  if not uncovered:
    return "two_pass", "asked for" if requested == "two_pass" else "norm taps cover every layer"
  reasons = ", ".join(uncovered[:4]) + (f" and {len(uncovered) - 4} more" * (len(uncovered) > 4))
  if requested == "two_pass":
    raise UserError(
      f"privacy.clipping='two_pass' does not cover this model ({reasons});"
      " set privacy.clipping=reference"
    )
  return "reference", f"norm taps do not cover the model: {reasons}"


def clipped_sum(
  method: str,
  model: Model,
  loss: Loss,
  params: Any,
  state: Any,
  inputs: jax.Array,  # [B, ...] float32
  labels: jax.Array,  # [B, ...]
  mask: jax.Array,  # [B] bool
  clip_norm: jax.Array,  # scalar float32, C
  key: jax.Array | None,
) -> tuple[Any, ClipMetrics]:
  """Returns sum over the mask of gradient_b * min(1, C / |gradient_b|), and metrics.

  The unit of privacy is the example; removing one moves the sum by at most C, up to the rounding of
  the norm. A row outside the mask counts exactly 0 and what stands in it changes no bit; an empty
  mask gives exactly 0; an example whose gradient norm is not finite in float32 counts exactly 0.
  Dropout draws differ between methods: 'reference' folds the row number into ``key``.

  How far rounding carries a contribution past C: 1e-6 of it in float32 products. With bfloat16
  activations the second backward pass of 'two_pass' rounds unlike the first (3e-3 in a small CNN),
  with 'reference' it does not.

  Args:
    method: 'two_pass' (needs an empty ``model.uncovered``; one gradient's memory) or 'reference'
      (B gradients' memory, any model).
    model: the network; its state is read and not changed.
    loss: (logits [B, classes], labels [B, ...]) -> [B], row by row.
    params: trainable weights.
    state: other collections of the model.
    inputs: examples.
    labels: labels of the examples.
    mask: which rows are examples.
    clip_norm: C, above 0.
    key: draws dropout; None if the model has none.

  Returns:
    (pytree like params, ClipMetrics).
  """
  require_choice("method", method, METHODS)
  inputs, labels = _zero_outside(mask, inputs), _zero_outside(mask, labels)
  gradients = _two_pass if method == "two_pass" else _reference
  total, metrics = gradients(model, loss, params, state, inputs, labels, mask, clip_norm, key)
  return total, ClipMetrics(*(_zero_outside(mask, value) for value in metrics))


def _two_pass(model, loss, params, state, inputs, labels, mask, clip_norm, key):
  """Pulls back ones for the norms, then the clip coefficients for the sum (design: norm taps)."""

  def losses(params, taps):
    logits = model.tapped_apply(params, state, inputs, taps, key=key)
    values = loss(logits, labels)
    return values, (values, logits)

  dtype = jax.tree.leaves(params)[0].dtype
  taps = jnp.zeros(inputs.shape[0], dtype)
  values, pull, (_, logits) = jax.vjp(losses, params, taps, has_aux=True)
  _, sq_norms = pull(jnp.ones_like(values))
  norms = jnp.sqrt(sq_norms)
  total, _ = pull(_coefficients(norms, mask, clip_norm).astype(values.dtype))
  return total, ClipMetrics(values, norms, logits)


def _reference(model, loss, params, state, inputs, labels, mask, clip_norm, key):
  """One gradient per example, each from a batch of its own (vmap of grad)."""

  def one(inputs, labels, row):
    def value(params):
      row_key = None if key is None else jax.random.fold_in(key, row)
      logits, _ = model.apply(params, state, inputs[None], key=row_key, train=True)
      return loss(logits, labels[None])[0], logits[0]

    return jax.value_and_grad(value, has_aux=True)(params)

  rows = jnp.arange(inputs.shape[0])
  (values, logits), gradients = jax.vmap(one)(inputs, labels, rows)
  leaves = jax.tree.leaves(gradients)
  norms = jnp.sqrt(sum(jnp.square(x).sum(tuple(range(1, x.ndim))) for x in leaves))
  scale = _coefficients(norms, mask, clip_norm)

  def weighted(x):
    weight = scale.reshape((-1,) + (1,) * (x.ndim - 1)).astype(x.dtype)
    # A coefficient of 0 alone does not do: 0 * inf = NaN.
    return jnp.where(weight > 0, x * weight, jnp.zeros_like(x)).sum(0)

  return jax.tree.map(weighted, gradients), ClipMetrics(values, norms, logits)


def _coefficients(norms: jax.Array, mask: jax.Array, clip_norm: jax.Array) -> jax.Array:
  """min(1, C / norm) of the examples; 0 outside the mask and where the norm is not finite."""
  clip_norm = jnp.asarray(clip_norm, norms.dtype)
  inside = norms <= clip_norm  # no division there, so a zero gradient is safe
  scale = jnp.where(inside, jnp.ones_like(norms), clip_norm / jnp.where(inside, clip_norm, norms))
  return jnp.where(mask & jnp.isfinite(norms), scale, jnp.zeros_like(norms))


def _zero_outside(mask: jax.Array, values: jax.Array) -> jax.Array:
  rows = mask.reshape((-1,) + (1,) * (values.ndim - 1))
  return jnp.where(rows, values, jnp.zeros_like(values))
