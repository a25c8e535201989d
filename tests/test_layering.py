"""Imports point one way, and flax stays inside models/."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = (
  "core",
  "tasks",
  "data",
  "models",
  "privacy",
  "federated",
  "exchange",
  "simulation",
  "folder",
  "prepare",
  "run",
  "study",
  "sweep",
  "report",
  "trained",
  "audit",
  "api",
)
PACKAGE = "fedjax_med"


def imported_modules(source: str, module: str) -> set[str]:
  """Dotted names a module imports anywhere in its code; relative ones are resolved."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        package = ".".join(module.split(".")[: -node.level])
        base = f"{package}.{base}".rstrip(".")
      # "from fedjax_med import models" and "from fedjax_med.core import errors" name modules too.
      found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
  return found


def layer_of(module: str) -> int:
  """Position in LAYERS; modules directly in the package, and __main__, are entry points above."""
  parts = module.split(".")
  if parts[-1] == "__main__":
    return len(LAYERS)
  return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else len(LAYERS)


def violations(source: str, module: str) -> list[str]:
  """Sentences about the imports of ``module`` (dotted name) that the rules forbid."""
  problems = []
  for name in sorted(imported_modules(source, module)):
    root, _, rest = name.partition(".")
    if root in ("flax", "flaxlib") and module.split(".")[1:2] != ["models"]:
      problems.append(f"{module} imports {name}; only models/ may")
    # The package imports nothing itself (public names at their first use), so all may import it.
    inside = root == PACKAGE and rest not in ("", "__version__")
    if inside and layer_of(name) > layer_of(module):
      problems.append(f"{module} imports {name}, a layer above its own")
  return problems


def package_modules() -> dict[str, pathlib.Path]:
  """Dotted name and file of every module of the package."""
  modules = {}
  for path in sorted((ROOT / PACKAGE).rglob("*.py")):
    # A package's __init__ keeps its last part, so that relative imports resolve alike.
    modules[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
  return modules


def test_imports_point_one_way_and_flax_stays_in_models():
  modules = package_modules()
  assert len(modules) > len(LAYERS)
  problems = []
  for module, path in modules.items():
    problems += violations(path.read_text("utf-8"), module)
  assert not problems, "\n".join(problems)


def test_every_folder_of_the_package_is_a_layer():
  folders = {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")}
  assert folders == set(LAYERS) - {"study", "api"}  # modules


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("fedjax_med.core.x", "from fedjax_med.data.dataset import Dataset"),
    ("fedjax_med.core.x", "import fedjax_med.prepare"),
    ("fedjax_med.core.x", "from fedjax_med import data"),
    ("fedjax_med.core.x", "from .. import privacy"),
    ("fedjax_med.core.x", "from ..models import ops"),
    ("fedjax_med.data.__init__", "from ..models import ops"),
    ("fedjax_med.privacy.x", "def f():\n  from fedjax_med.simulation import rounds"),
    ("fedjax_med.prepare.x", "from fedjax_med.flags import run_main"),
    ("fedjax_med.privacy.x", "import flax.linen as nn"),
    ("fedjax_med.train", "from flax import linen"),
  ],
)
def test_a_violation_is_found(module, source):
  assert violations(source, module)


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("fedjax_med.data.x", "from fedjax_med.core.errors import require"),
    ("fedjax_med.data.x", "from . import dataset\nfrom .dataset import Dataset"),
    ("fedjax_med.models.x", "import flax.linen as nn"),
    ("fedjax_med.prepare.x", "import fedjax_med\nfrom fedjax_med import __version__"),
    ("fedjax_med.train", "from fedjax_med.run import training\nfrom fedjax_med import flags"),
  ],
)
def test_an_allowed_import_is_not_a_violation(module, source):
  assert violations(source, module) == []
