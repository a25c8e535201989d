"""A folder as data.source=gdsc reads it, with a few drawn cell lines."""

import pathlib

import numpy as np
import pandas as pd

from fedjax_med.data.gdsc import DRUGS, LINES, METHYLATION, RESPONSES

SITES = {"lung": 40, "skin": 25, "bone": 9, "": 6}
MISSING = 0.2


def tables(seed: int = 0, inputs: int = 6, drugs: int = 4) -> dict[str, pd.DataFrame]:
  """The four tables by file: responses follow from methylation, with noise and gaps."""
  rng = np.random.default_rng(seed)
  number = sum(SITES.values())
  names = [f"ACH-{k:06d}" for k in range(number)]
  methylation = rng.random((number, inputs)).round(4)
  effects = rng.normal(size=(inputs, drugs))
  means = np.arange(drugs) * 3.0 - 2
  response = means + methylation @ effects + 0.1 * rng.normal(size=(number, drugs))
  response[rng.random(response.shape) < MISSING] = np.nan
  response[0] = np.arange(drugs)
  response[np.isnan(response).all(axis=1), 0] = 1.0  # no line is without any by chance
  numbers = [f"GDSC:{k + 1}" for k in range(drugs)]
  sites = [site for site, count in SITES.items() for _ in range(count)]
  return {
    METHYLATION: pd.DataFrame(methylation, names, [f"G{k}_1_2_3" for k in range(inputs)]),
    RESPONSES: pd.DataFrame(response, names, numbers).T,
    LINES: pd.DataFrame({"depMapID": names, "Site_Primary": [site or None for site in sites]}),
    DRUGS: pd.DataFrame({"drug_id": range(1, drugs + 1), "Name": ["A", "B", "B", "C"][:drugs]}),
  }


def write(folder: pathlib.Path, held: dict[str, pd.DataFrame]) -> pathlib.Path:
  """Writes the tables; missing responses are NA, as they were published."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, table in held.items():
    if name == LINES:
      table.to_csv(folder / name, sep="\t", index=False)
    else:
      table.to_csv(folder / name, index=name != DRUGS, na_rep="NA" if name == RESPONSES else "")
  return folder


def make_gdsc(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """Writes the folder, unless it is there."""
  return folder if folder.is_dir() else write(folder, tables(seed))
