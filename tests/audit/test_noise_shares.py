"""The audit where hospitals add the noise: under the claim as it is, and each mutant is caught."""

import dataclasses

import jax
import jax.numpy as jnp

from fedjax_med.audit.likelihood_ratio import best_threshold, thresholds_of
from fedjax_med.audit.noise_shares import check_shares
from fedjax_med.audit.planted_hospital import hospital_trials
from fedjax_med.core.keys import base_key
from fedjax_med.core.rounding import NORM_SLACK
from fedjax_med.exchange import distributed_noise as exchange
from fedjax_med.exchange import registry
from fedjax_med.exchange.registry import shared_exchange
from fedjax_med.privacy.accounting import epsilon
from fedjax_med.privacy.discrete_gaussian import draw, make_sampler
from fedjax_med.privacy.distributed import DistributedGaussian, make_shares
from tests.privacy.test_distributed import config_of, hyper_of, quiet

ROUNDS, DELTA, LEVEL, TRIALS = 5, 1e-2, 0.05, 3000
SIX = DistributedGaussian(
  num_units=6,
  colluders=2,
  noise_multiplier=2.5,
  clip_norm=0.3,
  scale=2.0**22,
  num_parameters=4096,
)


def found(mechanism, hyper=None):
  """The bound from below, the claim, and the names of checks that fail."""
  hyper = hyper_of(mechanism) if hyper is None else hyper
  parts = shared_exchange(config_of(client_privacy__clip_norm=mechanism.clip_norm))
  scores = hospital_trials(mechanism, hyper, ROUNDS, TRIALS, base_key(0), parts)
  claimed = epsilon(mechanism, ROUNDS, DELTA)
  lower = best_threshold(scores, thresholds_of(claimed, DELTA), DELTA, LEVEL)
  return lower, claimed, failed(mechanism, hyper)


def failed(mechanism, hyper):
  parts = shared_exchange(config_of(client_privacy__clip_norm=mechanism.clip_norm))
  checks = check_shares(mechanism, hyper, parts.transform, base_key(0))
  assert len(checks) == 4
  return [check.name for check in checks if not check.passed]


def with_share(mechanism, share):
  """Hyperparameters of a run that executes the mechanism with another share."""
  hyper = hyper_of(mechanism)
  shares = make_shares(mechanism)._replace(sampler=make_sampler(share))
  assert hyper.client_level is not None
  return hyper._replace(client_level=hyper.client_level._replace(shares=shares))


def test_the_bound_from_below_stays_under_the_claim_and_exceeds_it_without_noise():
  lower, claimed, wrong = found(SIX)
  assert 0.3 < lower <= claimed
  assert wrong == []
  silent, _, _ = found(SIX, quiet(hyper_of(SIX)))
  assert silent > claimed


def test_a_share_of_the_noise_that_is_counted_as_the_whole_is_caught():
  # ε is that of σ at every hospital, and each adds σ / sqrt(K - c).
  claim = dataclasses.replace(SIX, noise_multiplier=SIX.noise_multiplier * 2)
  lower, claimed, wrong = found(claim, with_share(claim, SIX.share))
  assert lower > claimed
  assert any("its share of the accounted standard deviation" in name for name in wrong)


def test_noise_of_colluders_that_is_counted_is_caught():
  everyone = dataclasses.replace(SIX, colluders=0)
  assert any("its share" in name for name in failed(SIX, with_share(SIX, everyone.share)))


def test_rounding_that_is_not_counted_is_caught_on_a_coarse_grid(monkeypatch):
  coarse = dataclasses.replace(SIX, clip_norm=1.0, scale=2.0**8)
  assert failed(coarse, hyper_of(coarse)) == []
  clipped = property(lambda self: self.clip_norm * (1 + NORM_SLACK))
  monkeypatch.setattr(DistributedGaussian, "sensitivity", clipped)
  assert failed(coarse, hyper_of(coarse)) == [
    "whole numbers of an update stay within the accounted sensitivity"
  ]


def noise_first(clip_norm, bits):
  """The transform, with noise that is added before an update is clipped."""
  right = exchange.distributed_noise(clip_norm, bits)

  def encode(message, kept, state, sender):
    shares = sender.hyper.client_level.shares
    share = draw(jax.random.fold_in(sender.key, 1), shares.sampler, message.params.shape)
    noisy = message.params + share.astype(jnp.float32) / shares.scale
    silent = sender.hyper.client_level._replace(noise_multiplier=jnp.float32(0))
    sender = sender._replace(hyper=sender.hyper._replace(client_level=silent))
    return right.encode(message._replace(params=noisy), kept, state, sender)

  return right._replace(encode=encode)


def test_noise_before_clipping_is_caught(monkeypatch):
  monkeypatch.setattr(registry, "distributed_noise", noise_first)
  lower, claimed, wrong = found(SIX)
  assert lower > claimed
  assert any("is added after clipping and rounding" in name for name in wrong)
  assert any("standard deviation" in name for name in wrong)


def test_an_update_that_is_not_clipped_is_caught(monkeypatch):
  monkeypatch.setattr(exchange, "clip_update", lambda update, bound: (update, jnp.float32(1)))
  monkeypatch.setattr(exchange, "to_grid", lambda u, r, s, key: jnp.round(u * s).astype(jnp.int32))
  lower, claimed, wrong = found(SIX)
  assert lower > claimed
  assert "whole numbers of an update stay within the accounted sensitivity" in wrong


def test_hospitals_that_draw_the_same_noise_are_caught(monkeypatch):
  monkeypatch.setattr(exchange, "draw", lambda key, *rest: draw(base_key(1), *rest))
  assert failed(SIX, hyper_of(SIX)) == ["hospitals and rounds draw noise of their own"]
