"""Figures of a sweep, from its table and the logs of its points; see ``report.figures``."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.report import figure_labels as texts
from fedjax_med.report.attack_table import AttackTable
from fedjax_med.report.figures import QUIET, WIDTH, add_legend, new_figure
from fedjax_med.tasks.task import Figure, Metric

MARKERS = ("o", "s", "D", "P")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#444444")


class Series(NamedTuple):
  """Arms that make one line of a figure: they differ in ε, or in the x of the figure.

  Attributes:
    label: text of the values that all of them share.
    x: [n] ε, or values of the first axis, ascending; infinite is no privacy.
    mean: [n] of the metric over points.
    low: [n] lower end of its interval, NaN where there is one point.
    high: [n] upper end.
    alone: [n] mean over hospitals of models trained alone, NaN without.
  """

  label: str
  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  alone: np.ndarray


def draw_frontier(
  path: pathlib.Path,
  panels: Sequence[tuple[str, Sequence[Series]]],
  x_name: str,
  y_name: str,
  log: bool,
) -> None:
  """Draws a metric against ε (or an axis) with intervals; dashed without privacy, dotted alone.

  A panel is a title and its lines, whose labels are those of every other panel; all share axes.
  """
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  height = 5.0 if rows == 1 else 0.8 + 3.3 * rows
  with new_figure(path, (WIDTH, height), f"{y_name} against {x_name}") as figure:
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axis in grid.ravel()[len(panels) :]:
      axis.set_visible(False)
    every = [line for _, lines in panels for line in lines]
    for axis, (title, lines) in zip(grid.ravel(), panels, strict=False):
      _draw_lines(axis, lines, log)
      axis.set_title(texts.drawable(title))
      if log:
        axis.set_xscale("log")
        ticks = sorted({float(f"{x:.2g}") for line in every for x in line.x if np.isfinite(x)})
        if len(ticks) <= 10:
          axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
          axis.minorticks_off()
    for axis in grid[-1]:
      axis.set(xlabel=x_name)
    for axis in grid[:, 0]:
      axis.set(ylabel=y_name)
    add_legend(figure, grid[0, 0])


def _draw_lines(axis: Any, lines: Sequence[Series], log: bool) -> None:
  known = np.concatenate([line.x[np.isfinite(line.x)] for line in lines])
  widest = np.ptp(known) if len(known) else 0.0
  for number, (line, colour) in enumerate(zip(lines, PALETTE, strict=False)):
    label = texts.drawable(line.label)
    private = np.isfinite(line.x)
    x, mean = line.x[private], line.mean[private]
    if len(x):
      spread = np.nan_to_num([mean - line.low[private], line.high[private] - mean])
      # Side by side, so that no bar hides another.
      shift = number - (len(lines) - 1) / 2
      aside = x * 1.012**shift if log else x + 0.004 * shift * widest
      axis.errorbar(
        aside, mean, yerr=spread, color=colour, marker="o", markersize=5, linewidth=1.8,
        capsize=3, label=label,
      )  # fmt: skip
    alone = private & ~np.isnan(line.alone)
    if alone.any():
      axis.plot(
        line.x[alone], line.alone[alone], color=colour, linestyle=":", marker=".",
        label=f"{label}, alone",
      )  # fmt: skip
    bare = zip(line.mean[~private], line.low[~private], line.high[~private], strict=True)
    for value, low, high in bare:
      axis.axhline(value, color=colour, linestyle="--", linewidth=1.4, label=f"{label}, no privacy")
      if not np.isnan(low):
        axis.axhspan(low, high, color=colour, alpha=0.05, linewidth=0)


def draw_spread(
  path: pathlib.Path, labels: Sequence[str], values: Sequence[np.ndarray], metric: Metric
) -> None:
  """Draws a dot for every hospital of every point of each arm; marks the worst and the mean."""
  with new_figure(
    path, (WIDTH, 1.8 + 0.34 * len(labels)), f"{metric.heading} on each hospital's own test images"
  ) as figure:
    axis = figure.subplots()
    rng = np.random.default_rng(0)
    for row, hospitals in enumerate(values):
      known = hospitals[~np.isnan(hospitals)]
      if not len(known):
        continue
      heights = row + rng.uniform(-0.22, 0.22, len(known))
      first = row == 0
      axis.scatter(known, heights, s=12, color=QUIET, alpha=0.6, linewidth=0,
                   label="hospital of a run" if first else None)  # fmt: skip
      axis.scatter(known.mean(), row, s=46, color=PALETTE[0], zorder=3,
                   label="mean" if first else None)  # fmt: skip
      axis.scatter(metric.worst(known.tolist()), row, s=46, marker="v", color=PALETTE[1], zorder=3,
                   label="worst" if first else None)  # fmt: skip
    rows = [textwrap.fill(texts.drawable(label), 52) for label in labels]
    axis.set_yticks(range(len(labels)), rows)
    axis.invert_yaxis()
    axis.set(xlabel=metric.axis)
    axis.grid(visible=False, axis="y")
    add_legend(figure, axis)


def draw_attacks(path: pathlib.Path, attacks: AttackTable, metric: Metric) -> None:
  """Draws a mark for every attack on each rule, and a triangle at the worst of the rule."""
  size = WIDTH, 2.2 + 0.34 * len(attacks.rules)
  with new_figure(path, size, f"{metric.heading} of honest hospitals under attack") as figure:
    axis = figure.subplots()
    rows = np.arange(len(attacks.rules))
    for column, attack in enumerate(attacks.attacks):
      colour, marker = (
        PALETTE[column % len(PALETTE)],
        MARKERS[column // len(PALETTE) % len(MARKERS)],
      )
      axis.scatter(attacks.values[:, column], rows, s=26, color=colour, marker=marker, alpha=0.8,
                   label=texts.drawable(attack))  # fmt: skip
    axis.scatter(attacks.worst, rows + 0.3, s=40, marker="^", color=QUIET, label="worst")
    axis.set_yticks(rows, [textwrap.fill(texts.drawable(label), 52) for label in attacks.rules])
    axis.invert_yaxis()
    axis.set(xlabel=metric.axis)
    axis.grid(visible=False, axis="y")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))


def draw_curves(
  path: pathlib.Path,
  curves: Sequence[tuple[str, np.ndarray, np.ndarray]],  # label, rounds [n], values [points, n]
  y_name: str,
) -> None:
  """Draws a metric over rounds: the mean of an arm's points, and the band that they lie in."""
  with new_figure(path, (WIDTH, 4.6), f"{y_name} on all test images over rounds") as figure:
    axis = figure.subplots()
    for (label, rounds, values), colour in zip(curves, PALETTE, strict=False):
      label = texts.drawable(label)
      axis.plot(rounds, values.mean(0), color=colour, marker="o", markersize=3, label=label)
      if len(values) > 1:
        axis.fill_between(
          rounds, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0
        )
    axis.set(xlabel="round", ylabel=y_name)
    axis.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure, axis)


