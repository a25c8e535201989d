"""Finished runs for all tests that only read them."""

import pytest

from tests.experiment.learning import learn
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
  learn(folder)
  return folder
