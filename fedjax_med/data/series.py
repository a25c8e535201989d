"""Series of people, such as those of a smartwatch: recordings become windows of one length."""

import collections
import functools
import math
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import UserError, nearest, require
from fedjax_med.data.classes import order_classes, require_distinct
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.duplicates import join_groups
from fedjax_med.data.files import File
from fedjax_med.data.folder_patterns import LeftOut, require_none_left_out
from fedjax_med.data.manifest import ROLES, columns_of, number_names, read_rows
from fedjax_med.data.patients import number_patients
from fedjax_med.data.ranges import parse_ranges, require_inside
from fedjax_med.data.recordings import Series, cut, window_starts
from fedjax_med.data.series_files import (
  ENDINGS,
  NO_SERIES,
  Recording,
  Samples,
  channels_of,
  read_samples,
  recordings_below,
  resample,
)

MOST_DRAWN_IN = 1000  # samples for each that was recorded: more is a time in other units


class Listed(NamedTuple):
  """The recordings of a source, R of them.

  Attributes:
    files: R files.
    labels: R names of classes.
    patients: R names, None where it is not known; None where nothing says any.
    sites: R names.
    in_test: R sides; None where the split is drawn.
    groups: by a further column R names, None where the cell is empty.
    left: files that are no recordings.
    source: what names the patients.
  """

  files: list[File]
  labels: list[str]
  patients: list[str | None] | None
  sites: list[str]
  in_test: list[bool] | None
  groups: dict[str, list[str | None]]
  left: list[LeftOut]
  source: str


def load_series(data: DataConfig) -> Dataset:
  """The dataset of ``data.source=series``: windows [N, T, 1, C] float32, nan where masked.

  ``data.path`` is a folder PERSON/.../LABEL/FILE or a manifest of files.

  Raises:
    UserError: a setting contradicts the data, or a file is not as it must be; with ``data.strict``
      also where a file is left out, or many values are outside ``data.ranges``.
  """
  length, hop = window_samples(data)
  root = pathlib.Path(data.path).expanduser()
  require(root.exists(), f"data.path={root} does not exist", "point it at a folder or a manifest")
  listed = _below(root, data) if root.is_dir() else _of_manifest(root, data)
  require_none_left_out(root, listed.left, data.strict)
  class_names = order_classes(sorted(set(listed.labels)), data.positive)
  require(
    len(class_names) > 1,
    f"{root} has one class only ('{class_names[0]}')",
    "give recordings of two classes or more",
  )
  channels, recordings = read_recordings([file.path for file in listed.files], data)
  _require_long_enough(listed.files, recordings, length, data)
  windows = [cut(each.values, length, hop) for each in recordings]
  rows = np.repeat(np.arange(len(windows), dtype=np.int32), [len(each) for each in windows])
  inputs = np.concatenate(windows)
  series = Series(
    rate=data.rate,
    length=length,
    hop=hop,
    channels=channels,
    recordings=rows,
    recording_names=tuple(file.name for file in listed.files),
    starts=np.concatenate([window_starts(len(e.values), length, hop) for e in recordings]),
    seconds=sum(len(each.values) for each in recordings) / data.rate,
    resampled=sum(each.resampled for each in recordings),
    padded=sum(len(each.values) < length for each in recordings),
    left_over=_left_over(recordings, length, hop) / data.rate,
    alone=_with_one(listed),
    bridged=_by_channel(channels, np.sum([each.bridged for each in recordings], axis=0)),
    empty=_by_channel(channels, _empty(recordings)),
    constant=_by_channel(channels, _constant(recordings)),
    outside=_outside(inputs, channels, data),
    test_persons=tuple(filter(None, (name.strip() for name in data.test_persons.split("+")))),
  )
  return _dataset(inputs, series, listed, class_names, data)


