"""Attacks on updates against ByzFL, and hostile hospitals in runs."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import Config, declared, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.data.poisoning import hostile_hospitals
from fedjax_med.exchange.aggregator import Joint, mean
from fedjax_med.exchange.attack import Scene
from fedjax_med.exchange.attacks.registry import ATTACKS, attack_strength
from fedjax_med.exchange.registry import exchange_numbers, make_exchange
from fedjax_med.exchange.robust.rules import RULES, joined_by
from fedjax_med.federated.algorithm import ClientDelta
from fedjax_med.run.training import run
from fedjax_med.sweep.points import hospital_loader
from tests.exchange.test_robust import GOLDEN, presence
from tests.federated.test_conformance import rounds
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper

STRENGTH = {"ipm": 2.0, "alie": 1.5}


def scene_of(vectors, weights, hostile, strength=1.0, aggregator=None):
  aggregator = aggregator or mean()
  joint = Joint(key=KEY, last=())
  return Scene(
    weights=weights,
    hostile=hostile,
    strength=jnp.float32(strength),
    key=KEY,
    aggregate=lambda some: aggregator.finish(
      aggregator.combine(some, weights, joint), weights.sum()
    ),
  )


def message(vectors):
  """The same numbers in two places of a message."""
  return ClientDelta(params=vectors[:, :3], state=vectors[:, 3:])


def sent(name, aggregator=None, strength=1.0):
  """[cases, D] what hostile clients send, in each case of the golden file."""
  attack = ATTACKS[name]()

  def one(vectors, present, f):
    number = present.sum()
    places = jnp.arange(len(present))
    hostile = present & (places >= number - f)
    made = None if aggregator is None else aggregator(f)
    weights = jnp.where(present, 1 / number.astype(jnp.float32), 0)
    messages = message(vectors)
    after = attack(messages, scene_of(messages, weights, hostile, strength, made))
    rows = jnp.concatenate([after.params, after.state], axis=1)
    return rows, hostile

  arguments = (jnp.asarray(x) for x in (GOLDEN["vectors"], presence(), GOLDEN["f"]))
  rows, hostile = jax.device_get(jax.jit(jax.vmap(one))(*arguments))
  honest = presence() & ~hostile
  np.testing.assert_array_equal(rows[honest], GOLDEN["vectors"][honest])
  assert (hostile.sum(1) == GOLDEN["f"]).all()
  last = rows[np.arange(len(rows)), GOLDEN["n"] - 1]
  for case, mask in enumerate(hostile):  # all of them send the same
    np.testing.assert_array_equal(rows[case][mask], np.tile(last[case], (GOLDEN["f"][case], 1)))
  return last


@pytest.mark.parametrize("name", ["sign_flip", "ipm", "alie", "mimic"])
def test_an_attack_is_that_of_byzfl(name):
  found, expected = sent(name, strength=STRENGTH.get(name, 1.0)), GOLDEN[name]
  scale = np.abs(GOLDEN["vectors"]).max((1, 2))[:, None]
  np.testing.assert_allclose(found / scale, expected / scale, rtol=1e-5, atol=1e-5)


def trimmed(f):
  return joined_by(RULES["trimmed_mean"](Config().robust), None, f)


@pytest.mark.parametrize("kind", ["ipm", "alie"])
@pytest.mark.parametrize("rule", ["mean", "trimmed_mean"])
def test_the_strength_that_harms_a_rule_most_is_that_of_byzfl(kind, rule):
  name = f"optimal_{kind}"
  found = sent(name, trimmed if rule == "trimmed_mean" else None)
  expected = GOLDEN[f"{name}_{rule}"]
  # The search compares distances: where two strengths harm alike, rounding chooses.
  scale = np.abs(expected).max(1, keepdims=True) + np.abs(GOLDEN["vectors"]).max((1, 2))[:, None]
  same = np.isclose(found / scale, expected / scale, rtol=1e-4, atol=1e-5).all(1)
  assert same.mean() >= (1 if rule == "mean" else 0.97)
