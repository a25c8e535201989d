"""Every module opens with one sentence that says what it is for."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("fedjax_med", "configs", "experiments", "benchmarks", "tests")


def purpose_problem(source: str) -> str:
  """What is wrong with the first line of a module's docstring; empty if nothing."""
  docstring = ast.get_docstring(ast.parse(source))
  if not docstring:
    return "the first statement is not a docstring"
  lines = docstring.splitlines()
  if not lines[0].endswith((".", ":")):
    return f"the first line is not one whole sentence: {lines[0]!r}"
  if len(lines) > 1 and lines[1].strip():
    return "the first line is not set off by an empty line"
  return ""


def test_first_line_of_every_module_says_its_purpose():
  paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
  problems = {
    str(path.relative_to(ROOT)): purpose_problem(path.read_text(encoding="utf-8")) for path in paths
  }
  assert len(paths) > 10
  assert {path: problem for path, problem in problems.items() if problem} == {}


@pytest.mark.parametrize(
  "source",
  [
    "",
    "import os\n",
    'import os\n"""Too late."""\n',
    '""" """\n',
    '"""No full stop"""\n',
    '"""A sentence that\ngoes on."""\n',
    '"""First.\nSecond without an empty line."""\n',
  ],
)
def test_a_missing_purpose_is_found(source):
  assert purpose_problem(source)


def test_a_purpose_with_details_is_accepted():
  assert purpose_problem('"""Draws batches.\n\nDetails.\n"""\n') == ""


def our_own(function: ast.expr) -> bool:
  """Whether ``write_text`` is that of ``folder.writing``, and no method of a path."""
  return ast.unparse(function) in ("write_text", "files.write_text")


def unsaid_encodings(source: str) -> list[int]:
  """Lines that open a file as text, or read a process as text, and do not say its encoding."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    words = {word.arg for word in node.keywords}
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    place = getattr(getattr(node.func, "value", None), "id", "")
    first = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    binary = any("b" in mode for mode in first if isinstance(mode, str) and len(mode) <= 3)
    opens = name in ("open", "fdopen", "TemporaryFile") and place not in ("Image", "webbrowser")
    opens = opens and not (binary or (name == "open" and place == "os"))
    reads = name in ("read_text", "write_text") and not our_own(node.func)
    if (opens or reads or "text" in words) and "encoding" not in words:
      found.append(node.lineno)
  return found


def test_every_text_file_is_opened_with_its_encoding():
  paths = [path for folder in FOLDERS[:4] for path in (ROOT / folder).rglob("*.py")]
  found = {
    str(path.relative_to(ROOT)): unsaid_encodings(path.read_text(encoding="utf-8"))
    for path in paths
  }
  assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
  "line",
  [
    "open(path)",
    "open(path, 'w')",
    "path.open('a')",
    "path.read_text()",
    "(folder / name).write_text(text)",
    "subprocess.run(command, text=True)",
    "tempfile.TemporaryFile('w+')",
  ],
)
def test_an_encoding_that_is_not_said_is_found(line):
  assert unsaid_encodings(line) == [1]


@pytest.mark.parametrize(
  "line", ["open(path, 'rb')", "path.open('wb')", "Image.open(path)", "os.open(path, flags)",
           "path.read_text(encoding='utf-8')", "write_text(path, text)"]
)  # fmt: skip
def test_bytes_and_an_encoding_that_is_said_are_accepted(line):
  assert unsaid_encodings(line) == []


WRITERS = ("write_text", "write_bytes", "savefig", "save_file", "to_csv", "to_parquet")


def torn_writes(source: str) -> list[int]:
  """Lines that write a whole file in its own place, so that a kill leaves half of it."""
  tree = ast.parse(source)
  whole = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Lambda)
           for inner in ast.walk(node)}  # fmt: skip
  found = []
  for node in ast.walk(tree):
    if not isinstance(node, ast.Call) or id(node) in whole:
      continue
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in WRITERS and not our_own(node.func):
      found.append(node.lineno)
  return found


def test_results_are_written_by_write_whole_only():
  # The probe of an empty file, and the neighbour that create_whole links to its place.
  allowed = {"fedjax_med/folder/writing.py": 2}
  found = {
    str(path.relative_to(ROOT)): torn_writes(path.read_text(encoding="utf-8"))
    for path in (ROOT / "fedjax_med").rglob("*.py")
  }
  assert {path: len(lines) for path, lines in found.items() if lines} == allowed