def draw_traffic(
  path: pathlib.Path,
  # label, megabytes [n], values [points, n]
  curves: Sequence[tuple[str, np.ndarray, np.ndarray]],
  y_name: str,
) -> None:
  """Draws a metric against the megabytes that all hospitals and the server have sent by then."""
  with new_figure(
    path, (WIDTH, 4.6), f"{y_name} on all test images against what was sent"
  ) as figure:
    axis = figure.subplots()
    for (label, megabytes, values), colour in zip(curves, PALETTE, strict=False):
      sent = megabytes > 0  # the start has no place on a logarithmic axis
      mean = values.mean(0)[sent]
      axis.plot(megabytes[sent], mean, color=colour, marker="o", markersize=3,
                label=texts.drawable(label))  # fmt: skip
      if len(values) > 1:
        low, high = values.min(0)[sent], values.max(0)[sent]
        axis.fill_between(megabytes[sent], low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set(xlabel="megabytes sent by all hospitals and the server", ylabel=y_name, xscale="log")
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
      ticks(lambda value, _: f"{value:g}")
    add_legend(figure, axis)


def draw_details(
  path: pathlib.Path,
  drawn: Figure,
  # label, details pooled over points, class names
  arms: Sequence[tuple[str, dict[str, Any], Sequence[str]]],
) -> None:
  """Draws a figure of the task's own for several arms, a panel each."""
  long = any(texts.inches(texts.labels(names, "class"), 7.5) > 0.65 for _, _, names in arms)
  columns = min(2 if long else 4, len(arms))
  rows = -(-len(arms) // columns)
  with new_figure(path, (WIDTH, 0.9 + 2.5 * rows), drawn.pooled_title) as figure:
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.ravel()[len(arms) :]:
      axis.set_visible(False)
    for axis, (label, details, names) in zip(grid.ravel(), arms, strict=False):
      ticks = texts.labels(names, "class")
      drawn.draw(axis, details, ticks, True)
      axis.set_title(texts.drawable(label), fontsize=8.5, wrap=True)
      if not drawn.of_classes:
        continue
      axis.set_xticks(range(len(names)), ticks, fontsize=7.5, rotation=30 if long else 0)
      axis.set_yticks(range(len(names)), ticks, fontsize=7.5)
