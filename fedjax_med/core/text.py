"""Text that can be printed, written and read back: names of files, terminals, command lines."""

import codecs
import io
import re
import shlex
import sys
from collections.abc import Sequence

# Surrogates, control characters, line and paragraph separators, and marks that turn text around.
_HIDDEN = "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
_ESCAPE_LIKE = r"\\(?=[xu])"  # a backslash that would be taken for the beginning of an escape
REPLACING = "fedjax_med.replacing"  # error handler: what an encoding lacks, in letters it has
PLAIN = {
  **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "λ": "lambda"},
  **{"μ": "mu", "µ": "mu", "π": "pi", "σ": "sigma", "τ": "tau", "Δ": "Delta", "Σ": "Sigma"},
  **{"≤": "<=", "≥": ">=", "≈": "~", "≠": "!=", "±": "+/-", "×": "x", "÷": "/", "·": "*"},
  **{"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "…": "...", "∞": "inf", "√": "sqrt"},
  **{"→": "->", "←": "<-", "•": "*", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"},
  **{"é": "e", "²": "^2", "°": " degrees", "\xa0": " ", "\u202f": " "},
}


def readable(name: str) -> str:
  """A name from a file system, as text that can be shown and written in any file.

  Bytes that are no text in the file system's encoding, which Python gives as surrogates, become
  ``\\x93``. Control characters, ends of line and marks that turn text around become ``\\x0a`` or
  ``\\u0085``. A backslash before x or u becomes ``\\x5c``, so that no two names become one. All
  else stays. Call it once, where a name comes in.
  """
  return re.sub(f"{_HIDDEN}|{_ESCAPE_LIKE}", lambda found: escaped(found[0]), name)


def visible(text: str) -> str:
  """Escapes what ``readable`` escapes, but for backslashes. A second time changes nothing."""
  return re.sub(_HIDDEN, lambda found: escaped(found[0]), text)


def escaped(character: str) -> str:
  """The escape of a character: ``\\x93`` for a byte that is no text, ``\\u8105`` for a letter."""
  number = ord(character)
  if 0xDC80 <= number <= 0xDCFF:  # a byte
    return f"\\x{number - 0xDC00:02x}"
  if number < 0x80:
    return f"\\x{number:02x}"
  return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def encodable(text: str, encoding: str = "utf-8") -> str:
  """A text with letters that ``encoding`` lacks spelt out (ε is epsilon) or as escapes."""
  return text.encode(encoding, REPLACING).decode(encoding)


def command_line(arguments: Sequence[str]) -> str:
  """Arguments as a line for a shell (bash, zsh), which gives it the same bytes again."""
  return " ".join(map(_quoted, arguments))


def use_any_terminal() -> None:
  """Makes stdout and stderr spell out what their encoding lacks, instead of raising an error."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors=REPLACING)


def _quoted(argument: str) -> str:
  if not re.search(_HIDDEN, argument):
    return shlex.quote(argument)
  plain = argument.replace("\\", "\\\\").replace("'", "\\'")
  return f"$'{visible(plain)}'"


def _replaced(error: UnicodeError) -> tuple[str, int]:
  if not isinstance(error, UnicodeEncodeError):
    raise error
  text = error.object[error.start : error.end]
  return "".join(PLAIN.get(letter) or escaped(letter) for letter in text), error.end


codecs.register_error(REPLACING, _replaced)
