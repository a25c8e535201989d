"""What secure aggregation costs a round: masks elided and executed against a plain round.

All are compiled in one process and run in turns, so that a slow minute slows them all. A round is
that of five hospitals that train cnn_small on phantoms of 32 pixels.

Example: taskset -c 0 python -m benchmarks.secure --repeats 9 \
  --out benchmarks/results/secure-cpu.json
"""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import common

HOSPITALS, ROUNDS = 5, 2  # rounds that are timed together
MASKED = {"secure.protocol": "masking"}
SYSTEMS: dict[str, dict[str, Any]] = {
  "plain": {},
  "grid": {"secure.protocol": "grid"},
  "elided": MASKED,
  "executed": {**MASKED, "secure.masks": "executed"},
  "executed, one in ten lost": {**MASKED, "secure.masks": "executed", "secure.dropout": 0.1},
}
BASE = {
  "data.source": "phantoms",
  "data.image_size": 32,
  "data.num_examples": 1000,
  "partition.scheme": "auto",
  "partition.num_clients": HOSPITALS,
  "model.name": "cnn_small",
  "client.batch_size": 32,
  "client.num_local_steps": 4,
  "client.learning_rate": 0.05,
  "execution.layout": "scan",
  "execution.devices": 1,
  "execution.compilation_cache": "",
}


class System:
  """A compiled federation.

  Attributes:
    compile_s: seconds to compile and run the first round.
    weights: trained weights of the network.
    bytes: bytes that a hospital gets and sends in a round.
  """

  def __init__(self, changes: dict[str, Any]):
    from fedjax_med.core.config import Config, set_field
    from fedjax_med.core.validation import validate
    from fedjax_med.data.hospitals import load_hospitals
    from fedjax_med.prepare.experiment import build

    config = Config()
    for path, value in (BASE | changes).items():
      set_field(config, path, value)
    validate(config)
    self._experiment = build(config, load_hospitals(config))
    parts = self._experiment.program.parts
    self.weights, self.bytes = parts.spec.params.size, parts.message
    self._state = self._experiment.program.initial()
    self.compile_s = common.seconds(lambda: self._rounds(1))

  def _rounds(self, number: int) -> None:
    import jax

    from fedjax_med.run.single import block_arguments

    arguments = block_arguments(self._experiment, number)
    self._state, _ = self._experiment.program.block(self._state, *arguments)
    jax.block_until_ready(self._state)

  def time(self) -> float:
    """Seconds of a round."""
    return common.seconds(lambda: self._rounds(ROUNDS)) / ROUNDS


def main() -> None:
  options = common.parser(__doc__ or "").parse_args()
  systems = {name: System(changes) for name, changes in SYSTEMS.items()}
  runs: dict[str, Callable[[], float]] = {name: each.time for name, each in systems.items()}
  times = common.alternate(runs, options.repeats)
  result: dict[str, Any] = common.envelope("secure") | {
    "hospitals": HOSPITALS,
    "weights": systems["plain"].weights,
    "systems": {
      name: {
        "round_s": statistics.median(times[name]),
        "least_round_s": min(times[name]),
        "deviation_s": statistics.pstdev(times[name]),
        "over_plain": round(common.ratio(times[name], times["plain"]), 3),
        "least_over_plain": round(min(times[name]) / min(times["plain"]), 3),
        "compile_s": each.compile_s,
        "bytes_down": each.bytes[0],
        "bytes_up": each.bytes[1],
      }
      for name, each in systems.items()
    },
  }
  common.finish(result, options)


if __name__ == "__main__":
  main()
