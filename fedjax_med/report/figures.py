"""Figures of a run, drawn from the plain data its workdir holds (dictionaries and lists).

Every function writes one PNG or PDF to ``path``, the same bytes for the same data. None, an
undefined value, leaves a gap. Colours are those of Okabe and Ito, which colour-blind readers can
tell apart.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedjax_med.data.modality import modality_of, worded
from fedjax_med.folder.writing import write_whole
from fedjax_med.privacy.accounting import round_up
from fedjax_med.report.figure_labels import families, inches, labels
from fedjax_med.tasks.task import Figure, Metric, Place, Task

GLOBAL, ALONE, POOLED, QUIET = "#0072B2", "#E69F00", "#009E73", "#8C8C8C"
CLASS_COLOURS = ("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#0072B2", "#E69F00")
DPI = 150  # of the files; a report shows them at 100 pixels an inch
WIDTH = 9.6  # inches, of all but the square ones
MAX_BARS = 30  # hospitals that get a bar each
MAX_LINES = 20  # hospitals that get a line each

STYLE: dict[Any, Any] = {
  "font.size": 10,
  "axes.titlesize": 10.5,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#666666",
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#E5E5E5",
  "legend.frameon": False,
  "figure.titlesize": 11.5,
  "figure.titleweight": "bold",
  "hatch.linewidth": 0.6,
}


def context_line(split_scheme: str, epsilon: float | None) -> str:
  """Line of every title: the split, and the largest ε of the hospitals or that there is none."""
  privacy = "no differential privacy" if epsilon is None else f"ε ≤ {round_up(epsilon)}"
  return f"{split_scheme} split · {privacy}"


def draw_partition(path: pathlib.Path, hospitals: dict[str, Any]) -> None:
  """Draws the class counts of each hospital, train and test, from hospitals.json."""
  rows, class_names = hospitals["hospitals"], labels(hospitals["class_names"], "class")
  sides = [
    np.array([row[side] for row in rows]).reshape(len(rows), -1) for side in ("train", "test")
  ]
  nouns = modality_of(hospitals).nouns
  title = f"Who holds what · {hospitals['split']['scheme']} split"
  colours = _class_colours(len(class_names))
  if len(rows) > MAX_BARS:
    _partition_of_many(path, sides, class_names, colours, title, nouns)
    return
  with new_figure(path, (WIDTH, 1.9 + 0.32 * len(rows)), title) as figure:
    axes = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for axis, counts, side in zip(axes, sides, ("Train", "Test"), strict=True):
      left = np.zeros(len(rows))
      for label, values, colour in zip(class_names, counts.T, colours, strict=True):
        hatch = "////" if side == "Test" else None
        axis.barh(
          range(len(rows)), values, left=left, color=colour, hatch=hatch, edgecolor="white",
          linewidth=0.6, height=0.72, label=label,
        )  # fmt: skip
        left += values
      for y, total in enumerate(left):
        axis.text(total, y, f" {total:.0f}", va="center", fontsize=9, color="#444444")
      axis.set(title=f"{side}: {left.sum():.0f} {nouns}", xlabel=nouns)
      axis.margins(x=0.12)
      axis.grid(visible=False, axis="y")
    axes[0].set_yticks(range(len(rows)), labels([row["name"] for row in rows], "hospital"))
    axes[0].invert_yaxis()
    add_legend(figure, axes[0])


def _partition_of_many(
  path: pathlib.Path,
  sides: list[np.ndarray],  # train and test, each [K, classes] images
  class_names: list[str],
  colours: list[Any],
  title: str,
  nouns: str,
) -> None:
  """Sizes in descending order above the class shares of the same hospitals."""
  train, test = sides
  order = np.argsort(-train.sum(axis=1), kind="stable")
  sizes, places = train.sum(axis=1)[order], np.arange(len(order)) + 1
  with new_figure(path, (WIDTH, 5.2), f"{title} · {len(order)} hospitals, largest first") as figure:
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    upper.fill_between(places, sizes, step="mid", color=GLOBAL, alpha=0.25, linewidth=0)
    upper.step(places, sizes, where="mid", color=GLOBAL, label=f"train, {sizes.sum()} in all")
    upper.step(
      places, test.sum(axis=1)[order], where="mid", color=ALONE, linewidth=1,
      label=f"test, {test.sum()} in all",
    )  # fmt: skip
    upper.set(ylabel=f"{nouns} of a hospital", ylim=(0, None))
    upper.legend(loc="upper right")
    shares = train[order] / np.maximum(train[order].sum(axis=1, keepdims=True), 1)
    base = np.zeros(len(order))
    for label, values, colour in zip(class_names, shares.T, colours, strict=True):
      lower.bar(places, values, bottom=base, width=1.0, color=colour, label=label)
      base += values
    lower.set(ylabel=f"share of\ntrain {nouns}", ylim=(0, 1), xlabel="hospital, by size")
    lower.set_xlim(0.5, len(order) + 0.5)
    lower.grid(visible=False)
    add_legend(figure, lower)


def draw_rounds(
  path: pathlib.Path,
  log: list[dict[str, Any]],
  baselines: dict[str, Any] | None,
  split_scheme: str,
  who: str,
  task: Task,
  nouns: str = "images",
) -> None:
  """Draws metrics of the task at the log points of metrics.jsonl, and the ε spent by then."""
  test = [line for line in log if line["split"] == "test"]
  train = [line for line in log if line["split"] == "train"]
  private = any(line["epsilon_max"] is not None for line in test)
  epsilon = test[-1]["epsilon_max"]
  title = f"{who.capitalize()} on the test {nouns} · {context_line(split_scheme, epsilon)}"
  metrics = task.metrics_in(Place.CURVES)
  panels = len(metrics) + private
  columns = 2 if panels == 4 else min(3, panels)
  rows = -(-panels // columns)
  with new_figure(path, (WIDTH, 1.0 + 2.6 * rows), title) as figure:
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[panels:]:
      axis.remove()
    for axis, metric in zip(axes, metrics, strict=False):
      key = metric.name
      _draw_hospital_lines(axis, test, key, nouns)
      if baselines is not None:
        for name, colour, style, curve in _baseline_curves(baselines, key):
          axis.plot(*curve, color=colour, linestyle=style, linewidth=1.6, label=name)
      axis.plot(
        *_curve(test, key), color=GLOBAL, linewidth=2.2, marker=_marker(test),
        markersize=4, label=f"{who}, all test {nouns}",
      )  # fmt: skip
      if key == "loss" and train:
        axis.plot(*_curve(train, key), color="#444444", linestyle=":", label="local training")
      axis.set(title=metric.axis, xlabel="round")
      if metric.is_share:
        axis.set_ylim(min(axis.get_ylim()[0], 0.9), 1.01)
    if private:
      axis = axes[len(metrics)]
      axis.plot(*_curve(test, "epsilon_max"), color="#D55E00", linewidth=2, marker=_marker(test))
      axis.set(title="privacy spent: largest ε of the hospitals", xlabel="round", ylim=(0, None))
      axis.annotate(
        f"ε ≤ {round_up(epsilon)}", (test[-1]["round"], epsilon), xytext=(0, -18),
        textcoords="offset points", ha="right", va="top",
      )  # fmt: skip
    for axis in figure.axes:
      axis.xaxis.get_major_locator().set_params(integer=True)
      axis.yaxis.get_major_formatter().set_useOffset(False)
      if len(test) == 1:
        axis.set_xlim(test[0]["round"] - 1, test[0]["round"] + 1)
    fullest = max(figure.axes, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    add_legend(figure, fullest)


def draw_deployment(
  path: pathlib.Path, log: list[dict[str, Any]], deployment: dict[str, Any], metric: Metric
) -> None:
  """Draws the headline metric of all test examples against gigabytes sent, and against hours."""
  test = [line for line in log if line["split"] == "test"]
  rounds, values = _curve(test, metric.name)
  share = rounds / max(deployment["rounds"], 1)
  sent, hours = deployment["gigabytes"], deployment["hours"]
  bytes_in = (1, "gigabytes") if sent >= 1 else (1000, "megabytes")
  time_in = (1, "hours") if hours >= 1 else (60, "minutes")
  panels = (
    (share * sent * bytes_in[0], f"{bytes_in[1]} sent by all hospitals and the server"),
    (share * hours * time_in[0], f"{time_in[1]} of a deployment"),
  )
  with new_figure(path, (WIDTH, 3.6), f"{metric.heading} against what it costs") as figure:
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (x, name) in zip(axes, panels, strict=True):
      axis.plot(x, values, color=GLOBAL, linewidth=2.2, marker=_marker(test), markersize=4)
      axis.set(xlabel=name, xlim=(0, None))
      axis.locator_params(axis="x", nbins=5)
    axes[0].set(ylabel=metric.axis)


def _draw_hospital_lines(axis: Any, test: list[dict[str, Any]], key: str, nouns: str) -> None:
  """A thin line for each hospital, or for many the band that holds their middle 80%."""
  rounds = [line["round"] for line in test]
  values = _array([[client.get(key) for client in line["clients"]] for line in test])
  if values.shape[1] <= MAX_LINES:
    for number, curve in enumerate(values.T):
      label = f"each hospital's test {nouns}" if number == 0 else None
      axis.plot(rounds, curve, color=QUIET, linewidth=0.8, alpha=0.7, label=label,
                marker="." if len(rounds) == 1 else None)  # fmt: skip
    return
  bands = [np.quantile(row[~np.isnan(row)], [0.1, 0.9]) for row in values if not _all_nan(row)]
  where = [at for at, row in zip(rounds, values, strict=True) if not _all_nan(row)]
  if bands:
    low, high = np.array(bands).T
    label = "middle 80% of the hospitals"
    axis.fill_between(where, low, high, color=QUIET, alpha=0.25, linewidth=0, label=label)


def _baseline_curves(
  baselines: dict[str, Any], key: str
) -> Iterator[tuple[str, str, str, tuple[np.ndarray, np.ndarray]]]:
  """(name, colour, line style, curve) of pooled training and of the mean of training alone."""
  pooled = baselines["pooled"]["curve"]
  rounds = np.array([point["round"] for point in pooled])
  yield "pooled data", POOLED, "--", (rounds, _array([point["all"].get(key) for point in pooled]))
  # Budgets may end each of them after another round: it stays where it ended.
  known = [
    {point["round"]: point["all"].get(key) for point in hospital["curve"]}
    for hospital in baselines["alone"]
  ]
  every = sorted({round for curve in known for round in curve})
  values = _array([[curve[max(r for r in curve if r <= at)] for at in every] for curve in known])
  keep = [column for column in range(values.shape[1]) if not _all_nan(values[:, column])]
  rounds = np.array([every[column] for column in keep])
  yield "alone (mean)", ALONE, "-.", (rounds, np.nanmean(values[:, keep], axis=0))


def draw_hospitals(
  path: pathlib.Path,
  summary: dict[str, Any],
  hospitals: dict[str, Any],
  baselines: dict[str, Any] | None,
  task: Task,
) -> None:
  """Draws metrics on each hospital's test images, and those of its model trained alone."""
  clients, scheme, who = summary["clients"], hospitals["split"]["scheme"], summary["predicts"]
  alone = None
  if baselines is not None:
    last = {hospital["name"]: hospital["curve"][-1]["own"] for hospital in baselines["alone"]}
    alone = [last[client["name"]] for client in clients]
  nouns = modality_of(hospitals).nouns
  title = f"Each hospital's own test {nouns} · {context_line(scheme, summary['epsilon_max'])}"
  metrics = task.metrics_in(Place.LINE)
  if len(clients) > MAX_BARS:
    sizes = [sum(row["train"]) for row in hospitals["hospitals"]]
    with new_figure(path, (WIDTH, 4.6), f"{title} · {len(clients)} hospitals") as figure:
      axes = figure.subplots(1, len(metrics), squeeze=False)[0]
      for axis, metric in zip(axes, metrics, strict=True):
        _draw_hospital_dots(axis, metric, who, clients, alone, sizes, nouns)
    return
  height = 0.62 if alone else 0.36
  with new_figure(path, (WIDTH, 1.9 + height * len(clients)), title) as figure:
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
      key, (low, high) = metric.name, _bar_range(metric, [*clients, *(alone or [])])
      groups = [(who, GLOBAL, clients)]
      groups += [("trained alone", ALONE, alone)] if alone else []
      thickness = 0.76 / len(groups)
      for place, (name, colour, rows) in enumerate(groups):
        values = _array([row.get(key) for row in rows])
        y = np.arange(len(rows)) + (place - (len(groups) - 1) / 2) * thickness
        axis.barh(y, values, height=thickness * 0.94, color=colour, label=name)
        for at, value in zip(y, values, strict=True):
          text = "–" if np.isnan(value) else f"{value:.3f}"
          axis.text(high + 0.025 * (high - low), at, text, va="center", fontsize=9, color="#444444")
      overall = summary["test"].get(key)
      if overall is not None:
        axis.axvline(overall, color=GLOBAL, linestyle="--", linewidth=1.2, zorder=0.5,
                     label=f"{who}, all test {nouns}")  # fmt: skip
      reach = (low, low + 1.13 * (high - low))
      axis.set(title=metric.axis, xlim=reach, xticks=_round_ticks(low, high))
      axis.grid(visible=False, axis="y")
    names = labels([client["name"] for client in clients], "hospital")
    axes[0].set_yticks(range(len(clients)), names)
    axes[0].invert_yaxis()
    add_legend(figure, axes[0])


