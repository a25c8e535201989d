"""A federated loop in plain PyTorch, with Opacus where it is private, in one or two processes.

One process gives each step both cores, or the GPU where there is one; two processes of one thread
each share the clients between them and meet at the end of the round, which is the faster form where
a step is small.
"""

import os
import sys
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from benchmarks import specs
from benchmarks.peers import protocol, training

VARIANTS = ("plain", "plain_channels_last", "hooks", "ghost", "ew")


class Worker:
  """Trains its share of the clients and leaves the sum of their deltas in a shared vector."""

  def __init__(self, workload: specs.Workload, mode: str, threads: int, reference: str | None):
    torch.set_num_threads(threads)
    self.workload, self.pool = workload, training.Pool(workload)
    self.network = training.create(workload)
    training.allow_tf32(False)
    self.errors = training.check_trainer(self.network, workload, mode, reference)
    training.allow_tf32(mode.startswith("plain"))
    self.flat = None if mode == "plain_channels_last" else training.Flat(self.network)
    self.trainer = training.create_trainer(self.network, workload, mode)
    torch.manual_seed(os.getpid())

  def vector(self) -> torch.Tensor:
    """The weights as one vector."""
    if self.flat is not None:
      return self.flat.vector
    return torch.cat([p.detach().reshape(-1) for p in self.network.parameters()])

  def load(self, vector: torch.Tensor) -> None:
    """Sets the weights."""
    if self.flat is not None:
      self.flat.vector.copy_(vector)
      return
    offset = 0
    with torch.no_grad():
      for parameter in self.network.parameters():
        parameter.copy_(vector[offset : offset + parameter.numel()].view_as(parameter))
        offset += parameter.numel()

  def train(self, clients: Any, weights: torch.Tensor, total: torch.Tensor) -> int:
    """Adds up local minus global weights of the clients in ``total``; returns examples seen."""
    total.zero_()
    seen = 0
    for client in clients:
      self.load(weights)
      seen += self.trainer.train(self.pool.images[client], self.pool.labels[client])
      total += self.vector()
    total.sub_(weights, alpha=len(clients))
    return seen


def work(workload: specs.Workload, mode: str, pipe: Any, weights: Any, total: Any) -> None:
  """The second process: trains whatever clients it is sent."""
  worker = Worker(workload, mode, 1, None)
  pipe.send("ready")
  while (clients := pipe.recv()) is not None:
    pipe.send(worker.train(clients, weights, total))


def main() -> None:
  """Serves rounds."""
  parser_names = [f"{mode}_{n}" for n in (1, 2) for mode in VARIANTS]
  arguments = protocol.parse(__doc__ or "", *parser_names)
  stream = protocol.claim_stdout()
  workload = specs.WORKLOADS[arguments.workload]
  mode, processes = arguments.variant.rsplit("_", 1)
  threads = 2 if processes == "1" else 1
  gpu = processes == "1" and training.use_accelerator()
  worker = Worker(workload, mode, threads, arguments.reference)
  weights = worker.vector().clone().share_memory_()
  total = torch.zeros_like(weights)
  pipe = None
  if processes == "2":
    other = torch.zeros_like(weights).share_memory_()
    context = mp.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=work, args=(workload, mode, end, weights, other), daemon=True)
    process.start()
    assert pipe.recv() == "ready"
  random = np.random.default_rng(1)

  def run(rounds: int) -> int:
    seen = 0
    for _ in range(rounds):
      cohort = random.choice(workload.num_clients, workload.cohort, replace=False)
      if pipe is None:
        seen += worker.train(cohort, weights, total)
      else:
        pipe.send(cohort[1::2])
        seen += worker.train(cohort[::2], weights, total)
        seen += pipe.recv()
        total.add_(other)
      weights.add_(total, alpha=1 / len(cohort))
    assert torch.isfinite(weights).all()
    return seen

  about = {
    "system": "torch_loop",
    "variant": arguments.variant,
    "settings": {
      "processes": int(processes),
      "threads_each": threads,
      "mode": mode,
      "device": torch.cuda.get_device_name() if gpu else "cpu",
    },
    "gradient_errors": worker.errors,
    "versions": protocol.versions("torch", *(["opacus"] if not mode.startswith("plain") else [])),
  }
  protocol.Session(arguments, stream, about).serve(run)
  if pipe is not None:
    pipe.send(None)


if __name__ == "__main__":
  sys.exit(main())
