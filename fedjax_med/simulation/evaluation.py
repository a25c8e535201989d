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


def make_classify(model: Model, normalisation: str) -> Callable[..., jax.Array]:
  """Builds ``classify(params, state, images [B, H, W, C] uint8) -> [B, classes]``, not jitted.

  The result is float32 class probabilities.
  """

  def classify(params: Tree, state: Tree, images: jax.Array) -> jax.Array:
    logits, _ = model.apply(params, state, normalise(images, normalisation))
    return jax.nn.softmax(logits.astype(jnp.float32))

  return classify


def make_evaluate(model: Model, normalisation: str) -> Callable[..., jax.Array]:
  """Builds ``evaluate(params, state, pool, batches [b, size]) -> [b, size, classes]``, not jitted.

  The result is float32 class probabilities of pool rows, batch by batch.
  """

  classify = make_classify(model, normalisation)

  def evaluate(params: Tree, state: Tree, pool: Pool, batches: jax.Array) -> jax.Array:
    return jax.lax.map(lambda rows: classify(params, state, pool.inputs[rows]), batches)

  return evaluate


def batches_of(rows: np.ndarray, batch_size: int, devices: int = 1) -> np.ndarray:
  """[b, size] ``rows`` in batches, as many for every device; padded with row 0 at the end."""
  size = min(batch_size, max(1, -(-len(rows) // devices)))
  num_batches = devices * max(1, -(-len(rows) // (size * devices)))
  padded = np.zeros(num_batches * size, np.int32)
  padded[: len(rows)] = rows
  return padded.reshape(num_batches, size)


def make_predict(
  evaluate: Callable[..., jax.Array], *, batch_size: int, mesh: Mesh | None = None
) -> tuple[Callable[..., np.ndarray], Callable[..., jax.stages.Lowered]]:
  """Builds ``predict(params, state, pool, rows [n]) -> probabilities [n, classes]`` (NumPy).

  ``rows`` are pool rows on the host. They are padded to whole batches, so one test set compiles
  one program; the batches are shared out over the devices of a mesh. The second function, of the
  same arguments, only lowers it for a compiler; shapes will do for all of them but ``rows``.
  """
  devices = 1 if mesh is None else mesh.size
  if mesh is None:
    compiled = jax.jit(evaluate)
  else:
    whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
    sharded = jax.shard_map(
      evaluate, mesh=mesh, in_specs=(whole,) * 3 + (dealt,), out_specs=dealt, check_vma=False
    )
    compiled = jax.jit(sharded, out_shardings=replicated(mesh))

  def predict(params: Tree, state: Tree, pool: Pool, rows: np.ndarray) -> np.ndarray:
    batches = batches_of(rows, batch_size, devices)
    probabilities = np.asarray(compiled(params, state, pool, batches))
    return probabilities.reshape(-1, probabilities.shape[-1])[: len(rows)]

  def lower_predict(params: Tree, state: Tree, pool: Pool, rows: np.ndarray) -> jax.stages.Lowered:
    return compiled.lower(params, state, pool, batches_of(rows, batch_size, devices))

  return predict, lower_predict
