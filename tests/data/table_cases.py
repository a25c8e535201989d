"""Small made-up tables, with a manifest and the four files of UCI's Heart Disease, for tests."""

import pathlib

import numpy as np

MANIFEST = """
target = "ill"
classes = ["no", "yes"]
patient = "person"

[columns]
age = { kind = "number", low = 20, high = 80, required = true }
pressure = { kind = "number", low = 80, high = 200, missing = [0] }
sex = { kind = "category", categories = ["f", "m"] }
remark = { kind = "ignore" }
"""
TARGETS = """
targets = ["dose", "days"]
unit = "units"
missing = ["", "?"]

[columns]
age = { kind = "number", low = 20, high = 80 }
sex = { kind = "category", categories = ["f", "m"], required = true }
"""
HEADER = "ill,person,age,pressure,sex,remark"


def columns_file(folder: pathlib.Path, text: str = MANIFEST, name: str = "columns.toml") -> str:
  """Writes a manifest; returns its path."""
  path = folder / name
  path.write_text(text, encoding="utf-8")
  return str(path)


def rows(number: int, seed: int = 0) -> list[str]:
  """Lines of a table whose classes follow from age and pressure, more or less."""
  random = np.random.default_rng(seed)
  ages, pressures = random.integers(20, 81, number), random.integers(80, 201, number)
  risk = (ages - 50) / 30 + (pressures - 140) / 60 + random.normal(0, 0.5, number)
  shown = ["" if k % 11 == 5 else str(value) for k, value in enumerate(pressures)]
  return [
    f"{'yes' if risk[k] > 0 else 'no'},P{seed}{k},{ages[k]},{shown[k]},{'fm'[k % 2]},none"
    for k in range(number)
  ]


def table_file(place: pathlib.Path, number: int = 60, seed: int = 0) -> pathlib.Path:
  """Writes a table of that many records."""
  place.parent.mkdir(parents=True, exist_ok=True)
  place.write_text("\n".join([HEADER, *rows(number, seed)]) + "\n", encoding="utf-8")
  return place


def hospitals_folder(folder: pathlib.Path, sizes: tuple[int, ...] = (60, 50, 40)) -> pathlib.Path:
  """Writes a table for each of some hospitals; returns the folder."""
  for number, size in enumerate(sizes):
    table_file(folder / f"{['north', 'south', 'east', 'west'][number]}.csv", size, number)
  return folder


def target_rows(number: int, seed: int = 0) -> list[str]:
  """Lines of a table with two numbers that follow from age and sex; some of them are missing."""
  random = np.random.default_rng(seed)
  ages = random.integers(20, 81, number)
  doses = 100 + 2 * ages + 30 * (np.arange(number) % 2) + random.normal(0, 5, number)
  days = 10 - 0.1 * ages + random.normal(0, 0.5, number)
  return [
    f"{'' if k % 5 == 1 else round(doses[k], 2)},{'?' if k % 7 == 3 else round(days[k], 3)},"
    f"{ages[k]},{'fm'[k % 2]}"
    for k in range(number)
  ]


def target_folder(folder: pathlib.Path, sizes: tuple[int, ...] = (60, 50, 40)) -> pathlib.Path:
  """Writes a table with numbers to predict for each of some hospitals; returns the folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, size in enumerate(sizes):
    lines = ["dose,days,age,sex", *target_rows(size, number)]
    path = folder / f"{['north', 'south', 'east', 'west'][number]}.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return folder


def heart_folder(folder: pathlib.Path, number: int = 60) -> pathlib.Path:
  """Writes made-up files with the names and columns of UCI's; every tenth row lacks a value."""
  folder.mkdir(parents=True, exist_ok=True)
  for seed, site in enumerate(("cleveland", "hungarian", "switzerland", "va")):
    random = np.random.default_rng(seed)
    lines = []
    for k in range(number):
      age, pressure = random.integers(30, 75), random.integers(100, 180)
      ill = int((age - 50) / 20 + random.normal(0, 0.7) > 0) * int(random.integers(1, 5))
      pressure = "?" if k % 10 == 3 else f"{pressure}.0"
      middle = f"{random.integers(0, 2)}.0,{random.integers(1, 5)},{pressure}"
      lines.append(f"{age}.0,{middle},220,0,{random.integers(0, 3)},140,1,0.5,?,?,?,{ill}")
    (folder / f"processed.{site}.data").write_text("\n".join(lines) + "\n")
  return folder
