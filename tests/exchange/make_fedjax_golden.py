"""Writes fedjax_golden.json: what FedJAX 0.0.17 makes of a vector, for test_compression.py.

    python -m tests.exchange.make_fedjax_golden FOLDER/fedjax/aggregators/compression.py

The functions are taken from the file by themselves: the module imports packages that are not used.
"""

import ast
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("fedjax_golden.json")
BITS = (2, 4, 8)


def golden_vector() -> np.ndarray:
  """[97] float32 whose least value is minus its largest: FedJAX's range is then ours."""
  vector = np.random.default_rng(20).normal(size=97).astype(np.float32)
  vector[5], vector[60] = np.abs(vector).max(), -np.abs(vector).max()
  return vector


def functions(path: pathlib.Path, *names: str) -> dict[str, Any]:
  """Functions of a module by name, without its imports and decorators."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
  for node in found:
    node.decorator_list, node.returns = [], None
    for argument in node.args.args:
      argument.annotation = None
  space: dict[str, Any] = {"jax": jax, "jnp": jnp}
  exec(compile(ast.Module([*found], []), str(path), "exec"), space)
  return space


def main() -> None:
  own = functions(pathlib.Path(sys.argv[1]), "uniform_stochastic_quantize", "drive_pytree")
  vector = jnp.asarray(golden_vector())
  record: dict[str, Any] = {"drive": np.asarray(own["drive_pytree"](vector)).tolist()}
  for bits in BITS:
    key, levels = jax.random.key(bits, impl="threefry2x32"), 2**bits - 1
    found = own["uniform_stochastic_quantize"](vector, levels, key)
    record[f"uniform_stochastic_quantize.{bits}"] = np.asarray(found).tolist()
  GOLDEN.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
  main()
