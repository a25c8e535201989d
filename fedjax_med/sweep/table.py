"""The folder of a sweep: its definition, its finished points, and the table of their results."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedjax_med import __version__, study
from fedjax_med.core.config import Config, fingerprint, flat, to_dict
from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import encodable
from fedjax_med.folder import writing as files
from fedjax_med.privacy import claims
from fedjax_med.sweep.grid import Point
from fedjax_med.tasks.registry import task_of

if TYPE_CHECKING:
  import pandas as pd

DEFINITION = "sweep.json"
RESULTS = "results.parquet"


def folder_of(workdir: pathlib.Path, number: int, baseline: str = "") -> pathlib.Path:
  """The folder of a point, a workdir of its own, or that of one of its baselines inside."""
  folder = workdir / "points" / f"{number:05d}"
  return folder / "baselines" / baseline if baseline else folder


def begin(
  workdir: pathlib.Path,
  base: Config,
  points: Sequence[Point],
  seed_axes: Sequence[str],
  **notes: Any,
) -> None:
  """Makes the folder and writes the definition of the sweep, or checks that it is the same.

  Raises:
    UserError: the folder cannot be written, or holds another sweep.
  """
  files.prepare(workdir)
  (workdir / "points").mkdir(exist_ok=True)
  values = {
    "base": to_dict(base),
    "points": [_plain(point) for point in points],
    "seed_axes": list(seed_axes),
  }
  # Points of two versions are not held against each other.
  values["sweep_id"] = fingerprint({**_without_places(values), "code": __version__})
  require(
    (workdir / DEFINITION).exists() or not (workdir / "config.json").exists(),
    f"--workdir={workdir} holds a run",
    "use another --workdir for the sweep",
  )
  # Shards start at once: one of them creates the file, and all of them compare.
  files.create_whole(workdir / DEFINITION, files.as_json({**values, **notes}))
  found = read(workdir)["sweep_id"]
  require(
    found == values["sweep_id"],
    f"--workdir={workdir} holds sweep {found}, this one is {values['sweep_id']}",
    "use another --workdir, or the flags, and the fedjax_med, of the first start to resume it",
  )


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """The definition of a sweep, with points as they were given.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  path = workdir / DEFINITION
  require(path.exists(), f"{path} is missing", "give the --workdir of a sweep")
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    found["points"] = [_parsed(point) for point in found["points"]]
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f"{path} cannot be read ({error}); restore it") from error
  return found


def has_run(workdir: pathlib.Path, number: int, baseline: str = "") -> bool:
  """Whether the files of a point, or of one of its baselines, are whole."""
  return (folder_of(workdir, number, baseline) / "summary.json").exists()


def done(workdir: pathlib.Path, number: int) -> bool:
  """Whether a point has run, and its baselines where it has any."""
  if not has_run(workdir, number):
    return False
  folder = folder_of(workdir, number)
  asked = read_json(folder / "config.json")["config"]["eval"]["local_baselines"]
  return not asked or "baselines" in read_json(folder / "summary.json")


def collect(workdir: pathlib.Path) -> "pd.DataFrame":
  """Results of all points that are done, a row a point and hospital; see ``write``.

  Raises:
    UserError: a file cannot be read.
  """
  import pandas as pd

  rows: list[dict[str, Any]] = []
  for number, point in enumerate(read(workdir)["points"]):
    if done(workdir, number):
      rows += rows_of(folder_of(workdir, number), number, point)
  return pd.DataFrame(rows)


def write(workdir: pathlib.Path) -> "pd.DataFrame":
  """Writes results.parquet and results.csv, and timing.csv; each whole or not at all.

  Equal runs give equal results, byte for byte, so the seconds that they took stand apart.
  """
  frame = collect(workdir)
  files.write_whole(workdir / RESULTS, lambda path: frame.to_parquet(path, index=False))
  files.write_whole(workdir / "results.csv", lambda path: frame.to_csv(path, index=False))
  numbers = sorted(set(frame["point"])) if len(frame) else []
  seconds = timing(workdir, numbers)
  files.write_whole(workdir / "timing.csv", lambda path: seconds.to_csv(path, index=False))
  return frame


