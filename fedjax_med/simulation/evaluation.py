"""Class probabilities of the global model on a set of examples, in batches of one shape."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.data.normalisation import normalise
from fedjax_med.federated.algorithm import Pool, Tree
from fedjax_med.models.model import Model


def make_predict(model: Model, *, batch_size: int, normalisation: str) -> Callable:
  """Builds ``predict(params, state, pool, rows [n]) -> probabilities [n, classes]`` (NumPy).

  ``rows`` are pool rows on the host. They are padded to whole batches, so one test set compiles
  one program.
  """

  @jax.jit
  def run(params: Tree, state: Tree, pool: Pool, batches: jax.Array) -> jax.Array:
    def one(rows):
      logits, _ = model.apply(params, state, normalise(pool.inputs[rows], normalisation))
      return jax.nn.softmax(logits.astype(jnp.float32))

    return jax.lax.map(one, batches)

  def predict(params: Tree, state: Tree, pool: Pool, rows: np.ndarray) -> np.ndarray:
    size = min(batch_size, max(1, len(rows)))
    num_batches = max(1, -(-len(rows) // size))
    padded = np.zeros(num_batches * size, np.int32)
    padded[: len(rows)] = rows
    probabilities = run(params, state, pool, jnp.asarray(padded.reshape(num_batches, size)))
    return np.asarray(probabilities).reshape(num_batches * size, -1)[: len(rows)]

  return predict