def _round_ticks(low: float, high: float) -> np.ndarray:
  """A few round numbers from ``low`` to ``high``, whose labels are short."""
  from matplotlib.ticker import MaxNLocator

  ticks = np.asarray(MaxNLocator(5).tick_values(low, high))
  return ticks[(ticks >= low) & (ticks <= high)]


def _bar_range(metric: Metric, rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
  """Least and largest value of the bars of a metric: its bounds, or those of the values and 0."""
  known = [0.0, *(row[metric.name] for row in rows if row.get(metric.name) is not None)]
  low, high = metric.bounds
  low, high = low if np.isfinite(low) else min(known), high if np.isfinite(high) else max(known)
  return low, high if high > low else low + 1.0


def _draw_hospital_dots(
  axis: Any,
  metric: Metric,
  who: str,
  clients: list[dict[str, Any]],
  alone: list[dict[str, Any]] | None,
  sizes: list[int],
  nouns: str,
) -> None:
  """A dot for each of many hospitals: against the one trained alone, or against its size."""
  values = _array([client.get(metric.name) for client in clients])
  if alone is None:
    axis.scatter(sizes, values, s=16, color=GLOBAL, alpha=0.6, linewidth=0)
    axis.set(title=metric.axis, xlabel=f"train {nouns} of the hospital", ylabel=who, xscale="log")
    if metric.is_share:
      axis.set_ylim(min(axis.get_ylim()[0], 0.9), 1.01)
    axis.xaxis.set_major_formatter("{x:.0f}")
    return
  local = _array([row.get(metric.name) for row in alone])
  axis.scatter(local, values, s=16, color=GLOBAL, alpha=0.6, linewidth=0)
  both = ~(np.isnan(values) | np.isnan(local))
  ahead = values - local if metric.better == "higher" else local - values
  better = int(np.sum(ahead[both] > 0))
  known = [*local[both], *values[both]]
  low, high = min([0.9, *known]) - 0.02, 1.01
  if not metric.is_share:
    low, high = min(known, default=0.0), max(known, default=1.0)
  axis.plot([low, high], [low, high], color=QUIET, linewidth=1, linestyle="--", zorder=0.5)
  axis.set(
    title=f"{metric.label}: {who} better in {better} of {int(both.sum())}",
    xlabel="trained alone", ylabel=who,
  )  # fmt: skip
  if low < high:
    axis.set(xlim=(low, high), ylim=(low, high))


def draw_details(
  path: pathlib.Path, drawn: Figure, summary: dict[str, Any], hospitals: dict[str, Any]
) -> None:
  """Draws a figure of the task from the predictions on all test images after the last round."""
  told = hospitals["class_names"] if drawn.of_classes else hospitals["targets"]["names"]
  names = labels(told, "class" if drawn.of_classes else "target")
  context = context_line(hospitals["split"]["scheme"], summary["epsilon_max"])
  size, title = drawn.size(names, inches(names)), f"Round {summary['rounds']}\n{context}"
  with new_figure(path, size, title) as figure:
    axis = figure.subplots()
    drawn.draw(axis, summary, names, False)
    axis.set(title=worded(drawn.title, modality_of(hospitals)))
    if not drawn.of_classes:
      return
    turned = len(names) >= 4 or inches(names) > 0.9
    axis.set_xticks(range(len(names)), names, rotation=45 if turned else 0)
    axis.set_yticks(range(len(names)), names)


def draw_examples(
  path: pathlib.Path,
  images: Sequence[Sequence[np.ndarray | None]],  # [hospital][column] of [H, W] uint8
  hospital_names: Sequence[str],
  column_titles: Sequence[str],
  title: str = "Train images",
) -> None:
  """Draws a grid of example images, a row for each hospital; None where it has no such image.

  Names and titles are drawn as they are: see ``labels``.
  """
  rows, columns = len(hospital_names), len(column_titles)
  width = max(1.9, 0.9 + inches(hospital_names)) + max(1.15, inches(column_titles)) * columns
  with new_figure(path, (width, 0.7 + 1.15 * rows), title) as figure:
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, name in enumerate(hospital_names):
      for axis, image in zip(grid[row], images[row], strict=True):
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.set_box_aspect(1)
        if image is None:
          axis.text(0.5, 0.5, "none", ha="center", va="center", color=QUIET)
          continue
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
      grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, title in zip(grid[0], column_titles, strict=True):
      axis.set_title(title, loc="center", fontsize=9.5)


@contextlib.contextmanager
def new_figure(path: pathlib.Path, size: tuple[float, float], title: str) -> Iterator[Any]:
  """A figure in the house style, ``size`` in inches, written to ``path`` (.png, .pdf) at the end.

  The file is whole or not there. It never touches pyplot, so it needs no display and leaves no
  global state behind.
  """
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context({**STYLE, "font.family": families()}):
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    # Neither software nor date: the bytes depend on the data only.
    unsaid = {"Software": None} if path.suffix == ".png" else {"CreationDate": None}
    kind = path.suffix.removeprefix(".")
    write_whole(path, lambda place: figure.savefig(place, format=kind, dpi=DPI, metadata=unsaid))


def add_legend(figure: Any, axis: Any) -> None:
  """One legend for the whole figure, under it, from the entries of ``axis``."""
  handles, entries = axis.get_legend_handles_labels()
  widths = [0.65 + 0.075 * len(entry) for entry in entries]  # inches, at 10 points

  def needed(columns: int) -> float:
    rows = -(-len(widths) // columns)  # a column is filled before the next
    return sum(max(widths[start : start + rows]) for start in range(0, len(widths), rows))

  fitting = (n for n in range(len(widths), 1, -1) if needed(n) <= figure.get_figwidth())
  figure.legend(handles, entries, loc="outside lower center", ncols=next(fitting, 1))


def _class_colours(num_classes: int) -> list[Any]:
  """One colour a class: the palette while it lasts, then steps along a colour map."""
  if num_classes <= len(CLASS_COLOURS):
    return list(CLASS_COLOURS[:num_classes])
  import matplotlib

  return list(matplotlib.colormaps["viridis"](np.linspace(0, 1, num_classes)))


def _array(values: Any) -> np.ndarray:
  """f64 array of a nested list in which None stands for an undefined value (NaN)."""
  return np.array(values, dtype=object).astype(np.float64)


def _all_nan(values: np.ndarray) -> bool:
  return bool(np.isnan(values).all())


def _curve(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Rounds and values of one key of the log lines."""
  return np.array([line["round"] for line in lines]), _array([line.get(key) for line in lines])


def _marker(lines: list[dict[str, Any]]) -> str | None:
  """Dots on short curves, so that a run of one log point is still visible."""
  return "o" if len(lines) <= 30 else None
