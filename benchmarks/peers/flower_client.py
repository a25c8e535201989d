"""Flower's client side, in its own module: an actor imports it once and keeps its state."""

import functools
import os
from typing import Any


@functools.cache
def actor_state(name: str, mode: str, threads: int) -> Any:
  """Network, trainer and data of an actor, made when its first message comes."""
  import torch

  from benchmarks import specs
  from benchmarks.peers import training

  torch.set_num_threads(threads)
  workload = specs.WORKLOADS[name]
  network = training.create(workload)
  trainer = training.create_trainer(network, workload, mode)
  torch.manual_seed(os.getpid())
  return workload, network, trainer, training.Pool(workload)


def make_client_app(name: str, mode: str, threads: int) -> Any:
  """A ClientApp that trains the network it is sent."""
  from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
  from flwr.clientapp import ClientApp

  app = ClientApp()

  @app.train()
  def train(message, context):
    workload, network, trainer, pool = actor_state(name, mode, threads)
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    seen = trainer.train(pool.images[client], pool.labels[client])
    content = RecordDict(
      {
        "arrays": ArrayRecord(network.state_dict()),
        "metrics": MetricRecord({"num-examples": workload.examples, "seen": seen}),
      }
    )
    return Message(content=content, reply_to=message)

  return app
