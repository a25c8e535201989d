"""Class probabilities of the global model on a set of examples, in batches of one shape."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedjax_med.data.normalisation import normalise
from fedjax_med.federated.algorithm import Pool, Tree
from fedjax_med.models.model import Model
from fedjax_med.simulation.mesh import CLIENTS, replicated


def make_predict(
  model: Model, *, batch_size: int, normalisation: str, mesh: Mesh | None = None
) -> tuple[Callable[..., np.ndarray], Callable[..., jax.stages.Lowered]]:
  """Builds ``predict(params, state, pool, rows [n]) -> probabilities [n, classes]`` (NumPy).

  ``rows`` are pool rows on the host. They are padded to whole batches, so one test set compiles
  one program; the batches are shared out over the devices of a mesh. The second function, of the
  same arguments, only lowers it for a compiler; shapes will do for all of them but ``rows``.
  """
  devices = 1 if mesh is None else mesh.size

  def run(params: Tree, state: Tree, pool: Pool, batches: jax.Array) -> jax.Array:
    def one(rows):
      logits, _ = model.apply(params, state, normalise(pool.inputs[rows], normalisation))
      return jax.nn.softmax(logits.astype(jnp.float32))

    return jax.lax.map(one, batches)

  if mesh is None:
    compiled = jax.jit(run)
  else:
    whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
    sharded = jax.shard_map(
      run, mesh=mesh, in_specs=(whole,) * 3 + (dealt,), out_specs=dealt, check_vma=False
    )
    compiled = jax.jit(sharded, out_shardings=replicated(mesh))

  def batched(rows: np.ndarray) -> np.ndarray:
    size = min(batch_size, max(1, -(-len(rows) // devices)))
    num_batches = devices * max(1, -(-len(rows) // (size * devices)))
    padded = np.zeros(num_batches * size, np.int32)
    padded[: len(rows)] = rows
    return padded.reshape(num_batches, size)

  def predict(params: Tree, state: Tree, pool: Pool, rows: np.ndarray) -> np.ndarray:
    probabilities = np.asarray(compiled(params, state, pool, batched(rows)))
    return probabilities.reshape(-1, probabilities.shape[-1])[: len(rows)]

  def lower_predict(params: Tree, state: Tree, pool: Pool, rows: np.ndarray) -> jax.stages.Lowered:
    return compiled.lower(params, state, pool, batched(rows))

  return predict, lower_predict
