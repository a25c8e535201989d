"""The table of secure.sh: a row a protocol and seed, and how far its AUROC is from that of none."""

import pathlib

import pandas as pd

from fedjax_med.core.errors import require
from fedjax_med.flags import run_main

NAMES = ("none", "masking_32", "masking_16")


def scores_of(runs: pathlib.Path, name: str) -> pd.DataFrame:
  """AUROC of all test images by seed."""
  path = runs / name / "results.csv"
  require(path.exists(), f"{path} is missing", "run secure.sh first")
  points = pd.read_csv(path).drop_duplicates("point")
  return pd.DataFrame(
    {"protocol": name, "seed": points["seed"], "auroc": points["all.auroc"]}
  ).set_index("seed", drop=False)


def main(argv: list[str]) -> None:
  """Writes argv[2], a CSV file, from the sweeps below the folder argv[1]; prints the means."""
  require(len(argv) == 3, "two arguments are read", "give the folder of the runs and the CSV file")
  runs, output = map(pathlib.Path, argv[1:])
  scores = [scores_of(runs, name) for name in NAMES]
  plain = scores[0]["auroc"]
  table = pd.concat([each.assign(difference=each["auroc"] - plain) for each in scores])
  table.to_csv(output, index=False)
  print(table.groupby("protocol", sort=False)[["auroc", "difference"]].mean())


if __name__ == "__main__":
  run_main(main)
