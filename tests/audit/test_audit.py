"""The audit: it agrees with the program as it is and catches every way of breaking it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.audit.epsilon_bounds import threshold_epsilon
from fedjax_med.audit.execution_checks import check_execution
from fedjax_med.audit.likelihood_ratio import ratio
from fedjax_med.audit.planted_records import make_trials, single_canaries
from fedjax_med.audit.verdict import audit_units
from fedjax_med.federated import local
from fedjax_med.privacy import banded, clipping, noise
from fedjax_med.privacy.guarantees import Guarantee, spent
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.sampling import epoch_batch, poisson_batch
from fedjax_med.privacy.strategy import toeplitz_strategy
from tests.audit.audited import audited_run

STEPS = 24
Q = 0.25


def audited(unit="record", sigma=1.5, method="book_keeping", q=Q, cap=36, bands=1):
  cap = min(cap, 60 // bands)
  strategy = tuple(float(c) for c in toeplitz_strategy(STEPS, bands))
  mechanisms = tuple(PoissonGaussian(n, q, cap, sigma, 0.7, strategy) for n in (60, 40))
  guarantee = Guarantee(unit, ("North", "South"), mechanisms, (1e-3, 2e-3))
  return audited_run(guarantee, (STEPS, STEPS), (2, 2), method)


def failed(run=None):
  return [check.name for check in check_execution(run or audited()) if not check.passed]


@functools.cache
def result():
  return audit_units(audited(), 3000)


def test_the_bound_from_below_stays_under_the_claim_at_every_hospital():
  found, checks, _ = result()
  assert [each.epsilon for each in found] == list(spent(audited().guarantee, (STEPS, STEPS)))
  for each in found:
    assert 0.1 < each.epsilon_lower <= each.epsilon
  assert all(check.passed for check in checks)


def test_without_noise_the_bound_exceeds_the_claim():
  found, _, power = result()
  assert power > max(each.epsilon for each in found)


@pytest.mark.parametrize(
  "run",
  [
    audited("patient"),
    audited(method="reference"),
    pytest.param(audited(method="two_pass"), marks=pytest.mark.slow),
    pytest.param(audited(q=1.0, cap=60), marks=pytest.mark.slow),
    audited(bands=4),
    audited("patient", bands=3, q=1.0),
  ],
  ids=["patients", "reference", "two_pass", "whole batches", "bands", "whole subsets"],
)
def test_checks_hold_for_every_unit_method_and_rate(run):
  assert failed(run) == []


@pytest.mark.slow
def test_correlated_noise_is_found_out_by_as_much_and_stays_under_its_claim():
  run = audited(bands=4, q=0.5)
  found, _, power = audit_units(run, 3000)
  for each in found:
    assert 0.1 < each.epsilon_lower <= each.epsilon
  assert power > max(each.epsilon for each in found)


def forgets(total, key, sigma, clip_norm, size, coefficients, memory):
  kept = memory._replace(noise=jax.tree.map(jnp.zeros_like, memory.noise))
  return banded.correlated_mean(total, key, sigma, clip_norm, size, coefficients, kept)


def uncounted(total, key, sigma, clip_norm, size, coefficients, memory):
  mean, after = banded.correlated_mean(total, key, sigma, clip_norm, size, coefficients, memory)
  return mean, after._replace(step=memory.step)


def from_everybody(key, n, q, *, step, bands, **shape):
  return poisson_batch(key, n, q / bands, **shape)


@pytest.mark.parametrize(
  ("name", "mutant", "words"),
  [
    ("correlated_mean", forgets, "draws noise of its own|noised by as much|standard deviation"),
    ("correlated_mean", uncounted, "in the steps of its subset alone"),
    ("banded_batch", from_everybody, "in the steps of its subset alone"),
  ],
)
def test_a_broken_correlation_is_caught(monkeypatch, name, mutant, words):
  monkeypatch.setattr(local, name, mutant)
  assert any(re.search(words, check) for check in failed(audited(bands=4)))


def test_checks_hold_for_a_run_of_a_single_step():
  assert failed(audited_run(audited().guarantee, (1, 1), (1, 1))) == []


# Each mutant: (where, name, what stands there instead, words of a check that must fail).
def no_noise(clipped_sum, key, sigma, clip_norm, size):
  return noise.private_mean(clipped_sum, key, 0.0, clip_norm, size)


def noise_on_the_mean(clipped_sum, key, sigma, clip_norm, size):
  return noise.private_mean(clipped_sum, key, sigma / size, clip_norm, size)


def sigma_halved(clipped_sum, key, sigma, clip_norm, size):
  return noise.private_mean(clipped_sum, key, sigma / 2, clip_norm, size)


def no_noise_on_empty_batches(clipped_sum, key, sigma, clip_norm, size):
  someone = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(clipped_sum)) > 0
  return noise.private_mean(clipped_sum, key, jnp.where(someone, sigma, 0), clip_norm, size)


def same_noise_in_every_layer(clipped_sum, key, sigma, clip_norm, size):
  layers = jnp.split(clipped_sum, 2)  # the network of canaries has two alike
  return jnp.concatenate([noise.private_mean(x, key, sigma, clip_norm, size) for x in layers])


def without(stream, *positions):
  """key_for that forgets counters of one stream."""

  def key_for(base, asked, *counters):
    if asked == stream:
      counters = tuple(0 if i in positions else c for i, c in enumerate(counters))
    return keys_for(base, asked, *counters)

  keys_for = local.key_for
  return key_for


def one_layer_unclipped(method, model, loss, params, state, rows, clip, key):
  total, metrics = clipping.clipped_sum(method, model, loss, params, state, rows, clip, key)
  wide = jnp.float32(1e6)
  free, _ = clipping.clipped_sum(method, model, loss, params, state, rows, wide, key)
  return {**total, "second": free["second"]}, metrics


def clipped_after_the_sum(method, model, loss, params, state, rows, clip, key):
  wide = jnp.float32(1e6)
  total, metrics = clipping.clipped_sum(method, model, loss, params, state, rows, wide, key)
  norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(total)))
  scale = jnp.minimum(1, clip / jnp.maximum(norm, 1e-9))
  return jax.tree.map(lambda leaf: leaf * scale, total), metrics


def q_halved(key, number, q, **sizes):
  return local_poisson(key, number, q / 2, **sizes)


def q_doubled(key, number, q, **sizes):
  return local_poisson(key, number, q * 2, **sizes)


def shuffled(key, number, q, *, max_examples, batch_cap, limit):
  """A random batch of the expected size, as of a shuffled epoch."""
  slots, mask = epoch_batch(key, 0, number, batch_size=batch_cap, max_examples=max_examples)
  place = jnp.arange(batch_cap, dtype=jnp.float32)
  return slots, mask & (
    place < jnp.minimum(limit.astype(jnp.float32), jnp.round(q * jnp.float32(number)))
  )


local_poisson = local.poisson_batch
MUTANTS = {
  "no noise": ("private_mean", no_noise, "standard deviation"),
  "noise on the mean": ("private_mean", noise_on_the_mean, "standard deviation"),
  "σ halved": ("private_mean", sigma_halved, "standard deviation"),
  "empty batches without noise": ("private_mean", no_noise_on_empty_batches, "draws nobody"),
  "layers share noise": ("private_mean", same_noise_in_every_layer, "each layer draws"),
  "one layer unclipped": ("clipped_sum", one_layer_unclipped, "more than the clip norm"),
  "clip after sum": ("clipped_sum", clipped_after_the_sum, "moves the sum by the clip norm"),
  "q halved": ("poisson_batch", q_halved, "probability q"),
  "q doubled": ("poisson_batch", q_doubled, "probability q"),
  "shuffle accounted as Poisson": ("poisson_batch", shuffled, "batch sizes vary"),
  "steps share a noise key": ("key_for", without(2, 2), "each step draws"),
  "rounds share a noise key": ("key_for", without(2, 1), "each step draws"),
  "hospitals share a noise key": ("key_for", without(2, 0), "noise of their own"),
}


# One of each part of a step; the others are slow.
QUICK = ("no noise", "clip after sum", "q doubled", "hospitals share a noise key")


@pytest.mark.parametrize(
  "mutant",
  [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS],
)
def test_a_mutant_is_caught(mutant, monkeypatch):
  name, replacement, words = MUTANTS[mutant]
  monkeypatch.setattr(local, name, replacement)
  assert any(words in check for check in failed())


def test_noise_that_all_hospitals_but_the_first_share_is_caught(monkeypatch):
  names, mechanisms = ("North", "South", "West"), audited().guarantee.mechanisms
  guarantee = Guarantee("record", names, (*mechanisms, mechanisms[0]), (1e-3, 2e-3, 1e-3))
  three = audited_run(guarantee, (STEPS,) * 3, (2,) * 3)
  assert failed(three) == []
  keys_for = local.key_for
  monkeypatch.setattr(
    local,
    "key_for",
    lambda base, stream, client, *rest: keys_for(base, stream, jnp.minimum(client, 1), *rest),
  )
  assert failed(three) == ["West and those before it draw noise of their own"]


def test_no_noise_is_caught_by_the_attack_alone(monkeypatch):
  monkeypatch.setattr(local, "private_mean", no_noise)
  run = audited()
  number = 3000
  scores = single_canaries(run, make_trials(run, 1), 0, number, noise=True)
  (epsilon, _) = spent(run.guarantee, run.steps)
  lower = max(threshold_epsilon(*pair, 0.0, 1e-3) for pair in scores.values())
  assert lower > epsilon


@pytest.mark.slow
def test_trials_over_devices_are_the_same_trials():
  run = audited()
  one, two = (
    single_canaries(run, make_trials(run, devices), 0, 900, noise=True) for devices in (1, 2)
  )
  for share, pair in one.items():
    for first, second in zip(pair, two[share], strict=True):
      np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_the_attackers_ratio_is_that_of_the_densities():
  y, sigma = 0.8, 1.5

  def density(mean):
    return np.exp(-((y - mean) ** 2) / (2 * sigma**2))

  expected = np.log(((1 - Q) * density(0) + Q * density(1)) / density(0))
  found = float(ratio(jnp.float32(y), Q, jnp.float32(sigma)))
  assert found == pytest.approx(expected, rel=1e-5)
