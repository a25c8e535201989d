"""report.html of a sweep or of several runs: what privacy costs, for whom, and how to repeat it.

Nothing but the files of the runs enters it: the same files give the same bytes.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fedjax_med import study
from fedjax_med.core.errors import require
from fedjax_med.core.metrics import NO_CLASS, about_points
from fedjax_med.folder.data_notes import Note, data_notes
from fedjax_med.folder.writing import read_metrics, write_text, write_whole
from fedjax_med.privacy import claims
from fedjax_med.report import latex, sweep_figures
from fedjax_med.report.figure_labels import stand_ins
from fedjax_med.report.figures import MAX_BARS, draw_partition
from fedjax_med.report.run_page import embedded, environment
from fedjax_med.run.statement import statement_text
from fedjax_med.sweep import table
from fedjax_med.sweep.grid import Point

METRICS = (
  ("auroc", "AUROC"),
  ("accuracy", "Accuracy"),
  ("f1", "F1"),
  ("recall", "Sensitivity"),
  ("specificity", "Specificity"),
  ("ece", "Calibration error"),
)
LATEX = (*METRICS[:3], ("worst.auroc", "AUROC, worst hospital"))
SEEDS = ("seed", "data.seed", "model.init_seed")
# Axes that move ε: points that differ in them are one line of the frontier.
PRIVACY = tuple(
  f"{level}.{name}"
  for level in ("privacy", "client_privacy")
  for name in ("noise_multiplier", "target_epsilon", "mechanism")
)
MOST_NOTES = 12  # sentences on the data
MOST_LINES = len(sweep_figures.PALETTE)
MOST_IN_PANEL, MOST_PANELS = 4, 12
ENDS = ("mean", "low", "high")
MOST_ARMS = 24  # in a figure; tables hold all of them


class ComparedRuns(NamedTuple):
  """What a report is of.

  Attributes:
    title: its heading.
    folders: of the runs that have ended.
    points: what each of them differs in.
    frame: the table, a row a run and hospital.
    missing: runs that have not ended.
    command: that started all of them; empty for runs by themselves.
  """

  title: str
  folders: list[pathlib.Path]
  points: list[Point]
  frame: pd.DataFrame
  missing: int
  command: str


def read_sweep(workdir: pathlib.Path) -> ComparedRuns:
  """The points of a sweep; raises UserError where none has ended."""
  definition = table.read(workdir)
  numbers = [k for k in range(len(definition["points"])) if table.done(workdir, k)]
  require(bool(numbers), f"no point of {workdir} has ended", "start the sweep with --resume")
  return ComparedRuns(
    f"Sweep {definition['sweep_id']}",
    [table.folder_of(workdir, number) for number in numbers],
    [definition["points"][number] for number in numbers],
    study.with_seconds(table.collect(workdir), table.timing(workdir, numbers)),
    len(definition["points"]) - len(numbers),
    definition.get("command", ""),
  )


def read_runs(folders: Sequence[pathlib.Path]) -> ComparedRuns:
  """Several runs by themselves; they differ in those fields whose values are not the same."""
  configs = []
  for folder in folders:
    require(
      (folder / "summary.json").exists(),
      f"{folder} holds no run that has ended",
      "give the --workdir of runs that have reached their end",
    )
    configs.append(table.flat_config(folder))
  varied = [
    name
    for name in configs[0]
    if len({json.dumps(config.get(name)) for config in configs}) > 1
    and not name.startswith(("execution.", "eval."))
  ]
  points = [{name: config.get(name) for name in varied} for config in configs]
  rows = [table.rows_of(*each) for each in zip(folders, range(len(folders)), points, strict=True)]
  frame = pd.DataFrame([row for own in rows for row in own])
  seconds = [table.read_json(folder / "timing.json")["total"] for folder in folders]
  timing = pd.DataFrame({"point": range(len(folders)), "seconds": seconds})
  title = f"{len(folders)} runs"
  return ComparedRuns(title, list(folders), points, study.with_seconds(frame, timing), 0, "")


def write(runs: ComparedRuns, target: pathlib.Path) -> pathlib.Path:
  """Writes report.html, figures (PNG and PDF) and tables (CSV and LaTeX) into ``target``."""
  axes = _axes(runs)
  arms = _arms(runs.frame, axes)
  folder = target / "figures"
  folder.mkdir(parents=True, exist_ok=True)
  _draw(runs, axes, arms, folder)
  names = ("frontier", "spread", "curves", "confusions", "partition")
  shown = _table(arms, axes)
  write_whole(target / "table.csv", lambda place: shown.to_csv(place, index=False))
  write_text(target / "table.tex", latex.table_of(shown, axes, LATEX))
  first = runs.folders[0]
  held = _holdings(first)
  names_of = [hospital["name"] for hospital in held["hospitals"]]
  private = next((f for f in runs.folders if claims.read(f)["guarantees"]), None)
  page = (
    environment()
    .get_template("sweep.html")
    .render(
      title=runs.title,
      name=table.read_json(first / "summary.json")["config_name"],
      command=runs.command,
      axes=axes,
      fixed_seeds=[name for name in SEEDS if name in runs.frame and runs.frame[name].nunique() > 1],
      num_points=len(runs.folders),
      missing=runs.missing,
      hospitals=sorted(set(runs.frame.groupby("point").size())),
      metrics=METRICS,
      positives=sorted(set(runs.frame["positive_class"])),
      about_classes=about_points(sorted(set(runs.frame["positive_class"]))),
      stand_ins=[
        *stand_ins(held["class_names"], "class"),
        *(stand_ins(names_of, "hospital") if len(names_of) <= MAX_BARS else []),
      ],
      most={"lines": MOST_LINES, "arms": MOST_ARMS},
      arms=arms,
      images=embedded(folder, names),
      config=table.read_json(first / "config.json"),
      split=held["split"],
      data_notes=_data_notes(runs),
      statement=statement_text(private) if private else "",
      folders=[
        {"name": str(_below(place, target)), "point": _label(point), "command": _command(place)}
        for place, point in zip(runs.folders, runs.points, strict=True)
      ],
      has_clients=bool(np.isfinite(runs.frame["client_epsilon"]).any()),
      has_alone=bool(runs.frame["alone.auroc"].notna().any()),
    )
  )
  path = target / "report.html"
  write_text(path, page)
  return path


def _axes(runs: ComparedRuns) -> list[str]:
  """What the points differ in, but for seeds, in the order of the sweep."""
  names = [name for name in runs.points[0] if name not in SEEDS]
  return [name for name in names if runs.frame[name].nunique(dropna=False) > 1]


def _arms(frame: pd.DataFrame, axes: list[str]) -> list[dict[str, Any]]:
  """A record for each combination of the axes: numbers of its points, means, intervals, costs."""
  points = study.by_point(frame)
  points["arm"] = 0
  keys = axes or ["arm"]
  arms = []
  for key, group in points.groupby(keys, sort=False, dropna=False):
    values = dict(zip(keys, key, strict=True)) if axes else {}
    diverged = group["stopped"] == "diverged"
    stats = {}
    for name, _ in METRICS:
      for key in (name, f"mean.{name}", f"worst.{name}", f"alone.{name}"):
        column = f"all.{name}" if key == name else key
        reached = group[column].to_numpy(float)
        stats[key] = study.mean_interval(reached, bounds=study.bounds_of(column))
    arms.append(
      {
        "values": values,
        "points": group["point"].astype(int).tolist(),
        "n": len(group),
        "diverged": int(diverged.sum()),
        "positive": _positive(group["positive_class"].unique().tolist()),
        "epsilon": float(group["epsilon_max"].max()),
        "client_epsilon": float(group["client_epsilon"].max()),
        "unit": ", ".join(sorted(set(group["unit"]))),
        "stats": stats,
        "rounds": float(group["rounds"].mean()),
        "steps": float(group["steps"].mean()),
        "megabytes": float(group["megabytes"].mean()),
        "seconds": float(group["seconds"].mean()),
      }
    )
  telling = _telling(axes, arms)
  for arm in arms:
    arm["label"] = _label(arm["values"]) or "all points"
    arm["short"] = _label({name: arm["values"][name] for name in telling}) or "all points"
  return arms


def _positive(classes: Sequence[str]) -> str:
  return "differs" if len(classes) > 1 else classes[0] or NO_CLASS


def _telling(axes: list[str], arms: list[dict[str, Any]]) -> list[str]:
  """Axes without those that follow from others, such as a learning rate chosen for each ε.

  Labels of figures have room for no more; tables name every axis.
  """

  def different(names: list[str]) -> int:
    return len({tuple(str(arm["values"][name]) for name in names) for arm in arms})

  telling = list(axes)
  for axis in reversed([name for name in axes if name not in PRIVACY]):
    others = [name for name in telling if name != axis]
    if different(others) == different(axes):
      telling = others
  return telling


def _draw(
  runs: ComparedRuns, axes: list[str], arms: list[dict[str, Any]], folder: pathlib.Path
) -> None:
  frontier = _frontier(axes, arms)
  some = arms[:MOST_ARMS]
  labels = [arm["short"] for arm in some]
  by_point = {int(number): place for number, place in _places(runs).items()}
  own = [
    runs.frame[runs.frame["point"].isin(arm["points"])]["auroc"].to_numpy(float) for arm in some
  ]
  curves = [
    (arm["short"], *_curve([by_point[number] for number in arm["points"]]))
    for arm in arms[:MOST_LINES]
  ]
  confusions = []
  for arm in arms[:MOST_LINES]:
    ended = [table.read_json(by_point[k] / "summary.json") for k in arm["points"]]
    known = [np.array(e["confusion"]) for e in ended if e["stopped"] != "diverged"]
    classes = {tuple(_holdings(by_point[k])["class_names"]) for k in arm["points"]}
    if known and len(classes) == 1:  # counts of other classes do not add up
      confusions.append((arm["short"], sum(known), *classes))
  hospitals = _holdings(runs.folders[0])
  for suffix in (".png", ".pdf"):
    if frontier is not None:
      panels, name, log = frontier
      sweep_figures.draw_frontier(folder / f"frontier{suffix}", panels, name, "AUROC", log)
    sweep_figures.draw_spread(folder / f"spread{suffix}", labels, own, "AUROC")
    sweep_figures.draw_curves(folder / f"curves{suffix}", curves, "Accuracy")
    if confusions:
      sweep_figures.draw_confusions(folder / f"confusions{suffix}", confusions)
    draw_partition(folder / f"partition{suffix}", hospitals)


def _places(runs: ComparedRuns) -> dict[int, pathlib.Path]:
  numbers = runs.frame["point"].drop_duplicates().tolist()
  return dict(zip(numbers, runs.folders, strict=True))


def _frontier(
  axes: list[str], arms: list[dict[str, Any]]
) -> tuple[list[tuple[str, list[sweep_figures.Series]]], str, bool] | None:
  """Panels of the first figure, the name of its x, whether that is logarithmic; None without any.

  Axes that move ε are the x; of the others those that come first are panels, as many as it takes
  for few lines in each.
  """
  moved = [name for name in axes if name in PRIVACY]
  name, log = "ε of the worst hospital", True
  if not moved:
    moved = [a for a in axes if all(isinstance(arm["values"][a], int | float) for arm in arms)][:1]
    if not moved:
      return None
    name, log = moved[0], False
  rest, panelled = [axis for axis in _telling(axes, arms) if axis not in moved], []

  def label(arm: dict[str, Any], names: list[str]) -> str:
    return _label({axis: arm["values"][axis] for axis in names})

  while len({label(arm, rest) for arm in arms}) > MOST_IN_PANEL and len(rest) > 1:
    panelled.append(rest.pop(0))
  panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
  for arm in arms:
    lines = panels.setdefault(label(arm, panelled), {})
    lines.setdefault(label(arm, rest), []).append(arm)

  def series(label: str, own: list[dict[str, Any]]) -> sweep_figures.Series:
    def x_of(arm: dict[str, Any]) -> float:
      return arm["epsilon"] if log else float(arm["values"][moved[0]])

    # Arms that all diverged have no place, nor has ε = 0 (no step was taken) on a log axis.
    shown = [arm for arm in own if arm["stats"]["auroc"]["n"] and (x_of(arm) > 0 or not log)]
    own = sorted(shown, key=x_of)
    stats = [arm["stats"]["auroc"] for arm in own]
    alone = np.array([arm["stats"]["alone.auroc"]["mean"] for arm in own], float)
    mean, low, high = (np.array([each[key] for each in stats], float) for key in ENDS)
    x = np.array([x_of(arm) for arm in own], float)
    return sweep_figures.Series(label or "federation", x, mean, low, high, alone)

  found = [
    (title, [series(*line) for line in list(lines.items())[:MOST_LINES]])
    for title, lines in list(panels.items())[:MOST_PANELS]
  ]
  return found, name, log


def _curve(folders: Sequence[pathlib.Path]) -> tuple[np.ndarray, np.ndarray]:
  """Rounds and accuracies [points, n] at those log points that all of an arm's points have."""
  logs = []
  for folder in folders:
    lines = [line for line in read_metrics(folder) if line["split"] == "test"]
    known = {line["round"]: line["accuracy"] for line in lines if line["accuracy"] is not None}
    logs.append(known)
  shared = sorted(set.intersection(*map(set, logs)))
  return np.array(shared), np.array([[log[number] for number in shared] for log in logs])


