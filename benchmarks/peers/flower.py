"""Flower's simulation engine on Ray, its clients in PyTorch, with Opacus where it is private.

``actors_2`` gives a client one core, so two run at a time (client_resources num_cpus=1), which is
what Flower's guide says to do with small clients; ``actors_1`` gives it both. An actor keeps data
and network between messages.
"""

import os
import sys
import time

from benchmarks.peers import protocol

MODES = ("plain", "plain_channels_last", "hooks", "ghost", "ew")
VARIANTS = tuple(f"{mode}_{n}" for n in (2, 1) for mode in MODES)


def main() -> None:
  """Serves rounds from inside the ServerApp."""
  arguments = protocol.parse(__doc__ or "", *VARIANTS)
  stream = protocol.claim_stdout()
  os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
  os.environ |= {"RAY_DISABLE_IMPORT_WARNING": "1", "RAY_DEDUP_LOGS": "0"}
  import torch
  from flwr.app import ArrayRecord
  from flwr.serverapp import ServerApp
  from flwr.serverapp.strategy import FedAvg
  from flwr.simulation import run_simulation

  from benchmarks import specs
  from benchmarks.peers import flower_client, training

  workload = specs.WORKLOADS[arguments.workload]
  mode, actors = arguments.variant.rsplit("_", 1)
  cores = 2 // int(actors)
  network = training.create(workload)
  arrays = {"now": ArrayRecord(network.state_dict())}
  about = {
    "system": "flower",
    "variant": arguments.variant,
    "settings": {"actors": int(actors), "threads_each": cores, "mode": mode},
    "gradient_errors": training.check_trainer(network, workload, mode, arguments.reference),
    "versions": protocol.versions("flwr", "ray", "torch"),
  }
  failures: list[Exception] = []
  app = ServerApp()

  @app.main()
  def serve(grid, context):
    try:
      session = protocol.Session(arguments, stream, about)
      while rounds := session.next():
        strategy = FedAvg(
          fraction_train=workload.cohort / workload.num_clients,
          fraction_evaluate=0.0,
          min_train_nodes=workload.cohort,
          min_available_nodes=workload.num_clients,
        )
        start = time.perf_counter()
        result = strategy.start(grid=grid, initial_arrays=arrays["now"], num_rounds=rounds)
        seconds = time.perf_counter() - start
        arrays["now"] = result.arrays
        state = result.arrays.to_torch_state_dict()
        assert all(torch.isfinite(value).all() for value in state.values())
        seen = [record["seen"] for record in result.train_metrics_clientapp.values()]
        assert len(seen) == rounds
        session.report(seconds, round(sum(map(float, seen)) * workload.cohort))
    except Exception as error:
      failures.append(error)
      raise

  run_simulation(
    server_app=app,
    client_app=flower_client.make_client_app(arguments.workload, mode, cores),
    num_supernodes=workload.num_clients,
    backend_config={
      "client_resources": {"num_cpus": cores, "num_gpus": 0.0},
      "init_args": {"num_cpus": 2, "log_to_driver": False, "include_dashboard": False},
    },
  )
  if failures:
    raise failures[0]


if __name__ == "__main__":
  sys.exit(main())
