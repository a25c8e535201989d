"""The table of the runs of noise.sh: ε, against whom it holds, and what the model is worth."""

import json
import pathlib

import pandas as pd

from fedjax_med.core.errors import require
from fedjax_med.flags import run_main


def row_of(folder: pathlib.Path) -> dict:
  """One run: its name without the seed, ε of its one unit, and AUROC of all test images."""
  summary, privacy = (
    json.loads((folder / name).read_text(encoding="utf-8"))
    for name in ("summary.json", "privacy.json")
  )
  guarantee = next(iter(privacy["guarantees"]), None)
  party = guarantee["parties"][0] if guarantee else {}
  return {
    "run": folder.name.rpartition("_")[0],
    "unit": guarantee["unit"] if guarantee else "none",
    "colluders": party.get("colluders"),
    "sigma": party.get("noise_multiplier"),
    "epsilon": guarantee["epsilon_max"] if guarantee else None,
    "delta": max(each["delta"] for each in guarantee["parties"]) if guarantee else None,
    "holds_against": "; ".join(guarantee["holds_against"]) if guarantee else "nobody",
    "rounds": summary["rounds"],
    "auroc": summary["test"]["auroc"],
    "accuracy": summary["test"]["accuracy"],
  }


def main(argv: list[str]) -> None:
  """Writes argv[2], a CSV file: means over the seeds of the runs below the folder argv[1]."""
  require(len(argv) == 3, "two arguments are read", "give the folder of the runs and the CSV file")
  runs, output = map(pathlib.Path, argv[1:])
  folders = sorted(path.parent for path in runs.glob("*/summary.json"))
  require(bool(folders), f"{runs} holds no finished run", "run noise.sh first")
  table = pd.DataFrame([row_of(folder) for folder in folders])
  scores = {
    "seeds": ("auroc", "size"),
    "epsilon": ("epsilon", "max"),
    "sigma": ("sigma", "max"),
    "auroc": ("auroc", "mean"),
    "auroc_sd": ("auroc", "std"),
    "accuracy": ("accuracy", "mean"),
  }
  keys = ["run", "unit", "colluders", "delta", "rounds", "holds_against"]
  table.groupby(keys, dropna=False).agg(**scores).reset_index().to_csv(output, index=False)


if __name__ == "__main__":
  run_main(main)
