"""The folder of a run: made, checked, and written so that a kill never leaves half a file.

Where several processes share a run, all can read the folder and the first one writes.
"""

import contextlib
import csv
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedjax_med.core.errors import UserError, require
from fedjax_med.core.text import REPLACING, encodable
from fedjax_med.simulation.processes import is_first

SUMMARY, REPORT, STATEMENT = "summary.json", "report.html", "privacy_statement.md"
DEPLOYMENT = "deployment.json"


def require_outside(workdir: pathlib.Path, data_path: str) -> None:
  """Raises UserError for a workdir inside the data, whose pictures would be read as data later."""
  if not data_path:
    return
  place, data = workdir.resolve(), pathlib.Path(data_path).expanduser().resolve()
  require(
    data != place and data not in place.parents,
    f"--workdir={workdir} lies in data.path={data_path}, and its figures would be read as pictures",
    "choose a folder outside",
  )


def prepare(workdir: pathlib.Path) -> None:
  """Makes the folder and proves that it can be written; raises UserError if it cannot."""
  require_text(workdir)
  try:
    (workdir / "figures").mkdir(parents=True, exist_ok=True)
    probe = workdir / ".write_test"
    probe.write_bytes(b"")
    probe.unlink(missing_ok=True)  # another process may have been faster
  except OSError as error:
    raise UserError(
      f"--workdir={workdir} cannot be written ({error.strerror}); choose a folder you may write to"
    ) from error


def require_text(workdir: pathlib.Path) -> None:
  """Refuses a folder whose name holds bytes that are no text: checkpoints cannot lie there.

  Raises:
    UserError: see above.
  """
  require(
    encodable(str(workdir.absolute())) == str(workdir.absolute()),
    f"--workdir={workdir.absolute()} holds bytes that are no UTF-8, which checkpoints cannot have",
    "rename the folder or choose another one",
  )


def withdraw(folder: pathlib.Path) -> None:
  """Removes what is said of a run that has ended, the summary first: the run goes on."""
  for name in (SUMMARY, REPORT, STATEMENT, DEPLOYMENT):
    (folder / name).unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON whole or not at all: to a neighbour first, which is renamed to ``path``."""
  if is_first():
    write_text(path, as_json(value))


def write_private_json(path: pathlib.Path, value: Any) -> None:
  """The same, in a file that only its owner may read."""
  if is_first():
    write_text(path, as_json(value), 0o600)


def as_json(value: Any) -> str:
  """The text of a JSON file."""
  return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_text(path: pathlib.Path, text: str, mode: int = 0o666) -> None:
  """Writes UTF-8, whole or not at all; what it cannot hold, such as surrogates, as escapes."""
  content = encodable(text).encode("utf-8")
  # The file has its mode before there is something to read.
  write_whole(path, lambda place: (place.touch(mode), place.write_bytes(content)))


def create_whole(path: pathlib.Path, text: str) -> None:
  """Creates a file with all of its text, unless there is one: of several writers one wins."""
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    temporary.write_text(text, encoding="utf-8")
    try:
      os.link(temporary, path)
    except FileExistsError:
      return
    except OSError:  # a file system without links, where a reader may meet half the text
      with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(text)
  finally:
    temporary.unlink(missing_ok=True)


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
  """Lets ``write`` fill a neighbour of ``path``, which then takes its place.

  The neighbour has a name of its own: shards of a sweep may write the same file at once. It is
  short, because ``path`` may have the longest name that a file system allows.
  """
  temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
  try:
    write(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_csv(path: pathlib.Path, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
  """Writes a table as a whole; its folder is made. What UTF-8 has not becomes a mark."""

  def write(place: pathlib.Path) -> None:
    with place.open("w", newline="", encoding="utf-8", errors=REPLACING) as file:
      table = csv.writer(file, lineterminator="\n")
      table.writerow(titles)
      table.writerows(rows)

  path.parent.mkdir(parents=True, exist_ok=True)
  write_whole(path, write)


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of metrics.jsonl in order; a line cut short by a kill is left out."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(encoding="utf-8").splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      continue
  return lines


def keep_metrics_to(workdir: pathlib.Path, round_number: int) -> None:
  """Drops lines past ``round_number``: they belong to rounds that a resumed run does again."""
  if not is_first():
    return
  kept = [line for line in read_metrics(workdir) if line["round"] <= round_number]
  text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
  write_text(workdir / "metrics.jsonl", text)


def append_metrics(workdir: pathlib.Path, lines: list[dict[str, Any]]) -> None:
  """Appends log lines and makes sure that they reached the disk."""
  if not is_first():
    return
  with (workdir / "metrics.jsonl").open("a", encoding="utf-8") as file:
    file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    file.flush()
    os.fsync(file.fileno())


def refuse_sweep(workdir: pathlib.Path) -> None:
  """Raises UserError for a folder that holds a sweep: files of the two would be mixed."""
  require(
    not (workdir / "sweep.json").exists(),
    f"--workdir={workdir} holds a sweep",
    "use another --workdir for the run",
  )


def claim(workdir: pathlib.Path, run_id: str) -> None:
  """Raises UserError for a folder that holds another run, or a sweep."""
  refuse_sweep(workdir)
  path = workdir / "config.json"
  if not path.exists():
    return
  try:
    found = json.loads(path.read_text(encoding="utf-8")).get("run_id")
  except (OSError, ValueError, AttributeError):
    found = "unreadable"
  require(
    found == run_id,
    f"--workdir={workdir} holds run {found}, this configuration is run {run_id}",
    "use another --workdir, or the flags and data of the first start to resume it",
  )
