"""The study of private training: an arm is trained, measured and kept as JSON."""

import json

from experiments.private_training.study import ARMS, config_of, run_arm
from fedjax_med.core.config import declared, flat
from tests.prepare.setting_cases import base


def test_every_arm_is_a_valid_configuration_that_changes_known_fields():
  assert {path for changes in ARMS.values() for path in changes} <= declared().keys()
  assert all(config_of(arm, "FOLDER").data.path == "FOLDER" for arm in ARMS)


def test_an_arm_keeps_its_configuration_and_a_measure_of_each_seed():
  config = base()
  config.privacy.mechanism, config.privacy.noise_multiplier = "dp_sgd", 1.0
  result = json.loads(json.dumps(run_arm(config, seeds=2)))
  assert flat(result["config"]).keys() == declared().keys()
  assert result["epsilon_max"] > 0
  assert [set(metrics) >= {"auroc", "accuracy"} for metrics in result["seeds"]] == [True, True]
