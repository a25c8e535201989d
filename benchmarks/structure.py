"""Counts what the code's structure costs a reader, at several commits; nothing is timed.

A word counts where the code names it: comments and docstrings are left out, templates are not. What
somebody has to touch is thereby counted from below, since a file may be bound to a word silently.

Example: python -m benchmarks.structure 5f1095c HEAD --json
"""

import ast
import io
import re
import statistics
import subprocess
import tarfile
from typing import Any

from benchmarks import common

MAX_LINES, MAX_PARAMETERS = 80, 8  # as in tests/test_structure.py
# An inhabitant of each kind that a user may add, to see which files know of it.
EXAMPLES = {
  "algorithm with a traced hyperparameter": "personal_weight",
  "network": "fedxnet",
  "metric": "f1",
  "source": "sars_cov2_ct",
}
# What travels: records by the parameters that are annotated with them.
TRAVELLERS = {
  "config": "Config",
  "hospitals": "Hospitals",
  "update": "ClientDelta",
  "point of a sweep": "Planned",
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def files_at(commit: str) -> dict[str, str]:
  """Python files and templates of the package, and tests, by path."""
  command = ["git", "archive", "--format=tar", commit, "fedjax_med", "tests"]
  packed = subprocess.run(command, capture_output=True, check=True).stdout
  found = {}
  with tarfile.open(fileobj=io.BytesIO(packed), encoding="utf-8") as archive:
    for member in archive:
      file = archive.extractfile(member) if member.name.endswith((".py", ".html")) else None
      if file is not None:
        found[member.name] = file.read().decode()
  return found


def without_words(tree: ast.Module) -> str:
  """The code of a module without comments and docstrings."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node):
      node.body[0] = ast.Expr(ast.Constant(None))
  return ast.unparse(tree)


def sizes(trees: dict[str, ast.Module]) -> list[tuple[int, int, str]]:
  """(lines, parameters, path:name) of every function, the longest first."""
  found = []
  for path, tree in trees.items():
    for node in ast.walk(tree):
      if isinstance(node, Function):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = sum(argument.arg not in ("self", "cls") for argument in arguments)
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        found.append((lines, parameters, f"{path}:{node.name}"))
  return sorted(found, reverse=True)


def takers(trees: dict[str, ast.Module], record: str) -> list[str]:
  """Modules with a function that has a parameter annotated with the record."""

  def takes(node: ast.AST) -> bool:
    annotation = node.annotation if isinstance(node, ast.arg) else None
    return annotation is not None and bool(re.search(rf"\b{record}\b", ast.unparse(annotation)))

  return [path for path, tree in trees.items() if any(takes(node) for node in ast.walk(tree))]


def rooms(paths: list[str]) -> list[str]:
  """Folders of the package that hold the modules; 'doors' is the package's own."""
  folders = [path.split("/")[1:-1] for path in paths]
  return sorted({folder[0] if folder else "doors" for folder in folders})


def field_names(trees: dict[str, ast.Module]) -> list[str]:
  """Fields of the configuration whose name has an underscore, and so is no word by itself."""
  names = [
    line.target.id
    for path, tree in trees.items()
    if path.startswith("fedjax_med/core/")
    for node in tree.body
    if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    for line in node.body
    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
  ]
  return sorted({name for name in names if "_" in name and not name.endswith("privacy")})


def counts(commit: str) -> dict[str, Any]:
  """All counts at a commit."""
  files = files_at(commit)
  package = {path: text for path, text in files.items() if path.startswith("fedjax_med/")}
  trees = {path: ast.parse(text) for path, text in package.items() if path.endswith(".py")}
  named_in = {path: without_words(ast.parse(package[path])) for path in trees}
  named_in |= {path: text for path, text in package.items() if path not in trees}

  def naming(word: str) -> list[str]:
    return [path for path, text in named_in.items() if re.search(rf"\b{word}\b", text)]

  def lines(room: str) -> int:
    return sum(text.count("\n") for path, text in files.items() if path.startswith(f"{room}/"))

  functions = sizes(trees)
  travels = {name: takers(trees, record) for name, record in TRAVELLERS.items()}
  fields = [len(naming(name)) for name in field_names(trees)]
  return {
    "lines": {"fedjax_med": lines("fedjax_med"), "tests": lines("tests")},
    "modules": len(trees),
    "longest_functions": [f"{name} {size}" for size, _, name in functions[:10]],
    "functions": len(functions),
    "functions_over_80_lines": sum(size > MAX_LINES for size, _, _ in functions),
    "functions_over_8_arguments": sum(many > MAX_PARAMETERS for _, many, _ in functions),
    "taken_by": {
      name: {"modules": len(paths), "rooms": rooms(paths)} for name, paths in travels.items()
    },
    "named_in": {name: naming(word) for name, word in EXAMPLES.items()},
    "files_that_name_a_field": {
      "fields": len(fields),
      "mean": round(statistics.mean(fields), 2),
      "median": statistics.median(fields),
      "most": max(fields),
    },
  }


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("commits", nargs="+", help="commits, branches or tags")
  options = parser.parse_args()
  result = common.envelope("structure") | {name: counts(name) for name in options.commits}
  common.finish(result, options)


if __name__ == "__main__":
  main()
