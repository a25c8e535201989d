"""Text of any kind can be shown, and no two names become one."""

import ast
import itertools
import pathlib
import re
import subprocess

import pytest

from fedjax_med.core.text import PLAIN, command_line, encodable, readable, visible

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIFT_JIS = "頭部.png".encode("shift_jis").decode("utf-8", "surrogateescape")
# Whatever could be taken for something else: escapes as text, bytes, controls, C1 next to bytes.
PIECES = ("\\", "x", "u", "93", "0093", "\udc93", "\x93", "\x0a", "\\x93", "頭", "\ud800", "\u202e")


def original(text):
  """The name that ``readable`` was given, from its docstring alone."""

  def letter(found):
    number = int(found[1] or found[2], 16)
    return chr(0xDC00 + number) if found[1] and number >= 0x80 else chr(number)

  return re.sub(r"\\x(..)|\\u(....)", letter, text)


@pytest.mark.parametrize(
  ("name", "shown"),
  [
    (SHIFT_JIS, "\\x93\\xaa\\x95\\x94.png"),
    ("scan\n\x1b[31m\x85.png", "scan\\x0a\\x1b[31m\\u0085.png"),
    ("症例 01 ü [bold] $x$ (1).PNG", "症例 01 ü [bold] $x$ (1).PNG"),
    ("a\\b\\x93.png", "a\\b\\x5cx93.png"),
    ("evil\u202egnp.exe", "evil\\u202egnp.exe"),
  ],
)
def test_a_name_is_readable_and_ordinary_letters_stay(name, shown):
  assert readable(name) == shown
  assert readable(name).encode("utf-8")
  assert len(readable(name).splitlines()) == 1


def test_no_two_names_become_one():
  names = {"".join(parts) for n in (1, 2, 3) for parts in itertools.product(PIECES, repeat=n)}
  assert len(names) > 1000
  assert len({readable(name) for name in names}) == len(names)
  assert {name for name in names if original(readable(name)) != name} == set()


def test_a_text_is_made_visible_once():
  text = "runs/\udc93\n\\x93"
  assert visible(text) == visible(visible(text)) == "runs/\\x93\\x0a\\x93"


@pytest.mark.parametrize(
  ("encoding", "shown"),
  [
    ("ascii", "epsilon <= 3 - 2x2 \\u982d \\x93"),
    ("latin-1", "epsilon <= 3 - 2×2 \\u982d \\x93"),
    ("utf-8", "ε ≤ 3 – 2×2 頭 \\x93"),
  ],
)
def test_what_an_encoding_lacks_is_spelt_out(encoding, shown):
  assert encodable("ε ≤ 3 – 2×2 頭 \udc93", encoding) == shown


def test_a_shell_gives_a_command_line_the_same_bytes_again():
  arguments = ["--path=" + SHIFT_JIS, "it's \\x93\\", "a\nb'\udc93\\'", "$HOME", "頭 部", "--x=1"]
  command = command_line(["printf", "%s\\0", *arguments])
  assert command.encode("utf-8")
  assert "\n" not in command
  done = subprocess.run(["bash", "-c", command], capture_output=True, check=True)
  wanted = [argument.encode("utf-8", "surrogateescape") for argument in arguments]
  assert done.stdout.split(b"\0")[:-1] == wanted


def said(path):
  """Strings of a module; of docstrings those that --help prints."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
  alone = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
  printed = alone[:1] if path.parent == ROOT / "fedjax_med" or path.stem == "__main__" else []
  printed = alone if path.stem == "config" else printed
  unsaid = {id(node) for node in alone} - {id(node) for node in printed}
  return [node.value for node in strings if isinstance(node.value, str) and id(node) not in unsaid]


def test_every_letter_that_we_print_ourselves_is_spelt_out_on_any_terminal():
  # Class names that sound negative in other scripts are compared with, not printed.
  aside = {"text.py", "classes.py"}
  paths = [path for path in (ROOT / "fedjax_med").rglob("*.py") if path.name not in aside]
  letters = {letter for path in paths for text in said(path) for letter in text}
  letters = {letter for letter in letters if not letter.isascii()}
  assert {"ε", "σ", "≤", "–"} <= letters
  assert letters - set(PLAIN) == set()
  assert all(text.isascii() for text in PLAIN.values())
