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
  problems = {str(path.relative_to(ROOT)): purpose_problem(path.read_text()) for path in paths}
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
