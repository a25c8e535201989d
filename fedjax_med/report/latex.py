"""The table of a sweep in LaTeX, for papers."""

import math
from collections.abc import Sequence

import pandas as pd

from fedjax_med.core.metrics import NO_CLASS
from fedjax_med.privacy.accounting import round_up

_SPECIAL = {
  **{letter: f"\\{letter}" for letter in "_&%$#{}"},
  **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
}
_XELATEX = "% Compile with xelatex or lualatex and a font that has its letters.\n"


def as_text(text: str) -> str:
  """What LaTeX prints as ``text``; letters beyond Latin stay, and need XeLaTeX or LuaLaTeX."""
  return "".join(_SPECIAL.get(letter, letter) for letter in text)


def table_of(shown: pd.DataFrame, axes: Sequence[str], metrics: Sequence[tuple[str, str]]) -> str:
  """Mean and ends of the interval of each metric, a row an arm (package booktabs).

  The head of F1 names the positive class; where it differs, a column does.

  Args:
    shown: the table of a report.
    axes: columns that tell its rows apart.
    metrics: further columns and their heads.
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
  for name, label in metrics:
    head = _head_of_f1(positives) if name == "f1" else label
    columns = [name, f"{name}.low", f"{name}.high"]
    short[head] = [_with_ends(*row) for row in shown[columns].to_numpy(float)]
  text = short.to_latex(index=False, escape=False, na_rep="--")
  return text if all(ord(letter) < 0x180 for letter in text) else _XELATEX + text


def _head_of_f1(positives: Sequence[str]) -> str:
  if len(positives) > 1:
    return "F1"
  return "F1 (macro)" if positives[0] == NO_CLASS else f"F1 (positive: {as_text(positives[0])})"


def _with_ends(mean: float, low: float, high: float) -> str:
  """Not a half width: an interval that ends at 0 or 1 is not even."""
  if math.isnan(mean):
    return "--"
  return f"{mean:.3f}" if math.isnan(high) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
