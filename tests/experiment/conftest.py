"""One finished run for all tests that only read it."""

import pytest

from tests.experiment.running import run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  run(folder)
  return folder
