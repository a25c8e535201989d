"""The secret of a private run: 128 random bits, from which its noise, its draws and its id follow.

Whoever has it can recompute every draw, and take the noise off again. It lies in one file of the
workdir, which only its owner may read, and is written nowhere else.
"""

import hashlib
import hmac
import os
import pathlib
import uuid

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError, require

FILE = "noise.key"
BYTES = 16


def is_private(config: Config) -> bool:
  """Whether a run promises privacy, and so has a secret."""
  return config.privacy.mechanism != "none" or config.client_privacy.mechanism != "none"


def draw() -> bytes:
  """A new secret from the operating system."""
  return os.urandom(BYTES)


def derived(secret: bytes, *words: str) -> bytes:
  """Derives a secret from another one and from words; it betrays nothing of that one."""
  return hmac.new(secret, "\0".join(words).encode(), hashlib.sha256).digest()[:BYTES]


def read(path: pathlib.Path) -> bytes:
  """The secret in a file: 32 hexadecimal digits.

  Raises:
    UserError: the file cannot be read, or holds something else.
  """
  try:
    secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
  except (OSError, ValueError) as error:
    reason = error.strerror if isinstance(error, OSError) else "no hexadecimal digits"
    raise UserError(f"{path} cannot be read ({reason}); restore it") from error
  require(
    len(secret) == BYTES,
    f"{path} holds {len(secret)} bytes and not {BYTES}",
    f"write {2 * BYTES} hexadecimal digits into it, such as openssl rand -hex {BYTES} prints",
  )
  return secret


def keep(folder: pathlib.Path, secret: bytes) -> bytes:
  """Writes the secret into a folder unless it holds one; returns the one that it then holds.

  Only the owner may read the file. It appears whole: of several writers one wins.
  """
  path = folder / FILE
  temporary = path.with_name(f"{FILE}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    place = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(place, "wb") as file:
      file.write(secret.hex().encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())
    try:
      os.link(temporary, path)
    except FileExistsError:
      pass
    except OSError:  # a file system without links
      if not path.exists():
        os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return read(path)


def folder_secret(folder: pathlib.Path, given: pathlib.Path | None, begun: bool) -> bytes:
  """The secret of a workdir: the one that it holds, else the one that is given, else a new one.

  Args:
    folder: the workdir, which keeps it.
    given: file of ``--noise_key``; None without one.
    begun: whether the folder holds a run, which a new secret would not go on.

  Raises:
    UserError: the secret of a run is lost, or another one is given.
  """
  path = folder / FILE
  chosen = None if given is None else read(given)
  if not path.exists():
    require(
      not begun,
      f"{path} is missing, the secret that the noise of the run in {folder} follows from",
      "restore the file; without it the run cannot go on: use another --workdir",
    )
    return keep(folder, chosen or draw())
  found = read(path)
  require(
    chosen in (None, found),
    f"--noise_key={given} is not the secret that the run in {folder} began with",
    "leave it out to go on with that run, or use another --workdir",
  )
  return found
