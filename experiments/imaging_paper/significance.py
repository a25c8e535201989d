"""Paired t-test on F1: the proposed system against every other, pairs of the same seed and split.

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
from experiments.imaging_paper.systems import PROPOSED, SPLITS, SYSTEMS
from fedjax_med.core.errors import require
from fedjax_med.flags import run_main


def compare(frame: pd.DataFrame, metric: str = "all.f1") -> list[dict[str, Any]]:
  """The proposed system minus each other one on each split, with the p value as it is and by Holm.

  Holm (1979) over the systems of a split. None where a metric is undefined or nothing varies.
  """
  found = []
  for split in SPLITS:
    own = frame[frame["split"] == split]
    values = own.pivot(index="seed", columns="system", values=metric)
    tests = []
    for other in (name for name in SYSTEMS if name in values and name != PROPOSED):
      differences = (values[PROPOSED] - values[other]).to_numpy(float)
      defined = bool(np.isfinite(differences).all()) and len(differences) > 1
      p = math.nan
      if defined and np.ptp(differences) > 0:
        result: Any = stats.ttest_1samp(differences, 0.0)
        p = float(result.pvalue)
      mean = float(differences.mean()) if defined else math.nan
      tests.append(
        {"split": split, "other": other, "pairs": len(differences), "mean": mean, "p": p}
      )
    known = sorted(
      (test for test in tests if not math.isnan(test["p"])), key=lambda test: test["p"]
    )
    largest = 0.0
    for place, test in enumerate(known):
      largest = max(largest, min(1.0, test["p"] * (len(known) - place)))
      test["p_holm"] = largest
    found += tests
  return [
    {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in test.items()}
    | {"p_holm": test.get("p_holm")}
    for test in found
  ]


def main(_: list[str]) -> None:
  systems = training.chosen()
  require(PROPOSED in systems, f"--only leaves out {PROPOSED}", "it is what the others are held to")
  tests = compare(training.results(systems))
  if flags.FLAGS.json:
    print(json.dumps({"scale": flags.FLAGS.scale, "set": flags.FLAGS.set, "tests": tests}))
    return
  print("F1 of FL-SE-ResNeXt-50 minus that of the other system, paired t-test over seeds\n")
  print(
    "| split | other system | pairs | mean difference | p | p (Holm) |\n|---|---|---|---|---|---|"
  )
  for test in tests:
    numbers = [_shown(test[key], form) for key, form in (("mean", "+.3f"), ("p", ".3f"))]
    cells = [test["split"], SYSTEMS[test["other"]].label, str(test["pairs"]), *numbers]
    print("| " + " | ".join([*cells, _shown(test["p_holm"], ".3f")]) + " |")


def _shown(value: float | None, form: str) -> str:
  return "–" if value is None else format(value, form)


if __name__ == "__main__":
  training.define_flags()
  flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
  run_main(main)
