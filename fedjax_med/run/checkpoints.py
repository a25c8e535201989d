"""Checkpoints of a run: saved whole and asynchronously by orbax, verified before they are used."""

import contextlib
import hashlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from fedjax_med.core.errors import UserError, require
from fedjax_med.simulation.rounds import SimulationState

Manager = ocp.CheckpointManager


def _leaves(state: SimulationState) -> dict[str, np.ndarray]:
  """Arrays by their path; those of no number are left out, since orbax cannot save them."""
  paths = jax.tree_util.tree_flatten_with_path(state)[0]
  leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}
  return {name: leaf for name, leaf in leaves.items() if leaf.size}


def digest(tree: Any) -> str:
  """SHA-256 over names, dtypes, shapes and bytes of every leaf: equal weights, equal digest."""
  return _digest(_leaves(tree))


def _digest(leaves: dict[str, np.ndarray]) -> str:
  sha = hashlib.sha256()
  for name, leaf in sorted(leaves.items()):
    sha.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    sha.update(np.ascontiguousarray(leaf).tobytes())
  return sha.hexdigest()


@contextlib.contextmanager
def open_checkpoints(workdir: pathlib.Path) -> Iterator[Manager]:
  """The checkpoint manager of a workdir; leaving the block waits for the last save."""
  options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
  with ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options) as manager:
    yield manager


def save(manager: Manager, state: SimulationState, run_id: str, ledger: str | None) -> None:
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
  manager: Manager, like: SimulationState, run_id: str
) -> tuple[SimulationState | None, str | None]:
  """The newest checkpoint (None where there is none) and the ledger's head it was saved after.

  Args:
    manager: from ``open_checkpoints``.
    like: a state of the same structure (its values are not used).
    run_id: fingerprint of everything that shapes the trajectory.

  Raises:
    UserError: the checkpoint is unreadable, was altered, or belongs to another run.
  """
  found = _newest(manager, run_id, "this configuration", "the flags of the first start")
  if found is None:
    return None, None
  leaves, head, place, remedy = found
  return _filled(like, leaves, place, remedy), head


class Restored(NamedTuple):
  """The model of a checkpoint.

  Attributes:
    params: [P] of the network: the average over rounds where the run keeps one, else the last
      round's.
    state: [S] of the network.
    client_state: persistent state of one client; None where it was not asked for.
    rounds: that they were trained for.
    head: of the privacy ledger that they were saved after.
  """

  params: Any
  state: Any
  client_state: Any
  rounds: int
  head: str | None


def restore_model(
  workdir: pathlib.Path,
  run_id: str,
  like: tuple[Any, Any],
  like_client: Any = None,
  client: int = 0,
) -> Restored | None:
  """The evaluated weights of a workdir's newest checkpoint; None where it holds none.

  Nothing of the training is needed, and nothing is written.

  Args:
    workdir: folder of the run.
    run_id: of the run that the workdir says it holds.
    like: vectors of the network's params and state, or their shapes.
    like_client: persistent state of a client, arrays or shapes; None reads none.
    client: number of that client.

  Raises:
    UserError: see ``restore``.
  """
  found = _read_newest(workdir, run_id)
  if found is None:
    return None
  leaves, head, place, remedy = found
  server = {n.removeprefix(".server"): leaf for n, leaf in leaves.items() if n[:7] == ".server"}
  parts = (".average" if ".average" in server else ".params", ".state")
  params, state = (
    _filled(vector, {"": server[part]} if part in server else {}, place, remedy)
    for vector, part in zip(like, parts, strict=True)
  )
  client_state = None
  if like_client is not None:
    part = ".client_states"
    stacked = {n.removeprefix(part): leaf for n, leaf in leaves.items() if n.startswith(part)}
    require(
      all(client < len(leaf) for leaf in stacked.values()),
      f"checkpoint {place} holds fewer hospitals than hospitals.json",
      "restore hospitals.json",
    )
    own = {name: leaf[client] for name, leaf in stacked.items()}
    client_state = _filled(like_client, own, place, remedy)
  return Restored(
    params=params,
    state=state,
    client_state=client_state,
    rounds=int(server[".round"]),
    head=head,
  )


def covered(workdir: pathlib.Path, run_id: str) -> tuple[str | None, int] | None:
  """The ledger's head that the newest checkpoint was saved after, and its rounds; None without one.

  Raises:
    UserError: see ``restore``.
  """
  found = _read_newest(workdir, run_id, "the ledger")
  return found and (found.head, int(found.leaves[".server.round"]))


def _read_newest(workdir: pathlib.Path, run_id: str, who: str = "config.json") -> "_Found | None":
  """The newest checkpoint of a workdir, which is left as it is; see ``_newest``."""
  if not (workdir / "checkpoints").is_dir():
    return None
  options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
  log = logging.getLogger("absl")
  level = log.level
  log.setLevel(logging.ERROR)  # orbax warns that nothing can be saved
  try:
    with ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options) as manager:
      return _newest(manager, run_id, who, "a folder that holds the files of one run")
  finally:
    log.setLevel(level)


class _Found(NamedTuple):
  """A checkpoint: its leaves by name, the ledger's head, its place, the remedy if it is bad."""

  leaves: dict[str, np.ndarray]
  head: str | None
  folder: pathlib.Path
  remedy: str


def _newest(manager: Manager, run_id: str, who: str, other_remedy: str) -> _Found | None:
  """The newest checkpoint, whole and of run ``run_id``, or None; UserError if it is not."""
  step = manager.latest_step()
  if step is None:
    return None
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
    f"checkpoint {folder} belongs to run {meta.get('run_id')}, {who} is run {run_id}",
    f"use another --workdir for a different configuration, or {other_remedy}",
  )
  require(
    _digest({name: np.asarray(leaf) for name, leaf in leaves.items()}) == meta.get("digest"),
    f"checkpoint {folder} was altered: its contents do not match their digest",
    remedy,
  )
  return _Found(leaves=leaves, head=meta.get("ledger"), folder=folder, remedy=remedy)


def _filled(like: Any, leaves: dict[str, Any], folder: pathlib.Path, remedy: str) -> Any:
  """``like`` with the values of ``leaves``; UserError where names, shapes or types differ."""
  paths, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
  expected = {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items() if leaf.size}
  actual = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
  require(actual == expected, f"checkpoint {folder} holds arrays of another model", remedy)
  empty = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if not leaf.size}
  filled = jax.tree.unflatten(structure, [{**leaves, **empty}[name] for name in wanted])
  return jax.tree.map(jax.numpy.asarray, filled)
