"""Joins what the shards of a sweep wrote, in one folder or in several.

Example: python -m fedjax_med.sweep merge --workdir=runs/noise runs/noise-of-machine-2
"""

import pathlib
import shutil
from collections.abc import Sequence

from absl import flags

from fedjax_med.core.errors import require
from fedjax_med.core.text import visible
from fedjax_med.sweep import table


def define() -> None:
  """Defines --workdir."""
  flags.DEFINE_string("workdir", None, "Folder of the sweep, which gets the table of all results.")


def main(arguments: list[str]) -> None:
  workdir = flags.FLAGS["workdir"].value
  require(bool(workdir), "--workdir is missing", "name the folder of the sweep")
  sources = [pathlib.Path(source).expanduser() for source in arguments[2:]]  # after "merge"
  join(pathlib.Path(str(workdir)).expanduser(), sources)


def join(target: pathlib.Path, sources: Sequence[pathlib.Path]) -> None:
  """Copies the points of ``sources`` that ``target`` lacks, and writes the table of all.

  Raises:
    UserError: a folder holds no sweep, or another one.
  """
  for source in sources:
    _take(source, target)
  points = table.read(target)["points"]
  table.write(target)
  missing = [number for number in range(len(points)) if not table.done(target, number)]
  print(
    f"{visible(str(target / table.RESULTS))}: {len(points) - len(missing)} of {len(points)} points"
  )
  if missing:
    shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
    print(f"missing: {shown}; start the sweep again with --resume")


def _take(source: pathlib.Path, target: pathlib.Path) -> None:
  definition = table.read(source)
  if not (target / table.DEFINITION).exists():
    (target / "points").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / table.DEFINITION, target / table.DEFINITION)
  found = table.read(target)["sweep_id"]
  require(
    found == definition["sweep_id"],
    f"{source} holds sweep {definition['sweep_id']}, {target} sweep {found}",
    "merge folders of one sweep: the same config, axes and seeds",
  )
  for number in range(len(definition["points"])):
    if table.done(source, number) and not table.done(target, number):
      place = table.folder_of(target, number)
      shutil.rmtree(place, ignore_errors=True)  # half a point of a killed process
      temporary = place.with_name(place.name + ".tmp")
      shutil.rmtree(temporary, ignore_errors=True)
      shutil.copytree(table.folder_of(source, number), temporary)  # whole or not at all
      temporary.rename(place)
