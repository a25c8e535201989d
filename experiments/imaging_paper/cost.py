"""The paper's cost model O(R·m·N·(C·d²·H·W + C²)) against measured time, one factor at a time.

R rounds, m clients, N images each, C channels, kernels of side d, images of H x W. Constants are
not part of it, so that ratios to the smallest case are compared. C is read as the stem's channels.
The sizes are its own (``VARIED``), on phantoms.

python -m experiments.imaging_paper.cost --json --out FILE
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments.imaging_paper.tables import interval
from fedjax_med.core.config import ClientConfig, Config
from fedjax_med.core.errors import require
from fedjax_med.flags import run_main
from fedjax_med.study import mean_interval

KERNEL, STEM = 3, 64


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
  config.client.gan_steps = ClientConfig().gan_steps  # no GAN is trained
  config.client.num_local_steps = case.images // 16
  config.server.num_rounds = config.eval.every = case.rounds
  return config


def seconds_of(case: Case) -> float:
  """Seconds of training: two evaluations too, no compiling."""
  from fedjax_med.run.training import run

  with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    run(config_of(case), pathlib.Path(folder), "cost", "")
    timing = (pathlib.Path(folder) / "timing.json").read_text(encoding="utf-8")
    return float(json.loads(timing)["train"])


def compare(seconds: Mapping[Case, Sequence[float]]) -> list[dict[str, Any]]:
  """Of each factor: the cases, and the power of the model that measured time grows with.

  ``seconds`` holds a number for each turn. A turn's power is the slope of log time over log model;
  the mean and its 95% t interval are over the turns. The paper's model says 1.
  """
  base, found = Case(), []
  for factor, values in VARIED.items():
    cases = [dataclasses.replace(base, **{factor: value}) for value in values]
    modelled = np.array([case.modelled() / base.modelled() for case in cases])
    times = np.array([seconds[case] for case in cases])  # [cases, turns]
    slopes = np.polyfit(np.log(modelled), np.log(times), 1)[0]
    ratios = np.median(times / np.array(seconds[base]), axis=1)
    lines = zip(values, modelled.tolist(), ratios.tolist(), strict=True)
    found.append(
      {
        "factor": factor,
        "power": mean_interval(slopes),
        "cases": [
          dict(zip(("value", "modelled", "measured"), line, strict=True)) for line in lines
        ],
      }
    )
  return found


def main(_: list[str]) -> None:
  from benchmarks import common
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.simulation.mesh import split_cpu

  repeats, out = flags.FLAGS.repeats, pathlib.Path(flags.FLAGS.out or os.devnull)
  require(out.parent.is_dir(), f"--out={out} is in no folder that exists", "make the folder first")
  require(repeats >= 2, f"--repeats={repeats} gives no interval", "take at least 2")
  split_cpu(0)
  use_compilation_cache("~/.cache/fedjax_med/xla")
  base = Case()
  cases = [dataclasses.replace(base, **{f: v}) for f, values in VARIED.items() for v in values]
  runs = {str(case): functools.partial(seconds_of, case) for case in cases}
  times = common.alternate(runs, repeats, warm_up=0)
  factors = compare({case: times[str(case)] for case in cases})
  result = common.envelope("imaging_paper_cost") | {
    "smallest": dataclasses.asdict(base),
    "seconds_of_smallest": times[str(base)],
    "factors": factors,
  }
  out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  print(json.dumps(result) if flags.FLAGS.json else markdown(factors))


def markdown(factors: list[dict[str, Any]]) -> str:
  """A row a factor: the paper's power, ours with interval, the difference, and the ratios."""
  lines = [
    "| factor | time grows as the model to the power of: paper | ours | difference | values |"
    " model, ratios | measured, ratios |",
    "|---|---|---|---|---|---|---|",
  ]
  for each in factors:
    columns = [
      ", ".join(format(case[key], form) for case in each["cases"])
      for key, form in (("value", "g"), ("modelled", ".1f"), ("measured", ".1f"))
    ]
    difference = f"{each['power']['mean'] - 1:+.2f}"
    cells = [each["factor"], "1", interval(each["power"], ".2f"), difference, *columns]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


if __name__ == "__main__":
  flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
  flags.DEFINE_string("out", "", "File that gets the JSON object as well.")
  flags.DEFINE_integer("repeats", 3, "Turns through all cases.")
  run_main(main)
