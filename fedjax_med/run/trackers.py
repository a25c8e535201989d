"""Log points in an experiment tracker: TensorBoard (without TensorFlow), Weights & Biases, MLflow.

A tracker is a context that yields ``write(round, values)``. Test metrics are no private release
(see the privacy statement), and Weights & Biases sends them to its servers unless WANDB_MODE says
otherwise.
"""

import contextlib
import importlib
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from fedjax_med.core.config import flat
from fedjax_med.core.errors import UserError
from fedjax_med.core.text import encodable
from fedjax_med.tasks.task import Task

Write = Callable[[int, dict[str, float]], None]


def require_installed(name: str) -> None:
  """Raises UserError unless the tracker's package is there; nothing has been trained by then."""
  if name != "none":
    _package(name)


@contextlib.contextmanager
def track(
  name: str, folder: pathlib.Path, run_id: str, config: dict[str, Any], task: Task
) -> Iterator[Callable[[dict[str, Any]], None]]:
  """Yields the function that records a test line of metrics.jsonl.

  Args:
    name: none, tensorboard, wandb or mlflow.
    folder: the workdir; TensorBoard and MLflow write below it.
    run_id: fingerprint of the run.
    config: the configuration as nested dictionaries.
    task: whose metrics are recorded.

  Raises:
    UserError: the tracker's package is not installed.
  """
  if name == "none":
    yield lambda line: None
    return
  with TRACKERS[name](folder, run_id, _encodable(config)) as write:
    yield lambda line: write(line["round"], values_of(line, task))


def _encodable(value: Any) -> Any:
  """The same with text that databases and servers take: a path may hold bytes that are no text."""
  if isinstance(value, dict):
    return {key: _encodable(inner) for key, inner in value.items()}
  return encodable(value) if isinstance(value, str) else value


def values_of(line: dict[str, Any], task: Task) -> dict[str, float]:
  """Numbers of a test line by slash-separated names; undefined values are left out."""
  names = [metric.name for metric in task.shown]
  found = {f"test/{name}": line.get(name) for name in names}
  found["epsilon"] = line.get("epsilon_max")
  for client in line["clients"]:
    found |= {f"{client['name']}/{name}": client.get(name) for name in names}
  named: dict[str, Any] = {}
  for key, value in found.items():
    allowed = re.sub(r"[^\w\-./ ]", "_", key)  # what MLflow allows in a name
    while allowed in named:  # two hospitals may differ in what is not allowed only
      allowed += "_"
    named[allowed] = value
  return {
    name: float(value)
    for name, value in named.items()
    if value is not None and math.isfinite(float(value))
  }


@contextlib.contextmanager
def _tensorboard(folder: pathlib.Path, run_id: str, config: dict[str, Any]) -> Iterator[Write]:
  board = _package("tensorboard")
  # Event files of a resumed run stand beside the first ones; TensorBoard reads all of them.
  with board.SummaryWriter(str(folder / "tensorboard"), write_to_disk=True) as writer:

    def write(round: int, values: dict[str, float]) -> None:
      for key, value in values.items():
        writer.add_scalar(key.replace(" ", "_"), value, round)
      writer.flush()

    yield write


@contextlib.contextmanager
def _wandb(folder: pathlib.Path, run_id: str, config: dict[str, Any]) -> Iterator[Write]:
  wandb = _package("wandb")
  with wandb.init(
    project="fedjax_med", dir=str(folder), id=run_id, resume="allow", config=config
  ) as run:
    yield lambda round, values: run.log(values, step=round)


@contextlib.contextmanager
def _mlflow(folder: pathlib.Path, run_id: str, config: dict[str, Any]) -> Iterator[Write]:
  client = _package("mlflow").MlflowClient(f"sqlite:///{(folder / 'mlflow.db').absolute()}")
  experiment = client.get_experiment_by_name("fedjax_med")
  number = experiment.experiment_id if experiment else client.create_experiment("fedjax_med")
  run = client.create_run(number, run_name=run_id)
  for field, value in flat(config).items():
    client.log_param(run.info.run_id, field, value)

  def write(round: int, values: dict[str, float]) -> None:
    for key, value in values.items():
      client.log_metric(run.info.run_id, key, value, step=round)

  yield write
  client.set_terminated(run.info.run_id)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow.tracking"}


def _package(name: str) -> Any:
  try:
    return importlib.import_module(PACKAGES[name])
  except ImportError as error:
    raise UserError(
      f"eval.tracker={name} needs the package {PACKAGES[name].partition('.')[0]}; run"
      f" python -m pip install -e '.[{name}]', or set --config.eval.tracker=none"
    ) from error
