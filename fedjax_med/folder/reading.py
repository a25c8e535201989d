"""Files of a run's workdir, read and checked for their shape."""

import json
import pathlib
from typing import Any

from fedjax_med.core.errors import UserError, require
from fedjax_med.folder.writing import DEPLOYMENT
from fedjax_med.privacy import claims
from fedjax_med.tasks.registry import task_of
from fedjax_med.tasks.task import Task

# The shape a file must have: {key: shape}, [shape of every element] or an isinstance type.
NUMBER = int | float | None


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
    "run_id": str, "config_name": str, "rounds": int, "stopped": str, "test": dict,
    "clients": [{"name": str}], "epsilon_max": NUMBER, "num_parameters": int,
    "predicts": str,
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
  "test": {"round": int, "epsilon_max": NUMBER, "clients": [{"name": str}]},
  "train": {"round": int, "loss": NUMBER},
}


POINT = {"round": int, "all": dict}


BASELINES = {
  "alone": [{"name": str, "curve": [{**POINT, "own": dict}]}],
  "pooled": {"curve": [{**POINT, "clients": [dict]}]},
}


EXPLANATION = {
  "run_id": str, "rounds": int, "layer": str, "map": [int], "target": str, "shown": str,
  "patients_of_private_run": bool, "figures": [{"file": str, "caption": str}],
}  # fmt: skip


DEPLOYED = {
  "rounds": int, "step_seconds": NUMBER, "step_seconds_from": str, "bytes_down": int,
  "bytes_up": int, "round_seconds": NUMBER, "waits_for": str, "hours": NUMBER,
  "gigabytes": NUMBER, "price": NUMBER,
  "hospitals": [{"name": str, "seconds": NUMBER, "late": bool}],
}  # fmt: skip


RESTORE = "restore it or run the experiment again"


def read_run(workdir: pathlib.Path) -> dict[str, Any]:
  """Reads and checks a workdir: config, hospitals, privacy, summary, log and baselines (or None).

  A metric of the run's task that the folder lacks is None, as one that is not defined.

  Raises:
    UserError: see ``write_report``.
  """
  require(workdir.is_dir(), f"workdir={workdir} is not a folder", "give the folder of a run")
  run: dict[str, Any] = {name.removesuffix(".json"): read_json(workdir / name) for name in SHAPES}
  for name, shape in SHAPES.items():
    require_shape(run[name.removesuffix(".json")], shape, workdir / name)
  if run["privacy"]["mechanism"] != "none":
    require_shape(run["privacy"], PRIVATE, workdir / claims.FILE)
  run["privacy"] = claims.read(workdir)  # no number that was edited gets into a report
  book = claims.ledger_of(workdir)
  claims.require_told(workdir / "summary.json", run["summary"], run["summary"]["rounds"], book)

  log_path = workdir / "metrics.jsonl"
  lines = read_utf8(log_path).splitlines()
  log = [_parse(line, f"{log_path}, line {number}") for number, line in enumerate(lines, 1)]
  for number, line in enumerate(log, 1):
    where = f"{log_path}, line {number}"
    require_shape(line, {"split": str}, where)
    require_shape(line, LINES.get(line["split"], LINES["train"]), where)
  require(
    any(line["split"] == "test" for line in log),
    f"{log_path} holds no line with split=test",
    "run at least one round up to a log point",
  )
  claims.require_logged(log_path, log, book)
  baselines = None
  if (workdir / "baselines.json").exists():
    baselines = read_json(workdir / "baselines.json")
    require_shape(baselines, BASELINES, workdir / "baselines.json")

  deployment = None
  if (workdir / DEPLOYMENT).exists():
    deployment = read_json(workdir / DEPLOYMENT)
    require_shape(deployment, DEPLOYED, workdir / DEPLOYMENT)

  held, path = run["hospitals"], workdir / "hospitals.json"
  counts = [hospital[side] for hospital in held["hospitals"] for side in ("train", "test")]
  require(
    len(counts) > 0 and all(len(row) == len(held["class_names"]) for row in counts),
    f"{path} names {len(held['class_names'])} classes, which is not the length of every count",
    RESTORE,
  )
  require(
    all(len(row) in (2, 3) for row in held["skipped"]),  # older runs name no class
    f"{path} has a skipped file that is not [name, reason, class]",
    RESTORE,
  )
  task = task_of(run["config"])
  problem = task.problem(run["summary"], held["class_names"])
  require(not problem, f"{workdir / 'summary.json'}: {problem}", RESTORE)
  _fill_metrics(task, workdir, run["summary"], log, baselines)
  names = [hospital["name"] for hospital in held["hospitals"]]
  _same_hospitals(names, run["summary"]["clients"], workdir / "summary.json")
  for guarantee in run["privacy"].get("guarantees", []):
    if guarantee["unit"] != "client":
      _same_hospitals(names, guarantee["parties"], workdir / "privacy.json")
  if baselines is not None:
    _same_hospitals(names, baselines["alone"], workdir / "baselines.json")
    curves = [row["curve"] for row in (baselines["pooled"], *baselines["alone"])]
    require(all(curves), f"{workdir / 'baselines.json'} has curves that are empty", RESTORE)
  return {**run, "log": log, "baselines": baselines, "deployment": deployment}


def _fill_metrics(
  task: Task,
  workdir: pathlib.Path,
  summary: dict[str, Any],
  log: list[dict[str, Any]],
  baselines: dict[str, Any] | None,
) -> None:
  """Sets the metrics of ``task`` that these records lack to None; the others must be numbers."""
  places = {"summary.json": [summary["test"], *summary["clients"]], "metrics.jsonl": []}
  for line in log:
    if line["split"] == "test":
      places["metrics.jsonl"] += [line, *line["clients"]]
  if baselines is not None:
    alone = [point[key] for row in baselines["alone"] for point in row["curve"]
             for key in ("own", "all")]  # fmt: skip
    pooled = [values for point in baselines["pooled"]["curve"]
              for values in (point["all"], *point["clients"])]  # fmt: skip
    places["baselines.json"] = alone + pooled
  shape = dict.fromkeys((metric.name for metric in task.shown), NUMBER)
  for name, records in places.items():
    for values in records:
      for metric in shape:
        values.setdefault(metric, None)
      require_shape(values, shape, workdir / name)


def read_utf8(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f"{path} cannot be read ({error}); give the folder of a run that reached its end"
    ) from error


def read_json(path: pathlib.Path) -> Any:
  return _parse(read_utf8(path), path)


def _parse(text: str, where: object) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(f"{where} is not JSON ({error}); {RESTORE}") from error


def require_shape(value: Any, shape: Any, where: object) -> None:
  """Raises UserError unless ``value`` has the ``shape``; ``where`` names it in the message."""
  if isinstance(shape, dict):
    require_shape(value, dict, where)
    for key, inner in shape.items():
      require(key in value, f"{where} lacks '{key}'", RESTORE)
      require_shape(value[key], inner, f"{where}: {key}")
  elif isinstance(shape, list):
    require_shape(value, list, where)
    for number, item in enumerate(value):
      require_shape(item, shape[0], f"{where}[{number}]")
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


def require_run(workdir: pathlib.Path, run_id: str) -> None:
  """Raises UserError unless ``workdir`` holds the run of that id."""
  found = read_json(workdir / "config.json").get("run_id")
  require(
    found == run_id,
    f"workdir={workdir} holds run {found}, this configuration is run {run_id}",
    "give the flags of that run, or no --workdir",
  )
