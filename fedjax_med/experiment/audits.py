"""The audit of a run: every guarantee it gives is attacked, and audit.json says what was found."""

from collections.abc import Callable
from typing import Any

import jax

from fedjax_med.experiment import audit
from fedjax_med.experiment.build import Experiment
from fedjax_med.experiment.client_audit import hospital_trials
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.privacy.guarantees import Guarantee, spent


def audit_run(
  experiment: Experiment, max_trials: int, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
  """Audits a run that was built; what audit.json holds.

  The numbers at the top are of the first guarantee: records or patients where they are protected.
  """
  results = []
  if experiment.local:
    results.append(_local(experiment, max_trials, seed, tell))
  if experiment.central:
    results.append(_central(experiment, experiment.central, max_trials, seed, tell))
  first = results[0]
  return {
    "run_id": experiment.run_id,
    "confidence": audit.CONFIDENCE,
    "unit": first["unit"],
    "epsilon": first["epsilon"],
    "epsilon_lower": first["epsilon_lower"],
    "epsilon_lower_without_noise": first["epsilon_lower_without_noise"],
    "passed": all(result["passed"] for result in results),
    "audits": results,
  }


def _result(
  unit: str, found: list[audit.Found], checks: list[audit.Check], power: float
) -> dict[str, Any]:
  return {
    "unit": unit,
    "epsilon": max(each.epsilon for each in found),
    "epsilon_lower": max(each.epsilon_lower for each in found),
    "epsilon_lower_without_noise": power,
    "passed": all(each.epsilon_lower <= each.epsilon for each in found)
    and all(check.passed for check in checks),
    "parties": [each._asdict() for each in found],
    "checks": [check._asdict() for check in checks],
  }


def _local(experiment: Experiment, max_trials: int, seed: int, tell: Callable) -> dict[str, Any]:
  local = experiment.local
  assert local is not None
  a_round = tuple(int(each) for each in experiment.steps)
  steps = tuple(each * experiment.config.server.num_rounds for each in a_round)
  subject = audit.Subject(local, steps, a_round, experiment.program.plan.clipping, seed)
  devices = jax.local_device_count() if jax.process_count() == 1 else 1
  return _result(local.unit, *audit.audit(subject, max_trials, devices, tell))


def _central(
  experiment: Experiment, central: Guarantee, max_trials: int, seed: int, tell: Callable
) -> dict[str, Any]:
  rounds = experiment.config.server.num_rounds
  (mechanism,), (delta,), (epsilon,) = central.mechanisms, central.deltas, spent(central, [rounds])
  level = 1 - audit.CONFIDENCE
  number = audit.wanted_trials(epsilon, level, max_trials)
  places = audit.thresholds_of(epsilon, delta)
  settings: ClientLevel = jax.device_get(experiment.hyper.client_level)

  def bound(settings: ClientLevel) -> float:
    scores = hospital_trials(mechanism, settings, rounds, number, seed)
    return audit.best_threshold(scores, places, delta, level)

  lower = bound(settings)
  power = bound(settings._replace(noise_multiplier=settings.noise_multiplier * 0))
  tell(f"a whole hospital: {lower:.3f} ≤ ε ≤ {epsilon:.3f} ({number} trials)")
  name = "likelihood ratio of one hospital"
  found = [audit.Found(central.names[0], epsilon, delta, lower, name, number, 0)]
  return _result(central.unit, found, [], power)
