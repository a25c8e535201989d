"""report.html of a sweep or of several runs: cost of privacy, its spread over hospitals, commands.

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
from fedjax_med.data.modality import modality_of, worded
from fedjax_med.folder.data_notes import Note, data_notes
from fedjax_med.folder.writing import read_metrics, write_text, write_whole
from fedjax_med.privacy import claims
from fedjax_med.report import latex, sweep_figures
from fedjax_med.report.attack_table import attack_table
from fedjax_med.report.figure_labels import stand_ins
from fedjax_med.report.figures import MAX_BARS, draw_partition
from fedjax_med.report.run_page import embedded, environment
from fedjax_med.run.statement import statement_text
from fedjax_med.sweep import table
from fedjax_med.sweep.grid import Point
from fedjax_med.tasks.classification import NO_CLASS
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Figure, Metric, Place, Task

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
  """The runs that a report compares.

  Attributes:
    title: its heading.
    folders: of the runs that have ended.
    points: values of the fields in which each of them differs.
    frame: the table, a row a run and hospital.
    missing: runs that have not ended.
    command: that started all of them; empty for runs by themselves.
    task: task of all of them.
  """

  title: str
  folders: list[pathlib.Path]
  points: list[Point]
  frame: pd.DataFrame
  missing: int
  command: str
  task: Task


def read_sweep(workdir: pathlib.Path) -> ComparedRuns:
  """The points of a sweep; raises UserError where none has ended."""
  definition = table.read(workdir)
  numbers = [k for k in range(len(definition["points"])) if table.done(workdir, k)]
  require(bool(numbers), f"no point of {workdir} has ended", "start the sweep with --resume")
  frame = study.with_seconds(table.collect(workdir), table.timing(workdir, numbers))
  return ComparedRuns(
    title=f"Sweep {definition['sweep_id']}",
    folders=[table.folder_of(workdir, number) for number in numbers],
    points=[definition["points"][number] for number in numbers],
    frame=frame,
    missing=len(definition["points"]) - len(numbers),
    command=definition.get("command", ""),
    task=_only_task(frame),
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
  frame = pd.DataFrame([row for run_rows in rows for row in run_rows])
  seconds = [table.read_json(folder / "timing.json")["total"] for folder in folders]
  timing = pd.DataFrame({"point": range(len(folders)), "seconds": seconds})
  return ComparedRuns(
    title=f"{len(folders)} runs",
    folders=list(folders),
    points=points,
    frame=study.with_seconds(frame, timing),
    missing=0,
    command="",
    task=_only_task(frame),
  )


def _only_task(frame: pd.DataFrame) -> Task:
  """The task of all runs of a table; raises UserError where they have several."""
  names = sorted(set(frame["task"]))
  require(
    len(names) == 1,
    f"the runs have the tasks {', '.join(names)}, whose metrics do not compare",
    "make a report for the runs of each task",
  )
  return task_named(names[0])


def write(runs: ComparedRuns, target: pathlib.Path) -> pathlib.Path:
  """Writes report.html, figures (PNG and PDF) and tables (CSV and LaTeX) into ``target``."""
  task, axes = runs.task, _axes(runs)
  arms = _arms(runs.frame, axes)
  folder = target / "figures"
  folder.mkdir(parents=True, exist_ok=True)
  _draw(runs, axes, arms, folder)
  attacks = attack_table(arms, _telling, _label, task.headline)
  if attacks is not None:
    for suffix in (".png", ".pdf"):
      sweep_figures.draw_attacks(folder / f"attacks{suffix}", attacks, task.headline)
    write_whole(
      target / "worst_attacks.csv", lambda place: attacks.frame.to_csv(place, index=False)
    )
  of_task = [f"{drawn.name}s" for drawn in task.figures]
  names = ("frontier", "attacks", "spread", "curves", "traffic", *of_task, "partition")
  shown = _table(arms, axes, task.metrics_in(Place.SWEEP))
  write_whole(target / "table.csv", lambda place: shown.to_csv(place, index=False))
  write_text(target / "table.tex", latex.table_of(shown, axes, runs.task))
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
      metrics=task.metrics_in(Place.SWEEP),
      headline=task.headline,
      worst=task.metrics_in(Place.WORST),
      own_figures=[(f"{drawn.name}s", drawn.pooled_caption) for drawn in task.figures],
      positives=sorted(set(runs.frame["positive_class"])),
      about_classes=task.about(sorted(set(runs.frame["positive_class"]))),
      stand_ins=[
        *stand_ins(held["class_names"], "class"),
        *(stand_ins(names_of, "hospital") if len(names_of) <= MAX_BARS else []),
      ],
      most={"lines": MOST_LINES, "arms": MOST_ARMS},
      arms=arms,
      attacks=attacks,
      images=embedded(folder, names),
      config=table.read_json(first / "config.json"),
      split=held["split"],
      table="table" in held or "series" in held,
      data_notes=_data_notes(runs),
      statement=statement_text(private) if private else "",
      folders=[
        {"name": str(_below(place, target)), "point": _label(point), "command": _command(place)}
        for place, point in zip(runs.folders, runs.points, strict=True)
      ],
      has_clients=bool(np.isfinite(runs.frame["client_epsilon"]).any()),
      has_alone=bool(runs.frame[f"alone.{task.headline.name}"].notna().any()),
    )
  )
  path = target / "report.html"
  write_text(path, worded(page, modality_of(held)))
  return path


def _axes(runs: ComparedRuns) -> list[str]:
  """Fields in which the points differ, without seeds, in the order of the sweep."""
  names = [name for name in runs.points[0] if name not in SEEDS]
  return [name for name in names if runs.frame[name].nunique(dropna=False) > 1]


def _arms(frame: pd.DataFrame, axes: list[str]) -> list[dict[str, Any]]:
  """A record for each combination of the axes: numbers of its points, means, intervals, costs."""
  points, metrics = study.by_point(frame), study.metrics_of(frame)
  points["arm"] = 0
  keys = axes or ["arm"]
  arms = []
  for key, group in points.groupby(keys, sort=False, dropna=False):
    values = dict(zip(keys, key, strict=True)) if axes else {}
    diverged = group["stopped"] == "diverged"
    stats = {}
    for name, metric in metrics.items():
      for key in (name, f"mean.{name}", f"worst.{name}", f"alone.{name}"):
        column = f"all.{name}" if key == name else key
        reached = group[column].to_numpy(float)
        stats[key] = study.mean_interval(reached, bounds=metric.bounds)
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
  headline = runs.task.headline
  frontier = _frontier(axes, arms, headline.name)
  some = arms[:MOST_ARMS]
  labels = [arm["short"] for arm in some]
  by_point = {int(number): place for number, place in _places(runs).items()}
  values = [
    study.honest(runs.frame[runs.frame["point"].isin(arm["points"])])[headline.name].to_numpy(float)
    for arm in some
  ]
  curves = [
    (arm["short"], *_curve([by_point[number] for number in arm["points"]], headline.name))
    for arm in arms[:MOST_LINES]
  ]
  traffic = _traffic(arms[:MOST_LINES], curves)
  details = [(drawn, _pooled(drawn, arms[:MOST_LINES], by_point)) for drawn in runs.task.figures]
  hospitals = _holdings(runs.folders[0])
  for suffix in (".png", ".pdf"):
    if frontier is not None:
      panels, name, log = frontier
      sweep_figures.draw_frontier(folder / f"frontier{suffix}", panels, name, headline.label, log)
    sweep_figures.draw_spread(folder / f"spread{suffix}", labels, values, headline)
    sweep_figures.draw_curves(folder / f"curves{suffix}", curves, headline.label)
    if traffic:
      sweep_figures.draw_traffic(folder / f"traffic{suffix}", traffic, headline.label)
    for drawn, pooled in details:
      if pooled:
        path = folder / f"{drawn.name}s{suffix}"
        sweep_figures.draw_details(path, drawn, pooled)
    draw_partition(folder / f"partition{suffix}", hospitals)


def _traffic(
  arms: Sequence[dict[str, Any]], curves: Sequence[tuple[str, np.ndarray, np.ndarray]]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
  """Curves over megabytes in place of rounds; none where all arms send as much in a round."""
  per_round = [arm["megabytes"] / max(arm["rounds"], 1) for arm in arms]
  if max(per_round) <= 1.001 * min(per_round):
    return []
  return [
    (label, rounds * each, values)
    for (label, rounds, values), each in zip(curves, per_round, strict=True)
  ]


def _pooled(
  drawn: Figure, arms: Sequence[dict[str, Any]], by_point: dict[int, pathlib.Path]
) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
  """(label, details, class names) of each arm of a figure of the task, over all points of the arm.

  Arms whose points differ in their classes are left out: their details do not add up.
  """
  found = []
  for arm in arms:
    ended = [table.read_json(by_point[number] / "summary.json") for number in arm["points"]]
    known = [each for each in ended if each["stopped"] != "diverged" and drawn.name in each]
    classes = {tuple(_holdings(by_point[number])["class_names"]) for number in arm["points"]}
    if known and len(classes) == 1:
      found.append((arm["short"], drawn.pool(known), *classes))
  return found


def _places(runs: ComparedRuns) -> dict[int, pathlib.Path]:
  numbers = runs.frame["point"].drop_duplicates().tolist()
  return dict(zip(numbers, runs.folders, strict=True))


def _frontier(
  axes: list[str], arms: list[dict[str, Any]], metric: str
) -> tuple[list[tuple[str, list[sweep_figures.Series]]], str, bool] | None:
  """Panels of the figure of a metric, the name of its x, whether that is logarithmic; or None.

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

  def series(label: str, arms: list[dict[str, Any]]) -> sweep_figures.Series:
    def x_of(arm: dict[str, Any]) -> float:
      return arm["epsilon"] if log else float(arm["values"][moved[0]])

    # Arms that all diverged have no place, nor has ε = 0 (no step was taken) on a log axis.
    shown = [arm for arm in arms if arm["stats"][metric]["n"] and (x_of(arm) > 0 or not log)]
    arms = sorted(shown, key=x_of)
    stats = [arm["stats"][metric] for arm in arms]
    alone = np.array([arm["stats"][f"alone.{metric}"]["mean"] for arm in arms], float)
    mean, low, high = (np.array([each[key] for each in stats], float) for key in ENDS)
    x = np.array([x_of(arm) for arm in arms], float)
    return sweep_figures.Series(
      label=label or "federation", x=x, mean=mean, low=low, high=high, alone=alone
    )

  found = [
    (title, [series(*line) for line in list(lines.items())[:MOST_LINES]])
    for title, lines in list(panels.items())[:MOST_PANELS]
  ]
  return found, name, log


