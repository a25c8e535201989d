"""Paired t-test on F1: the proposed system against the others, pairs of the same seed and split.

python -m experiments.imaging_paper.significance --scale=cpu --set=br35h --path=FOLDER
"""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
from absl import flags
from scipy import stats

from experiments.imaging_paper import training
from experiments.imaging_paper.systems import OWN_MODELS, PROPOSED, SPLITS, SYSTEMS, reference
from experiments.imaging_paper.tables import interval
from fedjax_med.core.errors import require
from fedjax_med.flags import run_main
from fedjax_med.study import mean_interval

TESTED = len(SYSTEMS) - len(OWN_MODELS) - 2  # without the references


def compare(frame: pd.DataFrame, metric: str = "all.f1") -> list[dict[str, Any]]:
  """The reference minus each other system on each split, with the p value as it is and by Holm.

  The reference is the proposed system, and FedAvg of the same network for the ways to meet unlike
  hospitals; low and high are the 95% t interval of the mean difference. Holm (1979) corrects, on
  each split by itself, for all systems of ``SYSTEMS`` whose global model is tested, looked at or
  not. Systems whose hospitals predict with models of their own are left out. None where a metric is
  undefined or nothing varies.
  """
  frame = frame[frame["predicts"] == "global model"]
  found = []
  for split in SPLITS:
    values = frame[frame["split"] == split].pivot(index="seed", columns="system", values=metric)
    tests = []
    for other in (name for name in SYSTEMS if name in values and name not in (PROPOSED, "fedavg")):
      if reference(other) not in values:
        continue
      differences = (values[reference(other)] - values[other]).to_numpy(float)
      defined = bool(np.isfinite(differences).all()) and len(differences) > 1
      p = math.nan
      if defined and np.ptp(differences) > 0:
        result: Any = stats.ttest_1samp(differences, 0.0)
        p = float(result.pvalue)
      around = mean_interval(differences if defined else np.full(2, np.nan), bounds=(-1, 1))
      ends = {end: around[end] for end in ("mean", "low", "high")}
      pairs = int(np.isfinite(differences).sum())
      tests.append({"split": split, "other": other, "pairs": pairs, **ends, "p": p})
    largest = 0.0
    ranked = sorted(tests, key=lambda test: (math.isnan(test["p"]), test["p"]))
    for place, test in enumerate(ranked):
      largest = max(largest, min(1.0, test["p"] * (TESTED - place)))
      test["p_holm"] = math.nan if math.isnan(test["p"]) else largest
    found += tests
  return [
    {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in test.items()}
    for test in found
  ]


def main(_: list[str]) -> None:
  systems = training.chosen()
  missing = sorted({reference(name) for name in systems} - set(systems))
  require(not missing, f"--only leaves out {', '.join(missing)}", "add what others are compared to")
  tests = compare(training.results(systems))
  if flags.FLAGS.json:
    print(json.dumps({"scale": flags.FLAGS.scale, "set": flags.FLAGS.set, "tests": tests}))
    return
  print(
    "F1 of FL-SE-ResNeXt-50 (for the ways to meet unlike hospitals: of FedAvg on their network)"
    f" minus that of the other system at scale {flags.FLAGS.scale} on {flags.FLAGS.set}, mean and"
    " 95% t interval, paired t-test over seeds, Holm's correction for the"
    f" {TESTED} systems of each split. Seeds share images, so p is too small (Dietterich 1998);"
    " with three seeds hardly any difference can be significant, and one that is not may exist. The"
    " paper's differences and p values were not available to us.\n"
  )
  print("| split | other system | pairs | mean difference | p | p (Holm) |")
  print("|---|---|---|---|---|---|")
  for test in tests:
    difference = "–" if test["mean"] is None else interval({**test, "missing": 0}, "+.3f")
    cells = [test["split"], SYSTEMS[test["other"]].label, str(test["pairs"]), difference]
    print("| " + " | ".join([*cells, *(_shown(test[key]) for key in ("p", "p_holm"))]) + " |")


def _shown(value: float | None) -> str:
  return "–" if value is None else f"{value:.3f}"


if __name__ == "__main__":
  training.define_flags()
  flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
  run_main(main)
