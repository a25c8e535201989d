"""Numbers or several labels to predict in place of a class, for sources of pictures."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.data.dataset import Dataset
from fedjax_med.tasks.multilabel import GROUPS, groups_of
from fedjax_med.tasks.task import Targets


def are_labels(values: np.ndarray) -> bool:
  """Whether all known values are 0 or 1, and there are several columns: labels, and not numbers."""
  return values.shape[1] > 1 and bool(np.isin(values[~np.isnan(values)], (0, 1)).all())


def group_names(values: np.ndarray) -> list[str]:
  """The group of each example, which stands in the place of its class; see ``with_targets``."""
  if not are_labels(values):
    return ["example"] * len(values)
  return [GROUPS[int(some)] for some in (values == 1).any(axis=1)]


def with_targets(
  dataset: Dataset, values: Mapping[str, np.ndarray], names: Sequence[str], unit: str = ""
) -> Dataset:
  """The dataset with targets: of the task multilabel where they are labels, else of regression.

  Args:
    dataset: examples with any classes.
    values: [M] float32 by name of the example, nan where missing; of all that are listed.
    names: [M] of the columns.
    unit: of numbers.
  """
  held = np.stack([values[name] for name in dataset.names]).astype(np.float32)
  several = are_labels(np.stack(list(values.values())))  # those of unreadable files too
  labels, class_names = np.zeros(len(held), np.int32), ("example",)
  if several:
    labels, class_names = groups_of(held)
  return dataclasses.replace(
    dataset,
    task="multilabel" if several else "regression",
    labels=labels,
    class_names=class_names,
    targets=Targets(values=held, names=tuple(names), unit=unit),
  )


def require_no_positive(positive: str) -> None:
  """Raises UserError where a positive class is named and none is predicted."""
  require(
    positive == "",
    f"data.positive='{positive}' is of classes, and several labels or numbers are predicted",
    "leave it out",
  )
