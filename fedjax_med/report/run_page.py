"""The report of a run: one self-contained report.html, made from the files of its workdir.

Nothing but those files enters it, no time and no network: the same workdir gives the same bytes.
"""

import base64
import itertools
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.data.modality import modality_of, worded
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.folder.reading import EXPLANATION, read_json, read_run, read_utf8, require_shape
from fedjax_med.folder.writing import REPORT, STATEMENT, write_text
from fedjax_med.privacy.accounting import round_up
from fedjax_med.privacy.statement import (
  ASSUMPTIONS,
  audit_sentence,
  participation_sentence,
  tuning_costs,
)
from fedjax_med.report import figures
from fedjax_med.report.figure_labels import stand_ins
from fedjax_med.run.statement import read_audit, statement_text
from fedjax_med.tasks.registry import task_of
from fedjax_med.tasks.task import Metric, Place, qualified

if TYPE_CHECKING:
  import jinja2

END_OF_PRIVACY = "<h2>Files left out</h2>"  # of the report
FIGURES = ("partition", "rounds", "hospitals", "deployment")
STOPPED = {
  "completed": "all rounds were run",
  "budget": "stopped before the next rounds would have exceeded the privacy budget",
  "diverged": "ended where weights or predictions were not finite",
}


def write_report(workdir: pathlib.Path, papers: bool = False) -> pathlib.Path:
  """Draws WORKDIR/figures/*.png and writes WORKDIR/report.html; returns its path.

  Args:
    workdir: the folder of a run.
    papers: draw the figures as PDF as well.

  Raises:
    UserError: a file is missing, is not JSON, lacks a field, or two files name other hospitals.
  """
  run = read_run(workdir)
  if papers:
    _draw_all(workdir / "figures", run, ".pdf")
  path = workdir / REPORT
  write_text(path, _page(workdir, run, _draw(workdir, run)))
  return path


def require_statement(workdir: pathlib.Path) -> None:
  """Raises UserError unless the statement, where there is one, says what the other files do."""
  statement = workdir / STATEMENT
  if statement.exists():
    _require_lines(
      statement,
      read_utf8(statement).splitlines(),
      statement_text(workdir).splitlines(),
      "restore it, or start the finished run again, which writes it",
    )


def require_page(workdir: pathlib.Path) -> None:
  """Raises UserError unless the report, where there is one, says what the other files do.

  It is compared up to the end of its section on privacy, without its figures.
  """
  page = workdir / REPORT
  if page.exists():
    expected = _page(workdir, read_run(workdir), {})
    remedy = f"python -m fedjax_med.report --workdir={workdir} writes it again"
    _require_lines(page, _comparable_lines(read_utf8(page)), _comparable_lines(expected), remedy)


def _comparable_lines(page: str) -> list[str]:
  """Lines of a report through its section on privacy, without parts that depend on fonts."""
  drawn = r"<figure.*?</figure>|<p [^>]*id=.labels.*?</p>"
  head = re.sub(drawn, "", page.partition(END_OF_PRIVACY)[0], flags=re.DOTALL)
  return [line.strip() for line in head.splitlines() if line.strip()]


def _require_lines(path: pathlib.Path, said: list[str], truth: list[str], remedy: str) -> None:
  pairs = itertools.zip_longest(said, truth, fillvalue="nothing")
  found, given = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
  require(
    found == given,
    f"{path} says '{_shortened(found, given)}', the files it is made from '"
    f"{_shortened(given, found)}'",
    remedy,
  )


def _shortened(text: str, other: str) -> str:
  """The part of a long line where it differs from another one."""
  pairs = itertools.zip_longest(text, other)
  start = max(next((number for number, (a, b) in enumerate(pairs) if a != b), 0) - 30, 0)
  part = text[start : start + 90]
  return f"{'... ' if start else ''}{part}{' ...' if start + 90 < len(text) else ''}"


def _page(workdir: pathlib.Path, run: dict[str, Any], images: dict[str, dict[str, Any]]) -> str:
  statement = _statement(workdir, run)
  task, class_names = task_of(run["config"]), run["hospitals"]["class_names"]
  positive = task.positive(class_names)
  quoted = f"“{positive}”" if positive else ""
  tiles = task.metrics_in(Place.TERMINAL)
  view = {
    **run,
    "images": images,
    "rows": _rows(run),
    "modality": modality_of(run["config"]),
    "data_notes": data_notes(
      run["hospitals"],
      run["config"]["config"]["privacy"]["unit"],
      show_names=run["privacy"]["mechanism"] == "none",
    ),
    "statement": statement,
    "explanation": _explanation(workdir, run),
    "stopped": STOPPED.get(run["summary"]["stopped"], run["summary"]["stopped"]),
    "max_bars": figures.MAX_BARS,
    "columns": task.shown,
    "few": task.metrics_in(Place.LINE),
    "tiles": [(metric, f"{metric.heading}{qualified(metric, quoted)}") for metric in tiles],
    "about_classes": task.about([positive]),
    "explained": task.explained(class_names),
    "has_classes": task.has_classes,
    "own_figures": [(drawn.name, drawn.caption(class_names)) for drawn in task.figures],
    "stand_ins": _stand_ins(run["hospitals"]),
  }
  return worded(environment().get_template("report.html").render(view), view["modality"])


def _stand_ins(held: dict[str, Any]) -> list[tuple[str, str]]:
  """(label, name) of classes and hospitals that figures show under another label."""
  names = [hospital["name"] for hospital in held["hospitals"]]
  shown = stand_ins(names, "hospital") if len(names) <= figures.MAX_BARS else []
  return [*stand_ins(held["class_names"], "class"), *shown]


