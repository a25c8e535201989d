"""Means and deviations of columns from sums, which hospitals can add up."""

import numpy as np


def sums(rows: np.ndarray) -> np.ndarray:
  """[3, M] float64 count, sum and sum of squares of the known values of rows [n, M].

  A value is known if it is not nan.
  """
  known = ~np.isnan(rows)
  values = np.where(known, rows, 0).astype(np.float64)
  return np.stack([known.sum(0), values.sum(0), np.square(values).sum(0)])


def moments(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[M] means and standard deviations by [3, M] ``sums``; 0 and 0 without a known value."""
  count, summed, squares = total
  count = np.maximum(count, 1)
  mean = summed / count
  return mean, np.sqrt(np.maximum(squares / count - np.square(mean), 0))
