"""Learning rates tried for points.py: on phantoms, and on seeds that the study does not use."""

import itertools
import math
from typing import Any

from experiments.privacy_utility.points import BATCH_SIZES, HOSPITALS


def get_sweep() -> list[dict[str, Any]]:
  """One dictionary a point; seeds vary last."""
  axes = (HOSPITALS, (0.5, 3.0, math.inf), (0.03, 0.1, 0.3), range(100, 103))
  return [
    {
      "partition.num_clients": hospitals,
      "client.batch_size": BATCH_SIZES[hospitals],
      "privacy.target_epsilon": epsilon,
      "client.learning_rate": rate,
      "seed": seed,
    }
    for hospitals, epsilon, rate, seed in itertools.product(*axes)
  ]
