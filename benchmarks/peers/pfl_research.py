"""pfl-research's simulation with the settings of its CIFAR10 benchmark, in one or two processes.

Those are: FedAvg with torch's SGD on both sides, users weighted alike, data as tensors in memory
with their batches sliced once, no evaluation in the rounds that are timed. Two processes are
distributed as its guide for fast simulations says, as if started by torchrun.
"""

import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.peers import protocol

VARIANTS = tuple(f"{mode}_{n}" for n in (1, 2) for mode in ("plain", "plain_channels_last"))


def second_process() -> subprocess.Popen:
  """Starts rank 1 and makes this process rank 0; to be called before pfl is imported."""
  common = {"TORCHELASTIC_RUN_ID": "benchmark", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
  common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
  common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
  os.environ.update(common, RANK="0", LOCAL_RANK="0")
  command = [sys.executable, "-m", "benchmarks.peers.pfl_research", *sys.argv[1:]]
  return subprocess.Popen(
    command, env={**os.environ, "RANK": "1", "LOCAL_RANK": "1"}, stdin=subprocess.DEVNULL, stdout=2
  )


def main() -> None:
  """Serves rounds."""
  arguments = protocol.parse(__doc__ or "", *VARIANTS)
  stream = protocol.claim_stdout()
  mode, processes = arguments.variant.rsplit("_", 1)
  rank, other = int(os.environ.get("RANK", "0")), None
  if processes == "2" and "RANK" not in os.environ:
    other = second_process()
  about = {
    "system": "pfl_research",
    "variant": arguments.variant,
    "settings": {"processes": int(processes), "mode": mode, "weighting": "by user"},
    "versions": protocol.versions("pfl", "torch"),
  }
  simulate(arguments, stream, about, mode, int(processes), rank)
  if other is not None:
    other.wait(60)


def simulate(
  arguments: Any, stream: Any, about: dict[str, Any], mode: str, processes: int, rank: int
) -> None:
  """Runs FederatedAveraging; the session is asked after each iteration what comes next."""
  import torch
  from pfl.aggregate.simulate import SimulatedBackend
  from pfl.aggregate.weighting import WeightByUser
  from pfl.algorithm.base import NNAlgorithmParams
  from pfl.algorithm.federated_averaging import FederatedAveraging
  from pfl.callback.base import TrainingProcessCallback
  from pfl.data import FederatedDataset
  from pfl.data.dataset import Dataset
  from pfl.data.sampling import get_user_sampler
  from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
  from pfl.internal.bridge.pytorch.sgd import _sgd_train_step
  from pfl.metrics import Metrics, Weighted
  from pfl.model.pytorch import PyTorchModel

  from benchmarks import specs
  from benchmarks.peers import training

  torch.set_num_threads(2 if processes == 1 else 1)
  workload = specs.WORKLOADS[arguments.workload]
  pool = training.Pool(workload)
  network = training.create(workload)
  memory_format = torch.contiguous_format
  if mode == "plain_channels_last":
    memory_format = torch.channels_last

  def make_model(network) -> PyTorchModel:
    dtype = next(network.parameters()).dtype
    network.to(memory_format=memory_format)

    def loss(images, labels):
      inputs = training.normalise(images, dtype).contiguous(memory_format=memory_format)
      return torch.nn.functional.cross_entropy(network(inputs), labels)

    def metrics(images, labels):
      with torch.no_grad():
        return {"loss": Weighted(float(loss(images, labels)) * len(labels), len(labels))}

    network.loss, network.metrics = loss, metrics
    return PyTorchModel(
      model=network,
      local_optimizer_create=torch.optim.SGD,
      central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
    )

  def hyper(rate: float, steps: int, batch: int) -> NNTrainHyperParams:
    return NNTrainHyperParams(
      local_num_epochs=None,
      local_num_steps=steps,
      local_learning_rate=rate,
      local_batch_size=batch,
    )

  def make_step(peer, clip_norm, batch):
    del clip_norm
    checked = make_model(peer)

    def step(images, labels):
      data = Dataset([images, labels])
      checked.do_multiple_epochs_of(data, hyper(1.0, 1, batch), _sgd_train_step)

    return step

  about["gradient_errors"] = training.check(
    make_step, network, workload, False, arguments.reference
  )
  model = make_model(network)
  users = {k: Dataset([pool.images[k], pool.labels[k]]) for k in range(workload.num_clients)}
  torch.manual_seed(1 + rank)
  data = FederatedDataset(
    users.__getitem__, get_user_sampler("minimize_reuse", list(range(workload.num_clients)))
  )
  backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByUser()])
  session = protocol.Session(arguments, stream, about) if rank == 0 else None

  def ask() -> int:
    """The rounds to run next, the same in both processes, which wait for each other here."""
    rounds = torch.tensor((session.next() or 0) if session else 0)
    if processes == 2:
      torch.distributed.broadcast(rounds, 0)
    return int(rounds)

  class Turns(TrainingProcessCallback):
    """Measures the iterations it lets pass."""

    def on_train_begin(self, *, model):
      self.asked = self.left = ask()
      self.start = time.perf_counter()
      return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
      self.left -= 1
      if self.left == 0:
        if session:
          session.report(time.perf_counter() - self.start, self.asked * workload.examples_per_round)
        self.asked = self.left = ask()
        self.start = time.perf_counter()
      return self.left == 0, Metrics()

  FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
      central_num_iterations=10**9,
      evaluation_frequency=10**9,  # so in iteration 0 only, which is the warm-up
      train_cohort_size=workload.cohort,
      val_cohort_size=0,
    ),
    backend=backend,
    model=model,
    model_train_params=hyper(workload.learning_rate, workload.steps, workload.batch),
    model_eval_params=NNEvalHyperParams(local_batch_size=workload.examples),
    callbacks=[Turns()],
    send_metrics_to_platform=False,
  )
  assert all(torch.isfinite(p).all() for p in network.parameters())


if __name__ == "__main__":
  sys.exit(main())
