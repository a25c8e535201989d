"""The table of the wearables runs: a row a run, from summary.json and hospitals.json of each."""

import json
import pathlib

import pandas as pd

from fedjax_med.core.errors import require
from fedjax_med.flags import run_main


def row_of(folder: pathlib.Path) -> dict:
  """Results of a run: of windows, of recordings, and ε."""
  summary, held = (
    json.loads((folder / name).read_text(encoding="utf-8"))
    for name in ("summary.json", "hospitals.json")
  )
  windows, recordings = summary["test"], summary["recordings"]
  return {
    "run": folder.name,
    "split": summary["split"],
    "rounds": summary["rounds"],
    "people": len(summary["clients"]),
    "windows": windows["n"],
    "accuracy": windows["accuracy"],
    "auroc": windows["auroc"],
    "recordings": recordings["n"],
    "recordings.accuracy": recordings["accuracy"],
    "recordings.auroc": recordings["auroc"],
    "overlapping": held["series"]["test_overlapping"],
    "epsilon_max": summary["epsilon_max"],
    "client_epsilon": summary["client_epsilon"],
  }


def main(argv: list[str]) -> None:
  """Writes argv[2], a CSV file, with a row for each finished run below the folder argv[1]."""
  require(len(argv) == 3, "two arguments are read", "give the folder of the runs and the CSV file")
  runs, output = map(pathlib.Path, argv[1:])
  folders = sorted(path.parent for path in runs.glob("*/summary.json"))
  require(bool(folders), f"{runs} holds no finished run", "run wearables.sh first")
  pd.DataFrame([row_of(folder) for folder in folders]).to_csv(output, index=False)


if __name__ == "__main__":
  run_main(main)
