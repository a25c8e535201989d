"""Distance of ε from its exact value, and the loss of δ by composing distributions in floats.

``gaussian``: every unit in every step (q = 1), where ε is known exactly (Balle and Wang 2018,
theorem 8): the least and the most that the library's distribution alone, and ``epsilon``, are above
it, by number of steps and δ. ``composition``: random mechanisms, truncated ones among them,
composed by the library in float64 and by squaring spectra in long double: the largest difference of
δ(ε) over all ε from 0, a step. ``accounting.STEP_ERROR`` has to exceed it. Nothing is timed, and no
accelerator is used.

Example: python -m benchmarks.accounting_error --json
"""

import math
from typing import Any

import numpy as np
from dp_accounting.pld import common as library
from scipy import fft, optimize, signal, special

from benchmarks import common
from fedjax_med.core.rounding import NORM_SLACK
from fedjax_med.privacy import accounting
from fedjax_med.privacy.mechanism import PoissonGaussian, batch_size_bound

DELTAS = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)


def gaussian_epsilon(mu: float, delta: float) -> float:
  """ε of μ-Gaussian DP."""

  def excess(eps: float) -> float:
    below = special.log_ndtr(-eps / mu - mu / 2) + eps
    return float(special.ndtr(mu / 2 - eps / mu) - math.exp(min(below, 0.0))) - delta

  return float(optimize.brentq(excess, 0.0, 400.0, xtol=1e-13))  # pyright: ignore[reportArgumentType]


def gaussian_lines(steps: int, mus: list[float]) -> list[dict[str, Any]]:
  """Least and largest relative distance from the exact ε over μ = sqrt(steps) / σ, for each δ."""
  alone: dict[float, list[float]] = {delta: [] for delta in DELTAS}
  ours: dict[float, list[float]] = {delta: [] for delta in DELTAS}
  for mu in mus:
    sigma = math.sqrt(steps) / mu
    mechanism = PoissonGaussian(
      num_units=50,
      sampling_probability=1.0,
      batch_cap=50,
      noise_multiplier=sigma * (1 + NORM_SLACK),
      clip_norm=1.0,
    )
    composed = accounting._step_pld(mechanism.event()).self_compose(steps)
    for delta in DELTAS:
      exact = gaussian_epsilon(mu, delta)
      alone[delta].append(composed.get_epsilon_for_delta(delta) / exact - 1)
      ours[delta].append(accounting.epsilon(mechanism, steps, delta) / exact - 1)
  return [
    {
      "steps": steps,
      "delta": delta,
      "library_alone": [round(min(alone[delta]), 6), round(max(alone[delta]), 6)],
      "epsilon": [round(min(ours[delta]), 6), round(max(ours[delta]), 6)],
    }
    for delta in DELTAS
  ]


def composition_error(pmf: Any, steps: int) -> float:
  """Largest error of δ(ε), over ε from 0, of the library's composition of one distribution."""
  one = pmf.to_dense_pmf()
  first, sums = library.self_convolve(one._probs, steps, 1e-15)
  size = fft.next_fast_len(max(len(sums), len(one._probs)))
  spectrum = fft.fft(one._probs.astype(np.longdouble), size)
  power = np.ones_like(spectrum)
  for bit in bin(steps)[2:]:
    power = power * power * (spectrum if bit == "1" else 1)
  precise = np.roll(np.asarray(fft.ifft(power)).real, -first)[: len(sums)]  # pyright: ignore[reportAttributeAccessIssue]
  losses = (np.arange(len(sums)) + one._lower_loss * steps + first) * one._discretization
  errors = (sums - precise).astype(float)[losses > 0][::-1]
  if not len(errors):
    return 0.0
  # Σ error (1 - e^(ε - loss)) over losses above ε, from the largest ε down.
  upper = np.cumsum(errors)
  lower = signal.lfilter([1.0], [1.0, -math.exp(-one._discretization)], errors)
  return float(np.abs(upper - lower).max())


def random_mechanism(generator: np.random.Generator, steps: int) -> PoissonGaussian:
  """A mechanism whose steps add up to a μ of the central limit between 0.05 and 8."""
  n = int(10 ** generator.uniform(2, 4))
  q = max(float(generator.choice([1.0, 0.5, 0.1, 0.02, 0.005])), 2 / n)
  mu = 10 ** generator.uniform(-1.3, 0.9)
  sigma = 1 / math.sqrt(math.log1p(mu**2 / (q**2 * steps)))
  cap = min(n, batch_size_bound(n, q, float(generator.choice([2, 3, 5]))))
  return PoissonGaussian(
    num_units=n, sampling_probability=q, batch_cap=cap, noise_multiplier=sigma, clip_norm=1.0
  )


def main() -> None:
  parser = common.parser(__doc__ or "")
  parser.add_argument("--mus", type=float, nargs="*", default=[0.05, 0.3, 1.0, 2.0, 5.0])
  parser.add_argument(
    "--steps", type=int, nargs="*", default=[10**3, 10**4, 10**5, 10**6, 2 * 10**6]
  )
  parser.add_argument("--mechanisms", type=int, default=40, help="random ones for each --steps")
  options = parser.parse_args()
  gaussian, composition = [], []
  for steps in options.steps:
    gaussian += gaussian_lines(steps, options.mus)
    common.say("\n".join(map(str, gaussian[-len(DELTAS) :])))
    errors, generator = [], np.random.default_rng(steps)
    for _ in range(options.mechanisms if steps <= 10**6 else 0):
      pld = accounting._step_pld(random_mechanism(generator, steps).event())
      errors += [composition_error(pmf, steps) for pmf in (pld._pmf_remove, pld._pmf_add)]
    if errors:
      composition.append(
        {"steps": steps, "largest_error_a_step": float(f"{max(errors) / steps:.3g}")}
      )
      common.say(str(composition[-1]))
  result = common.envelope("accounting_error") | {
    "mus": options.mus,
    "step_error": accounting.STEP_ERROR,
    "gaussian": gaussian,
    "composition": composition,
  }
  common.finish(result, options)


if __name__ == "__main__":
  main()
