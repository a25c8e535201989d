"""Joins the results of the shards of a sweep, in one folder or in several.

Example: python -m fedjax_med.sweep merge --workdir=runs/noise runs/noise-of-machine-2
"""

import pathlib
import shutil
from collections.abc import Sequence

from absl import flags

from fedjax_med.core.errors import require
from fedjax_med.core.presets import register_parts
from fedjax_med.core.text import visible
from fedjax_med.folder import lock
from fedjax_med.folder import secret as secrets
from fedjax_med.folder import writing as files
from fedjax_med.sweep import image_sets, table


def define() -> None:
  """Defines --workdir; ``main`` reads --network too."""
  flags.DEFINE_string("workdir", None, "Folder of the sweep, which gets the table of all results.")


def main(arguments: list[str]) -> None:
  workdir = flags.FLAGS["workdir"].value
  require(bool(workdir), "--workdir is missing", "name the folder of the sweep")
  register_parts(flags.FLAGS["network"].value or "")
  sources = [pathlib.Path(source).expanduser() for source in arguments[2:]]  # after "merge"
  join(pathlib.Path(str(workdir)).expanduser(), sources)


def join(target: pathlib.Path, sources: Sequence[pathlib.Path]) -> None:
  """Copies the points of ``sources`` that ``target`` lacks, and writes the table of all.

  Raises:
    UserError: a folder holds no sweep, another one, or points of other images, or a process works
      in ``target``; nothing is copied then.
  """
  _tell_unknown([target, *sources])
  if sources:
    target.mkdir(parents=True, exist_ok=True)
    with lock.hold(target, print):
      _take(sources, target)
  points = table.read(target)["points"]
  table.write(target)
  missing = [number for number in range(len(points)) if not table.done(target, number)]
  print(
    f"{visible(str(target / table.RESULTS))}: {len(points) - len(missing)} of {len(points)} points"
  )
  if missing:
    shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
    print(f"missing: {shown}; start the sweep again with --resume")


def _take(sources: Sequence[pathlib.Path], target: pathlib.Path) -> None:
  """Copies the points that ``target`` lacks, after a check of all ``sources``."""
  begun = (target / table.DEFINITION).exists()
  require(
    begun or not (target / "config.json").exists(),
    f"--workdir={target} holds a run",
    "use another --workdir for the sweep",
  )
  first, *others = [target, *sources] if begun else sources
  definition = table.read(first)
  for other in others:
    sweep_id = table.read(other)["sweep_id"]
    require(
      sweep_id == definition["sweep_id"],
      f"{other} holds sweep {sweep_id}, {first} sweep {definition['sweep_id']}",
      "merge folders of one sweep: the same config, axes and seeds",
    )
  records = image_sets.join([first, *others])
  for folder in ("points", image_sets.FOLDER):
    (target / folder).mkdir(exist_ok=True)
  if not begun:
    if (first / secrets.FILE).exists():
      secrets.keep(target, secrets.read(first / secrets.FILE))
    shutil.copy(first / table.DEFINITION, target / table.DEFINITION)
  for key, record in records.items():
    place = target / image_sets.FOLDER / f"{key}.json"
    files.create_whole(place, files.as_json(record))
    place.chmod(0o600)
  for source in sources:
    _copy_points(source, target, len(definition["points"]))


def _tell_unknown(folders: Sequence[pathlib.Path]) -> None:
  """Names folders that an older version began, without digests: they cannot be compared."""
  for folder in folders:
    if any((folder / "points").glob("*")) and not image_sets.records(folder):
      print(f"{folder} does not say which images its points are of; they must be the same in all")


def _copy_points(source: pathlib.Path, target: pathlib.Path, count: int) -> None:
  for number in range(count):
    if table.done(source, number) and not table.done(target, number):
      place = table.folder_of(target, number)
      shutil.rmtree(place, ignore_errors=True)  # half a point of a killed process
      temporary = place.with_name(place.name + ".tmp")
      shutil.rmtree(temporary, ignore_errors=True)
      shutil.copytree(table.folder_of(source, number), temporary)  # whole or not at all
      temporary.rename(place)