def window_samples(data: DataConfig) -> tuple[int, int]:
  """Samples of a window, and from one to the next; UserError where there are none."""
  length, hop = (round(s * data.rate) for s in (data.window_seconds, data.hop_seconds))
  for name, samples in (("window_seconds", length), ("hop_seconds", hop)):
    least = 2 if name == "window_seconds" else 1
    require(
      samples >= least,
      f"data.{name}={getattr(data, name):g} at data.rate={data.rate:g} is {samples} samples",
      f"use {least / data.rate:g} or more",
    )
  require(
    not (data.time_column and data.recorded_rate),
    f"data.recorded_rate={data.recorded_rate:g} is not read:"
    f" data.time_column='{data.time_column}' tells when each sample was taken",
    "leave one of them out",
  )
  return length, hop


def _below(root: pathlib.Path, data: DataConfig) -> Listed:
  """The recordings of a folder: its first level is the persons, the folder of a file its class."""
  usual = DataConfig()
  names = [f"{role}_column" for role in ROLES] + ["group_columns", "given_split"]
  told = [f"data.{n}={getattr(data, n)}" for n in names if getattr(data, n) != getattr(usual, n)]
  require(
    not told,
    f"{' and '.join(told)} {'is' if len(told) == 1 else 'are'} read of a manifest only, and"
    f" data.path={root} is a folder",
    "leave it out, or give a manifest (CSV or Parquet)",
  )
  files = recordings_below(root)
  ours = [file for file in files if not file.reason]
  require(
    bool(ours),
    f"data.path={root} holds no recording",
    f"give a folder PERSON/.../CLASS with files ending in {', '.join(ENDINGS)}",
  )
  shallow = [file for file in ours if len(file.parts) < 3]
  require(
    not shallow,
    f"{root}: '{shallow[0].name if shallow else ''}' is not below a folder of a person and one of a"
    " class",
    "give a folder PERSON/.../CLASS, or a manifest (CSV with path, label, patient)",
  )
  people = [file.parts[0] for file in ours]
  left = [LeftOut(name=f.name, reason=f.reason, class_name="") for f in files if f.reason]
  return Listed(
    files=ours,
    labels=[file.parts[-2] for file in ours],
    patients=[*people],
    sites=people,
    in_test=None,
    groups={},
    left=left,
    source="the first level of folders",
  )


def _of_manifest(path: pathlib.Path, data: DataConfig) -> Listed:
  """The recordings that a table lists; see ``manifest.read_rows``."""
  columns = columns_of(path, data)
  require(
    not columns.targets,
    f"{path.with_suffix('.toml')} names targets, and of series a class is predicted",
    "name the column of the class as label",
  )
  rows = read_rows(path, columns, data)
  people = rows.patients
  require(
    rows.sites is not None or (people is not None and all(people)),
    f"{path} does not say whose each recording is",
    "name the column of the persons with --config.data.patient_column, or that of the sites with"
    " --config.data.site_column, and fill every cell",
  )
  sites = rows.sites or [str(person) for person in people or []]
  ours = [file.path.suffix.lower() in ENDINGS for file in rows.files]
  require(any(ours), f"{path} lists no recording", f"list files ending in {', '.join(ENDINGS)}")

  def kept(values):
    return [value for value, own in zip(values, ours, strict=True) if own]

  left = [
    LeftOut(name=file.name, reason=NO_SERIES, class_name=label)
    for file, label, own in zip(rows.files, rows.labels, ours, strict=True)
    if not own
  ]
  return Listed(
    files=kept(rows.files),
    labels=kept(rows.labels),
    patients=None if people is None else kept(people),
    sites=kept(sites),
    in_test=None if rows.in_test is None else kept(rows.in_test),
    groups={name: kept(keys) for name, keys in rows.groups.items()},
    left=left,
    source="the manifest",
  )


