"""Scheduling: clients of similar step counts share a chunk, and chunks are dealt to devices.

A chunk's vmap runs until its longest client is done, so a chunk of unlike clients wastes
arithmetic, and a device that got the long chunks keeps the others waiting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Load(NamedTuple):
  """Cost of a round, in client-steps.

  Attributes:
    useful: local steps that clients take.
    executed: steps computed, those of clients that only wait for their chunk included.
    longest: steps one after the other on the device that has most to do.
  """

  useful: int
  executed: int
  longest: int

  @property
  def waste(self) -> float:
    """Executed over useful arithmetic, minus 1."""
    return self.executed / self.useful - 1 if self.useful else 0.0


def deal(cohort: int, chunk: int, devices: int) -> np.ndarray:
  """[devices · chunks, chunk] int32: place in the cohort, longest client first, of every slot.

  Rows of one device are neighbours. Chunks go round the devices forth and back, so that each gets
  long and short ones. Places at or past ``cohort`` are empty slots; they come last.
  """
  chunks = -(-cohort // (chunk * devices))  # of each device
  places = np.arange(chunks * devices * chunk, dtype=np.int32).reshape(chunks, devices, chunk)
  places[1::2] = places[1::2, ::-1]
  return places.swapaxes(0, 1).reshape(-1, chunk)


def load(steps: Sequence[int] | np.ndarray, chunk: int, devices: int = 1) -> Load:
  """Cost of a round of clients with these step counts; 0 marks an absent client."""
  steps = np.sort(np.asarray(steps, np.int64))[::-1]
  seats = deal(len(steps), chunk, devices)
  dealt = np.pad(steps, (0, seats.size - len(steps)))[seats]
  longest = dealt.max(1)  # of each chunk; a chunk without clients is not run
  by_device = longest.reshape(devices, -1).sum(1)
  return Load(
    useful=int(steps.sum()), executed=int(longest.sum()) * chunk, longest=int(by_device.max())
  )


def best_chunk(
  steps: Sequence[int] | np.ndarray, devices: int, most_at_once: int, most_waste: float
) -> int:
  """The chunk that gets a round done in fewest steps in a row without wasting more than allowed.

  Args:
    steps: [K] local steps a round.
    devices: devices that share the clients.
    most_at_once: largest chunk.
    most_waste: largest executed over useful arithmetic, minus 1.
  """
  most_at_once = min(most_at_once, -(-len(steps) // devices))
  loads = {chunk: load(steps, chunk, devices) for chunk in range(1, most_at_once + 1)}
  allowed = [chunk for chunk in loads if loads[chunk].waste <= most_waste]  # 1 wastes nothing
  return min(allowed, key=lambda chunk: (loads[chunk].longest, chunk))
