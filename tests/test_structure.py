"""Functions stay short and take few arguments; records are built and read by the names of fields.

The tables of exceptions hold what was over a limit when the limit came. An entry that is no longer
needed, or whose size is not that of the code, fails. So the tables can only shrink.
"""

import ast
import pathlib
import re
from typing import Any, NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("fedjax_med", "benchmarks", "experiments", "configs")
MAX_LINES = 80  # of a function, its signature and its docstring among them
MAX_PARAMETERS = 8  # without self
MAX_POSITIONAL = 2  # values of a record that are told apart by their position

# "file:function": (lines, parameters), today's size of each that is over a limit.
LONG_FUNCTIONS: dict[str, tuple[int, int]] = {
  "benchmarks/peers/fedjax_peer.py:serve": (90, 2),
  "benchmarks/peers/pfl_research.py:simulate": (117, 6),
}
# file: number of records that are built by position, or read by it.
POSITIONS: dict[str, int] = {
  "fedjax_med/federated/local.py": 2,
  "fedjax_med/privacy/clipping.py": 5,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, ast.Module]:
  """The parsed modules of the package, the benchmarks, the experiments and the presets, by path."""
  paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
  return {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths
  }


def long_functions(tree: ast.AST) -> dict[str, tuple[int, int]]:
  """(lines, parameters) of every function that is over a limit, by name."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, Function):
      arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      parameters = sum(argument.arg not in ("self", "cls") for argument in arguments)
      lines = (node.end_lineno or node.lineno) - node.lineno + 1
      if lines > MAX_LINES or parameters > MAX_PARAMETERS:
        found[node.name] = lines, parameters
  return found


class Record(NamedTuple):
  """A NamedTuple or a dataclass of this repository.

  Attributes:
    name: dotted name, such as fedjax_med.data.files.File.
    fields: annotation of each field, by its name.
  """

  name: str
  fields: dict[str, str]


class Names(NamedTuple):
  """The records that a module can name.

  Attributes:
    records: by the name that the module calls them by, such as File or files.File.
    attributes: names of fields that hold a record wherever they occur.
  """

  records: dict[str, Record]
  attributes: set[str]


def defined(path: str, tree: ast.Module) -> list[Record]:
  """The records that a module defines."""
  found = []
  for node in ast.walk(tree):
    if not isinstance(node, ast.ClassDef):
      continue
    bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if "NamedTuple" in bases or any("dataclass" in decorator for decorator in decorators):
      fields = {
        line.target.id: ast.unparse(line.annotation)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
      }
      found.append(Record(f"{module_name(path)}.{node.name}", fields))
  return found


def module_name(path: str) -> str:
  """Dotted name of the module in a file."""
  return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def local_names(path: str, tree: ast.Module, records: dict[str, Record]) -> dict[str, Record]:
  """The records that a module defines or imports, by the name that it calls them by."""
  found = {record.name.rpartition(".")[2]: record for record in defined(path, tree)}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        dotted, called = f"{node.module}.{alias.name}", alias.asname or alias.name
        inside = [name for name in records if name.rpartition(".")[0] == dotted]
        found |= {f"{called}.{name.rpartition('.')[2]}": records[name] for name in inside}
        if dotted in records:
          found[called] = records[dotted]
  return found


def names_in(trees: dict[str, ast.Module]) -> dict[str, Names]:
  """The records that each module can name, by the module's path."""
  records = {record.name: record for path in trees for record in defined(path, trees[path])}
  local = {path: local_names(path, tree, records) for path, tree in trees.items()}
  holders: dict[str, set[bool]] = {}
  for path, tree in trees.items():
    for record in defined(path, tree):
      for name, annotation in record.fields.items():
        holders.setdefault(name, set()).add(named(annotation) in local[path])
  attributes = {name for name, kinds in holders.items() if kinds == {True}}
  return {path: Names(known, attributes) for path, known in local.items()}


def named(annotation: str) -> str:
  """The name in an annotation such as 'Client | None'."""
  return annotation.strip("'\"").removesuffix(" | None")


def variables_of(scope: ast.AST) -> dict[str, str]:
  """Classes of variables and parameters, by name: an annotation, or the function they come from."""
  found = {}
  if isinstance(scope, Function):
    arguments = [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]
    found = {a.arg: named(ast.unparse(a.annotation)) for a in arguments if a.annotation}
  for node in ast.walk(scope):
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      found[node.target.id] = named(ast.unparse(node.annotation))
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
      called = ast.unparse(node.value.func)
      found |= {target.id: called for target in node.targets if isinstance(target, ast.Name)}
  return found


