"""The audit of a run: attacks every guarantee, and makes the content of audit.json."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.audit.epsilon_bounds import one_run_epsilon
from fedjax_med.audit.execution_checks import Check, check_execution
from fedjax_med.audit.likelihood_ratio import (
  CONFIDENCE,
  best_threshold,
  thresholds_of,
  wanted_trials,
)
from fedjax_med.audit.noise_shares import check_shares
from fedjax_med.audit.planted_hospital import hospital_trials
from fedjax_med.audit.planted_records import (
  AuditedRun,
  key_of,
  make_trials,
  many_canaries,
  single_canaries,
)
from fedjax_med.audit.replay import replay_checks
from fedjax_med.exchange.ckks import modelled
from fedjax_med.exchange.registry import make_exchange, shared_exchange
from fedjax_med.federated.algorithm import Hyper
from fedjax_med.prepare.accounted_arrays import differences
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.privacy.guarantees import Guarantee, spent
from fedjax_med.run.budget import planned_rounds
from fedjax_med.simulation.mesh import local_devices


class PartyResult(NamedTuple):
  """Result of the attacks on one hospital.

  Attributes:
    name: the hospital.
    epsilon: claimed at ``delta``.
    delta: δ.
    epsilon_lower: bound from below at the confidence of the audit.
    attack: name of the attack that gave the bound.
    trials: runs without the planted record; a tenth as many have it.
    canaries: planted records of the run with many.
  """

  name: str
  epsilon: float
  delta: float
  epsilon_lower: float
  attack: str
  trials: int
  canaries: int


def audit_run(
  experiment: Experiment, max_trials: int, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
  """Audits a run; returns the content of audit.json.

  The numbers at the top belong to the first guarantee: that of records or patients, if there is
  one.
  """
  results = []
  if experiment.local:
    results.append(_local(experiment, max_trials, seed, tell))
  if experiment.central:
    results.append(_central(experiment, experiment.central, max_trials, seed, tell))
  first = results[0]
  return {
    "run_id": experiment.run_id,
    "confidence": CONFIDENCE,
    "unit": first["unit"],
    "epsilon": first["epsilon"],
    "epsilon_lower": first["epsilon_lower"],
    "epsilon_lower_without_noise": first["epsilon_lower_without_noise"],
    "passed": all(result["passed"] for result in results),
    "audits": results,
  }


def audit_units(
  audited: AuditedRun,
  max_trials: int,
  tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[PartyResult], list[Check], float]:
  """Attacks every hospital and checks the execution; all bounds hold together at CONFIDENCE.

  Args:
    audited: the run under audit.
    max_trials: runs without the planted record at a hospital, at most.
    tell: is called with lines of progress.

  Returns:
    The result at each hospital, the checks, and the power of the audit: the bound that the same
    attack gives at the hospital of the largest ε if its noise is left out.
  """
  checks = check_execution(audited)
  hospitals = len(audited.guarantee.names)
  claims = spent(audited.guarantee, audited.steps)
  # Half of what may go wrong to each of the two kinds of attack.
  level = (1 - CONFIDENCE) / (2 * hospitals)
  trials = make_trials(audited, local_devices())
  parties = []
  for k, epsilon in enumerate(claims):
    mechanism, delta = audited.guarantee.mechanisms[k], audited.guarantee.deltas[k]
    number = wanted_trials(epsilon, level, max_trials)
    thresholds = thresholds_of(epsilon, delta)
    noisy = single_canaries(audited, trials, k, number, noise=True)
    bounds = {"likelihood ratio of one record": best_threshold(noisy, thresholds, delta, level)}
    scores, bits = many_canaries(audited, k)
    one_run = one_run_epsilon(scores, bits, delta, 1 - level)
    bounds["many records in one run"] = one_run.epsilon_lower
    attack = max(bounds, key=lambda name: bounds[name])
    name = audited.guarantee.names[k]
    parties.append(
      PartyResult(
        name=name,
        epsilon=epsilon,
        delta=delta,
        epsilon_lower=bounds[attack],
        attack=attack,
        trials=number,
        canaries=len(bits),
      )
    )
    tell(
      f"{name}: {bounds[attack]:.3f} ≤ ε ≤ {epsilon:.3f} (n {mechanism.num_units}, {number} trials)"
    )
  worst = int(np.argmax(claims))
  silent = single_canaries(audited, trials, worst, parties[worst].trials, noise=False)
  delta = audited.guarantee.deltas[worst]
  power = best_threshold(silent, thresholds_of(claims[worst], delta), delta, level)
  return parties, checks, power


def _local(experiment: Experiment, max_trials: int, seed: int, tell: Callable) -> dict[str, Any]:
  local = experiment.local
  assert local is not None
  rounds = planned_rounds(experiment)
  clients, hyper = jax.device_get((experiment.clients, experiment.hyper))
  audited = AuditedRun(
    guarantee=local,
    steps=tuple(int(steps) * rounds for steps in experiment.steps),
    clients=clients,
    hyper=hyper,
    key=_on_host(experiment.key),
    clipping=experiment.program.plan.clipping,
    microbatch=experiment.program.plan.microbatch,
    rows_per_unit=experiment.case.protection.rows_per_unit,
    seed=seed,
  )
  parties, checks, power = audit_units(audited, max_trials, tell)
  tell("Replaying steps of every hospital ...")
  checks = [_arrays(experiment), *checks, *replay_checks(experiment)]
  return _result(local.unit, parties, checks, power)


def _on_host(key: jax.Array) -> jax.Array:
  """The key, bound to no device: trials of an audit use other devices than clients of a run."""
  data = jax.device_get(jax.random.key_data(key))
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _arrays(experiment: Experiment) -> Check:
  """Checks that the run's arrays are those of the accounted mechanisms."""
  case = experiment.case
  arrays = experiment.clients, experiment.hyper
  wrong = differences(case.protection, case.numbers, case.rows, *arrays)
  words = "; ".join(wrong[:4]) or "the arrays on the device are those that are accounted for"
  return Check(name=words, p_value=float(not wrong), passed=not wrong)


