"""All tasks by name."""

from typing import Any

from fedjax_med.core.errors import require_choice
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.tasks.task import Task

TASKS: dict[str, Task] = {
  "classification": CLASSIFICATION,
}
DEFAULT = "classification"


def task_named(name: str) -> Task:
  """The task of that name; raises UserError where there is none."""
  require_choice("task", name, TASKS)
  return TASKS[name]


def task_of(record: dict[str, Any]) -> Task:
  """The task of a run by its config.json, which names none in folders of older versions."""
  return task_named(record.get("task", DEFAULT))
