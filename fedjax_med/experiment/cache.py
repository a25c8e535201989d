"""XLA's persistent compilation cache: a second start of the same config compiles nothing."""

import os
import pathlib

import jax

from fedjax_med.core.errors import UserError


def use_compilation_cache(folder: str) -> None:
  """Turns the cache on in ``folder`` ('' leaves it off); raises UserError if it cannot be made."""
  if not folder:
    return
  path = pathlib.Path(folder).expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"execution.compilation_cache={folder} cannot be made ({error.strerror}); name another folder"
      " or turn it off with --config.execution.compilation_cache="
    ) from error
  if not os.access(path, os.W_OK):
    raise UserError(f"execution.compilation_cache={folder} cannot be written; name another folder")
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
