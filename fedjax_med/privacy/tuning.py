"""Cost of choosing the best of several runs: ε of repeat-and-select."""

from fedjax_med.core.errors import require
from fedjax_med.privacy.accounting import RDP_ORDERS, check_delta, cut_probability
from fedjax_med.privacy.mechanism import Mechanism


def tuned_epsilon(
  mechanism: Mechanism, steps: int, delta: float, mean_runs: float
) -> tuple[float, float] | None:
  """ε and δ of publishing the best of N such runs and nothing of the others.

  N is drawn from the logarithmic distribution, P(N = k) proportional to x^k / k, which costs least
  where ε is not small. Papernot and Steinke 2022 (arXiv 2110.03620, theorem 2 with η = 0) on the
  Rényi divergences of steps without truncation. That no step of any run pushed a record out of a
  batch that overflowed does not depend on the record, and given that, N is logarithmic still, of a
  smaller mean; the probability of the contrary is added to δ.

  Args:
    mechanism: of one step of every run.
    steps: of every run.
    delta: δ of the first part.
    mean_runs: runs on average, above 1; a fixed number of runs has no such bound.

  Returns:
    (ε, δ), or None where the δ would not be under 1/n, or there is no noise.

  Raises:
    UserError: δ is refused, or ``mean_runs`` is not above 1.
  """
  import dp_accounting
  from dp_accounting import dp_event, rdp

  require(mean_runs > 1, f"mean_runs={mean_runs} must be above 1", "use 10")
  check_delta(delta, mechanism.num_units)
  if steps == 0:
    return 0.0, delta
  compositions = mechanism.compositions(steps)
  total = delta + mean_runs * compositions * cut_probability(mechanism)
  if total >= 1 / mechanism.num_units or mechanism.noise_multiplier == 0:
    return None
  run = dp_accounting.SelfComposedDpEvent(mechanism.untruncated_event(), compositions)
  accountant = rdp.RdpAccountant(RDP_ORDERS, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
  accountant.compose(dp_event.RepeatAndSelectDpEvent(run, mean_runs, 0.0))
  return float(accountant.get_epsilon(delta)), total
