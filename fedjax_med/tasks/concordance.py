"""Statistics of survival times: Harrell's C, Kaplan-Meier curves, groups by risk; in NumPy."""

from typing import NamedTuple

import numpy as np

ROWS_AT_ONCE = 1024  # records with an event that are compared with all others at once
THIRDS = ("low", "middle", "high")  # groups by risk


class Pairs(NamedTuple):
  """Counts of pairs of records of which is known who had the event first.

  Attributes:
    concordant: pairs in which that one has the higher risk.
    tied: pairs of equal risks.
    comparable: all of them.
  """

  concordant: int
  tied: int
  comparable: int

  @property
  def c_index(self) -> float | None:
    """Harrell's C, in which ties count half; None without a comparable pair."""
    if not self.comparable:
      return None
    return (self.concordant + 0.5 * self.tied) / self.comparable


def concordance(
  time: np.ndarray,  # [n]
  event: np.ndarray,  # [n] bool
  risk: np.ndarray,  # [n], the higher the sooner
  groups: np.ndarray | None = None,  # [n] hospitals
) -> Pairs:
  """Counts comparable pairs, with ``groups`` those within a group only (Harrell et al. 1996).

  A pair is comparable if the shorter time ended in an event, or if the times are equal and one of
  them did. Two events at one time are not compared. This is lifelines' ``concordance_index``.
  """
  concordant = tied = comparable = 0
  events = np.flatnonzero(event)
  for first in range(0, len(events), ROWS_AT_ONCE):
    rows = events[first : first + ROWS_AT_ONCE, None]
    later = (time[None] > time[rows]) | ((time[None] == time[rows]) & ~event[None])
    if groups is not None:
      later &= groups[None] == groups[rows]
    comparable += int(later.sum())
    concordant += int((later & (risk[None] < risk[rows])).sum())
    tied += int((later & (risk[None] == risk[rows])).sum())
  return Pairs(concordant=concordant, tied=tied, comparable=comparable)


def kaplan_meier(time: np.ndarray, event: np.ndarray, at: np.ndarray) -> np.ndarray:
  """Estimates the probability of no event up to each of ``at`` (Kaplan and Meier 1958).

  Args:
    time: [n] times of the event or of the end of observation.
    event: [n] bool, whether it is an event.
    at: [m] times.

  Returns:
    [m] float64; 1 of no records.
  """
  ends = np.unique(time[event])
  died = np.array([(event & (time == end)).sum() for end in ends])
  at_risk = np.array([(time >= end).sum() for end in ends])
  steps = np.concatenate([[1.0], np.cumprod(1 - died / np.maximum(at_risk, 1))])
  return steps[np.searchsorted(ends, at, side="right")]


def thirds(risk: np.ndarray) -> np.ndarray:
  """[n] number of each record's third by risk, 0 the lowest; equal risks are in the same one."""
  if not len(risk):
    return np.zeros(0, np.int64)
  return np.searchsorted(np.quantile(risk, [1 / 3, 2 / 3]), risk, side="left")