def timing(workdir: pathlib.Path, numbers: Sequence[int]) -> "pd.DataFrame":
  """Seconds of each of these points, without its baselines."""
  import pandas as pd

  seconds = [read_json(folder_of(workdir, number) / "timing.json")["total"] for number in numbers]
  return pd.DataFrame({"point": list(numbers), "seconds": seconds})


def flat_config(folder: pathlib.Path) -> dict[str, Any]:
  """The configuration of a run by dotted fields."""
  return flat(read_json(folder / "config.json")["config"])


def rows_of(folder: pathlib.Path, number: int, point: Point) -> list[dict[str, Any]]:
  """A row for each hospital of a run that has ended.

  Raises:
    UserError: a file cannot be read, or tells other ε than the ledger.
  """
  config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
  task = task_of(config)
  privacy, hospitals = claims.read(folder), read_json(folder / "hospitals.json")
  book = claims.ledger_of(folder)
  claims.require_told(folder / "summary.json", summary, summary["rounds"], book)
  local = [each for each in privacy["guarantees"] if each["unit"] != "client"]
  spent = {party["name"]: party for each in local for party in each["parties"]}
  shared = {"point": number, "run_id": summary["run_id"], **flat(config["config"]), **point}
  # Neither Parquet nor CSV holds bytes of a path that are no text.
  shared = {k: encodable(v) if isinstance(v, str) else v for k, v in shared.items()}
  nothing: dict[str, Any] = {"own": {}, "all": {}}
  solo = summary.get("baselines", {}).get("alone", [nothing] * len(summary["clients"]))
  pooled = summary.get("baselines", {}).get("pooled", {})
  attacked = config["config"].get("attack", {}).get("kind", "none") != "none"
  rows = []
  columns = zip(hospitals["hospitals"], summary["clients"], solo, strict=True)
  for holds, own, by_itself in columns:
    party = spent.get(holds["name"], {})
    measured = (own, summary["test"], by_itself["own"], by_itself["all"], pooled)
    models = dict(zip(study.PREFIXES, measured, strict=True))
    rows.append(
      {
        **shared,
        "hospital": holds["name"],
        **({"hostile": bool(own.get("hostile"))} if attacked else {}),
        "task": task.name,
        "positive_class": task.positive(hospitals["class_names"]),
        "num_train": sum(holds["train"]),
        "num_test": sum(holds["test"]),
        "rounds": summary["rounds"],
        "steps": summary["steps"],
        "megabytes": summary["megabytes"],
        "stopped": summary["stopped"],
        **{
          f"{prefix}{metric.name}": _number(values.get(metric.name))
          for prefix, values in models.items()
          for metric in task.shown
        },
        **{
          f"recordings.{metric.name}": _number(summary["recordings"].get(metric.name))
          for metric in task.shown
          if "recordings" in summary
        },
        "unit": "+".join(each["unit"] for each in privacy["guarantees"]) or "none",
        "epsilon": _number(party.get("epsilon", math.inf)),
        "delta": _number(party.get("delta")),
        "sigma": _number(party.get("noise_multiplier", 0.0)),
        "epsilon_max": _number(summary["epsilon_max"], math.inf),
        "client_epsilon": _number(summary["client_epsilon"], math.inf),
      }
    )
  return rows


def _number(value: float | None, missing: float = math.nan) -> float:
  return missing if value is None else float(value)


def read_json(path: pathlib.Path) -> Any:
  """A file of a run; raises UserError if it cannot be read."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}); delete its folder and --resume") from error


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
  """Removes fields that move no result: places of the data, and the layout."""
  base = {name: value for name, value in values["base"].items() if name != "execution"}
  data = {k: v for k, v in base["data"].items() if k not in ("path", "cache_dir")}
  return {**values, "base": {**base, "data": data}}


def _plain(point: Point) -> Point:
  """The point with infinity, which JSON lacks, as text."""
  return {name: "inf" if value == math.inf else value for name, value in point.items()}


def _parsed(point: Point) -> Point:
  return {name: math.inf if value == "inf" else value for name, value in point.items()}
