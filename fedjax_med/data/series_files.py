"""Files of recordings: CSV and text with a row a sample, and NumPy arrays."""

import csv
import pathlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import readable
from fedjax_med.data.files import SYSTEM, File, walk

TEXT, ARRAY = (".csv", ".tsv", ".txt"), ".npy"
ENDINGS = (*TEXT, ARRAY)
NO_SERIES = "no recording (CSV, text or .npy)"
SEPARATORS = ",;\t"
MISSING = ("", "NA", "N/A", "nan", "NaN", "NAN", "null")  # cells without a value


class Samples(NamedTuple):
  """The samples of a file.

  Attributes:
    values: [T, C] float64, nan where there is no value.
    columns: names of its columns; "1", "2" and so on where it has no header.
  """

  values: np.ndarray
  columns: tuple[str, ...]


class Recording(NamedTuple):
  """A recording at the rate of the run.

  Attributes:
    values: [T, C] float32; nan in a channel without any value.
    bridged: [C] missing values that were drawn in.
    resampled: whether it had another rate.
  """

  values: np.ndarray
  bridged: np.ndarray
  resampled: bool


def recordings_below(root: pathlib.Path) -> list[File]:
  """All files below a folder, those that are no recordings with the reason."""
  return [_judged(file) for file in walk(root).files]


def _judged(file: File) -> File:
  if file.reason == SYSTEM or file.reason.startswith(("hidden", "a link", "it cannot", "not a")):
    return file
  ours = file.path.suffix.lower() in ENDINGS
  return file._replace(reason="" if ours else NO_SERIES)


def read_samples(path: pathlib.Path) -> Samples:
  """Reads a file, with a row a sample and a column a channel.

  Text is separated by commas, semicolons, tabs or spaces, with or without a header.

  Raises:
    UserError: it cannot be read, is empty, has a column twice, or a cell that is no finite number.
  """
  samples = _array(path) if path.suffix.lower() == ARRAY else _text(path)
  require(len(samples.values) > 0, f"{path} holds no samples", "remove it, or record it again")
  infinite = np.argwhere(np.isinf(samples.values))
  row, column = infinite[0] if len(infinite) else (0, 0)
  require(
    not len(infinite),
    f"{path}, sample {row + 1}: column '{samples.columns[column]}' is infinite",
    "correct it, or leave the cell empty",
  )
  return samples


def _array(path: pathlib.Path) -> Samples:
  try:
    values = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f"{path} cannot be read as a NumPy array ({error}); save it anew") from error
  values = values[:, None] if values.ndim == 1 else values
  require(
    values.ndim == 2 and values.shape[1] > 0 and values.dtype.kind in "iufb",
    f"{path} is {values.dtype}{list(values.shape)}, which is no recording",
    "save numbers of shape [samples, channels]",
  )
  columns = tuple(str(number + 1) for number in range(values.shape[1]))
  return Samples(values.astype(np.float64), columns)


def _text(path: pathlib.Path) -> Samples:
  import pandas as pd

  try:
    with path.open(encoding="utf-8-sig", newline="") as file:
      first = file.readline()
    separator = max(SEPARATORS, key=first.count)
    plain = separator if first.count(separator) else r"\s+"
    split = first.split() if plain == r"\s+" else next(csv.reader([first], delimiter=plain), [])
    cells = [cell.strip().strip('"') for cell in split]
    comma = separator == ";" and plain == ";"
    header = not all(_is_number(cell, comma) for cell in cells)
    named = [cell for cell in cells if cell]
    require(
      len(named) < 2 or named != [str(number) for number in range(len(named))],
      f"the first line of {path} is {', '.join(named[:4])}, which may be the header that pandas"
      " gives columns without names, or a sample",
      "name the columns, or leave the header out; write 0.0 if it is a sample",
    )
    with warnings.catch_warnings():
      warnings.simplefilter("error", pd.errors.ParserWarning)  # a cell too many is no index
      frame = pd.read_csv(
        path,
        sep=plain,
        header=0 if header else None,
        index_col=False,
        decimal="," if comma else ".",
        na_values=list(MISSING),
        keep_default_na=False,
        skipinitialspace=True,
        skip_blank_lines=False,
        encoding="utf-8-sig",
        low_memory=False,
      )
  except (OSError, ValueError, csv.Error, pd.errors.ParserWarning) as error:
    reason = " ".join(str(error).split())[:160]
    raise UserError(
      f"{path} cannot be read ({reason}); save it as CSV with a row a sample"
    ) from error
  columns = tuple(cells) if header else tuple(str(k + 1) for k in range(frame.shape[1]))
  twice = sorted({name for name in columns if columns.count(name) > 1})
  require(
    not twice, f"{path} has the column '{''.join(twice[:1])}' twice", "give each a name of its own"
  )
  require(len(frame) > 0, f"{path} holds no samples", "remove it, or record it again")
  numbers = frame.apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
  wrong = np.argwhere(np.isnan(numbers) & frame.notna().to_numpy())
  row, column = wrong[0] if len(wrong) else (0, 0)
  require(
    not len(wrong),
    f"{path}, line {row + 1 + header}: column '{columns[column]}' holds"
    f" '{readable(str(frame.iat[row, column]))}', which is no number",
    "correct it, or leave the cell empty",
  )
  known = np.flatnonzero(~np.isnan(numbers).all(axis=1))  # blank lines at the end are no samples
  return Samples(numbers[: known[-1] + 1 if len(known) else 0], columns)


def _is_number(cell: str, comma: bool) -> bool:
  try:
    float(cell.replace(",", ".") if comma else cell)
  except ValueError:
    return cell in MISSING
  return True


def channels_of(samples: Samples, path: pathlib.Path, names: Sequence[str]) -> np.ndarray:
  """[T, C] values of the columns of those names; UserError where the file lacks one."""
  absent = [name for name in names if name not in samples.columns]
  require(
    not absent,
    f"{path} has no column '{''.join(absent[:1])}' but {', '.join(samples.columns)}",
    "correct its header, or name the columns that are read with --config.data.signals",
  )
  return samples.values[:, [samples.columns.index(name) for name in names]]


def resample(values: np.ndarray, times: np.ndarray, rate: float) -> Recording:
  """The recording at ``rate`` samples a second from its first sample on, by linear interpolation.

  Missing values are drawn in as well; before the first and after the last known one it stays.

  Args:
    values: [T, C], nan where there is no value.
    times: [T] seconds, ascending.
    rate: samples a second.
  """
  count = int(np.floor((times[-1] - times[0]) * rate + 1e-6)) + 1
  wanted = times[0] + np.arange(count) / rate
  same = count == len(times) and bool(np.allclose(wanted, times, rtol=0, atol=1e-3 / rate))
  missing = np.isnan(values)
  made = values[:count].copy() if same else np.full((count, values.shape[1]), np.nan)
  for channel, lacks in enumerate(missing.T):
    if not lacks.all() and (lacks.any() or not same):
      made[:, channel] = np.interp(wanted, times[~lacks], values[~lacks, channel])
  bridged = np.where(missing.all(axis=0), 0, missing.sum(axis=0))
  return Recording(values=made.astype(np.float32), bridged=bridged, resampled=not same)
