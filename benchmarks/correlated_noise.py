"""Noise left in SGD's weights by independent and by banded noise of the same ε, δ and steps.

For one hospital, every figure is error_over_independent: the root mean square, over steps, of the
noise in the sum of the mean gradients so far, of plain DP-SGD over that of banded noise. Above 1
bands are better. It knows nothing of learning rates, of momentum, nor of the spread of gradients
in a batch, and where a subset is smaller than the batch asked for, ``expected_batch`` says so.
Nothing is timed and no accelerator is used.

Example: python -m benchmarks.correlated_noise --json
"""

from typing import Any

from benchmarks import common
from fedjax_med.privacy.accounting import default_delta
from fedjax_med.privacy.calibration import PrivacyTarget, plan_mechanisms
from fedjax_med.privacy.strategy import error_over_independent


def line_of(n: int, batch: int, epsilon: float, steps: int, bands: list[int]) -> dict[str, Any]:
  """The comparison for every number of bands, and the best of those that keep the batch size."""
  plans = {
    b: plan_mechanisms(
      [n], batch, [steps], PrivacyTarget(clip_norm=1.0, target_epsilon=epsilon, bands=b)
    )[0]
    for b in bands
  }
  plain = plan_mechanisms(
    [n], batch, [steps], PrivacyTarget(clip_norm=1.0, target_epsilon=epsilon)
  )[0]
  ratios = {b: error_over_independent(plain, plans[b], steps) for b in bands}
  whole = [b for b in bands if plans[b].expected_batch_size >= min(batch, n) * (1 - 1e-9)]
  best = max(whole, key=lambda b: ratios[b])
  return {
    "batch": batch,
    "epsilon": epsilon,
    "steps": steps,
    "best_bands": best,
    "best_ratio": round(ratios[best], 4),
    "by_bands": {
      b: {
        "independent_over_banded": round(ratios[b], 4),
        "noise_multiplier": round(plans[b].noise_multiplier, 4),
        "sampling_probability": round(plans[b].sampling_probability, 6),
        "expected_batch": round(plans[b].expected_batch_size, 3),
        "buffer_floats_per_weight": b - 1,
      }
      for b in bands
    },
  }


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("--num_units", type=int, default=500, help="records of the hospital")
  parser.add_argument("--batch_sizes", type=int, nargs="*", default=[32, 128])
  parser.add_argument("--epsilons", type=float, nargs="*", default=[1.0, 3.0, 8.0])
  parser.add_argument("--steps", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048])
  parser.add_argument("--bands", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
  options = parser.parse_args()
  n, lines = options.num_units, []
  for batch in options.batch_sizes:
    for epsilon in options.epsilons:
      common.say(f"batch {batch}, ε {epsilon:g}: bands " + ", ".join(map(str, options.bands)))
      for steps in options.steps:
        line = line_of(n, batch, epsilon, steps, options.bands)
        lines.append(line)
        cells = [
          f"{banded['independent_over_banded']:6.3f}" for banded in line["by_bands"].values()
        ]
        common.say(f"  {steps:5d} steps: {' '.join(cells)}   best {line['best_bands']}")
  result = common.envelope("correlated_noise") | {
    "num_units": n,
    "delta": default_delta(n),
    "lines": lines,
  }
  common.finish(result, options)


if __name__ == "__main__":
  main()
