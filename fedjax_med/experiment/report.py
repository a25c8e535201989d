"""One self-contained report.html from the files of a workdir, so that it can be redone anytime.

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

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.metrics import LOWER_IS_BETTER, METRICS, about_classes, positive_class
from fedjax_med.experiment import figures
from fedjax_med.experiment.data_notes import data_notes, patient_note
from fedjax_med.experiment.labels import stand_ins
from fedjax_med.experiment.workdir import write_text
from fedjax_med.privacy import claims
from fedjax_med.privacy.accounting import round_up
from fedjax_med.privacy.statement import (
  ASSUMPTIONS,
  audit_sentence,
  participation_sentence,
  tuning_costs,
  write_out,
)

if TYPE_CHECKING:
  import jinja2

# The shape a file must have: {key: shape}, [shape of every element] or an isinstance type.
NUMBER = int | float | None
VALUES = dict.fromkeys(METRICS, NUMBER)
CLIENT = {"name": str, **VALUES}
SHAPES: dict[str, Any] = {
  "config.json": {
    "run_id": str, "command": str, "versions": dict, "config": dict, "notes": [str],
  },
  "hospitals.json": {
    "class_names": [str],
    "split": {
      "scheme": str, "num_train": int, "num_test": int, "num_duplicate_groups": int,
      "num_in_duplicate_groups": int, "num_test_with_duplicate_in_train": int,
    },
    "num_moved": int,
    "skipped": [list],
    "hospitals": [{"name": str, "train": [int], "test": [int]}],
  },
  "privacy.json": {"mechanism": str, "epsilon_max": NUMBER},
  "summary.json": {
    "run_id": str, "config_name": str, "rounds": int, "stopped": str, "test": VALUES,
    "clients": [CLIENT], "epsilon_max": NUMBER, "confusion": [[int]],
    "num_parameters": int, "predicts": str,
    "plan": {"layout": str, "clipping": str, "lowering": str, "reasons": [str]},
  },
  "timing.json": {"compile": NUMBER, "train": NUMBER, "total": NUMBER},
}  # fmt: skip
GUARANTEE = {
  "unit": str, "protects": str, "adjacency": str, "mechanism": str, "holds_against": [str],
  "not_against": [str], "accountant": dict, "epsilon_max": NUMBER,
  "parties": [
    {"name": str, "n": int, "sampling_probability": NUMBER,
     "batch_cap": int, "noise_multiplier": NUMBER, "clip_norm": NUMBER, "steps": int,
     "delta": NUMBER, "epsilon": NUMBER},
  ],
}  # fmt: skip
PRIVATE = {"guarantees": [GUARANTEE], "not_covered": [str], "ledger": str}
LINES = {
  "test": {"round": int, "epsilon_max": NUMBER, "clients": [CLIENT], **VALUES},
  "train": {"round": int, "loss": NUMBER},
}
POINT = {"round": int, "all": VALUES}
BASELINES = {
  "alone": [{"name": str, "curve": [{**POINT, "own": VALUES}]}],
  "pooled": {"curve": [{**POINT, "clients": [VALUES]}]},
}
EXPLANATION = {
  "run_id": str, "rounds": int, "layer": str, "map": [int], "target": str, "shown": str,
  "patients_of_private_run": bool, "figures": [{"file": str, "caption": str}],
}  # fmt: skip
RESTORE = "restore it or run the experiment again"
END_OF_PRIVACY = "<h2>Files left out</h2>"  # of the report
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
  run = load(workdir)
  if papers:
    _draw_all(workdir / "figures", run, ".pdf")
  path = workdir / "report.html"
  write_text(path, _page(workdir, run, _draw(workdir, run)))
  return path


def require_told(workdir: pathlib.Path) -> None:
  """Raises UserError unless statement and report, where they are, say what the other files do.

  Of the report all is compared up to the end of its section on privacy, but for the figures.
  """
  statement, page = workdir / "privacy_statement.md", workdir / "report.html"
  if statement.exists():
    _require_lines(
      statement,
      _text(statement).splitlines(),
      statement_text(workdir).splitlines(),
      "restore it, or start the finished run again, which writes it",
    )
  if page.exists():
    again = _page(workdir, load(workdir), {})
    remedy = f"python -m fedjax_med.report --workdir={workdir} writes it again"
    _require_lines(page, _told(_text(page)), _told(again), remedy)


def _told(page: str) -> list[str]:
  """Lines of a report up to the end of its section on privacy, without what follows from fonts."""
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
  view = {
    **run,
    "images": images,
    "rows": _rows(run),
    "data_notes": data_notes(
      run["hospitals"],
      run["config"]["config"]["privacy"]["unit"],
      show_names=run["privacy"]["mechanism"] == "none",
    ),
    "statement": statement,
    "explanation": _explanation(workdir, run),
    "stopped": STOPPED.get(run["summary"]["stopped"], run["summary"]["stopped"]),
    "max_bars": figures.MAX_BARS,
    "about_classes": about_classes(positive_class(run["hospitals"]["class_names"])),
    "stand_ins": _stand_ins(run["hospitals"]),
  }
  return environment().get_template("report.html").render(view)


def _stand_ins(held: dict[str, Any]) -> list[tuple[str, str]]:
  """(label, name) of classes and hospitals that figures show under another label."""
  names = [hospital["name"] for hospital in held["hospitals"]]
  shown = stand_ins(names, "hospital") if len(names) <= figures.MAX_BARS else []
  return [*stand_ins(held["class_names"], "class"), *shown]


def environment() -> "jinja2.Environment":
  """Templates of all reports, and the filters that they use."""
  import jinja2

  made = jinja2.Environment(
    loader=jinja2.PackageLoader("fedjax_med.experiment"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  made.globals["infinity"] = math.inf
  made.filters.update(fixed=_fixed, epsilon=round_up, duration=_duration, mean=_mean, worst=_worst)
  return made


def load(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads and checks a workdir: config, hospitals, privacy, summary, log and baselines (or None).

  Raises:
    UserError: see ``write_report``.
  """
  require(workdir.is_dir(), f"workdir={workdir} is not a folder", "give the folder of a run")
  run: dict[str, Any] = {name.removesuffix(".json"): _read(workdir / name) for name in SHAPES}
  for name, shape in SHAPES.items():
    _check(run[name.removesuffix(".json")], shape, workdir / name)
  if run["privacy"]["mechanism"] != "none":
    _check(run["privacy"], PRIVATE, workdir / claims.FILE)
  run["privacy"] = claims.read(workdir)  # no number that was edited gets into a report
  book = claims.ledger_of(workdir)
  claims.require_told(workdir / "summary.json", run["summary"], run["summary"]["rounds"], book)

  log_path = workdir / "metrics.jsonl"
  lines = _text(log_path).splitlines()
  log = [_parse(line, f"{log_path}, line {number}") for number, line in enumerate(lines, 1)]
  for number, line in enumerate(log, 1):
    where = f"{log_path}, line {number}"
    _check(line, {"split": str}, where)
    _check(line, LINES.get(line["split"], LINES["train"]), where)
  require(
    any(line["split"] == "test" for line in log),
    f"{log_path} holds no line with split=test",
    "run at least one round up to a log point",
  )
  claims.require_logged(log_path, log, book)
  baselines = None
  if (workdir / "baselines.json").exists():
    baselines = _read(workdir / "baselines.json")
    _check(baselines, BASELINES, workdir / "baselines.json")

  held, path = run["hospitals"], workdir / "hospitals.json"
  counts = [hospital[side] for hospital in held["hospitals"] for side in ("train", "test")]
  confusion = [run["summary"]["confusion"], *run["summary"]["confusion"]]
  require(
    len(counts) > 0 and all(len(row) == len(held["class_names"]) for row in (*counts, *confusion)),
    f"{path} names {len(held['class_names'])} classes, which is not the length of every count",
    RESTORE,
  )
  require(
    all(len(row) in (2, 3) for row in held["skipped"]),  # older runs name no class
    f"{path} has a skipped file that is not [name, reason, class]",
    RESTORE,
  )
  names = [hospital["name"] for hospital in held["hospitals"]]
  _same_hospitals(names, run["summary"]["clients"], workdir / "summary.json")
  for guarantee in run["privacy"].get("guarantees", []):
    if guarantee["unit"] != "client":
      _same_hospitals(names, guarantee["parties"], workdir / "privacy.json")
  if baselines is not None:
    _same_hospitals(names, baselines["alone"], workdir / "baselines.json")
    curves = [row["curve"] for row in (baselines["pooled"], *baselines["alone"])]
    require(all(curves), f"{workdir / 'baselines.json'} has curves that are empty", RESTORE)
  return {**run, "log": log, "baselines": baselines}


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"{path} cannot be read ({error}); give the folder of a run that reached its end"
    ) from error


