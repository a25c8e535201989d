"""Times and events of a table as the targets of a survival task."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import require
from fedjax_med.data.table_manifest import Manifest, Survival
from fedjax_med.tasks.survival import COX, HAZARDS, STATES, cut_points
from fedjax_med.tasks.task import Targets


class Predicted(NamedTuple):
  """The part of a table that is predicted.

  Attributes:
    task: name of the task.
    labels: [N] int32 numbers of classes, or of groups whose shares splits keep.
    class_names: names of those.
    targets: numbers that are predicted; None of classes.
    survival: how times and events became targets; None of other tasks.
  """

  task: str
  labels: np.ndarray
  class_names: tuple[str, ...]
  targets: Targets | None = None
  survival: Survival | None = None


def survival_of(
  times: np.ndarray,
  codes: Sequence[str],
  places: Sequence[str],
  manifest: Manifest,
  data: DataConfig,
) -> Predicted:
  """Makes targets of the columns of time and event.

  Args:
    times: [N] of the time column.
    codes: [N] cells of the event column.
    places: [N] file and line of each record, for errors.
    manifest: of the table.
    data: ``survival``, ``intervals``, ``interval_bounds`` and ``strict`` are read.

  Raises:
    UserError: an event is neither of its two values, nobody has a time above 0 or an event,
      ``data.strict`` and a time is 0 or less, or intervals have no horizon.
  """
  events = _events(codes, places, manifest)
  positive = times[times > 0]
  require(
    len(positive) > 0,
    f"no time of the column '{manifest.time}' is above 0",
    "name the column of the time from the first day of observation",
  )
  early = times <= 0
  require(
    not (data.strict and early.any()),
    f"data.strict: {early.sum()} values of '{manifest.time}' are 0 or less",
    "correct them, or set data.strict=False to take the smallest positive time and count them",
  )
  times = np.where(early, positive.min(), times)
  require(
    bool(events.any()),
    f"no record has an event: the column '{manifest.event}' holds {manifest.event_values[0]} only",
    "give a table with events, or correct event_values in the manifest",
  )
  fitted, late = _intervals(times, events, manifest, data)
  present = [int(state) for state in np.unique(events)]
  return Predicted(
    task={"cox": COX, "hazards": HAZARDS}[data.survival],
    labels=np.searchsorted(present, events).astype(np.int32),
    class_names=tuple(STATES[state] for state in present),
    targets=Targets(
      values=np.stack([times, events], axis=1).astype(np.float32),
      names=(manifest.time, manifest.event),
      fitted=fitted,
    ),
    survival=Survival(
      loss=data.survival,
      early=int(early.sum()),
      smallest=float(positive.min()) if early.any() else 0.0,  # told only where it is used
      late=late,
    ),
  )


def _events(codes: Sequence[str], places: Sequence[str], manifest: Manifest) -> np.ndarray:
  """[N] bool."""
  without, with_event = manifest.event_values
  for code, place in zip(codes, places, strict=True):
    require(
      code in manifest.event_values,
      f"{place}: column '{manifest.event}' holds '{code}', which is neither {without}"
      f" (no event) nor {with_event} (event)",
      "correct it, or name its two values in the manifest, such as event_values = [1, 2], that of"
      " no event first",
    )
  return np.array([code == with_event for code in codes], bool)


def _intervals(
  times: np.ndarray, events: np.ndarray, manifest: Manifest, data: DataConfig
) -> tuple[dict[str, np.ndarray], int]:
  """What ``Targets.fitted`` holds of intervals, and how many events are after the last one."""
  if data.survival == "cox":
    return {}, 0
  if data.interval_bounds == "quantiles":
    return {"intervals": np.array([data.intervals], np.float32)}, 0
  require(
    manifest.horizon is not None,
    "data.interval_bounds='equal' and the manifest gives no horizon",
    "give there the end of the last interval, or use data.interval_bounds=quantiles",
  )
  assert manifest.horizon is not None
  ends = cut_points(manifest.horizon, data.intervals).astype(np.float32)
  return {"ends": ends}, int((events & (times > ends[-1])).sum())
