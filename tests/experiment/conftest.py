"""Finished runs for all tests that only read them."""

import pytest

from tests.experiment.learning import learn, learning_config
from tests.experiment.running import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  run(folder)
  return folder


@pytest.fixture(scope="session")
def learned(tmp_path_factory):
  """A CNN that finds most tumours, and an average of whose weights is measured."""
  folder = tmp_path_factory.mktemp("learned")
  learn(folder, learning_config())
  return folder


@pytest.fixture(scope="session")
def gated(tmp_path_factory):
  """A network with squeeze-and-excitation whose norms stay at the hospitals."""
  folder, config = tmp_path_factory.mktemp("gated"), learning_config()
  config.model.name, config.server.algorithm = "se_resnext_micro", "fedbn"
  config.server.num_rounds = config.eval.every = 1
  config.client.num_local_steps, config.server.ema_decay = 2, 0.0
  learn(folder, config)
  return folder
