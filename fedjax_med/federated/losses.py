"""The loss of an example: cross-entropy of its class, and what the network adds of its own."""

from collections.abc import Callable

import jax
import optax

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def cross_entropy(label_smoothing: float) -> Loss:
  """Per-example softmax cross-entropy: (logits [B, classes], labels [B]) -> float32 [B]."""

  def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    targets = optax.smooth_labels(
      jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing
    )
    return optax.softmax_cross_entropy(logits, targets)

  return loss


def class_logits(outputs: jax.Array, penalties: int) -> jax.Array:
  """What a network says of the classes: its outputs [B, columns] without the last ``penalties``."""
  return outputs[:, :-penalties] if penalties else outputs


def with_penalties(loss: Loss, penalties: int) -> Loss:
  """``loss`` of the class logits, plus each example's own penalties, the last columns of outputs.

  Returns (outputs of a training pass [B, classes + penalties], labels [B]) -> [B]. Penalties are
  part of an example's loss, so that its gradient is clipped with them in it.
  """
  if not penalties:
    return loss

  def penalised(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    logits = class_logits(outputs, penalties)
    return loss(logits, labels) + outputs[:, logits.shape[1] :].sum(axis=1)

  return penalised