def _central(
  experiment: Experiment, central: Guarantee, max_trials: int, seed: int, tell: Callable
) -> dict[str, Any]:
  rounds = planned_rounds(experiment)
  (mechanism,), (delta,), (epsilon,) = central.mechanisms, central.deltas, spent(central, [rounds])
  level = 1 - CONFIDENCE
  number = wanted_trials(epsilon, level, max_trials)
  places = thresholds_of(epsilon, delta)
  hyper, key = jax.device_get(experiment.hyper), key_of(_on_host(experiment.key), 3, seed)
  exchange = make_exchange(modelled(experiment.config), len(experiment.names))
  if isinstance(mechanism, DistributedGaussian):
    exchange = shared_exchange(experiment.config)

  def bound(hyper: Hyper) -> float:
    return best_threshold(
      hospital_trials(mechanism, hyper, rounds, number, key, exchange), places, delta, level
    )

  assert hyper.client_level is not None
  lower = bound(hyper)
  power = bound(
    hyper._replace(client_level=hyper.client_level._replace(noise_multiplier=jnp.float32(0)))
  )
  tell(f"a whole hospital: {lower:.3f} ≤ ε ≤ {epsilon:.3f} ({number} trials)")
  name = "likelihood ratio of one hospital"
  parties = [
    PartyResult(
      name=central.names[0],
      epsilon=epsilon,
      delta=delta,
      epsilon_lower=lower,
      attack=name,
      trials=number,
      canaries=0,
    )
  ]
  checks = [_arrays(experiment)]
  if isinstance(mechanism, DistributedGaussian):
    checks += check_shares(mechanism, hyper, exchange.transform, key)
  return _result(central.unit, parties, checks, power)


def _result(
  unit: str, parties: list[PartyResult], checks: list[Check], power: float
) -> dict[str, Any]:
  return {
    "unit": unit,
    "epsilon": max(party.epsilon for party in parties),
    "epsilon_lower": max(party.epsilon_lower for party in parties),
    "epsilon_lower_without_noise": power,
    "passed": all(party.epsilon_lower <= party.epsilon for party in parties)
    and all(check.passed for check in checks),
    "parties": [party._asdict() for party in parties],
    "checks": [check._asdict() for check in checks],
  }
