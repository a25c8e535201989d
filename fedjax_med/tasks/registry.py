"""All tasks by name: a file and a line here, or a call of ``register``."""

from typing import Any

from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.registered import add_name
from fedjax_med.core.sources import read_again, source_digest
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.tasks.multilabel import MULTILABEL
from fedjax_med.tasks.regression import REGRESSION
from fedjax_med.tasks.survival import SURVIVAL_COX, SURVIVAL_HAZARDS
from fedjax_med.tasks.task import Metric, Task

TASKS: dict[str, Task] = {
  "classification": CLASSIFICATION,
  "multilabel": MULTILABEL,
  "regression": REGRESSION,
  "survival_cox": SURVIVAL_COX,
  "survival_hazards": SURVIVAL_HAZARDS,
}
DEFAULT = "classification"


def task_named(name: str) -> Task:
  """The task of that name; raises UserError where there is none."""
  require_choice("task", name, TASKS)
  return TASKS[name]


def task_of(record: dict[str, Any]) -> Task:
  """The task of a run by its config.json, which names none in folders of older versions.

  Raises:
    UserError: it is the user's own, and the file that registers it was not read.
  """
  require(
    is_known(record),
    f"the run's task '{record.get('task')}' is not part of this package",
    "give --network=FILE.py, the file that registers it (usually the --config of the run)",
  )
  return task_named(record.get("task", DEFAULT))


def is_known(record: dict[str, Any]) -> bool:
  """Whether the task of a run, by its config.json, is registered here."""
  return record.get("task", DEFAULT) in TASKS


def register(task: Task) -> None:
  """Adds a task that datasets can name.

  One that was read from its file once more replaces itself: config files are read several times.

  Raises:
    UserError: the name is taken by another task.
  """
  known = TASKS.get(task.name, task)
  pairs = zip(known._replace(shown=()), task._replace(shown=()), strict=True)
  require(
    all(one == other or read_again(one, other) for one, other in pairs)
    and [metric.name for metric in known.shown][: len(task.shown)]
    == [metric.name for metric in task.shown],
    f"a task named '{task.name}' is registered already",
    "choose another name",
  )
  TASKS[task.name] = task
  add_name("task", task.name)


def add_metric(task: str, metric: Metric) -> None:
  """Adds a metric to a task: it is then measured, written and shown wherever metrics are.

  Args:
    task: name of the task.
    metric: the metric, with ``value``. Read from its file once more it replaces itself.

  Raises:
    UserError: there is no such task, the metric has no value, or its name is taken.
  """
  where, known = f"metric '{metric.name}' of task '{task}'", task_named(task)
  require(metric.value is not None, f"{where} has no value", "give Metric(value=...) a function")
  kept = [one for one in known.shown if one.name != metric.name]
  same = [one for one in known.shown if one.name == metric.name]
  bare = metric._replace(value=None)
  require(
    all(one._replace(value=None) == bare and read_again(one.value, metric.value) for one in same),
    f"{where} is there already",
    "choose another name",
  )
  TASKS[task] = known._replace(shown=(*kept, metric))
  add_name("metric", metric.name)


def task_code(name: str) -> str:
  """Digest of the source of what a registered task trains by; empty for this package's own.

  Two losses of one name are two trainings: with the same random keys the difference of their
  releases would have no noise.
  """
  task = task_named(name)
  parts = {source_digest(part, f"task '{name}'") for part in (task.loss, task.columns)}
  return "".join(sorted(parts))
