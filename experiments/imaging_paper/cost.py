"""The paper's cost model O(R·m·N·(C·d²·H·W + C²)) against measured time, one factor at a time.

R rounds, m clients, N images each, C channels, kernels of side d, images of H x W. Constants are
not part of it, so that ratios to the smallest case are compared. C is read as the stem's channels.

python -m experiments.imaging_paper.cost --json
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from absl import flags

from fedjax_med.core.config import Config
from fedjax_med.flags import run_main

KERNEL, STEM = 3, 64
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Case:
  """One measurement; the defaults are the smallest case."""

  rounds: int = 4
  clients: int = 2
  images: int = 128
  width: float = 0.25
  side: int = 32

  def modelled(self) -> float:
    """The model's operations, up to a constant."""
    channels = STEM * self.width
    layer = channels * KERNEL**2 * self.side**2 + channels**2
    return self.rounds * self.clients * self.images * layer


VARIED: dict[str, tuple[Any, ...]] = {
  "rounds": (4, 8, 16),
  "clients": (2, 4, 8),
  "images": (128, 256, 512),
  "width": (0.25, 0.5, 1.0),
  "side": (32, 64, 96),
}


def config_of(case: Case) -> Config:
  """FL-SE-ResNeXt-50 on phantoms at that size, tested once at the end."""
  from experiments.imaging_paper.systems import base_config

  config = base_config("cpu", "phantoms", "")
  config.data.image_size = case.side
  config.data.num_examples = case.clients * case.images * 5 // 4
  config.data.split = "paper"
  config.partition.scheme = "iid"
  config.partition.num_clients = case.clients
  config.model.width = case.width
  config.client.batch_size = 16
  config.client.num_local_steps = case.images // 16
  config.server.num_rounds = config.eval.every = case.rounds
  return config


def seconds_of(case: Case) -> float:
  """Median seconds of training over ``REPEATS`` runs: two evaluations too, no compiling."""
  from fedjax_med.experiment.run import run

  found = []
  for _ in range(REPEATS):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
      run(config_of(case), pathlib.Path(folder), "cost", "")
      found.append(json.loads((pathlib.Path(folder) / "timing.json").read_text())["train"])
  return float(np.median(found))


def main(_: list[str]) -> None:
  import jax

  from fedjax_med.experiment.cache import use_compilation_cache
  from fedjax_med.simulation.mesh import split_cpu

  split_cpu(0)
  use_compilation_cache("~/.cache/fedjax_med/xla")
  base = Case()
  seconds = {base: seconds_of(base)}
  found = []
  for factor, values in VARIED.items():
    for value in values:
      case = dataclasses.replace(base, **{factor: value})
      if case not in seconds:
        seconds[case] = seconds_of(case)
      modelled, measured = case.modelled() / base.modelled(), seconds[case] / seconds[base]
      found.append({"factor": factor, "value": value, "modelled": modelled, "measured": measured})
  slopes = {
    factor: _slope([line for line in found if line["factor"] == factor]) for factor in VARIED
  }
  if flags.FLAGS.json:
    print(
      json.dumps(
        {
          "cpu_cores": os.cpu_count(),
          "devices": [str(device) for device in jax.devices()],
          "seconds_of_smallest": seconds[base],
          "cases": found,
          "slopes": slopes,
        }
      )
    )
    return
  print("| factor | value | model, ratio | measured, ratio |\n|---|---|---|---|")
  for line in found:
    print(
      f"| {line['factor']} | {line['value']} | {line['modelled']:.2f} | {line['measured']:.2f} |"
    )
  print("\nMeasured time grows as the model to the power of (1 is agreement):")
  print(", ".join(f"{factor} {slope:.2f}" for factor, slope in slopes.items()))


def _slope(lines: list[dict[str, Any]]) -> float:
  modelled, measured = (np.log([line[key] for line in lines]) for key in ("modelled", "measured"))
  return float(np.polyfit(modelled, measured, 1)[0])


if __name__ == "__main__":
  flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
  run_main(main)
