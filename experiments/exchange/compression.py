"""The table of the compression runs: a row a run, its score against the bytes of a message."""

import json
import pathlib

import pandas as pd

from fedjax_med.core.errors import require
from fedjax_med.flags import run_main


def row_of(folder: pathlib.Path) -> dict:
  """Scores and bytes of a point at RUNS/DATA/SETTING/points/NUMBER."""
  summary, config = (
    json.loads((folder / name).read_text(encoding="utf-8"))
    for name in ("summary.json", "config.json")
  )
  lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  points = [point for point in map(json.loads, lines) if point["split"] == "test"]
  by_round = {point["round"]: point["auroc"] for point in points}
  whole = 4 * summary["num_parameters"]
  return {
    "data": folder.parents[2].name,
    "setting": folder.parents[1].name,
    "seed": config["config"]["seed"],
    "tested_on": config["config"]["data"].get("test_persons", ""),
    "rounds": summary["rounds"],
    "auroc_after_a_quarter": by_round[summary["rounds"] // 4],
    "auroc": summary["test"]["auroc"],
    "parameters": summary["num_parameters"],
    "bytes_up": summary["bytes_up"],
    "bytes_down": summary["bytes_down"],
    "times_fewer_bytes_up": round(whole / summary["bytes_up"], 2),
    "megabytes": summary["megabytes"],
    "compression_error": summary.get("exchange", {}).get("compression_error"),
  }


def main(argv: list[str]) -> None:
  """Writes argv[2], a CSV file, with a row for each finished point below the folder argv[1]."""
  require(len(argv) == 3, "two arguments are read", "give the folder of the runs and the CSV file")
  runs, output = map(pathlib.Path, argv[1:])
  folders = sorted(path.parent for path in runs.glob("*/*/points/*/summary.json"))
  require(bool(folders), f"{runs} holds no finished run", "run compression.sh first")
  table = pd.DataFrame([row_of(folder) for folder in folders])
  table.to_csv(output, index=False)
  scores = ["auroc_after_a_quarter", "auroc", "times_fewer_bytes_up"]
  print(table.groupby(["data", "setting"])[scores].mean().round(4))


if __name__ == "__main__":
  run_main(main)
