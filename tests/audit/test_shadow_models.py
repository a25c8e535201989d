"""Membership inference: it finds the members of an overfitted model and none behind noise."""

import dataclasses

import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.audit import shadow_models
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.hospitals import load_hospitals


def config_with(mechanism, sigma, rounds=300):
  config = get_config()
  config.model.name = "mlp"
  config.data.num_examples = 200
  config.privacy.mechanism, config.privacy.noise_multiplier = mechanism, sigma
  config.server.num_rounds, config.client.num_local_steps = rounds, 8
  config.client.learning_rate = 0.1
  return config


@pytest.mark.slow
def test_members_of_an_overfitted_model_are_found_and_noise_hides_them():
  bare = config_with("none", 0.0)
  hospitals = load_hospitals(bare)
  # Labels that nothing but memory can tell.
  labels = np.random.default_rng(0).integers(0, 2, len(hospitals.dataset.labels)).astype(np.int32)
  dataset = dataclasses.replace(hospitals.dataset, labels=labels)
  hospitals = dataclasses.replace(hospitals, dataset=dataset)
  open_model = shadow_models.attack(shadow_models.prepare(bare, hospitals, 8, 0))
  hidden = shadow_models.attack(shadow_models.prepare(config_with("dp_sgd", 50.0), hospitals, 8, 0))
  assert open_model["examples"] == hospitals.train.counts.sum()
  assert open_model["likelihood_ratio"]["balanced_accuracy"] > 0.6
  assert hidden["likelihood_ratio"]["balanced_accuracy"] < 0.56
  assert 0 <= hidden["likelihood_ratio"]["tpr"] <= 0.02


def test_halves_are_of_one_size_and_differ_between_runs():
  hospitals = load_hospitals(get_config())
  first, second = (shadow_models._halves(hospitals, 0, run) for run in (0, 1))
  for whole, one, other in zip(client_rows(hospitals.train), first, second, strict=True):
    assert len(one) == len(other) == len(whole) // 2
    assert set(one) <= set(whole)
    assert set(one) != set(other)
    assert 0.2 < np.isin(one, other).mean() < 0.8


def test_equal_scores_tell_nothing_and_others_what_a_threshold_finds():
  member = np.array([[True, True, False, False]])
  tied = shadow_models._summary(np.zeros((1, 4)), member)
  assert tied == {"tpr": 0.0, "balanced_accuracy": 0.5}
  half = shadow_models._summary(np.array([[2.0, 1.0, 1.0, 0.0]]), member)
  assert half == {"tpr": 0.5, "balanced_accuracy": 0.75}


def grouped():
  config = get_config()
  config.privacy.unit = "patient"
  return config


def loose():
  config = get_config()
  config.privacy.delta = 1 / 40
  return config


@pytest.mark.parametrize(
  ("config", "runs", "sentence"),
  [
    (get_config(), 3, r"--shadow_runs=3 must be at least 4, or 0 for none; use 16"),
    (get_config(), -1, r"--shadow_runs=-1 must be at least 4"),
    (grouped(), 16, r"--shadow_runs=16 .* privacy.unit='patient'; use --shadow_runs=0"),
    (loose(), 16, r"--shadow_runs=16 trains on halves of the data: delta=0.025 must"),
  ],
  ids=["few", "negative", "patients", "delta above 1/n of a half"],
)
def test_what_cannot_be_attacked_is_refused_before_anything_is_trained(config, runs, sentence):
  with pytest.raises(UserError, match=sentence):
    shadow_models.prepare(config, load_hospitals(get_config()), runs, 0)
