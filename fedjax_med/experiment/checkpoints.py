"""Checkpoints of a run: saved whole and asynchronously by orbax, verified before they are used."""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedjax_med.core.errors import UserError, require
from fedjax_med.simulation.rounds import SimulationState


def _leaves(state: SimulationState) -> dict[str, np.ndarray]:
  paths = jax.tree_util.tree_flatten_with_path(state)[0]
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


def digest(tree: Any) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of every leaf: equal weights, equal digest."""
  sha = hashlib.sha256()
  for name, leaf in sorted(_leaves(tree).items()):
    sha.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


@contextlib.contextmanager
def open_checkpoints(workdir: pathlib.Path) -> Iterator[ocp.CheckpointManager]:
  """The checkpoint manager of a workdir; leaving the block waits for the last save."""
  options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
  with ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options) as manager:
    yield manager


def save(
  manager: ocp.CheckpointManager, state: SimulationState, run_id: str, ledger: str | None
) -> None:
  """Starts saving ``state`` under its round number; the run goes on meanwhile.

  ``ledger`` is the head of the privacy ledger by then: a ledger that lacks it is not this run's.
  """
  host = jax.device_get(state)
  meta = {"run_id": run_id, "digest": digest(host), "ledger": ledger}
  manager.save(
    int(host.server.round),
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(_leaves(host)), meta=ocp.args.JsonSave(meta)
    ),
  )


def restore(
  manager: ocp.CheckpointManager, like: SimulationState, run_id: str
) -> tuple[SimulationState | None, str | None]:
  """The newest checkpoint (None where there is none) and the ledger's head it was saved after.

  Args:
    manager: from ``open_checkpoints``.
    like: a state of the same structure (its values are not used).
    run_id: fingerprint of everything that shapes the trajectory.

  Raises:
    UserError: the checkpoint is unreadable, was altered, or belongs to another run.
  """
  step = manager.latest_step()
  if step is None:
    return None, None
  folder = pathlib.Path(manager.directory) / str(step)
  remedy = f"delete {folder} to go on from the checkpoint before it, or use another --workdir"
  try:
    found = manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()),
    )
    meta, leaves = dict(found["meta"]), dict(found["state"])
  except Exception as error:  # orbax and tensorstore raise many kinds for a damaged folder
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    raise UserError(f"checkpoint {folder} cannot be read ({reason}); {remedy}") from error
  require(
    meta.get("run_id") == run_id,
    f"checkpoint {folder} belongs to run {meta.get('run_id')}, this configuration is run {run_id}",
    "use another --workdir for a different configuration, or the flags of the first start",
  )
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  names = [jax.tree_util.keystr(path) for path, _ in paths]
  expected = {name: (leaf.shape, leaf.dtype) for name, (_, leaf) in zip(names, paths, strict=True)}
  actual = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
  require(actual == expected, f"checkpoint {folder} holds arrays of another model", remedy)
  state = jax.tree.unflatten(structure, [leaves[name] for name in names])
  require(
    digest(state) == meta.get("digest"),
    f"checkpoint {folder} was altered: its contents do not match their digest",
    remedy,
  )
  return jax.tree.map(jax.numpy.asarray, state), meta.get("ledger")
