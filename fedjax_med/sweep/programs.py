"""The compiled programs of a sweep: a group of points shares one, with an axis of runs."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedjax_med.core.config import init_seed
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import Dataset, input_bytes
from fedjax_med.federated.algorithm import Pool
from fedjax_med.prepare.accounted_arrays import differences, require_accounted
from fedjax_med.prepare.experiment import (
  Experiment,
  host_pool,
  make_experiment,
  make_shared_program,
)
from fedjax_med.prepare.memory import shared_devices
from fedjax_med.prepare.program import Program
from fedjax_med.prepare.recipe import Shapes
from fedjax_med.run.drive import Advance, Reached
from fedjax_med.run.measure import evaluated, evaluation_groups
from fedjax_med.simulation.evaluation import Batches, batches_of, shape_of
from fedjax_med.simulation.mesh import CLIENTS, RUNS_AT_ONCE, client_mesh, local_devices, replicated
from fedjax_med.simulation.rounds import SimulationState
from fedjax_med.simulation.runs_axis import RunInputs, blank_states, make_sweep
from fedjax_med.sweep.points import Planned, chunks, images_of, shown

# A kill loses a chunk, so it stays small where memory would allow more.
MAX_AT_ONCE = 64
# Programs that compile while another one runs: of a CPU, XLA uses one core. The compiler of an
# accelerator times kernels, for which it must be idle.
AHEAD = 2
POOL_SHARE = 0.1  # of the memory that is left, for images of further sets


class Placement(NamedTuple):
  """Placement of the runs of a group on this machine.

  Attributes:
    chunks: the runs that are trained together.
    size: runs in a program.
    at_once: how many of them a device works on side by side.
    mesh: devices that they are dealt over; None is the default device.
  """

  chunks: list[list[Planned]]
  size: int
  at_once: int
  mesh: Mesh | None


class Prepared(NamedTuple):
  """A group of points that share a program.

  Attributes:
    group: its points.
    program: of one run.
    shapes: sizes that the program is made for.
    placement: placement of the runs on this machine.
    batches: [b, size] of test images, enough for each run's.
    images: in the pool, enough for each run's.
    sweep: (states, fresh, rounds [S], points, pool, pretrained) -> (states, metrics,
      probabilities).
    compilations: how often ``sweep`` was compiled in this process.
  """

  group: Sequence[Planned]
  program: Program
  shapes: Shapes
  placement: Placement
  batches: tuple[int, int]
  images: int
  sweep: Callable[..., Any]
  compilations: Callable[[], int]


def compiled_ahead(plans: Sequence[Prepared]) -> Iterator[Prepared]:
  """The program of each plan in turn; on a CPU the next ones compile while it is used."""
  ahead = AHEAD if jax.default_backend() == "cpu" else 0
  left, waiting = iter(plans), deque()
  with ThreadPoolExecutor(max(1, ahead)) as threads:
    try:
      for _ in plans:
        waiting += [threads.submit(_compile, p) for p in islice(left, 1 + ahead - len(waiting))]
        yield waiting.popleft().result()
    finally:
      for each in waiting:
        each.cancel()


def prepare(group: Sequence[Planned], at_once: int) -> Prepared:
  """The program of a group, compiled."""
  return _compile(make_group_program(group, at_once))


def make_group_program(group: Sequence[Planned], at_once: int) -> Prepared:
  """The program of a group, whose ``sweep`` is still to be compiled.

  It may time steps, so nothing else must run meanwhile.

  Raises:
    UserError: a point does not fit; the sentence names it.
  """
  try:
    program, shapes = make_shared_program([each.case for each in group])
  except UserError as error:
    raise UserError(f"point {shown(group[0].point)}: {error}") from error
  placement = _placement(program, group, at_once)
  parts, traces = program.parts, []

  def evaluate(state, pool, batches):
    traces.append(1)
    return parts.evaluate(evaluated(parts, state), pool, batches)

  sweep = make_sweep(
    parts.initial, parts.block, evaluate, at_once=placement.at_once, mesh=placement.mesh
  )
  tests = [evaluation_groups(parts, each.case.hospitals) for each in group]
  batches = shape_of(tests, group[0].case.config.eval.batch_size)
  images = max(sum(len(each.labels) for each in _sets(part)) for part in placement.chunks)
  return Prepared(
    group=group,
    program=program,
    shapes=shapes,
    placement=placement,
    batches=batches,
    images=images,
    sweep=sweep,
    compilations=lambda: len(traces),
  )


def _compile(prepared: Prepared) -> Prepared:
  """Compiles ``sweep`` for the shapes of the group."""
  parts, size, case = prepared.program.parts, prepared.placement.size, prepared.group[0].case
  dataset, shape = case.hospitals.dataset, jax.ShapeDtypeStruct
  images: Any = jax.tree.map(
    lambda leaf: shape((prepared.images, *leaf.shape[1:]), leaf.dtype), host_pool(dataset)
  )
  run = make_experiment(case, prepared.program, prepared.shapes, images, None)
  batches, _ = batches_of(evaluation_groups(parts, case.hospitals), prepared.batches)
  states = jax.eval_shape(lambda: blank_states(parts.initial, parts.pretrained, size))
  points, lengths = stack([run] * size, [batches] * size), np.zeros(size, np.int32)
  sweep: Any = prepared.sweep
  lowered = sweep.lower(states, np.bool_(True), lengths, points, run.pool, parts.pretrained)
  return prepared._replace(sweep=lowered.compile())


def _sets(part: Sequence[Planned]) -> list[Dataset]:
  """Each set of images once; synthetic ones are still black."""
  return list({images_of(each): each.case.hospitals.dataset for each in part}.values())


def _placement(program: Program, group: Sequence[Planned], asked: int) -> Placement:
  devices = local_devices()
  cpu = jax.default_backend() == "cpu"
  shapes = jax.eval_shape(program.initial)
  state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  shared = shared_devices(devices)
  side_by_side, most, limit = 1 if cpu else RUNS_AT_ONCE, MAX_AT_ONCE, math.inf
  images = [input_bytes(each) for each in _sets(group)]
  if program.budget.size is not None:
    room = program.budget.size
    if not cpu:
      side_by_side = max(1, min(RUNS_AT_ONCE, int(room / 2 / program.needs)))
    room -= shared * side_by_side * program.needs  # with the largest set of images
    limit = max(images) + POOL_SHARE * max(0, room) / shared
    room -= shared * (min(limit, sum(images)) - max(images))
    # A state is there before and after a block, and once more on its way to the host.
    most = max(devices, min(most, int(devices / shared * room / (3 * state))))
  most = max(1, asked or most)
  fill = devices * side_by_side
  largest = max(len(part) for part in chunks(group, len(group), fill, limit))
  parts = -(-largest // most)
  size = -(-largest // parts)
  devices = min(devices, size)
  # Every device has as many, in whole rows side by side: what is left over would be compiled again.
  side_by_side = min(side_by_side, -(-size // devices))
  size += -size % (devices * side_by_side)
  mesh = client_mesh(devices) if devices > 1 else None
  return Placement(
    chunks=chunks(group, size, fill, limit), size=size, at_once=side_by_side, mesh=mesh
  )


def stack(runs: Sequence[Experiment], batches: Sequence[Batches]) -> RunInputs:
  """Stacks the inputs that runs do not share; ``batches`` are of their test sets.

  Raises:
    RuntimeError: the arrays of a point are not those of its accounted mechanisms.
  """

  def stacked(*leaves: Any) -> jax.Array:
    return jnp.stack(leaves)

  clients = jax.tree.map(stacked, *[run.clients for run in runs])
  hyper = jax.tree.map(stacked, *[run.hyper for run in runs])
  held = jax.device_get((clients, hyper))
  for row, run in enumerate(runs):
    case = run.case
    its_clients, its_hyper = jax.tree.map(lambda leaf, row=row: leaf[row], held)
    found = differences(case.protection, case.numbers, case.rows, its_clients, its_hyper, run.start)
    require_accounted(found)
  return RunInputs(
    seed=jnp.asarray([init_seed(run.config) for run in runs], jnp.int32),
    key=jnp.stack([run.key for run in runs]),
    clients=clients,
    hyper=hyper,
    batches=jax.tree.map(stacked, *batches),
  )


def advance_together(
  runs: Sequence[Experiment], starts: Sequence[int], prepared: Prepared, tell: Callable[[int], Any]
) -> tuple[Advance, Callable[[], list[SimulationState]]]:
  """Builds the function that advances a chunk of runs, and one that returns their states.

  Args:
    runs: the runs; empty places of the program repeat the first one and are not advanced.
    starts: row of the pool at which the images of each run begin.
    prepared: their group.
    tell: called with the rounds that all runs have done, whenever they were advanced.
  """
  placement, parts, number = prepared.placement, prepared.program.parts, len(runs)
  tests = [
    [rows + start for rows in evaluation_groups(parts, run.hospitals)]
    for run, start in zip(runs, starts, strict=True)
  ]
  batches, places = zip(*(batches_of(test, prepared.batches) for test in tests), strict=True)
  missing = placement.size - number
  points = stack([*runs, *[runs[0]] * missing], [*batches, *[batches[0]] * missing])
  points = put(points, placement.mesh, dealt=True)
  states = put(
    blank_states(parts.initial, parts.pretrained, placement.size), placement.mesh, dealt=True
  )
  fresh, pool = True, runs[0].pool

  def advance(lengths: np.ndarray) -> list[Reached]:
    nonlocal states, fresh
    began, fresh = fresh, False
    states, metrics, probabilities = prepared.sweep(
      states, np.bool_(began), np.pad(lengths, (0, missing)), points, pool, parts.pretrained
    )
    rounds, steps = jax.device_get((states.server.round, states.steps))
    metrics, probabilities = jax.device_get((metrics, probabilities))
    tell(int(rounds[:number].sum()))
    return [
      Reached(
        rounds=int(rounds[k]),
        steps=steps[k],
        metrics=None if began else jax.tree.map(lambda leaf, k=k: leaf[k], metrics),
        probabilities=probabilities[k].reshape(-1, probabilities.shape[-1])[places[k]],
      )
      for k in range(number)
    ]

  def states_now() -> list[SimulationState]:
    host = jax.device_get(states)
    return [jax.tree.map(lambda leaf, k=k: leaf[k], host) for k in range(number)]

  return advance, states_now


def pool_of(datasets: Sequence[Dataset], prepared: Prepared) -> Pool:
  """All examples on the devices, padded to ``prepared.images`` with zeros that no client holds."""
  missing = prepared.images - sum(len(each.labels) for each in datasets)

  def joined(*leaves: np.ndarray) -> jax.Array:
    blank = np.zeros((missing, *leaves[0].shape[1:]), leaves[0].dtype)
    return jnp.asarray(np.concatenate([*leaves, blank]))

  images = jax.tree.map(joined, *map(host_pool, datasets))
  return put(images, prepared.placement.mesh, dealt=False)


def put(tree: Any, mesh: Mesh | None, dealt: bool) -> Any:
  if mesh is None:
    return jax.device_put(tree, jax.devices()[0])
  place = NamedSharding(mesh, PartitionSpec(CLIENTS)) if dealt else replicated(mesh)
  return jax.device_put(tree, place)
