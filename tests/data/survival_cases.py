"""Small made-up tables of times and events at three hospitals, with a manifest, for tests."""

import pathlib

import numpy as np

SURVIVAL = """
time = "days"
event = "dead"
horizon = 120
patient = "person"

[columns]
age = { kind = "number", low = 20, high = 80, required = true }
stage = { kind = "number", low = 0, high = 3 }
"""
HEADER = "days,dead,person,age,stage"


def times(number: int, seed: int) -> list[str]:
  """Lines whose times are shorter for the old and for high stages, about two thirds events."""
  random = np.random.default_rng(seed)
  ages, stages = random.integers(20, 81, number), random.integers(0, 4, number)
  until = random.exponential(60 * np.exp(-(ages - 50) / 30 - (stages - 1.5) / 2)) + 1
  end = random.uniform(20, 150, number)
  lines = zip(np.minimum(until, end), until <= end, ages, stages, strict=True)
  return [
    f"{time:.1f},{int(dead)},P{seed}-{k},{age},{stage if k % 9 else ''}"
    for k, (time, dead, age, stage) in enumerate(lines)
  ]


def survival_folder(folder: pathlib.Path, sizes: tuple[int, ...] = (60, 50, 40)) -> pathlib.Path:
  """Writes a table for each hospital; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for seed, size in enumerate(sizes):
    lines = [HEADER, *times(size, seed)]
    (folder / f"{['north', 'south', 'east'][seed]}.csv").write_text("\n".join(lines) + "\n")
  return folder