def read_recordings(
  paths: Sequence[pathlib.Path], data: DataConfig
) -> tuple[tuple[str, ...], list[Recording]]:
  """Names of the channels, and the recordings of files at ``data.rate``.

  The channels are ``data.signals``, or all columns with a name but ``data.time_column``; their
  order is that of the first file.

  Raises:
    UserError: a file cannot be read, or two have unlike channels.
  """
  chosen = tuple(filter(None, (name.strip() for name in data.signals.split(","))))
  require(
    len(set(chosen)) == len(chosen),
    f"data.signals='{data.signals}' names a column twice",
    "name each once",
  )
  names, first, found = chosen, paths[0], []
  for path in paths:
    samples = read_samples(path)
    own = tuple(c for c in samples.columns if c and c != data.time_column)
    names = names or own
    require(bool(names), f"{path} has no column besides the time", "give a column a channel")
    require(
      bool(chosen) or sorted(own) == sorted(names),
      f"{path} has {len(own)} channels ({', '.join(own)}) and {first} has {len(names)}"
      f" ({', '.join(names)})",
      "give all files the same, or name those that all have with --config.data.signals",
    )
    found.append(
      resample(channels_of(samples, path, names), sample_times(samples, path, data), data.rate)
    )
  return names, found


def sample_times(samples: Samples, path: pathlib.Path, data: DataConfig) -> np.ndarray:
  """[T] seconds of the samples."""
  if not data.time_column:
    return np.arange(len(samples.values)) / (data.recorded_rate or data.rate)
  times = channels_of(samples, path, (data.time_column,))[:, 0]
  wrong = np.flatnonzero(~(np.diff(times) > 0)) + 1  # also where a time is missing
  require(
    not len(wrong) and math.isfinite(times[0]),
    f"{path}, sample {wrong[0] + 1 if len(wrong) else 1}: the time in column"
    f" '{data.time_column}' is missing or not after the one before it",
    "sort the samples, or remove those without a time",
  )
  seconds = float(times[-1] - times[0])
  require(
    seconds * data.rate <= MOST_DRAWN_IN * len(times),
    f"{path} has {len(times)} samples in {seconds:g} seconds by column '{data.time_column}'",
    f"write the time in seconds, or lower data.rate={data.rate:g}",
  )
  return times


def _require_long_enough(
  files: Sequence[File], recordings: Sequence[Recording], length: int, data: DataConfig
) -> None:
  sizes = [len(each.values) for each in recordings]
  longest = int(np.argmax(sizes))
  require(
    sizes[longest] >= length,
    f"data.window_seconds={data.window_seconds:g} is longer than every recording: the longest,"
    f" {files[longest].name}, has {sizes[longest] / data.rate:g} seconds at"
    f" data.rate={data.rate:g}",
    "use a shorter window",
  )


def _left_over(recordings: Sequence[Recording], length: int, hop: int) -> int:
  """Samples that no window holds."""
  sizes = [len(each.values) for each in recordings]
  starts = [window_starts(size, length, hop) for size in sizes]
  held = [s[-1] + length if hop <= length else len(s) * length for s in starts]
  return int(sum(max(0, size - some) for size, some in zip(sizes, held, strict=True)))


def _with_one(listed: Listed) -> int:
  people = listed.sites if listed.patients is None else listed.patients
  return sum(count == 1 for person, count in collections.Counter(people).items() if person)


def _by_channel(channels: Sequence[str], counts: np.ndarray) -> dict[str, int]:
  return {name: int(count) for name, count in zip(channels, counts, strict=True) if count}


def _empty(recordings: Sequence[Recording]) -> np.ndarray:
  return np.sum([np.isnan(each.values).all(axis=0) for each in recordings], axis=0)


def _constant(recordings: Sequence[Recording]) -> np.ndarray:
  flat = [(each.values == each.values[:1]).all(axis=0) for each in recordings]
  return np.sum(flat, axis=0)


def _outside(inputs: np.ndarray, channels: Sequence[str], data: DataConfig) -> dict[str, int]:
  """By channel, values of the windows outside ``data.ranges``."""
  if not data.ranges:
    return {}
  ends = np.array(parse_ranges(data.ranges, len(channels)), np.float32)
  cut_off = (inputs < ends[:, 0]) | (inputs > ends[:, 1])  # False of nan
  counts = _by_channel(channels, cut_off.sum(axis=(0, 1, 2)))
  require_inside(counts, inputs.shape[0] * inputs.shape[1], data.strict, "data.ranges")
  return counts


