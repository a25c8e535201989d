"""Windows of recordings: where they begin, which of them overlap, and how they were made."""

from typing import NamedTuple

import numpy as np


class Series(NamedTuple):
  """How windows of a dataset were cut from recordings, of which there are R.

  Attributes:
    rate: samples a second.
    length: samples of a window.
    hop: samples from the start of a window to that of the next.
    channels: name of each channel.
    recordings: [N] int32 recording of each window.
    recording_names: R files.
    starts: [N] int32 first sample of each window in its recording.
    seconds: of all recordings together.
    resampled: recordings that were resampled to ``rate``.
    padded: recordings shorter than a window: what is missing at the end is masked.
    left_over: seconds of recordings that are in no window.
    alone: patients with one recording, which is on one side whatever the split.
    bridged: by channel, missing values that are drawn in linearly.
    empty: by channel, recordings without a value of it: masked.
    constant: by channel, recordings in which it never changes.
    outside: by channel, values of windows that ``data.ranges`` cuts.
    test_persons: names of ``data.test_persons``.
  """

  rate: float
  length: int
  hop: int
  channels: tuple[str, ...]
  recordings: np.ndarray
  recording_names: tuple[str, ...]
  starts: np.ndarray
  seconds: float
  resampled: int
  padded: int
  left_over: float
  alone: int
  bridged: dict[str, int]
  empty: dict[str, int]
  constant: dict[str, int]
  outside: dict[str, int]
  test_persons: tuple[str, ...]


def window_starts(samples: int, length: int, hop: int) -> np.ndarray:
  """First samples of the windows of a recording; 0 alone where it is shorter than a window.

  >>> window_starts(947, 200, 100).tolist()
  [0, 100, 200, 300, 400, 500, 600, 700]
  >>> window_starts(150, 200, 100).tolist()
  [0]
  """
  return np.arange(max(0, samples - length) // hop + 1, dtype=np.int32) * hop


def cut(samples: np.ndarray, length: int, hop: int) -> np.ndarray:
  """Windows [n, length, 1, C] of a recording [T, C]; nan past the end of a shorter one."""
  starts = window_starts(len(samples), length, hop)
  lacking = max(0, length - len(samples))
  whole = np.pad(samples, ((0, lacking), (0, 0)), constant_values=np.nan)
  return whole[starts[:, None] + np.arange(length)][:, :, None]


def overlapping(series: Series, train: np.ndarray, test: np.ndarray) -> np.ndarray:
  """Which test windows share a sample with a training window, [n_test] bool.

  Args:
    series: the windows.
    train: numbers of the training windows.
    test: numbers of the test windows.
  """
  span = int(series.starts.max(initial=0)) + 2 * series.length  # recordings end to end, apart
  places = series.recordings.astype(np.int64) * span + series.starts
  trained = np.sort(places[train])
  first = np.searchsorted(trained, places[test] - series.length, "right")
  last = np.searchsorted(trained, places[test] + series.length, "left")
  return last > first


def of_recordings(predictions: np.ndarray, recordings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Predictions of recordings, each the mean of those of its windows.

  Args:
    predictions: [n, columns] of windows.
    recordings: [n] recording of each window.

  Returns:
    [r, columns] means, and [r] the place of the first window of each recording.
  """
  _, first, place = np.unique(recordings, return_index=True, return_inverse=True)
  sums = np.zeros((len(first), predictions.shape[1]))
  np.add.at(sums, place, predictions.astype(np.float64))
  means = sums / np.bincount(place, minlength=len(first))[:, None]
  return means.astype(predictions.dtype), first
