"""Small made-up recordings of four people, as a folder and as a manifest, for tests."""

import pathlib

import numpy as np

PEOPLE, CLASSES = ("p1", "p2", "p3", "p4"), ("normal", "tremor")
RATE = 10.0


def samples(person: int, label: int, take: int) -> np.ndarray:
  """[50 to 68, 2] float64 of a recording: a tremor is fast, and every person has a tilt."""
  random = np.random.default_rng([person, label, take])
  time = np.arange(50 + 6 * take + person) / RATE
  wave = np.sin(2 * np.pi * (0.5 + 2 * label) * time + random.uniform(0, 6))
  tilt = 0.2 * person
  return np.stack([wave, tilt + 0.5 * wave + 0.1 * random.normal(size=len(time))], axis=1)


def write(path: pathlib.Path, values: np.ndarray, header: str = "t,ax,ay") -> None:
  """Writes samples as CSV, with the time in seconds as first column."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = np.column_stack([np.arange(len(values)) / RATE, values])
  np.savetxt(path, rows, delimiter=",", header=header, comments="", fmt="%.6f")


def series_folder(root: pathlib.Path, takes: int = 3) -> pathlib.Path:
  """PERSON/CLASS/TAKE.csv of all people, and manifest.csv that lists them."""
  lines = ["path,label,patient"]
  for person, name in enumerate(PEOPLE):
    for label, of_class in enumerate(CLASSES):
      for take in range(takes):
        place = pathlib.Path(name, of_class, f"{take}.csv")
        write(root / "people" / place, samples(person, label, take))
        lines.append(f"people/{place.as_posix()},{of_class},{name}")
  (root / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
  return root
