"""The table of the wearables runs: a row a run, from summary.json and hospitals.json of each."""

import json
import pathlib
import sys

import pandas as pd


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


def main(runs: pathlib.Path, output: pathlib.Path) -> None:
  """Writes ``output`` with a row for each finished run below ``runs``."""
  folders = sorted(path.parent for path in runs.glob("*/summary.json"))
  pd.DataFrame([row_of(folder) for folder in folders]).to_csv(output, index=False)


if __name__ == "__main__":
  main(*map(pathlib.Path, sys.argv[1:]))
