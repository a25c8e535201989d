"""Locks of a workdir: the kernel frees them when their holder ends, also by kill -9.

A lock is a file that its holder keeps open and locked (flock). Its text is for people. A file that
no process holds has no effect, so no lock is ever stale.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

from fedjax_med.core.errors import UserError

FOLDER = ".locks"
# Network file systems that make flock of another kind of lock may say EACCES.
TAKEN = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def hold(
  workdir: pathlib.Path, tell: Callable[[str], Any], index: int = 0, number: int = 1
) -> Iterator[None]:
  """Holds the lock of a workdir inside the block.

  Shards of one number run side by side. Any other process in the folder is refused. On a file
  system without locks none is refused.

  Args:
    workdir: a folder that exists.
    tell: called with a sentence where the file system has no locks.
    index: of the shard, from 0.
    number: of shards; 1 where one process does all.

  Raises:
    UserError: the folder is in use; the sentence names process, host and time.
  """
  folder = workdir / FOLDER
  folder.mkdir(exist_ok=True)
  with contextlib.ExitStack() as stack:
    # Whoever looks at locks or takes one is alone: a look takes a lock for a moment.
    with (folder / "gate").open("a", encoding="utf-8") as gate:
      try:
        fcntl.flock(gate, fcntl.LOCK_EX)
      except OSError as error:
        tell(
          f"The file system of --workdir={workdir} has no locks ({error.strerror}): start no second"
          " process in this folder"
        )
      else:
        _require_free(workdir, index, number)
        path = folder / f"{index}-of-{number}"
        file = stack.enter_context(path.open("w", encoding="utf-8"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        started = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started}, file)
        file.flush()
        stack.callback(file.truncate, 0)
    yield


def _require_free(workdir: pathlib.Path, index: int, number: int) -> None:
  """Raises UserError if a process holds a lock that shard ``index`` of ``number`` is not beside."""
  for path in sorted((workdir / FOLDER).glob("*-of-*")):
    place, _, shards = path.name.partition("-of-")
    beside = shards == str(number) and place != str(index)
    if beside or not _is_held(path):
      continue
    shard = "" if shards == "1" else f", shard {place}/{shards} of a sweep"
    raise UserError(
      f"--workdir={workdir} is in use by {_described(path)}{shard}; wait until it ends, or use"
      " another --workdir"
    )


def _is_held(path: pathlib.Path) -> bool:
  with path.open("r+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in TAKEN:
        return True
      raise
  return False


def _described(path: pathlib.Path) -> str:
  try:
    holder = json.loads(path.read_text(encoding="utf-8"))
    return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
  except (OSError, ValueError, KeyError, TypeError):
    return f"a process that did not say its name in {path}"
