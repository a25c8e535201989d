"""The healthcare paper's two figures from the sweeps of figures.sh: tables, and two PNGs.

accuracy_by_rounds.png is the global model against rounds, local_against_global.png the model of
each hospital alone beside that of the federation. Each has a panel for each kind of data, with and
without privacy; marks are means over runs, bars and bands reach from the lowest run to the highest.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from fedjax_med.core.errors import require
from fedjax_med.flags import run_main
from fedjax_med.report.figure_labels import labels
from fedjax_med.report.figures import ALONE, GLOBAL, new_figure


class Kind(NamedTuple):
  """A kind of data.

  Attributes:
    name: first part of the names of its two sweeps.
    metric: the score, a metric of its task.
    label: of the score.
    tested_on: "own", the test data of the hospital, or "all", those of all hospitals.
  """

  name: str
  metric: str
  label: str
  tested_on: str


KINDS = (
  Kind(name="records", metric="accuracy", label="accuracy", tested_on="own"),
  Kind(name="images", metric="accuracy", label="accuracy", tested_on="own"),
  Kind(name="wearables", metric="accuracy", label="accuracy", tested_on="all"),
  Kind(name="drugs", metric="rmse", label="RMSE of log IC50 (lower is better)", tested_on="own"),
)
SOURCES = {
  "heart_disease": "Records: heart disease",
  "br35h": "Images: brain MRI (Br35H)",
  "phantoms": "Images: brain-MRI phantoms",
  "series": "Wearables: exercises by smartwatch",
  "gdsc": "Drug response: GDSC",
}
ARMS = ("plain", "private")
COLOURS = {"plain": GLOBAL, "private": ALONE}
MARKERS = {"plain": "o", "private": "s"}
SHORT = {
  "central_nervous_system": "nervous system",
  "haematopoietic_and_lymphoid_tissue": "blood",
  "large_intestine": "intestine",
}
SIZE = (9.6, 7.6)  # inches


def rounds_of(folder: pathlib.Path, kind: Kind, arm: str) -> pd.DataFrame:
  """A row a run and log point of a sweep: the score on all test data, and the ε spent by then."""
  rows = []
  for path in sorted(folder.glob("points/*/metrics.jsonl")):
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    rows += [
      {
        "kind": kind.name,
        "privacy": arm,
        "run": int(path.parent.name),
        "round": line["round"],
        "metric": kind.metric,
        "score": line[kind.metric],
        "epsilon_max": line["epsilon_max"],
      }
      for line in lines
      if line["split"] == "test"
    ]
  return pd.DataFrame(rows)


def hospitals_of(results: pd.DataFrame, kind: Kind, arm: str) -> pd.DataFrame:
  """A row a run and hospital of a sweep: scores of the federation and of the hospital alone."""
  prefix = {"own": "", "all": "all."}[kind.tested_on]
  return pd.DataFrame(
    {
      "kind": kind.name,
      "privacy": arm,
      "run": results["point"],
      "hospital": results["hospital"],
      "num_train": results["num_train"],
      "num_test": results["num_test"],
      "tested_on": kind.tested_on,
      "metric": kind.metric,
      "federation": results[f"{prefix}{kind.metric}"],
      "alone": results[f"alone.{prefix}{kind.metric}"],
      "epsilon": results["epsilon"],
    }
  )


def spread(frame: pd.DataFrame, by: str, score: str) -> pd.DataFrame:
  """Mean, lowest and highest score over runs, a row a value of ``by`` in order of appearance."""
  return frame.groupby(by, sort=False)[score].agg(["mean", "min", "max"])


def in_order(names: Iterable[str]) -> list[str]:
  """Distinct names of hospitals, sorted, "other" last."""
  return sorted(set(names), key=lambda name: (name == "other", name))


def arm_label(results: dict[str, pd.DataFrame], arm: str) -> str:
  """The entry of a legend: no privacy, or the ε that a sweep was calibrated to."""
  if arm == "plain":
    return "no privacy"
  return f"DP-SGD, ε ≤ {results[arm]['privacy.target_epsilon'].iloc[0]:g}"


def draw_rounds(path: pathlib.Path, rounds: pd.DataFrame, sweeps: dict[str, Any]) -> None:
  """The first figure: scores of the global model against rounds."""
  with new_figure(path, SIZE, "Global model on all test data, by round · three runs") as figure:
    for axis, kind in zip(figure.subplots(2, 2).ravel(), KINDS, strict=True):
      for arm in ARMS:
        of_arm = rounds[(rounds["kind"] == kind.name) & (rounds["privacy"] == arm)]
        curve = spread(of_arm, "round", "score")
        axis.fill_between(curve.index, curve["min"], curve["max"], color=COLOURS[arm], alpha=0.2)
        axis.plot(
          curve.index, curve["mean"], color=COLOURS[arm], marker=MARKERS[arm], markersize=4,
          label=arm_label(sweeps[kind.name], arm),
        )  # fmt: skip
      axis.set(xlabel="round", ylabel=kind.label)
      axis.xaxis.get_major_locator().set_params(integer=True)
      _head(axis, _title(sweeps[kind.name]), pad=22)


def draw_hospitals(path: pathlib.Path, hospitals: pd.DataFrame, sweeps: dict[str, Any]) -> None:
  """The second figure: at each hospital the model of the federation, and its own alone."""
  title = "Local (hollow) against global model (filled) at each hospital · three runs"
  with new_figure(path, (SIZE[0], 9.0), title) as figure:
    for axis, kind in zip(figure.subplots(2, 2).ravel(), KINDS, strict=True):
      of_kind = hospitals[hospitals["kind"] == kind.name]
      for side, arm in enumerate(ARMS):
        _draw_arm(
          axis, of_kind[of_kind["privacy"] == arm], -0.3 + 0.4 * side, arm,
          arm_label(sweeps[kind.name], arm),
        )  # fmt: skip
      names = in_order(of_kind["hospital"])
      shown = labels([SHORT.get(name, name) for name in names], "hospital")
      turned = {"rotation": 60, "ha": "right"} if len(names) > 5 else {}
      axis.set_xticks(range(len(names)), shown, fontsize=9, **turned)
      axis.grid(visible=False, axis="x")
      where = "" if kind.tested_on == "own" else ", same test people for all"
      axis.set(ylabel=f"{kind.label}{where}")
      _head(axis, _title(sweeps[kind.name]), pad=36)


def _draw_arm(axis: Any, rows: pd.DataFrame, offset: float, arm: str, label: str) -> None:
  """Two marks with bars at each hospital: alone, and right of it the federation."""
  for model, shift, filled in (("alone", 0.0, False), ("federation", 0.2, True)):
    found = spread(rows, "hospital", model)
    found = found.loc[in_order(found.index)]
    reach = np.array([found["mean"] - found["min"], found["max"] - found["mean"]])
    axis.errorbar(
      np.arange(len(found)) + offset + shift, found["mean"], yerr=reach, fmt=MARKERS[arm],
      color=COLOURS[arm], markerfacecolor=COLOURS[arm] if filled else "white", markersize=5,
      elinewidth=1, label=f"{'global' if filled else 'local'}, {label}",
    )  # fmt: skip


def _shrink(path: pathlib.Path) -> None:
  """Writes a PNG again with 64 colours, a third of its bytes."""
  with Image.open(path) as picture:
    small = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
  small.save(path, optimize=True)


def _head(axis: Any, title: str, pad: int) -> None:
  """Puts a title over a panel, and the legend in the ``pad`` points between them."""
  axis.set_title(title, pad=pad)
  axis.legend(
    loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=2, fontsize=8, columnspacing=1.2,
    handletextpad=0.4, borderaxespad=0.2,
  )  # fmt: skip


def _title(sweeps: dict[str, pd.DataFrame]) -> str:
  return SOURCES[sweeps["plain"]["data.source"].iloc[0]]


def summary(rounds: pd.DataFrame, hospitals: pd.DataFrame) -> pd.DataFrame:
  """A row a kind and arm: last score, means over hospitals, and where the federation is better."""
  rows = []
  for kind in KINDS:
    for arm in ARMS:
      curve = rounds[(rounds["kind"] == kind.name) & (rounds["privacy"] == arm)]
      last = curve[curve["round"] == curve["round"].max()]["score"]
      rows_of = hospitals[(hospitals["kind"] == kind.name) & (hospitals["privacy"] == arm)]
      means = rows_of.groupby("hospital", sort=False)[["federation", "alone"]].mean()
      gain = means["federation"] - means["alone"]
      gain = -gain if kind.metric == "rmse" else gain
      rows.append(
        {
          "kind": kind.name,
          "privacy": arm,
          "metric": kind.metric,
          "last": last.mean(),
          "lowest": last.min(),
          "highest": last.max(),
          "federation": means["federation"].mean(),
          "alone": means["alone"].mean(),
          "hospitals": len(means),
          "better": int((gain > 0).sum()),
          "worse": ", ".join(gain.index[gain < 0]),
        }
      )
  return pd.DataFrame(rows)


def main(argv: list[str]) -> None:
  """Reads argv[1]/KIND_ARM of every kind of data, writes tables and figures into argv[2]."""
  require(
    len(argv) == 3, "two arguments are read", "give the folder of the sweeps and that to write"
  )
  runs, output = map(pathlib.Path, argv[1:])
  tables = [runs / f"{kind.name}_{arm}" / "results.csv" for kind in KINDS for arm in ARMS]
  lacking = [str(table) for table in tables if not table.exists()]
  require(not lacking, f"{''.join(lacking[:1])} is not there", "run figures.sh, which trains first")
  sweeps = {
    kind.name: {arm: pd.read_csv(runs / f"{kind.name}_{arm}" / "results.csv") for arm in ARMS}
    for kind in KINDS
  }
  pairs = [(kind, arm) for kind in KINDS for arm in ARMS]
  rounds = pd.concat([rounds_of(runs / f"{kind.name}_{arm}", kind, arm) for kind, arm in pairs])
  hospitals = pd.concat([hospitals_of(sweeps[kind.name][arm], kind, arm) for kind, arm in pairs])
  output.mkdir(parents=True, exist_ok=True)
  rounds.to_csv(output / "rounds.csv", index=False, float_format="%.4f")
  hospitals.to_csv(output / "hospitals.csv", index=False, float_format="%.4f")
  draw_rounds(output / "accuracy_by_rounds.png", rounds, sweeps)
  draw_hospitals(output / "local_against_global.png", hospitals, sweeps)
  for path in output.glob("*.png"):
    _shrink(path)
  print(summary(rounds, hospitals).to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
  run_main(main)
