"""The model that a run has trained, from its workdir alone: neither data nor pretrained file."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_med import __version__
from fedjax_med.core.config import Config, algorithm_options, from_dict
from fedjax_med.core.errors import UserError, require, require_choice
from fedjax_med.core.keys import base_key
from fedjax_med.core.presets import register_parts
from fedjax_med.data.grey import EIGHT_BITS, Grey
from fedjax_med.data.modality import Modality, modality_of
from fedjax_med.federated.algorithm import FederatedAlgorithm
from fedjax_med.federated.local import LocalTraining
from fedjax_med.federated.registry import ALGORITHMS, create_algorithm
from fedjax_med.federated.vector import NetworkSpec, network_spec
from fedjax_med.folder.writing import require_text
from fedjax_med.models.model import Model, from_flax
from fedjax_med.models.ops import Lowering
from fedjax_med.models.registry import recreate_module
from fedjax_med.prepare.plan import choose_lowering
from fedjax_med.privacy import ledger
from fedjax_med.run.checkpoints import Restored, restore_model
from fedjax_med.simulation.mesh import cpu_cores
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.tasks.registry import task_of
from fedjax_med.tasks.task import Targets, Task, read_targets


class Trained(NamedTuple):
  """A run's global model, or that of one of its hospitals, ready to be used.

  Attributes:
    folder: the workdir.
    run_id: fingerprint of the run.
    config: config of the run.
    class_names: in the order of the model's outputs.
    rounds: rounds that the weights were trained for.
    model: the network.
    params: weights that the run is measured by: its average over rounds, if it has one.
    state: stored statistics, {} for most networks.
    grey: rule by which the run made pixels of grey values.
    modality: kind of the run's examples.
    task: kind of the run's predictions.
    stem_pool_padding: padding of the pool of the network's stem; empty if it has no such choice.
    hospital: hospital of the model; empty for the global one.
    input_shape: shape of one input of the network; () is a picture of data.image_size.
    table: how records became inputs, from hospitals.json; None of other examples.
    targets: what a task without classes predicts, without values; None of other tasks.
  """

  folder: pathlib.Path
  run_id: str
  config: Config
  class_names: tuple[str, ...]
  rounds: int
  model: Model
  params: Any
  state: Any
  grey: Grey
  modality: Modality
  task: Task
  stem_pool_padding: str
  hospital: str
  input_shape: tuple[int, ...] = ()
  table: dict[str, Any] | None = None
  targets: Targets | None = None

  @property
  def described(self) -> str:
    """Origin of the model, for people."""
    whose = f", the model of {self.hospital}" if self.hospital else ""
    return f"run {self.run_id} after round {self.rounds}{whose}"

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Shape of one input of the network, (H, W, C) of a picture."""
    side = self.config.data.image_size
    return self.input_shape or (side, side, self.grey.channels)

  @property
  def predicts_classes(self) -> bool:
    """Whether predictions are probabilities of the classes."""
    return self.task.predict is CLASSIFICATION.predict

  @property
  def private(self) -> bool:
    """Whether the run promises differential privacy."""
    levels = self.config.privacy, self.config.client_privacy
    return any(level.mechanism != "none" for level in levels)


def load(
  folder: pathlib.Path, network: str = "", hospital: str = "", lowering: Lowering | None = None
) -> Trained:
  """Loads the newest checkpoint of a finished or interrupted run.

  Args:
    folder: the workdir.
    network: Python file that registers the network, source, task or other parts of the run that
      are the user's own; empty without any.
    hospital: name of the hospital whose model is meant, where the algorithm leaves each one of its
      own; empty for the global model.
    lowering: lowering of convolutions; None chooses as the run would here.

  Raises:
    UserError: ``network`` registers nothing, the folder holds no run or no weights, another version
      of this package or another network was trained, or the run has no global model, or no model
      of that hospital, or its ledger does not count the rounds of the weights.
  """
  register_parts(network)
  run = _read_run(folder)
  config, saved = run.config, run.network
  cores = cpu_cores()
  lowering = lowering or choose_lowering(config.execution.lowering, cores)[0]
  module = recreate_module(config.model, run.num_columns, saved)
  model = from_flax(module, lowering=lowering)
  image = jnp.zeros((1, *run.input_shape), jnp.float32)
  spec = network_spec(*jax.eval_shape(model.init, base_key(0), image))
  algorithm = _personal_algorithm(folder, run, hospital, spec)
  like = (
    jax.ShapeDtypeStruct((spec.params.size,), jnp.float32),
    jax.ShapeDtypeStruct((spec.state.size,), jnp.float32),
  )
  like_client = jax.eval_shape(algorithm.init_client, *like) if algorithm else None
  client = run.hospitals.index(hospital) if hospital else 0
  restored = restore_model(folder, run.run_id, like, like_client, client)
  if restored is None:
    raise UserError(
      f"{folder} holds no checkpoint, because the run ended before its first log point or is a"
      " point of a sweep, which keeps no weights; train it by itself with the command in its"
      " config.json"
    )
  _require_counted(folder, run, restored)
  params, state = restored.params, restored.state
  if algorithm and algorithm.personal:
    params, state = algorithm.personal(params, state, restored.client_state)
  params, state = spec.trees(params, state)
  padding = getattr(module, "stem_pool_padding", "")
  return Trained(
    folder=folder,
    run_id=run.run_id,
    config=config,
    class_names=run.class_names,
    rounds=restored.rounds,
    model=model,
    params=params,
    state=state,
    grey=run.grey,
    modality=run.modality,
    task=run.task,
    stem_pool_padding=padding,
    hospital=hospital,
    input_shape=run.input_shape,
    table=run.table,
    targets=run.targets,
  )


