"""The table of the encrypted runs: bytes, seconds and scores of each, and whether weights agree."""

import json
import pathlib
from typing import Any

import pandas as pd

from fedjax_med.core.errors import require
from fedjax_med.flags import run_main

RUNS = ("none", "grid", "ckks_sum", "ckks_nvflare")


def row_of(folder: pathlib.Path) -> dict[str, Any]:
  """Results and costs of a run; seconds of encryption are those of all hospitals together."""
  summary, timing = (
    json.loads((folder / name).read_text(encoding="utf-8"))
    for name in ("summary.json", "timing.json")
  )
  spent = timing.get("encryption", {})
  seconds = {f"{name}_s": spent.get(name) for name in ("encrypt", "serialise", "add", "decrypt")}
  return {
    "run": folder.name,
    "auroc": summary["test"]["auroc"],
    "accuracy": summary["test"]["accuracy"],
    "bytes_up": summary["bytes_up"],
    "bytes_measured": spent["bytes"] / spent["messages"] if spent else None,
    "times_float32": round(summary["bytes_up"] / (4 * summary["num_parameters"]), 2),
    "train_s": timing["train"],
    **seconds,
    "max_error_steps": spent.get("max_error"),
    "weights": summary["weights_sha256"][:12],
  }


def main(argv: list[str]) -> None:
  """Writes argv[2], a CSV file, with a row for each of the runs below the folder argv[1].

  Raises:
    UserError: a run is missing, or an encrypted one ended in other weights than that on the grid.
  """
  require(len(argv) == 3, "two arguments are read", "give the folder of the runs and the CSV file")
  runs, output = map(pathlib.Path, argv[1:])
  missing = [name for name in RUNS if not (runs / name / "summary.json").exists()]
  require(not missing, f"{runs} lacks {', '.join(missing)}", "run encrypted.sh first")
  table = pd.DataFrame([row_of(runs / name) for name in RUNS])
  weights = dict(zip(table["run"], table["weights"], strict=True))
  other = [name for name in RUNS[2:] if weights[name] != weights["grid"]]
  require(
    not other,
    f"the weights of {', '.join(other)} are not those of grid",
    "remove the runs' folders and run encrypted.sh again",
  )
  table.to_csv(output, index=False)


if __name__ == "__main__":
  run_main(main)
