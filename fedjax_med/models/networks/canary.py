"""A network for privacy audits: every record's gradient is known and as large as one likes."""

import flax.linen as nn
import jax.numpy as jnp

from fedjax_med.models.model import Model, from_flax


class Canary(nn.Module):
  """Two layers side by side, logits = scale · (x A + x B) of two classes, A = B = 0 at first.

  The gradient of the cross-entropy of label 0 is (-1/2, 1/2) · scale ⊗ x in both layers. No record
  moves the sum over the two classes, which therefore holds noise alone.

  Attributes:
    scale: factor on the logits, and so on every gradient.
  """

  scale: float

  @nn.compact
  def __call__(self, inputs):
    rows = inputs.reshape(inputs.shape[0], -1)
    dense = [
      nn.Dense(2, use_bias=False, kernel_init=nn.initializers.zeros, name=name)(rows)
      for name in ("first", "second")
    ]
    return jnp.asarray(self.scale, rows.dtype) * (dense[0] + dense[1])


def canary_model(scale: float) -> Model:
  """The network as plain functions; see ``Canary``."""
  return from_flax(Canary(scale))