def dotted(node: ast.expr) -> str:
  """A name such as File or files.File; empty for any other expression."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
    return f"{node.value.id}.{node.attr}"
  return ""


def built_by_position(tree: ast.AST, names: Names) -> set[int]:
  """Lines that build a record of more than two fields from a splat or by position."""
  found = set()
  for node in ast.walk(tree):
    record = names.records.get(dotted(node.func)) if isinstance(node, ast.Call) else None
    if not isinstance(node, ast.Call) or record is None or len(record.fields) <= MAX_POSITIONAL:
      continue
    splat = any(isinstance(argument, ast.Starred) for argument in node.args)
    if splat or len(node.args) > MAX_POSITIONAL:
      found.add(node.lineno)
  return found


def read_by_position(tree: ast.AST, names: Names) -> set[int]:
  """Lines that index, slice or unpack a record, or slice a variable called after one."""
  found = set()
  namesakes = {re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in names.records}
  for scope in [node for node in ast.walk(tree) if isinstance(node, Function)]:
    variables = variables_of(scope)

    def is_record(value: ast.expr, variables: dict[str, str] = variables) -> bool:
      if isinstance(value, ast.Attribute):
        return value.attr == "_fields" or value.attr in names.attributes
      return isinstance(value, ast.Name) and variables.get(value.id, "") in names.records

    for node in ast.walk(scope):
      if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        called = node.value.id if isinstance(node.value, ast.Name) else ""
        found |= {node.lineno} if called in namesakes and called not in variables else set()
      if isinstance(node, ast.Subscript) and is_record(node.value):
        by_name = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
        found |= set() if by_name else {node.lineno}
      if isinstance(node, ast.Assign) and is_record(node.value):
        tuples = [target for target in node.targets if isinstance(target, ast.Tuple)]
        many = any(len(target.elts) > MAX_POSITIONAL for target in tuples)
        found |= {node.lineno} if many else set()
  return found


def differences(found: dict[str, Any], listed: dict[str, Any]) -> list[str]:
  """Sentences on what is found and not listed so, and on what is listed and not found so."""
  new = [f"{name}: {value}" for name, value in found.items() if listed.get(name) != value]
  gone = [f"{name} is in order: take it off the list" for name in listed if name not in found]
  return new + gone


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
  return sources()


def test_functions_are_short_and_take_few_arguments_but_for_a_list_that_shrinks(trees):
  assert len(trees) > 100
  found = {
    f"{path}:{name}": size for path, tree in trees.items()
    for name, size in long_functions(tree).items()
  }  # fmt: skip
  assert differences(found, LONG_FUNCTIONS) == []


def test_records_are_built_and_read_by_the_names_of_their_fields_but_for_a_list(trees):
  names = names_in(trees)
  assert {"Hyper", "Client"} <= set(names["fedjax_med/prepare/memory.py"].records)
  lines = {
    path: built_by_position(tree, names[path]) | read_by_position(tree, names[path])
    for path, tree in trees.items()
  }
  found = {path: len(some) for path, some in lines.items() if some}
  assert differences(found, POSITIONS) == [], {path: sorted(lines[path]) for path in found}


def test_a_list_of_exceptions_can_only_shrink():
  assert differences({"a": 3, "b": 1}, {"a": 3, "b": 1}) == []
  assert differences({"a": 4}, {"a": 3}) == ["a: 4"]
  assert differences({"a": 2}, {"a": 3}) == ["a: 2"]
  assert differences({}, {"a": 3}) == ["a is in order: take it off the list"]


def body(lines: int) -> str:
  """A method of that many lines."""
  return "class A:\n  def f(self):\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize("source", [body(81), "def f(a, b, c, d, /, e, f, g, *, h, i):\n  pass\n"])
def test_a_function_over_a_limit_is_found(source):
  assert list(long_functions(ast.parse(source))) == ["f"]


@pytest.mark.parametrize("source", [body(80), "def f(self, a, b, c, d, e, f, g, h): pass\n"])
def test_a_function_within_the_limits_is_accepted(source):
  assert long_functions(ast.parse(source)) == {}


LIBRARY = """
class Box(NamedTuple):
  width: int
  height: int
  depth: int
class Pair(NamedTuple):
  left: int
  right: int
@dataclasses.dataclass(frozen=True)
class Crate:
  box: Box | None
  weight: int
  owner: str
"""
IMPORTS = "from library.boxes import Box, Crate, Pair\nfrom library import boxes\n"


def by_position(source: str) -> set[int]:
  """Lines of a module, which may name the records of LIBRARY, that go by position."""
  trees = {"library/boxes.py": ast.parse(LIBRARY), "user.py": ast.parse(IMPORTS + source)}
  names = names_in(trees)["user.py"]
  found = built_by_position(trees["user.py"], names) | read_by_position(trees["user.py"], names)
  return {line - IMPORTS.count("\n") for line in found}


@pytest.mark.parametrize(
  "line",
  [
    "Box(1, 2, 3)",
    "boxes.Box(1, 2, 3)",
    "Box(*sizes)",
    "Crate(box, 1, 'me')",
    "def f(box: Box): return box[1:]",
    "def f(box: 'Box | None'): return box[-1]",
    "def f(box: boxes.Box): a, b, c = box",
    "def f(): box = Box(width=1, height=2, depth=3); return box[2]",
    "def f(crate): return crate.box[0]",
    "def f(): return Box._fields[:-1]",
    "def f(): return [pair for crate in crates for pair in crate[1:]]",
  ],
)
def test_a_position_in_a_record_is_found(line):
  assert by_position(line) == {1}


@pytest.mark.parametrize(
  "line",
  [
    "Box(1, 2, depth=3)",
    "Box(width=1, height=2, depth=3)",
    "Box(**sizes)",
    "Pair(1, 2)",
    "Other(1, 2, 3)",
    "def f(pair: Pair): left, right = pair",
    "def f(box: list[Box]): return box[0]",
    "def f(box: Box): return box.width",
    "def f(crate): return crate.owner[0]",
    "def f(crate): return crate['box']",
    "def f(crates): return crates[1:]",
    "def f(box: Other): return box[0]",
  ],
)
def test_names_of_fields_pairs_and_other_values_are_accepted(line):
  assert by_position(line) == set()
