"""Points of the study: ε, number of hospitals, skew, unit of privacy, seeds.

Without privacy (ε infinite) there is no unit: those points stand under both, beside the others. The
larger unit is a group of near-duplicates, since the real sets name no patients.
"""

import itertools
import math
from typing import Any

from fedjax_med.core.config import PartitionConfig

EPSILONS = (0.5, 1.0, 3.0, 8.0, 20.0, math.inf)
HOSPITALS = (5, 20)
# α of the Dirichlet partition; infinite is the same mixture everywhere.
ALPHAS = (0.1, 1.0, math.inf)
UNITS = ("record", "group")
SEEDS = range(5)
BATCH_SIZES = {5: 64, 20: 32}
# Images of a group in a step, drawn anew each time: copies are alike.
ROWS_PER_UNIT = {"record": 0, "group": 3}
# With privacy and without: tuned on phantoms of other seeds (README.md).
LEARNING_RATES = {False: 0.1, True: 0.03}


def get_sweep() -> list[dict[str, Any]]:
  """One dictionary a point; seeds vary last."""
  points = []
  for unit, hospitals, alpha, epsilon, seed in itertools.product(
    UNITS, HOSPITALS, ALPHAS, EPSILONS, SEEDS
  ):
    iid = math.isinf(alpha)
    points.append(
      {
        "privacy.unit": unit,
        "privacy.rows_per_unit": ROWS_PER_UNIT[unit],
        "partition.num_clients": hospitals,
        "partition.scheme": "iid" if iid else "dirichlet",
        "partition.alpha": PartitionConfig().alpha if iid else alpha,  # where it is not read
        "privacy.target_epsilon": epsilon,
        "client.batch_size": BATCH_SIZES[hospitals],
        "client.learning_rate": LEARNING_RATES[math.isinf(epsilon)],
        "seed": seed,
      }
    )
  return points