def _table(arms: list[dict[str, Any]], axes: list[str]) -> pd.DataFrame:
  rows = []
  for arm in arms:
    row: dict[str, Any] = {name: arm["values"][name] for name in axes}
    row |= {"points": arm["n"], "unit": arm["unit"], "epsilon": arm["epsilon"]}
    row |= {"client_epsilon": arm["client_epsilon"], "positive_class": arm["positive"]}
    for name, _ in METRICS:
      for key in (name, f"worst.{name}"):
        stats = arm["stats"][key]
        row |= {key: stats["mean"], f"{key}.low": stats["low"], f"{key}.high": stats["high"]}
    rows.append(row)
  return pd.DataFrame(rows)


def _label(point: Point) -> str:
  from fedjax_med.sweep.points import shown

  return shown({name.rpartition(".")[2]: value for name, value in point.items()})


def _data_notes(runs: ComparedRuns) -> list[Note]:
  """What must be known of the data of the runs, each sentence once; names of files in none."""
  units = runs.frame.groupby("point")["privacy.unit"].first()
  notes = (
    note
    for folder, unit in zip(runs.folders, units, strict=True)
    for note in data_notes(_holdings(folder), unit, show_names=False)
  )
  return list(dict.fromkeys(notes))[:MOST_NOTES]


def _holdings(folder: pathlib.Path) -> dict[str, Any]:
  return table.read_json(folder / "hospitals.json")


def _command(folder: pathlib.Path) -> str:
  return table.read_json(folder / "config.json")["command"]


def _below(place: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  return place.relative_to(target) if place.is_relative_to(target) else place
