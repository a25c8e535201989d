"""The table of a sweep in LaTeX, for papers."""

import math
from collections.abc import Sequence

import pandas as pd

from fedjax_med.privacy.accounting import round_up
from fedjax_med.tasks.classification import NO_CLASS
from fedjax_med.tasks.task import Metric, Place, Task, qualified

_SPECIAL = {
  **{letter: f"\\{letter}" for letter in "_&%$#{}"},
  **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
}
_XELATEX = "% Compile with xelatex or lualatex and a font that has its letters.\n"


def as_text(text: str) -> str:
  """Escapes a text for LaTeX. Letters beyond Latin stay, and need XeLaTeX or LuaLaTeX."""
  return "".join(_SPECIAL.get(letter, letter) for letter in text)


def table_of(shown: pd.DataFrame, axes: Sequence[str], task: Task) -> str:
  """Mean and ends of the interval of each metric, a row an arm (package booktabs).

  The head of a metric of the positive class names it; where it differs, a column does.

  Args:
    shown: the table of a report.
    axes: columns that tell its rows apart.
    task: whose metrics are the further columns.
  """
  short = shown[list(axes)].map(lambda value: as_text(str(value)))
  short.columns = [as_text(name) for name in axes]
  short["unit"] = shown["unit"]
  positives = shown["positive_class"].unique().tolist()
  if len(positives) > 1:
    short["positive class"] = [as_text(name) for name in shown["positive_class"]]
  short["$\\varepsilon$"] = [
    "$\\infty$" if math.isinf(e) else round_up(e) for e in shown["epsilon"]
  ]
  columns = {
    metric.name: f"{metric.heading}{_suffix(metric, positives)}"
    for metric in task.metrics_in(Place.PAPER)
  }
  headline = task.headline
  columns[f"worst.{headline.name}"] = f"{headline.heading}, worst hospital"
  for name, head in columns.items():
    ends = [name, f"{name}.low", f"{name}.high"]
    short[as_text(head)] = [_with_ends(*row) for row in shown[ends].to_numpy(float)]
  text = short.to_latex(index=False, escape=False, na_rep="--")
  return text if all(ord(letter) < 0x180 for letter in text) else _XELATEX + text


def _suffix(metric: Metric, positives: Sequence[str]) -> str:
  """Class in the head of a column; empty where a column names the class."""
  if len(positives) > 1:
    return ""
  return qualified(metric, "" if positives[0] == NO_CLASS else positives[0])


def _with_ends(mean: float, low: float, high: float) -> str:
  """A mean with the ends of its interval, which is not even where it ends at 0 or 1."""
  if math.isnan(mean):
    return "--"
  return f"{mean:.3f}" if math.isnan(high) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
