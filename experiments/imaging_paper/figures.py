"""Figures 2 to 4 of the imaging paper, and the random beside the grouped split.

Figure 2 is who holds what (partition_*.png), figure 3 the architectures on Br35H and figure 4 those
on SARS-CoV-2-CT (both are architectures.png of their set), splits.png all systems on both splits.

python -m experiments.imaging_paper.figures --scale=cpu --set=br35h --path=FOLDER
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
from absl import flags

from experiments.imaging_paper import training
from experiments.imaging_paper.systems import PROPOSED, SPLITS, SYSTEMS
from experiments.imaging_paper.tables import caption, mark, markdown, summarise
from fedjax_med.core.errors import require
from fedjax_med.flags import run_main
from fedjax_med.report.figures import CLASS_COLOURS, add_legend, draw_partition, new_figure

NAMES = {
  "paper": "random split, as the paper's",
  "grouped": "grouped split: no near-duplicate leaks",
}


def draw_architectures(path: pathlib.Path, records: list[dict[str, Any]], dataset: str) -> None:
  """Accuracy of each architecture on both splits as bars with intervals."""
  shown = [record for record in records if "figures 3 and 4" in record["places"]]
  title = f"Architectures under FedAvg · {dataset} · scale {flags.FLAGS.scale}"
  with new_figure(path, (9, 4.6), title) as figure:
    axis = figure.subplots()
    _bars(axis, shown)
    for at, record in enumerate(shown):
      if record["published"] is not None:
        label = "the paper's, at full size" if not at else None
        axis.plot([at - 0.45, at + 0.45], [record["published"]] * 2, "k--", lw=1.2, label=label)
    axis.set_xticks(
      range(len(shown)), [record["label"] for record in shown], rotation=20, ha="right"
    )
    axis.set(ylabel="accuracy", ylim=(0, 1.02))
    add_legend(figure, axis)


def draw_splits(path: pathlib.Path, records: list[dict[str, Any]], dataset: str) -> None:
  """Every system on both splits: what near-duplicates of test images in train are worth."""
  shown = sorted(
    (record for record in records if record["random_minus_grouped"]["mean"] is not None),
    key=lambda record: record["splits"]["paper"]["accuracy"]["mean"],
  )
  title = f"Random and grouped split · {dataset} · scale {flags.FLAGS.scale}"
  with new_figure(path, (9, 1.6 + 0.3 * len(shown)), title) as figure:
    axis = figure.subplots()
    for side, (split, colour) in enumerate(zip(SPLITS, CLASS_COLOURS, strict=False)):
      stats = [record["splits"][split]["accuracy"] for record in shown]
      y = np.arange(len(shown)) + 0.12 * (1 - 2 * side)
      axis.errorbar(
        [each["mean"] for each in stats], y, xerr=_reach(stats), fmt="os"[side], color=colour,
        capsize=2, label=NAMES[split],
      )  # fmt: skip
    axis.set_yticks(range(len(shown)), [record["label"] + mark(record) for record in shown])
    axis.set(xlabel="accuracy, mean and 95% t interval over seeds")
    add_legend(figure, axis)


def _bars(axis: Any, shown: list[dict[str, Any]]) -> None:
  for side, (split, colour) in enumerate(zip(SPLITS, CLASS_COLOURS, strict=False)):
    stats = [record["splits"][split]["accuracy"] for record in shown]
    heights = [np.nan if each["mean"] is None else each["mean"] for each in stats]
    axis.bar(
      np.arange(len(shown)) + 0.4 * side - 0.2, heights, 0.38, yerr=_reach(stats), color=colour,
      capsize=3, label=NAMES[split],
    )  # fmt: skip


def _reach(stats: list[dict[str, Any]]) -> np.ndarray:  # [2, n], below and above the mean
  def reach(each: dict[str, Any]) -> tuple[float, float]:
    if each["mean"] is None or each["low"] is None:
      return 0.0, 0.0
    return each["mean"] - each["low"], each["high"] - each["mean"]

  return np.array([reach(each) for each in stats]).T.reshape(2, -1)


def draw_split(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Figure 2 of both splits, of the first seed."""
  from fedjax_med.sweep.table import folder_of

  for number, row in enumerate(training.every_row()):
    hospitals = folder_of(folder, number) / "hospitals.json"
    if row.system == PROPOSED and row.seed == 0 and hospitals.exists():
      draw_partition(
        target / f"partition_{row.split}.png", json.loads(hospitals.read_text(encoding="utf-8"))
      )


def main(_: list[str]) -> None:
  dataset = flags.FLAGS.set
  systems = training.chosen()
  whole = len(systems) == len(SYSTEMS)
  require(
    whole or not flags.FLAGS.committed,
    f"--only={','.join(systems)} would overwrite the committed figures with a part of them",
    "leave out --only or --committed",
  )
  records = summarise(training.results(systems), dataset)
  target = training.workdir() / ("figures" if whole else "figures-only")
  target = training.committed().parent if flags.FLAGS.committed else target
  if not whole:
    shutil.rmtree(target, ignore_errors=True)  # those of another --only
  text = [caption(), f"Figures: {target}"]
  if any("figures 3 and 4" in record["places"] for record in records):
    draw_architectures(target / "architectures.png", records, dataset)
    text.append(markdown(records, "figures 3 and 4"))
  draw_splits(target / "splits.png", records, dataset)
  if not flags.FLAGS.committed:
    draw_split(training.workdir(), target)
  print("\n\n".join(text))


if __name__ == "__main__":
  training.define_flags()
  run_main(main)