def environment() -> "jinja2.Environment":
  """Templates of all reports, and the filters that they use."""
  import jinja2

  made = jinja2.Environment(
    loader=jinja2.PackageLoader("fedjax_med.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  made.globals["infinity"] = math.inf
  made.filters.update(fixed=_fixed, epsilon=round_up, duration=_duration, mean=_mean, worst=_worst)
  return made


def _draw(workdir: pathlib.Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Draws the figures; returns PNGs and widths by name, with the run's own examples.png if any."""
  folder = workdir / "figures"
  _draw_all(folder, run, ".png")
  of_task = [drawn.name for drawn in task_of(run["config"]).figures]
  return embedded(folder, (*FIGURES, *of_task, "examples", "synthetic"))


def _draw_all(folder: pathlib.Path, run: dict[str, Any], suffix: str) -> None:
  hospitals, summary, baselines = run["hospitals"], run["summary"], run["baselines"]
  task = task_of(run["config"])
  figures.draw_partition(folder / f"partition{suffix}", hospitals)
  figures.draw_rounds(
    folder / f"rounds{suffix}",
    run["log"],
    baselines,
    hospitals["split"]["scheme"],
    summary["predicts"],
    task,
    nouns=modality_of(run["config"]).nouns,
  )
  figures.draw_hospitals(folder / f"hospitals{suffix}", summary, hospitals, baselines, task)
  if run["deployment"] is not None:
    path = folder / f"deployment{suffix}"
    figures.draw_deployment(path, run["log"], run["deployment"], task.headline)
  for drawn in task.figures:
    if drawn.name in summary:
      figures.draw_details(folder / f"{drawn.name}{suffix}", drawn, summary, hospitals)


def embedded(folder: pathlib.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Figures that exist, as a page embeds them: base64 of the PNG, width in pixels."""
  images = {}
  for name in names:
    if (folder / f"{name}.png").exists():
      png = (folder / f"{name}.png").read_bytes()
      pixels = int.from_bytes(png[16:20], "big")  # width in the IHDR chunk
      width = round(pixels * 100 / figures.DPI)
      images[name] = {"data": base64.b64encode(png).decode("ascii"), "width": width}
  return images


def _statement(workdir: pathlib.Path, run: dict[str, Any]) -> dict[str, Any]:
  """Data of the section on privacy beside privacy.json."""
  return {
    "assumptions": ASSUMPTIONS,
    "audit": audit_sentence(read_audit(workdir), run["privacy"]),
    "tuning": [tuning_costs(guarantee) for guarantee in run["privacy"].get("guarantees", [])],
    "participation": [
      participation_sentence(guarantee) for guarantee in run["privacy"].get("guarantees", [])
    ],
  }


def _explanation(workdir: pathlib.Path, run: dict[str, Any]) -> dict[str, Any] | None:
  """Results of python -m fedjax_med.explain for this run, or None.

  Its pictures enter the report where they are test images that may be shown.
  """
  path = workdir / "explain" / "explain.json"
  if not path.exists():
    return None
  found = read_json(path)
  require_shape(found, EXPLANATION, path)
  if found["run_id"] != run["config"]["run_id"]:
    return None
  shown = found["shown"] != "given pictures" and not found["patients_of_private_run"]
  names = [figure["file"].removesuffix(".png") for figure in found["figures"]] if shown else []
  captions = {figure["file"].removesuffix(".png"): figure["caption"] for figure in found["figures"]}
  return {"hospital": "", **found, "images": embedded(path.parent, names), "captions": captions}


def _rows(run: dict[str, Any]) -> list[dict[str, Any]]:
  """Everything known of each hospital in one record, in the order of hospitals.json."""
  count = len(run["hospitals"]["hospitals"])
  local = [g["parties"] for g in run["privacy"].get("guarantees", []) if g["unit"] != "client"]
  privacy = local[0] if local else [None] * count
  alone = run["baselines"]["alone"] if run["baselines"] else [None] * count
  return [
    {
      "name": f"{holds['name']} (hostile)" if metrics.get("hostile") else holds["name"],
      "honest": not metrics.get("hostile"),
      "train": holds["train"],
      "synthetic": holds.get("synthetic"),
      "test": holds["test"],
      "metrics": metrics,
      "privacy": spent,
      "alone": local["curve"][-1] if local else None,
    }
    for holds, metrics, spent, local in zip(
      run["hospitals"]["hospitals"], run["summary"]["clients"], privacy, alone, strict=True
    )
  ]


def _fixed(value: float | None, digits: int = 3) -> Any:
  """HTML of a number: rounded to read, exact in the ``value`` attribute; an en dash for None."""
  import markupsafe

  if value is None or math.isnan(value):
    return "–"
  exact = json.dumps(value)
  return markupsafe.Markup(f'<data value="{exact}">{value:,.{digits}f}</data>')


def _duration(seconds: float | None) -> str:
  if seconds is None:
    return "–"
  minutes, rest = divmod(seconds, 60)
  return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _defined(values: list[float | None]) -> list[float]:
  return [value for value in values if value is not None and not math.isnan(value)]


def _mean(values: list[float | None]) -> float | None:
  """Unweighted mean over the hospitals where the value is defined."""
  known = _defined(values)
  return float(np.mean(known)) if known else None


def _worst(values: list[float | None], metric: Metric) -> float | None:
  """The worst of the values that are defined."""
  return metric.worst(_defined(values))
