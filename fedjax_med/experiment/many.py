"""Several whole runs of one experiment as one program: other seeds, or other shares of the data."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from fedjax_med.experiment.build import Experiment
from fedjax_med.experiment.loop import evaluated_params
from fedjax_med.simulation.mesh import CLIENTS, client_mesh

# Runs side by side on an accelerator; a core is full with one.
AT_ONCE = 8


class Runs(NamedTuple):
  """What differs between R runs of an experiment, each with a leading axis of R.

  Attributes:
    seeds: [R] int32, of the initial weights.
    keys: [R] key of every other draw.
    indices: [R, K, n_max] int32 rows of the clients, as many in each run.
  """

  seeds: np.ndarray
  keys: jax.Array
  indices: np.ndarray


def train_many(experiment: Experiment, runs: Runs) -> list[tuple[Any, Any]]:
  """(evaluated weights, model state) of every run after all rounds, on the host.

  A run equals the same run by itself to rounding. Runs are shared out over the devices of this
  process; nothing is logged, saved or resumed, and no budget stops a run.
  """
  program, rounds = experiment.program, experiment.config.server.num_rounds
  number = len(runs.seeds)
  devices = min(jax.local_device_count(), number) if jax.process_count() == 1 else 1
  at_once = 1 if jax.default_backend() == "cpu" else AT_ONCE

  def several(clients, pool, hyper, runs: Runs):
    def one(run: Runs):
      own = clients._replace(indices=run.indices)

      def body(_, state):
        return program.round(state, own, pool, hyper, run.keys)[0]

      state = jax.lax.fori_loop(0, rounds, body, program.initial(run.seeds))
      return evaluated_params(state), state.server.state

    return jax.lax.map(one, runs, batch_size=at_once)

  mesh = client_mesh(devices)
  program_of_runs = several
  if mesh is not None:
    whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
    program_of_runs = jax.shard_map(
      several, mesh=mesh, in_specs=(whole, whole, whole, dealt), out_specs=dealt, check_vma=False
    )
  again = np.arange(number + -number % devices) % number  # every device has as many
  runs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[again], runs)
  host = jax.device_get((experiment.clients, experiment.pool, experiment.hyper))
  found = jax.device_get(jax.jit(program_of_runs)(*host, runs))
  return [jax.tree.map(lambda leaf, k=k: leaf[k], found) for k in range(number)]
