"""Kernels that the H200's compiler makes of a round of SE-ResNeXt-50, in and outside local steps.

No GPU is needed, only jax's compiler for CUDA (the extra gpu): the program is compiled for an H200
that need not be there. Checkouts are compared, those given by --against and this one. The clients
of W2 are vmapped, as on a GPU. A kernel is an instruction that starts work on the device; one in a
loop counts once. Prints one JSON object on stdout.

Example: git worktree add /tmp/before 4553602
  python -m benchmarks.kernels --against before=/tmp/before --json
"""

import pathlib
import re
from typing import Any

from benchmarks import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICE = ROOT / "tests" / "devices" / "h200.txtpb"
# Instructions that start nothing on a GPU.
FREE = frozenset(
  [
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
  ]
)
PRODUCTS = ("__cublas", "__cudnn", "__triton")

ONE = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
target, private, device = sys.argv[1], sys.argv[2] == "1", pathlib.Path(sys.argv[3]).read_text()
chosen = jax.default_backend
jax.default_backend = lambda: "gpu"
from benchmarks import specs, workloads
from fedjax_med.core.keys import base_key
made = workloads._build(specs.WORKLOADS["W2"], private, "vmap", 4)
arguments = (made.state, made.clients, made.pool, made.hyper, base_key(0), jnp.int32(1))
topology = topologies.get_topology_desc(
  "", platform="cuda", topology="1x1x1", target_config=device
)
placing = SingleDeviceSharding(topology.devices[0])
shapes = jax.tree.map(
  lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placing), arguments
)
jax.default_backend = chosen
compiled = made.block.trace(*shapes).lower().compile()
pathlib.Path(target).write_text(compiled.as_text())
print(json.dumps({"working_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20}))
"""


def compiled_text(checkout: pathlib.Path, private: bool, target: pathlib.Path) -> dict[str, float]:
  """Writes the compiled program of a checkout to ``target``; returns what else is known of it."""
  return common.in_checkout(checkout, ONE, [str(target), str(int(private)), str(DEVICE)])


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """Name of the entry, and the instructions of each computation of a compiled program."""
  found: dict[str, list[str]] = {}
  entry, name = "", ""
  for line in text.splitlines():
    start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if start:
      name = start[2]
      found[name] = []
      entry = name if start[1] else entry
    elif name and " = " in line:
      found[name].append(re.sub(r"/\*.*?\*/", "", line.strip()))
  return entry, found


def opcode(line: str) -> str:
  """Opcode of an instruction."""
  found = re.search(r"= (?:\([^=]*?\)|\S+) ([a-z][\w\-]*)\(", line)
  return found[1] if found else ""


def called(line: str) -> list[str]:
  """Computations that an instruction runs as steps of the program, loops and branches."""
  if opcode(line) not in ("while", "conditional", "call"):
    return []
  names = re.findall(
    r"(?:body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line
  )
  for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
    names += [name.strip().lstrip("%") for name in branches.split(",")]
  return names


def kernels(name: str, found: dict[str, list[str]], without: frozenset[str] = frozenset()) -> int:
  """Kernels of a computation and all that it runs, but for computations in ``without``."""
  count = 0
  for line in found[name]:
    code = opcode(line)
    count += code not in FREE and not code.endswith("-done")
    count += sum(kernels(each, found, without) for each in called(line) if each not in without)
  return count


def products(name: str, found: dict[str, list[str]]) -> int:
  """Products and convolutions of a computation and all that it runs."""
  own = sum(any(each in line for each in PRODUCTS) or " dot(" in line for line in found[name])
  return own + sum(products(each, found) for line in found[name] for each in called(line))


def local_step(entry: str, found: dict[str, list[str]]) -> str:
  """Body of the innermost loop that holds most of the products: a local step of all clients."""
  whole, step = products(entry, found), entry
  while True:
    inner = [each for line in found[step] for each in called(line)]
    deeper = [each for each in inner if products(each, found) > 0.9 * whole]
    if not deeper:
      return step
    step = deeper[0]


def count(text: str) -> dict[str, int]:
  """Kernels of a local step, and of a round outside the local steps."""
  entry, found = computations(text)
  step = local_step(entry, found)
  return {
    "local_step": kernels(step, found),
    "outside": kernels(entry, found, frozenset({step})),
    "products": products(entry, found),
  }


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument(
    "--against", default=[], action="append", metavar="NAME=FOLDER", help="An earlier checkout."
  )
  parser.add_argument("--texts", default="/tmp", help="Folder for the compiled programs.")
  options = parser.parse_args()
  checkouts = common.checkouts(options.against, ROOT)
  result: dict[str, Any] = common.envelope("kernels") | {
    "device": "H200, compiled for",
    "cases": {},
  }
  for private in (True, False):
    label = f"W2 {'private' if private else 'plain'}"
    for name, checkout in checkouts.items():
      target = pathlib.Path(options.texts) / f"kernels-{name}-{int(private)}.txt"
      more = compiled_text(checkout, private, target)
      found = count(target.read_text(encoding="utf-8")) | more
      result["cases"].setdefault(label, {})[name] = found
      common.say(f"{label} {name} {found}")
  common.finish(result, options)


if __name__ == "__main__":
  main()