def _dataset(
  inputs: np.ndarray,
  series: Series,
  listed: Listed,
  class_names: tuple[str, ...],
  data: DataConfig,
) -> Dataset:
  rows = series.recordings
  labels = np.array([class_names.index(name) for name in listed.labels], np.int32)[rows]
  site_names = tuple(sorted(set(listed.sites)))
  require_distinct(list(site_names), "sites")
  sites = np.array([site_names.index(name) for name in listed.sites], np.int32)[rows]
  patients = None
  if listed.patients is not None:
    # The windows of a recording whose person is not known are of one person, whoever that is.
    keys = [name or f"recording {row} of nobody named" for row, name in enumerate(listed.patients)]
    known = np.array([name is not None for name in listed.patients])[rows]
    patients = number_patients(
      [keys[row] for row in rows], listed.source, [listed.sites[row] for row in rows]
    )
    counts = patients.counts._replace(
      named=int(known.sum()), patients=len(set(listed.patients) - {None})
    )
    patients = patients._replace(counts=counts)
    require(
      not (data.strict and counts.shared),
      f"data.strict: {counts.shared} patients stand at several sites",
      "give different people different names, or set data.strict=False to count them",
    )
  in_test = None if listed.in_test is None else np.array(listed.in_test)[rows]
  if data.test_persons:
    in_test = _test_side(series, listed, data)[rows]
  groups = [number_names([keys[row] for row in rows]) for keys in listed.groups.values()]
  return Dataset(
    inputs=inputs,
    labels=labels,
    names=tuple(
      f"{series.recording_names[row]}@{start / series.rate:g}s"
      for row, start in zip(rows, series.starts, strict=True)
    ),
    class_names=class_names,
    sites=sites,
    site_names=site_names,
    patients=patients and patients.numbers,
    patient_counts=patients and patients.counts,
    kept_together=functools.reduce(join_groups, groups) if groups else None,
    skipped=tuple(sorted(listed.left)),
    in_test=in_test,
    modality="series",
    series=series,
  )


def _test_side(series: Series, listed: Listed, data: DataConfig) -> np.ndarray:
  """[R] bool, recordings of the persons whom ``data.test_persons`` names."""
  require(
    listed.in_test is None,
    f"data.test_persons='{data.test_persons}' is not read: the manifest gives the sides",
    "leave it out, or set --config.data.given_split=False",
  )
  people = listed.sites if listed.patients is None else listed.patients
  folded = [_folded(person or "") for person in people]
  wanted = {_folded(name): name for name in series.test_persons}
  for name, shown in wanted.items():
    if name not in folded:
      names = sorted({person for person in people if person})
      raise UserError(f"data.test_persons: nobody is called '{shown}'; {nearest(shown, names)}")
  require(
    bool(wanted),
    f"data.test_persons='{data.test_persons}' names nobody",
    "write names with + between them, or leave it empty",
  )
  require(
    set(folded) - set(wanted) != set(),
    f"data.test_persons='{data.test_persons}' leaves nobody to train on",
    "name fewer",
  )
  in_test = [name in wanted for name in folded]
  for group, keys in listed.groups.items():
    sides = {(_folded(key), side) for key, side in zip(keys, in_test, strict=True) if key}
    both = sorted(key for key, side in sides if side and (key, False) in sides)
    require(
      not both,
      f"data.test_persons='{data.test_persons}' puts rows of one name of column '{group}'"
      f" ('{''.join(both[:1])}') in train and in test",
      "name all people of a group, or leave the column out of data.group_columns",
    )
  return np.array(in_test)


def _folded(name: str) -> str:
  return unicodedata.normalize("NFC", name).casefold()
