"""Class probabilities of the models of a run on sets of examples, in batches of one shape."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fedjax_med.federated.algorithm import Pool, Tree
from fedjax_med.federated.vector import NetworkSpec
from fedjax_med.models.model import Model
from fedjax_med.simulation.mesh import CLIENTS, replicated


def make_classify(
  model: Model,
  prepare: Callable[[Tree], jax.Array],
  predict: Callable[[jax.Array], jax.Array],
) -> Callable[..., jax.Array]:
  """Builds ``classify(params, state, examples) -> [B, columns]``, not jitted.

  Args:
    model: the network.
    prepare: raw examples -> network inputs; see ``data.modality.preparation``.
    predict: outputs of the network -> float32 predictions, of the task.
  """

  def classify(params: Tree, state: Tree, examples: Tree) -> jax.Array:
    outputs, _ = model.apply(params, state, prepare(examples))
    return predict(outputs)

  return classify


class EvaluatedModel(NamedTuple):
  """A model to predict with: the weights after some rounds.

  Attributes:
    params: [P] the global model's.
    state: [S] its non-trained state.
    client_states: persistent state of each client, leading axis K, where a client predicts with a
      model of its own; () where all use the global one. Digests of weights contain this name.
  """

  params: jax.Array
  state: jax.Array
  client_states: Tree = ()


class Batches(NamedTuple):
  """Examples in batches of one shape.

  Attributes:
    rows: [b, size] int32 pool rows; padding repeats row 0.
    owners: [b] int32 client whose model looks at the batch.
  """

  rows: np.ndarray | jax.Array
  owners: np.ndarray | jax.Array


def make_evaluate(
  classify: Callable[..., jax.Array],
  spec: NetworkSpec,
  personal: Callable[[jax.Array, jax.Array, Tree], tuple[jax.Array, jax.Array]] | None = None,
) -> Callable[..., jax.Array]:
  """Builds ``evaluate(weights, pool, batches) -> [b, size, columns]``, not jitted.

  The result is that of ``classify`` (of ``make_classify``) on pool rows, batch by batch; with
  ``personal`` (of a FederatedAlgorithm) by the model of each batch's owner.
  """

  def evaluate(weights: EvaluatedModel, pool: Pool, batches: Batches) -> jax.Array:
    def one(batch: Batches):
      params, state = weights.params, weights.state
      if personal is not None:
        owner = jax.tree.map(lambda leaf: leaf[batch.owners], weights.client_states)
        params, state = personal(params, state, owner)
      examples = jax.tree.map(lambda leaf: leaf[batch.rows], pool.inputs)
      return classify(*spec.trees(params, state), examples)

    return jax.lax.map(one, batches)

  return evaluate


def shape_of(
  runs: Sequence[Sequence[np.ndarray]], batch_size: int, devices: int = 1
) -> tuple[int, int]:
  """[b, size] of batches that the groups of each run fit into, as many for every device."""
  longest = max((len(rows) for groups in runs for rows in groups), default=0)
  alone = all(len(groups) == 1 for groups in runs)  # then one group is shared out over the devices
  size = min(batch_size, max(1, -(-longest // (devices if alone else 1))))
  total = max(1, *(sum(-(-len(rows) // size) for rows in groups) for groups in runs))
  return total + -total % devices, size


def batches_of(groups: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[Batches, np.ndarray]:
  """Pool rows in batches of ``shape`` [b, size], each of one group only.

  Returns:
    The batches, and [n] the places of the rows among all of the batches' slots, group by group.
  """
  total, size = shape
  slots, owners, places = np.zeros(total * size, np.int32), np.zeros(total, np.int32), []
  first = 0
  for owner, rows in enumerate(groups):
    last = first + -(-len(rows) // size)
    owners[first:last] = owner
    places.append(first * size + np.arange(len(rows)))
    slots[places[-1]] = rows
    first = last
  return Batches(slots.reshape(shape), owners), np.concatenate(places)


def make_predict(
  evaluate: Callable[..., jax.Array], *, batch_size: int, mesh: Mesh | None = None
) -> tuple[Callable[..., np.ndarray], Callable[..., jax.stages.Lowered]]:
  """Builds ``predict(weights, pool, groups) -> probabilities [n, classes]`` (NumPy).

  ``groups`` are arrays of pool rows on the host, one for every client that predicts with a model of
  its own, else one in all; the result is in their order. They are padded to whole batches, so one
  test set compiles one program; the batches are shared out over the devices of a mesh. The second
  function, of the same arguments, only lowers it for a compiler; shapes will do for all of them but
  the groups.
  """
  devices = 1 if mesh is None else mesh.size
  if mesh is None:
    compiled = jax.jit(evaluate)
  else:
    whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
    sharded = jax.shard_map(
      evaluate, mesh=mesh, in_specs=(whole, whole, dealt), out_specs=dealt, check_vma=False
    )
    compiled = jax.jit(sharded, out_shardings=replicated(mesh))

  def predict(weights: EvaluatedModel, pool: Pool, groups: Sequence[np.ndarray]) -> np.ndarray:
    batches, places = batches_of(groups, shape_of([groups], batch_size, devices))
    probabilities = np.asarray(compiled(weights, pool, batches))
    return probabilities.reshape(-1, probabilities.shape[-1])[places]

  def lower_predict(
    weights: EvaluatedModel, pool: Pool, groups: Sequence[np.ndarray]
  ) -> jax.stages.Lowered:
    batches, _ = batches_of(groups, shape_of([groups], batch_size, devices))
    return compiled.lower(weights, pool, batches)

  return predict, lower_predict
