"""Checks of every draw and release of local steps: sampling, clipped sums and noise."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.audit.p_values import (
  dispersion_p_value,
  inclusion_p_value,
  noise_std_p_value,
  uncorrelated_p_value,
)
from fedjax_med.audit.planted_records import (
  AuditedRun,
  claim_of,
  decorrelate,
  key_of,
  memory_of,
  num_canaries,
  plant,
  release,
)

# Chance that one check refuses a correct program; its numbers follow from the seed.
ALARM = 1e-6
# Steps of which every number is looked at.
WATCHED = 32


class Check(NamedTuple):
  """One property of the execution.

  Attributes:
    name: the property.
    p_value: probability of the observation if the property holds; 0 or 1 if it is certain.
    passed: whether the property is accepted.
  """

  name: str
  p_value: float
  passed: bool


class _Watched(NamedTuple):
  """Steps of a hospital's first two rounds, number by number, in units of the clip norm.

  Attributes:
    steps: [steps] their numbers.
    drawn: [steps, canaries] multiplicity of each present canary in the noiseless sum.
    rest: [steps] norm of the noiseless sum without the canaries.
    noise: [steps, 2, N] noise of the two layers, freed of its correlation over steps.
    idle: [steps, 2, N] the same where no record can be drawn.
  """

  steps: np.ndarray
  drawn: np.ndarray
  rest: np.ndarray
  noise: np.ndarray
  idle: np.ndarray


def _watch(audited: AuditedRun, k: int) -> _Watched:
  # The beginnings of two rounds: a key without the step shows in one, without the round in both.
  half, second = np.arange(WATCHED // 2), int(audited.clients.num_steps[k])
  steps = np.unique(np.concatenate([half, second + half]))
  steps = steps[steps < audited.steps[k]]
  everybody = np.ones(num_canaries(audited.guarantee.mechanisms[k]), bool)
  setting, loud, pool, directions = plant(audited, k, everybody)
  silent = loud._replace(noise_multiplier=jnp.float32(0))
  none = jnp.int32(0)
  empty = loud._replace(
    num_examples=none, units=None if loud.units is None else loud.units._replace(number=none)
  )
  claim = claim_of(audited, k)
  strategy = claim.coefficients

  @jax.jit
  def run(client, key):
    def once(step, carry):
      memory, past = carry
      signal, noise, memory = release(setting, claim, client, pool, key, step, memory)
      noise, past = decorrelate(strategy, past, noise)
      return (memory, past), (signal, noise)

    def watched(carry, between):
      begin, step = between
      carry = jax.lax.fori_loop(begin, step, lambda i, carry: once(i, carry)[0], carry)
      return once(step, carry)

    past = jnp.zeros((len(strategy) - 1, 2, setting.pixels))
    # Correlated noise goes on from every step before; else those between need not be run.
    begins = steps if client.coefficients is None else np.concatenate([[0], steps[:-1] + 1])
    pairs = jnp.asarray(begins, jnp.int32), jnp.asarray(steps, jnp.int32)
    return jax.lax.scan(watched, (memory_of(setting, client), past), pairs)[1]

  key = key_of(audited.key, 2, audited.seed)
  sums = np.asarray(run(silent, key)[0], np.float64)
  basis = np.asarray(directions, np.float64)
  drawn = np.linalg.solve(basis @ basis.T, basis @ sums.T).T
  rest = np.linalg.norm(sums - drawn @ basis, axis=1)
  return _Watched(
    steps=steps,
    drawn=drawn,
    rest=rest,
    noise=np.asarray(run(loud, key)[1]),
    idle=np.asarray(run(empty, key)[1]),
  )


def check_execution(audited: AuditedRun) -> list[Check]:
  """Checks that every hospital's releases are those of its accounted mechanism."""
  checks: list[tuple[str, float]] = []
  watched = [_watch(audited, k) for k in range(len(audited.steps))]
  for name, mechanism, seen in zip(
    audited.guarantee.names, audited.guarantee.mechanisms, watched, strict=True
  ):
    sigma, q = mechanism.noise_multiplier, mechanism.drawn_probability
    present, bands = seen.drawn > 0.5, mechanism.bands
    its_turn = (seen.steps[:, None] - np.arange(present.shape[1])) % bands == 0
    exact = np.abs(seen.drawn - present).max() < 2e-3
    checks += [
      (f"{name}: no record moves the sum by more than the clip norm", seen.drawn.max() <= 1.002),
      (f"{name}: a drawn record moves the sum by the clip norm, another one not at all", exact),
      (f"{name}: nothing but records is in the sum", seen.rest.max() < 2e-2),
      (f"{name}: noise has standard deviation σC on the sum", noise_std_p_value(seen.noise, sigma)),
      (
        f"{name}: every step is noised by as much",
        _smallest([noise_std_p_value(step, sigma) for step in seen.noise]),
      ),
      (
        f"{name}: a step that draws nobody is noised by as much",
        _smallest([noise_std_p_value(step, sigma) for step in seen.idle]),
      ),
      (
        f"{name}: each step draws noise of its own",
        _smallest([uncorrelated_p_value(*pair) for pair in itertools.combinations(seen.noise, 2)]),
      ),
      (
        f"{name}: each layer draws noise of its own",
        uncorrelated_p_value(seen.noise[:, 0], seen.noise[:, 1]),
      ),
      (
        f"{name}: a record is drawn with probability q",
        inclusion_p_value(int(present.sum()), int(its_turn.sum()), q),
      ),
      (
        f"{name}: batch sizes vary as those of a Poisson sample",
        _smallest([_dispersion(present, seen.steps, bands, r, q) for r in range(bands)]),
      ),
    ]
    if bands > 1:
      alone = not (present & ~its_turn).any()
      checks.append((f"{name}: a record is drawn in the steps of its subset alone", alone))
  for k in range(1, len(watched)):
    same = [_same_noise(seen.noise, watched[k].noise) for seen in watched[:k]]
    name = f"{audited.guarantee.names[k]} and those before it draw noise of their own"
    checks.append((name, _smallest(same)))
  return [Check(name=name, p_value=float(p), passed=bool(p > ALARM)) for name, p in checks]


def _dispersion(present: np.ndarray, steps: np.ndarray, bands: int, subset: int, q: float) -> float:
  """p-value of the batch sizes of one subset's steps; 1 where there is no such step or record."""
  sizes = present[steps % bands == subset][:, subset::bands]
  return dispersion_p_value(sizes.sum(1), sizes.shape[1], q) if sizes.size else 1.0


def _same_noise(first: np.ndarray, second: np.ndarray) -> float:
  """p-value of the noise of two hospitals being unrelated."""
  # The same places of both; the first layer begins either draw.
  steps = min(len(first), len(second))
  pixels = min(first.shape[-1], second.shape[-1])
  return uncorrelated_p_value(first[:steps, 0, :pixels], second[:steps, 0, :pixels])


def _smallest(p_values: list[float]) -> float:
  """The smallest of several, times their number (Bonferroni); 1 if there is none."""
  return min(1.0, max(1, len(p_values)) * min(p_values, default=1.0))
