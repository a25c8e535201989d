"""The audit of client-level privacy: under the claim as it is, above it without noise."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.audit.likelihood_ratio import best_threshold, thresholds_of
from fedjax_med.audit.planted_hospital import hospital_trials
from fedjax_med.core.keys import base_key
from fedjax_med.exchange import clip_and_noise as clipping
from fedjax_med.privacy.accounting import epsilon
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.privacy.mechanism import PoissonGaussian
from tests.federated.toy import make_hyper

ROUNDS, DELTA, LEVEL, TRIALS = 5, 1e-2, 0.05, 3000


def bound(mechanism, level):
  claimed = epsilon(mechanism, ROUNDS, DELTA)
  scores = hospital_trials(mechanism, hyper_of(mechanism, level), ROUNDS, TRIALS, base_key(0))
  lower = best_threshold(scores, thresholds_of(claimed, DELTA), DELTA, LEVEL)
  return lower, claimed


def hyper_of(mechanism, level):
  rate = mechanism.sampling_probability
  return make_hyper(participation_rate=rate)._replace(client_level=level)


def settings(mechanism, noise, count_noise=0.0, rate=0.0):
  values = (noise, mechanism.expected_batch_size, count_noise, 0.5, rate)
  return ClientLevel(*(jnp.float32(value) for value in values))


FULL = PoissonGaussian(6, 1.0, 6, 2.5, 0.3)
SAMPLED = PoissonGaussian(30, 0.4, 26, 1.5, 0.3)
COUNTED = dataclasses.replace(FULL, count_noise=2.0)
ADAPTIVE = settings(COUNTED, COUNTED.sum_noise_multiplier, 2.0, 0.2)


@pytest.mark.parametrize(
  ("mechanism", "level"),
  [(FULL, settings(FULL, 2.5)), (SAMPLED, settings(SAMPLED, 1.5)), (COUNTED, ADAPTIVE)],
  ids=["everybody", "sampled", "adaptive"],
)
def test_the_bound_from_below_stays_under_the_claim_and_exceeds_it_without_noise(mechanism, level):
  lower, claimed = bound(mechanism, level)
  assert 0.3 < lower <= claimed
  silent, _ = bound(mechanism, level._replace(noise_multiplier=jnp.float32(0)))
  assert silent > claimed


def test_an_update_that_is_not_clipped_is_caught(monkeypatch):
  monkeypatch.setattr(clipping, "clip_update", lambda update, clip_norm: (update, jnp.float32(1)))
  lower, claimed = bound(FULL, settings(FULL, 2.5))
  assert lower > claimed


def test_scores_without_the_hospital_do_not_know_the_clip_norm():
  one = hospital_trials(FULL, hyper_of(FULL, settings(FULL, 2.5)), ROUNDS, 300, base_key(0))
  other = PoissonGaussian(6, 1.0, 6, 2.5, 3.0)
  two = hospital_trials(other, hyper_of(other, settings(other, 2.5)), ROUNDS, 300, base_key(0))
  for share, pair in one.items():
    for first, second in zip(pair, two[share], strict=True):
      np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3)
