"""Every preset resolves to its golden file, and its header says how to run it and what to expect.

Write the golden files anew: python -m tests.core.test_presets
"""

import json
import pathlib
import re
import runpy

import pytest

from fedjax_med.core.config import from_dict, to_dict
from fedjax_med.core.validation import validate

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "presets"
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def module(name: str) -> dict:
  return runpy.run_path(str(ROOT / "configs" / f"{name}.py"), run_name="config")


def resolved(name: str) -> str:
  """The text of the golden file: every field of the preset's configuration."""
  return json.dumps(to_dict(module(name)["get_config"]()), indent=2) + "\n"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_to_its_golden_file(name):
  expected = (GOLDEN / f"{name}.json").read_text(encoding="utf-8")
  assert resolved(name) == expected, "if this is meant: python -m tests.core.test_presets"


def test_every_golden_file_is_that_of_a_preset():
  assert sorted(path.stem for path in GOLDEN.glob("*.json")) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_survives_the_trip_through_json(name):
  config = module(name)["get_config"]()
  validate(config)
  assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("name", PRESETS)
def test_the_header_of_a_preset_has_command_time_score_and_epsilon(name):
  header = module(name)["__doc__"]
  assert f"python -m fedjax_med.train --config=configs/{name}.py" in header
  assert re.search(r"To expect on two CPU cores: [\w ]*minutes?", header)
  assert re.search(r"(AUROC|RMSE|C-index)\s\d\.\d", header)
  assert re.search(r"no ε|ε \d+\.\d", header)


if __name__ == "__main__":
  GOLDEN.mkdir(parents=True, exist_ok=True)
  for preset in PRESETS:
    (GOLDEN / f"{preset}.json").write_text(resolved(preset), encoding="utf-8")