def _curve(folders: Sequence[pathlib.Path], metric: str) -> tuple[np.ndarray, np.ndarray]:
  """Rounds and values [points, n] of a metric at the log points that all of these runs have."""
  logs = []
  for folder in folders:
    lines = [line for line in read_metrics(folder) if line["split"] == "test"]
    logs.append({line["round"]: line[metric] for line in lines if line.get(metric) is not None})
  shared = sorted(set.intersection(*map(set, logs)))
  return np.array(shared), np.array([[log[number] for number in shared] for log in logs])


def _table(arms: list[dict[str, Any]], axes: list[str], metrics: Sequence[Metric]) -> pd.DataFrame:
  rows = []
  for arm in arms:
    row: dict[str, Any] = {name: arm["values"][name] for name in axes}
    row |= {"points": arm["n"], "unit": arm["unit"], "epsilon": arm["epsilon"]}
    row |= {"client_epsilon": arm["client_epsilon"], "positive_class": arm["positive"]}
    for metric in metrics:
      for key in (metric.name, f"worst.{metric.name}"):
        stats = arm["stats"][key]
        row |= {key: stats["mean"], f"{key}.low": stats["low"], f"{key}.high": stats["high"]}
    rows.append(row)
  return pd.DataFrame(rows)


def _label(point: Point) -> str:
  from fedjax_med.sweep.points import shown

  return shown({name.rpartition(".")[2]: value for name, value in point.items()})


def _data_notes(runs: ComparedRuns) -> list[Note]:
  """Sentences about the data of the runs, each of them once; they name no files."""
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