def _read(path: pathlib.Path) -> Any:
  return _parse(_text(path), path)


def _parse(text: str, where: object) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(f"{where} is not JSON ({error}); {RESTORE}") from error


def _check(value: Any, shape: Any, where: object) -> None:
  """Raises UserError unless ``value`` has the ``shape``; ``where`` names it in the message."""
  if isinstance(shape, dict):
    _check(value, dict, where)
    for key, inner in shape.items():
      require(key in value, f"{where} lacks '{key}'", RESTORE)
      _check(value[key], inner, f"{where}: {key}")
  elif isinstance(shape, list):
    _check(value, list, where)
    for number, item in enumerate(value):
      _check(item, shape[0], f"{where}[{number}]")
  else:
    name = getattr(shape, "__name__", str(shape)).replace(" | None", " or null")
    require(
      isinstance(value, shape),
      f"{where} is {json.dumps(value)[:60]}, which must be {name}",
      RESTORE,
    )


def _same_hospitals(names: list[str], rows: list[dict[str, Any]], where: pathlib.Path) -> None:
  found = [row["name"] for row in rows]
  require(
    found == names,
    f"{where} names {len(found)} hospitals, not the {len(names)} of hospitals.json in their order",
    "give a folder that holds the files of one run",
  )


def _draw(workdir: pathlib.Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Draws the figures; returns PNGs and widths by name, with the run's own examples.png if any."""
  folder = workdir / "figures"
  _draw_all(folder, run, ".png")
  return embedded(
    folder, ("partition", "rounds", "hospitals", "confusion", "examples", "synthetic")
  )


def _draw_all(folder: pathlib.Path, run: dict[str, Any], suffix: str) -> None:
  hospitals, summary, baselines = run["hospitals"], run["summary"], run["baselines"]
  figures.draw_partition(folder / f"partition{suffix}", hospitals)
  figures.draw_rounds(
    folder / f"rounds{suffix}",
    run["log"],
    baselines,
    hospitals["split"]["scheme"],
    summary["predicts"],
  )
  figures.draw_hospitals(folder / f"hospitals{suffix}", summary, hospitals, baselines)
  figures.draw_confusion(folder / f"confusion{suffix}", summary, hospitals)


def embedded(folder: pathlib.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Those figures that are there, as a page shows them: base64 of the PNG, width in pixels."""
  images = {}
  for name in names:
    if (folder / f"{name}.png").exists():
      png = (folder / f"{name}.png").read_bytes()
      pixels = int.from_bytes(png[16:20], "big")  # width in the IHDR chunk
      width = round(pixels * 100 / figures.DPI)
      images[name] = {"data": base64.b64encode(png).decode("ascii"), "width": width}
  return images


def _statement(workdir: pathlib.Path, run: dict[str, Any]) -> dict[str, Any]:
  """What the section on privacy shows beside privacy.json."""
  return {
    "assumptions": ASSUMPTIONS,
    "audit": audit_sentence(_audit(workdir), run["privacy"]),
    "tuning": [tuning_costs(guarantee) for guarantee in run["privacy"].get("guarantees", [])],
    "participation": [
      participation_sentence(guarantee) for guarantee in run["privacy"].get("guarantees", [])
    ],
  }


def _explanation(workdir: pathlib.Path, run: dict[str, Any]) -> dict[str, Any] | None:
  """What python -m fedjax_med.explain has left for this run, or None.

  Its pictures enter the report where they are test images that may be shown.
  """
  path = workdir / "explain" / "explain.json"
  if not path.exists():
    return None
  found = _read(path)
  _check(found, EXPLANATION, path)
  if found["run_id"] != run["config"]["run_id"]:
    return None
  shown = found["shown"] != "given pictures" and not found["patients_of_private_run"]
  names = [figure["file"].removesuffix(".png") for figure in found["figures"]] if shown else []
  captions = {figure["file"].removesuffix(".png"): figure["caption"] for figure in found["figures"]}
  return {"hospital": "", **found, "images": embedded(path.parent, names), "captions": captions}


def _audit(workdir: pathlib.Path) -> dict[str, Any] | None:
  """audit.json, if there is one; UserError where it is of another run."""
  path = workdir / "audit.json"
  if not path.exists():
    return None
  found, own = _read(path), _read(workdir / "config.json").get("run_id")
  require(
    found.get("run_id") == own,
    f"{path} is of run {found.get('run_id')}, the folder of run {own}",
    "remove it, or run python -m fedjax_med.audit with this --workdir again",
  )
  return found


def require_run(workdir: pathlib.Path, run_id: str) -> None:
  """Raises UserError unless ``workdir`` holds the run of that id."""
  found = _read(workdir / "config.json").get("run_id")
  require(
    found == run_id,
    f"workdir={workdir} holds run {found}, this configuration is run {run_id}",
    "give the flags of that run, or no --workdir",
  )


def write_statement(workdir: pathlib.Path) -> pathlib.Path:
  """Writes WORKDIR/privacy_statement.md from privacy.json, and audit.json if there is one.

  Raises:
    UserError: a file is missing or is not what a run writes, or privacy.json does not follow from
      the ledger.
  """
  path = workdir / "privacy_statement.md"
  write_text(path, statement_text(workdir))
  return path


def statement_text(workdir: pathlib.Path) -> str:
  """What the privacy statement has to say; see ``write_statement``."""
  record, config = claims.read(workdir), _read(workdir / "config.json")
  held, unit = _read(workdir / "hospitals.json"), config["config"]["privacy"]["unit"]
  patients = patient_note(held, unit).text
  return write_out(record, config["run_id"], _audit(workdir), patients)


def _rows(run: dict[str, Any]) -> list[dict[str, Any]]:
  """Everything known of each hospital in one record, in the order of hospitals.json."""
  count = len(run["hospitals"]["hospitals"])
  local = [g["parties"] for g in run["privacy"].get("guarantees", []) if g["unit"] != "client"]
  privacy = local[0] if local else [None] * count
  alone = run["baselines"]["alone"] if run["baselines"] else [None] * count
  return [
    {
      "name": holds["name"],
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


def _worst(values: list[float | None], metric: str) -> float | None:
  """The highest loss or calibration error, or the lowest of any other metric."""
  return (max if metric in LOWER_IS_BETTER else min)(_defined(values), default=None)
