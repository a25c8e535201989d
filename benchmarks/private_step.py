"""One training step of SE-ResNeXt-50 on one batch: plain, by each clipping method, and peers.

Steps run in a loop inside one compiled program with donated weights, as in a run; the methods are
measured in turns. PyTorch and Opacus run the same network and batch in processes of their own,
between two halves of our turns. A private step is clipping, noise and update, as Opacus' is;
``clipping_over_plain`` leaves the noise out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, specs
from benchmarks.workloads import make_model, write_reference
from fedjax_med.core.keys import base_key
from fedjax_med.federated.losses import with_penalties
from fedjax_med.federated.optimizers import descend
from fedjax_med.privacy.clipping import METHODS, Rows, clipped_sum
from fedjax_med.privacy.noise import private_mean
from fedjax_med.tasks.classification import cross_entropy

RATE = 0.01
MIB = 2**20


def step(method: str, model: Any, batch: int, *, noisy: bool = True) -> Callable[..., Any]:
  """``(params, state, inputs, labels, key) -> params`` of one SGD step."""
  loss = with_penalties(cross_entropy(0.0), model.penalties)

  def plain(params, state, inputs, labels, key):
    del key

    def mean_loss(params):
      return loss(model.apply(params, state, inputs, train=True)[0], labels).mean()

    return descend(params, jax.grad(mean_loss)(params), jnp.float32(RATE))

  def private(params, state, inputs, labels, key):
    mask = jnp.ones(batch, bool)
    with jax.default_matmul_precision("highest"):
      rows = Rows(inputs=inputs, labels=labels, mask=mask)
      total, _ = clipped_sum(method, model, loss, params, state, rows, jnp.float32(1), None)
    if noisy:
      gradient = private_mean(total, key, specs.NOISE_MULTIPLIER, specs.CLIP_NORM, batch)
    else:
      gradient = jax.tree.map(lambda leaf: leaf / batch, total)
    return descend(params, gradient, jnp.float32(RATE))

  return plain if method == "plain" else private


class Looped:
  """A step compiled in a loop: ``run()`` returns seconds a step; memory is the compiler's word."""

  def __init__(self, one: Callable[..., Any], steps: int, params: Any, rest: tuple[Any, ...]):
    def loop(params, state, inputs, labels, key):
      def body(index, params):
        return one(params, state, inputs, labels, jax.random.fold_in(key, index))

      return jax.lax.fori_loop(0, steps, body, params)

    program = jax.jit(loop, donate_argnums=0).lower(params, *rest)
    self.compile_s = common.seconds(lambda: setattr(self, "_program", program.compile()))
    self.memory_bytes = self._program.memory_analysis().temp_size_in_bytes
    self._params, self._rest, self._steps = jax.tree.map(jnp.copy, params), rest, steps

  _program: Any

  def run(self) -> float:
    def once() -> None:
      self._params = jax.block_until_ready(self._program(self._params, *self._rest))

    return common.seconds(once) / self._steps


def ours(arguments: argparse.Namespace, workload: specs.Workload) -> dict[str, Looped]:
  """Every system of this side, compiled."""
  model, _ = make_model(workload)
  images, labels = specs.make_pool(workload)
  inputs = jnp.asarray(images, jnp.float32) / 127.5 - 1
  params, state = jax.jit(model.init)(base_key(1), inputs[:1])
  rest = (state, inputs, jnp.asarray(labels), base_key(0))
  systems = {}
  for name in ("plain", *METHODS, "book_keeping_without_noise"):
    if name in arguments.skip:
      continue
    common.say(f"{name}: compiling")
    method, noisy = name.removesuffix("_without_noise"), not name.endswith("_without_noise")
    one = step(method, model, workload.batch, noisy=noisy)
    systems[name] = Looped(one, arguments.steps, params, rest)
  return systems


def peers(arguments: argparse.Namespace, workload: specs.Workload) -> dict[str, Any]:
  """The measurements of the PyTorch side, or {'error': reason}."""
  with tempfile.TemporaryDirectory() as folder:
    reference = os.path.join(folder, "reference.npz")
    write_reference(workload, reference)
    command = [arguments.peers_python, "-m", "benchmarks.peers.private_step_torch"]
    command += ["--pixels", str(arguments.pixels), "--batch", str(arguments.batch)]
    command += ["--repeats", str(arguments.repeats), "--reference", reference]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    try:
      done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=environment, check=True
      )
      return json.loads(done.stdout.splitlines()[-1])
    except (OSError, IndexError, json.JSONDecodeError) as error:
      return {"error": str(error)}
    except subprocess.CalledProcessError as error:
      return {"error": (error.stderr.strip().splitlines() or ["no word"])[-1][:300]}


def fastest(modes: dict[str, Any], names: tuple[str, ...]) -> float | None:
  """Seconds of the fastest of the named modes that ran."""
  ran = [modes[name]["seconds"] for name in names if "seconds" in modes.get(name, {})]
  return min(ran, default=None)


def main() -> None:
  """Prints one object; see the module's docstring and README.md."""
  parser = common.parser(__doc__ or "")
  parser.add_argument("--pixels", type=int, default=64)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--steps", type=int, default=5, help="steps inside one call")
  parser.add_argument("--skip", nargs="*", default=(), help="methods of ours to leave out")
  parser.add_argument("--no_peers", action="store_true", help="leave PyTorch and Opacus out")
  python = os.environ.get("FEDJAX_MED_PEERS_PYTHON", sys.executable)
  parser.add_argument("--peers_python", default=python, help="interpreter with PyTorch and Opacus")
  arguments = parser.parse_args()
  shape = (arguments.pixels, arguments.pixels, 3)
  workload = specs.Workload(
    name="step",
    network="se_resnext50_32x4d",
    num_clients=1,
    cohort=1,
    examples=arguments.batch,
    shape=shape,
    num_classes=2,
    batch=arguments.batch,
    steps=1,
    learning_rate=0.01,
    private=True,
  )
  systems = ours(arguments, workload)
  runs = {name: system.run for name, system in systems.items()}
  before = common.alternate(runs, arguments.repeats)
  theirs = {"error": "left out"} if arguments.no_peers else peers(arguments, workload)
  after = common.alternate(runs, arguments.repeats)
  times = {name: before[name] + after[name] for name in runs}
  seconds = {name: statistics.median(values) for name, values in times.items()}
  modes: Any = theirs.get("modes", {})
  torch = fastest(modes, ("plain", "plain_channels_last"))
  opacus = fastest(modes, ("hooks", "ghost", "ew"))
  plain = systems["plain"]

  def over_plain(name: str) -> float | None:
    return common.ratio(times[name], times["plain"]) if name in times else None

  memory = {name: system.memory_bytes for name, system in systems.items()}
  private = "book_keeping"
  result = common.envelope("private_step") | {
    "pixels": arguments.pixels,
    "batch": arguments.batch,
    "private_over_plain": over_plain(private),
    "clipping_over_plain": over_plain("book_keeping_without_noise"),
    "memory_over_plain": memory[private] / plain.memory_bytes if private in memory else None,
    "opacus_over_private": (opacus and private in seconds and opacus / seconds[private]) or None,
    "torch_over_plain": torch and torch / seconds["plain"],
    "method_over_plain": {name: over_plain(name) for name in systems},
    "seconds": seconds,
    "memory_mib": {name: round(size / MIB, 1) for name, size in memory.items()},
    "compile_s": {name: system.compile_s for name, system in systems.items()},
    "peers": theirs,
  }
  common.finish(result, arguments)


if __name__ == "__main__":
  main()
