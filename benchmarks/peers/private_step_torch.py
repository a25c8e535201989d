"""One training step of SE-ResNeXt-50 (GroupNorm) in eager PyTorch, plain and with Opacus.

A step is forward, backward and SGD, in the private ones with per-example clipping and noise. Each
mode runs in a process of its own, so that its peak memory is its own: the most the process ever
held, less what it held with network, data and libraries loaded. Modes are measured in turns.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from typing import Any

from benchmarks.peers import protocol

MODES = ("plain", "plain_channels_last", "hooks", "ghost", "ew")


def status(field: str) -> int:
  """Bytes of VmRSS or VmHWM of this process."""
  with open("/proc/self/status", encoding="utf-8") as lines:
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
  """Makes VmHWM start again from what is held now."""
  with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
    file.write("5")


def work(
  mode: str, pixels: int, batch: int, channels: int, classes: int, path: str, pipe: Any, check: bool
) -> None:
  """Sends the gradient's errors; or answers every message with seconds and peak of one step.

  The check has a process of its own: what it frees stays with the process, and steps that were
  measured after it would seem to need no memory.
  """
  import torch

  from benchmarks import specs
  from benchmarks.peers import training

  torch.set_num_threads(multiprocessing.cpu_count())
  workload = specs.Workload(
    name="step",
    network="se_resnext50_32x4d",
    num_clients=1,
    cohort=1,
    examples=batch,
    shape=(pixels, pixels, channels),
    num_classes=classes,
    batch=batch,
    steps=1,
    learning_rate=0.01,
    private=True,
  )
  network = training.create(workload)
  if check:
    try:
      errors = training.check_trainer(network, workload, mode, path or None)
      pipe.send({"gradient_errors": errors})
    except Exception as error:
      pipe.send({"error": f"{type(error).__name__}: {error}"[:300]})
    return
  trainer = training.create_trainer(network, workload, mode)
  pool = training.Pool(workload)
  images, labels = pool.images[0], pool.labels[0]
  trainer.optimizer.zero_grad(set_to_none=True)
  baseline = status("VmRSS")
  reset_peak()
  pipe.send({})
  while pipe.recv():
    start = time.perf_counter()
    trainer.step(images, labels)
    seconds = time.perf_counter() - start
    pipe.send({"seconds": seconds, "peak_bytes": status("VmHWM") - baseline})


def main() -> None:
  """Prints one object: per mode the median seconds, the repeats and the peak bytes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--pixels", type=int, default=64)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--channels", type=int, default=3)
  parser.add_argument("--classes", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
  parser.add_argument("--reference", default="", help="npz as benchmarks.workloads writes it")
  arguments = parser.parse_args()
  stream = protocol.claim_stdout()
  context = multiprocessing.get_context("spawn")
  pipes, result = {}, {}
  shape = (arguments.pixels, arguments.batch, arguments.channels, arguments.classes)

  def start(mode: str, check: bool) -> tuple[Any, dict[str, Any]]:
    pipe, end = context.Pipe()
    how = (mode, *shape, arguments.reference, end, check)
    context.Process(target=work, args=how, daemon=True).start()
    end.close()
    try:
      return pipe, pipe.recv()
    except EOFError:  # killed, for memory most likely
      return pipe, {"error": "the process ended"}

  for mode in arguments.modes:
    result[mode] = start(mode, True)[1]
    if "error" not in result[mode]:
      pipes[mode], answer = start(mode, False)
      result[mode] |= {**answer, "repeats": []}
      if "error" in answer:
        del pipes[mode]
  for turn in range(1 + arguments.repeats):  # the first is the warm-up
    for mode, pipe in list(pipes.items()):
      pipe.send(True)
      try:
        answer = pipe.recv()
      except EOFError:
        result[mode] = {"error": "the process ended"}
        del pipes[mode]
        continue
      result[mode]["peak_bytes"] = answer["peak_bytes"]
      if turn:
        result[mode]["repeats"].append(answer["seconds"])
  for mode, pipe in pipes.items():
    result[mode]["seconds"] = statistics.median(result[mode]["repeats"])
    pipe.send(False)
  about = {name: getattr(arguments, name) for name in ("pixels", "batch", "channels", "classes")}
  versions = protocol.versions("torch", "opacus")
  print(json.dumps({**about, "versions": versions, "modes": result}), file=stream, flush=True)


if __name__ == "__main__":
  sys.exit(main())
