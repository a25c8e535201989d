"""Checks and times everything on a GPU or TPU in under nine minutes, most important first.

Each benchmark is a process of its own with a time limit; what it printed lies in NAME.json in the
folder ``--out``, its progress in NAME.log. ``summary.json`` says what ended how, and names what no
time was left for. ``--quick`` is the first half.

Example: python -m benchmarks.accelerator --out results
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

LIMIT = 520.0  # seconds in all
# Name, seconds at most, command after `python -m benchmarks.`
ITEMS = (
  ("check", 60, "accelerator --check"),
  ("rounds-W1", 90, "rounds --workload=W1 --json --systems pytorch_1 --block_s 5 --repeats 3"),
  ("parallel_clients", 200, "parallel_clients --json --repeats 3"),
  ("private_step", 120, "private_step --json --repeats 3"),
  ("rounds-W3", 90, "rounds --workload=W3 --json --systems pytorch_1 opacus_hooks_1 --repeats 3"),
  ("rounds-W2", 120, "rounds --workload=W2 --json --systems pytorch_1 opacus_hooks_1 --repeats 3"),
  ("scaling", 90, "scaling --json"),
  ("memory", 90, "memory --json --image_size 192 --methods book_keeping two_pass"),
)
QUICK = 3  # of them


def check() -> dict[str, Any]:
  """Largest relative differences on this device between what must agree to rounding."""
  import jax
  import jax.numpy as jnp
  import optax

  from fedjax_med.core.config import ModelConfig
  from fedjax_med.models.ops import Lowering
  from fedjax_med.models.registry import create_model
  from fedjax_med.privacy.clipping import METHODS, Rows, clipped_sum
  from fedjax_med.tasks.classification import cross_entropy

  images = jax.random.normal(jax.random.key(0), (6, 32, 32, 1))
  labels = jnp.arange(6) % 2
  mask, loss = jnp.ones(6, bool), cross_entropy(0.0)

  def sums(lowering: Lowering, method: str, clients: int) -> Any:
    model = create_model(ModelConfig(name="se_resnext_micro"), 2, lowering)
    params, state = model.init(jax.random.key(1), images[:1])

    def one(params):
      with jax.default_matmul_precision("highest"):
        rows = Rows(inputs=images, labels=labels, mask=mask)
        return clipped_sum(method, model, loss, params, state, rows, jnp.float32(0.5), None)[0]

    if clients == 1:
      return jax.jit(one)(params)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + k) for k in range(clients)]), params)
    return jax.tree.map(lambda leaf: leaf[0], jax.jit(jax.vmap(one))(many))

  def distance(got: Any, want: Any) -> float:
    """Largest over leaves of the l2 error over the leaf's norm; a leaf near zero counts by 1e-3."""
    whole = float(optax.tree.norm(want))
    errors = jax.tree.map(
      lambda a, b: jnp.linalg.norm(a - b) / jnp.maximum(jnp.linalg.norm(b), 1e-3 * whole), got, want
    )
    return float(jnp.stack(jax.tree.leaves(errors)).max())  # NaN stays NaN

  want = sums("native", "reference", 1)
  lowerings: tuple[Lowering, ...] = ("auto", "matmul")
  errors = {
    f"{lowering} {method} x{clients}": distance(sums(lowering, method, clients), want)
    for lowering in lowerings
    for method in METHODS
    for clients in (1, 3)
  }
  return {
    "device": jax.devices()[0].device_kind,
    "errors": errors,
    "passed": all(error < 1e-3 for error in errors.values()),
  }


def run(name: str, limit: float, command: str, folder: pathlib.Path) -> dict[str, Any]:
  """Runs one benchmark; returns how it ended."""
  started = time.monotonic()
  with (folder / f"{name}.json").open("wb") as out, (folder / f"{name}.log").open("wb") as log:
    process = subprocess.Popen(
      [sys.executable, "-m", *f"benchmarks.{command}".split()],
      stdout=out,
      stderr=log,
      start_new_session=True,
    )
    try:
      code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
      code = None
      os.killpg(process.pid, signal.SIGKILL)  # its peers too: they would keep the accelerator
      process.wait()
  return {"exit_code": code, "seconds": round(time.monotonic() - started, 1), "command": command}


def main() -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("accelerator"))
  parser.add_argument("--quick", action="store_true", help="only the most important")
  parser.add_argument("--check", action="store_true", help="only print the check")
  options = parser.parse_args()
  if options.check:
    result = check()
    print(json.dumps(result))
    return 0 if result["passed"] else 1
  options.out.mkdir(parents=True, exist_ok=True)
  ends, summary = time.monotonic() + LIMIT, {}
  for name, limit, command in ITEMS[: QUICK if options.quick else None]:
    left = ends - time.monotonic()
    if left < 20:
      summary[name] = {"exit_code": None, "seconds": 0.0, "command": command, "not_run": True}
      continue
    summary[name] = run(name, min(limit, left), command, options.out)
    print(name, summary[name], file=sys.stderr, flush=True)
    text = json.dumps(summary, indent=2) + "\n"
    (options.out / "summary.json").write_text(text, encoding="utf-8")
    if name == "check" and summary[name]["exit_code"] != 0:
      print("the check failed: times of wrong results are worth nothing", file=sys.stderr)
      return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
