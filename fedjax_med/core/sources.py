"""Functions that users register: recognised when they are read once more, named by their source."""

import functools
import hashlib
import inspect
import pathlib
from typing import Any

from fedjax_med.core.errors import require


def read_again(one: Any, other: Any) -> bool:
  """Whether both are functions that the same lines of a file define, with the same defaults.

  Config files are read several times. Of two ``functools.partial`` the arguments are compared too.
  """
  if one is other:
    return True
  if isinstance(one, functools.partial) and isinstance(other, functools.partial):
    first, second = ({**dict(enumerate(p.args)), **p.keywords} for p in (one, other))
    same = first.keys() == second.keys() and all(
      value == second[name] or read_again(value, second[name]) for name, value in first.items()
    )
    return same and read_again(one.func, other.func)
  if not all(inspect.isfunction(f) and not f.__closure__ for f in (one, other)):
    return False
  return _definition(one) == _definition(other)


def _definition(function: Any) -> tuple[Any, ...]:
  code = function.__code__
  path = pathlib.Path(code.co_filename).absolute()
  return path, code, function.__defaults__, function.__kwdefaults__


def source_digest(function: Any, what: str) -> str:
  """SHA-256 of the file that defines a registered function; empty for this package's own.

  Of a ``functools.partial`` function and arguments count: with others it is another function.

  Args:
    function: the registered function.
    what: for people, such as ``model 'mine'``.

  Raises:
    UserError: neither a file nor compiled code of it can be read, or an argument of a partial is
      neither a number, a text nor a function.
  """
  if isinstance(function, functools.partial):
    named = {**dict(enumerate(function.args)), **function.keywords}
    parts = [
      source_digest(function.func, what),
      *(f"{name}={_argument(value, what)}" for name, value in named.items()),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if any(parts) else ""
  if getattr(function, "__module__", "").startswith("fedjax_med."):
    return ""
  try:
    source = pathlib.Path(inspect.getsourcefile(function) or "").read_bytes()
  except (TypeError, OSError):  # typed into a session
    code: Any = getattr(function, "__code__", None)
    require(code is not None, f"the source of {what} cannot be read", "put it in a file")
    source = code.co_code + repr(code.co_consts).encode()
  return hashlib.sha256(source).hexdigest()


def _argument(value: Any, what: str) -> str:
  if value is None or isinstance(value, bool | int | float | str):
    return repr(value)
  require(
    callable(value),
    f"{what} is a functools.partial with an argument of type {type(value).__name__}, whose value"
    " cannot be told from another's",
    "give it numbers, texts and functions only",
  )
  return source_digest(value, what) or f"{value.__module__}.{value.__qualname__}"
