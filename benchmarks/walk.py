"""Runs a command of the package and tells which modules a record was passed to; nothing is timed.

A module counts where one of its functions got the record, or a list of such, as an argument. Older
commits are walked from a copy of theirs: the package is that of the working directory.

Example: python -m benchmarks.walk fedjax_med.train --config=configs/smoke.py --workdir=/tmp/walked
"""

import json
import pathlib
import runpy
import sys
import threading
from typing import Any

# Class of the record: what it stands for.
RECORDS = {
  "Config": "config",
  "Hospitals": "hospitals",
  "ClientDelta": "update",
  "Planned": "point of a sweep",
}
PACKAGE = "/fedjax_med/"


def walk(module: str, arguments: list[str]) -> dict[str, list[str]]:
  """Modules by record, in the order in which they got it first."""
  passed: dict[str, dict[str, None]] = {name: {} for name in RECORDS.values()}

  def watch(frame: Any, event: str, _: Any) -> None:
    code = frame.f_code
    inside, place = code.co_filename.rpartition(PACKAGE)[1:]
    if event != "call" or not inside or code.co_name.startswith("<"):
      return
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
      value = frame.f_locals.get(name)
      first = value[0] if type(value) in (list, tuple) and value else value
      kind = type(first).__name__
      if kind in RECORDS:
        passed[RECORDS[kind]].setdefault(place)

  sys.argv = [module, *arguments]
  threading.setprofile(watch)
  sys.setprofile(watch)
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  finally:
    sys.setprofile(None)
    threading.setprofile(None)
  return {name: list(places) for name, places in passed.items()}


def rooms(places: list[str]) -> list[str]:
  """Rooms of the modules, in that order; 'doors' is the package's own folder."""
  return list(dict.fromkeys(str(pathlib.PurePath(place).parent) for place in places))


def main() -> None:
  module, *arguments = sys.argv[1:]
  for name, places in walk(module, arguments).items():
    entered = ["doors" if room == "." else room.split("/")[0] for room in rooms(places)]
    entered = list(dict.fromkeys(entered))
    print(json.dumps({"record": name, "modules": places, "rooms": entered}), file=sys.stderr)


if __name__ == "__main__":
  main()
