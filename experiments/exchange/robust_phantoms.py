"""The table of robust_phantoms.sh: a row for each rule and attack, from the sweeps' results.

The scores are of all test images of the honest hospitals, mean, least and largest of the seeds.
"""

import pathlib

import pandas as pd

from fedjax_med.core.errors import require
from fedjax_med.flags import run_main

SCORES = ("all.accuracy", "all.auroc")


def table(runs: pathlib.Path) -> pd.DataFrame:
  """Mean, least and largest score by rule and attack of the sweeps in a folder."""
  frames = [pd.read_csv(path, keep_default_na=False) for path in sorted(runs.glob("*/results.csv"))]
  require(bool(frames), f"{runs} holds no sweep", "run robust_phantoms.sh")
  points = pd.concat(frames).drop_duplicates(["server.aggregator", "attack.kind", "run_id"])
  for name in SCORES:
    points[name] = pd.to_numeric(points[name])
  by = points.groupby(["server.aggregator", "attack.kind", "attack.strength"])
  found = by[list(SCORES)].agg(["mean", "min", "max"])
  found.columns = [f"{name.removeprefix('all.')}.{kind}" for name, kind in found.columns]
  return found.round(4).assign(runs=by.size()).reset_index()


def main(arguments: list[str]) -> None:
  require(
    len(arguments) == 3,
    f"{len(arguments) - 1} arguments",
    "give the folder of the sweeps and the table to write",
  )
  table(pathlib.Path(arguments[1])).to_csv(arguments[2], index=False)


if __name__ == "__main__":
  run_main(main)
