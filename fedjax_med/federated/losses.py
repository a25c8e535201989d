"""Loss terms that a network adds to the loss of each example."""

import jax

from fedjax_med.tasks.task import Loss


def class_logits(outputs: jax.Array, penalties: int) -> jax.Array:
  """The logits of the classes: outputs [B, columns] without the last ``penalties`` columns."""
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
