"""XLA's persistent compilation cache: a second start of the same config compiles nothing."""

import os
import pathlib
import sys

import jax

from fedjax_med.core.config import ExecutionConfig
from fedjax_med.core.errors import UserError


def use_compilation_cache(folder: str) -> None:
  """Turns the cache on in ``folder``; '' leaves it off, as does a default that cannot be written.

  Raises:
    UserError: a folder that the user named cannot be made or written.
  """
  if not folder:
    return
  path = pathlib.Path(folder)
  try:
    path = path.expanduser()
    path.mkdir(parents=True, exist_ok=True)
    writable = os.access(path, os.W_OK)
  except (OSError, RuntimeError):  # RuntimeError: there is no home
    writable = False
  if not writable:
    if folder == ExecutionConfig().compilation_cache:
      print(f"note: {folder} cannot be written, so compiled programs are not kept", file=sys.stderr)
      return
    raise UserError(
      f"execution.compilation_cache={folder} cannot be made or written; name another folder or turn"
      " it off with --config.execution.compilation_cache="
    )
  jax.config.update("jax_compilation_cache_dir", str(path))
  # Small programs too: a start makes a dozen of them, and each costs more to compile than to read.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