def _require_counted(folder: pathlib.Path, run: "_Run", restored: Restored) -> None:
  """Raises UserError unless the ledger of a private run counts the rounds of its weights."""
  levels = run.config.privacy, run.config.client_privacy
  if all(level.mechanism == "none" for level in levels):
    return
  book = ledger.read(folder)
  require(
    book.run_id == run.run_id,
    f"{folder / ledger.FILE} is the ledger of run {book.run_id}, config.json is of {run.run_id}",
    "give a folder that holds the files of one run",
  )
  ledger.require_covers(book, folder, restored.head, restored.rounds)


class _Run(NamedTuple):
  """Facts from the files of a run.

  Attributes:
    config: config of the run.
    class_names: in the order of the model's outputs.
    hospitals: names of the hospitals.
    run_id: fingerprint of the run.
    network: the registry's record of the network.
    grey: rule by which the run made pixels of grey values.
    modality: kind of its examples.
    task: kind of its predictions.
    num_columns: outputs of the network for an example.
    input_shape: shape of one input of the network.
    table: how records became inputs; None of other examples.
    targets: what a task without classes predicts; None of other tasks.
  """

  config: Config
  class_names: tuple[str, ...]
  hospitals: list[str]
  run_id: str
  network: dict[str, Any]
  grey: Grey
  modality: Modality
  task: Task
  num_columns: int
  input_shape: tuple[int, ...]
  table: dict[str, Any] | None
  targets: Targets | None


def _read_run(folder: pathlib.Path) -> _Run:
  """Reads config.json and hospitals.json; UserError where they are not this version's of a run."""
  require(
    folder.is_dir(),
    f"--workdir={folder} is not a folder",
    "give the folder of a run that fedjax_med.train has written",
  )
  require(
    not (folder / "sweep.json").exists(),
    f"--workdir={folder} is a sweep, whose points keep results but no weights",
    "train the point by itself, with the command in points/NUMBER/config.json",
  )
  require_text(folder)
  record, held = _read(folder / "config.json"), _read(folder / "hospitals.json")
  modality, task = modality_of(record), task_of(record)
  try:
    config = from_dict(record["config"])
    side = config.data.image_size
    grey = Grey(**held["grey"]) if "grey" in held else EIGHT_BITS
    pictured = (side, side, grey.channels)  # of folders that do not say their inputs' shape
    run = _Run(
      config=config,
      class_names=tuple(held["class_names"]),
      hospitals=[str(hospital["name"]) for hospital in held["hospitals"]],
      run_id=str(record["run_id"]),
      network=dict(record.get("network", {})),
      grey=grey,
      modality=modality,
      task=task,
      num_columns=int(record.get("num_columns", len(held["class_names"]))),
      input_shape=tuple(record.get("input_shape", pictured)),
      table=held.get("table"),
      targets=read_targets(held["targets"]) if "targets" in held else None,
    )
    version = str(record["versions"]["fedjax_med"])
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f"{folder} holds a run of another version of fedjax_med ({error}); use the version that"
      " its config.json names"
    ) from error
  require(
    version == __version__,
    f"{folder} was trained by fedjax_med {version} and this is {__version__}, whose networks may"
    " make something else of the same weights",
    "use the version that trained it, or train again",
  )
  return run


def _personal_algorithm(
  folder: pathlib.Path, run: _Run, hospital: str, spec: NetworkSpec
) -> FederatedAlgorithm | None:
  """The algorithm if a hospital's own model is meant, None for the global one.

  Raises:
    UserError: there is no such model.
  """
  name = run.config.server.algorithm
  if not hospital:
    entry = ALGORITHMS.get(name)
    require(
      entry is None or entry.has_global_model,
      f"{folder} was trained with server.algorithm='{name}', whose global model"
      " lacks the layers that stay at the hospitals",
      f"say whose model is meant, such as --hospital='{run.hospitals[0]}'",
    )
    return None
  algorithm = _algorithm(run.config, spec)
  require(
    algorithm.personal is not None,
    f"--hospital={hospital}: under server.algorithm='{name}' all hospitals have the same model",
    "leave out --hospital",
  )
  require_choice("--hospital", hospital, run.hospitals)
  return algorithm


def _algorithm(config: Config, spec: NetworkSpec) -> FederatedAlgorithm:
  """The run's algorithm, to tell its models apart: it cannot train.

  Raises:
    UserError: this version has no algorithm of that name.
  """
  nothing: Any = None
  bands = config.privacy.bands if config.privacy.mechanism != "none" else 1
  return create_algorithm(
    config.server.algorithm,
    LocalTraining(train=nothing, optimizer=nothing, rate=nothing, spec=spec, bands=bands),
    optax.identity(),
    average=config.server.ema_decay > 0,
    options=algorithm_options(config, traced=False),
  )


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except FileNotFoundError as error:
    raise UserError(
      f"{path.parent} has no {path.name}; give the folder of a run that fedjax_med.train wrote"
    ) from error
  except (ValueError, TypeError) as error:  # UnicodeDecodeError is one
    raise UserError(f"{path} is not what a run writes ({error}); restore it") from error
