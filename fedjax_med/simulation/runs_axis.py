"""Several runs as one program: points of a sweep on an axis of their own, dealt over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_med.federated.algorithm import Client, Hyper
from fedjax_med.simulation.evaluation import Batches
from fedjax_med.simulation.mesh import CLIENTS, map_rows, replicated
from fedjax_med.simulation.rounds import SimulationState


class RunInputs(NamedTuple):
  """The inputs of a program that differ between runs, stacked over S runs; images are shared.

  Attributes:
    seed: int32, of the initial weights.
    key: key of every other draw.
    clients: stacked over the K clients.
    hyper: traced hyperparameters.
    batches: what to evaluate on.
  """

  seed: jax.Array
  key: jax.Array
  clients: Client
  hyper: Hyper
  batches: Batches


def make_sweep(
  initial: Callable[..., SimulationState],
  block: Callable[..., Any],
  evaluate: Callable[[SimulationState, Any, jax.Array], jax.Array],
  *,
  at_once: int,
  mesh: Mesh | None,
) -> jax.stages.Wrapped:
  """Builds the one program of a sweep.

  It is ``sweep(states, fresh, num_rounds [S], points, pool, pretrained) -> (states, metrics,
  probabilities [S, b, size, classes])``, jitted, states donated. Each run takes as many rounds as
  ``num_rounds`` says, 0 being none; with ``fresh`` it begins anew first, whatever its state holds.
  A run depends on no other: neither on its values nor on its rounds.

  Args:
    initial: (seed, *pretrained) -> state before round 0.
    block: (state, clients, pool, hyper, key, num_rounds) -> (state, metrics).
    evaluate: (state, pool, batches) -> probabilities.
    at_once: runs that a device works on side by side; the others wait.
    mesh: devices that runs are dealt over, which must divide S; None is the default device.
  """

  def run(states, fresh, num_rounds, points, pool, pretrained):
    def one(row):
      state, rounds, point = row
      state = jax.lax.cond(fresh, lambda: initial(point.seed, *pretrained), lambda: state)
      state, metrics = block(state, point.clients, pool, point.hyper, point.key, rounds)
      return state, metrics, evaluate(state, pool, point.batches)

    return map_rows(one, (states, num_rounds, points), at_once)

  if mesh is None:
    return jax.jit(run, donate_argnums=0)
  whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
  sharded = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(dealt, whole, dealt, dealt, whole, whole),
    out_specs=dealt,
    check_vma=False,
  )
  runs = NamedSharding(mesh, dealt)
  places = runs, replicated(mesh), runs, runs, replicated(mesh), replicated(mesh)
  return jax.jit(sharded, donate_argnums=0, in_shardings=places, out_shardings=runs)


def blank_states(initial: Callable[..., SimulationState], pretrained: Any, runs: int) -> Any:
  """States to begin ``runs`` runs from with ``fresh``; their values are not read."""
  shapes = jax.eval_shape(initial, jax.ShapeDtypeStruct((), jnp.int32), *pretrained)
  return jax.tree.map(lambda leaf: jnp.zeros((runs, *leaf.shape), leaf.dtype), shapes)
