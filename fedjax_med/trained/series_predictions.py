"""Predictions of a trained model on recordings: a table of recordings, and one of their windows."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import readable
from fedjax_med.data.files import SYSTEM, File
from fedjax_med.data.recordings import cut, of_recordings, window_starts
from fedjax_med.data.series import sample_times, window_samples
from fedjax_med.data.series_files import (
  ENDINGS,
  channels_of,
  read_samples,
  recordings_below,
  resample,
)
from fedjax_med.folder.writing import write_csv
from fedjax_med.trained.loading import Trained
from fedjax_med.trained.predictions import make_probabilities, table_of


class Counts(NamedTuple):
  """Recordings and windows that were predicted, and (name, error) of files that were not."""

  recordings: int
  windows: int
  errors: list[tuple[str, str]]


def windows_output(output: pathlib.Path) -> pathlib.Path:
  """The table of windows beside that of recordings."""
  return output.with_name(f"{output.stem}_windows{output.suffix}")


def predict_series(trained: Trained, place: pathlib.Path, output: pathlib.Path) -> Counts:
  """Writes a row for each recording of ``place`` to ``output``, and one for each window beside it.

  Recordings are read, resampled and cut as those of the run. Columns of recordings: file, windows,
  predicted, the mean over its windows of each class under 'probability of CLASS', error. Columns of
  windows: file, start in seconds, predicted, the same probabilities. Of a task that predicts no
  classes the columns are those of ``Task.table``.

  Args:
    trained: the model.
    place: a folder, which is searched with all below it, or a file.
    output: the table of recordings; its folder is made.

  Raises:
    UserError: there is nothing to read.
  """
  length, hop = window_samples(trained.config.data)
  made = {output.resolve(), windows_output(output).resolve()}  # by an earlier call
  files = [file for file in _files(place) if file.path.resolve() not in made]
  require(bool(files), f"--series={place} holds predictions only", "give a folder of recordings")
  windows: list[np.ndarray] = []
  starts: list[tuple[str, float]] = []
  errors: list[tuple[str, str]] = []
  for file in files:
    values = file.reason or _read(trained, file)
    if isinstance(values, str):
      errors.append((file.name, values))
      continue
    windows.append(cut(values, length, hop))
    times = window_starts(len(values), length, hop) / trained.config.data.rate
    starts += [(file.name, float(time)) for time in times]
  read = [file.name for file in files if file.name not in dict(errors)]
  rows = np.repeat(np.arange(len(read)), [len(each) for each in windows])
  found = _predicted(trained, windows)
  told = table_of(trained, found)
  whole = table_of(trained, of_recordings(found, rows)[0])
  counts = np.bincount(rows, minlength=len(read))
  table = [
    [name, str(count), *cells, ""]
    for name, count, own in zip(read, counts, whole.rows, strict=True)
    for cells in own
  ]
  table += [[name, "", *[""] * len(told.heading), error] for name, error in errors]
  write_csv(output, ["file", "windows", *told.heading, "error"], sorted(table))
  each = [
    [name, f"{time:g}", *cells]
    for (name, time), own in zip(starts, told.rows, strict=True)
    for cells in own
  ]
  write_csv(windows_output(output), ["file", "start", *told.heading], each)
  return Counts(recordings=len(read), windows=len(found), errors=errors)


def _files(place: pathlib.Path) -> list[File]:
  require(place.exists(), f"--series={place} does not exist", "give a folder or a recording")
  if not place.is_dir():
    return [File(path=place, parts=(readable(place.name),), reason="")]
  files = [file for file in recordings_below(place) if file.reason != SYSTEM]
  require(
    not all(file.reason for file in files),
    f"--series={place} holds no recordings, in it or below it",
    f"give a folder with files ending in {', '.join(ENDINGS)}",
  )
  return files


def _read(trained: Trained, file: File) -> np.ndarray | str:
  """[T, C] samples at the rate of the run, or why the file cannot be read."""
  data = trained.config.data
  assert trained.series is not None
  try:
    samples = read_samples(file.path)
    values = channels_of(samples, file.path, trained.series["channels"])
    return resample(values, sample_times(samples, file.path, data), data.rate).values
  except UserError as error:
    return str(error)


def _predicted(trained: Trained, windows: Sequence[np.ndarray]) -> np.ndarray:
  """[n, columns] predictions of all windows, in batches of one shape."""
  if not windows:
    return np.zeros((0, len(trained.class_names)), np.float32)
  inputs, predict = np.concatenate(windows), make_probabilities(trained)
  size = min(trained.config.eval.batch_size, len(inputs))
  parts = []
  for start in range(0, len(inputs), size):
    some = inputs[start : start + size]
    batch = np.zeros((size, *inputs.shape[1:]), np.float32)
    batch[: len(some)] = some
    parts.append(predict(batch)[: len(some)])
  return np.concatenate(parts)
