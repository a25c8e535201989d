"""Runs of the smoke config with a linear model, for the tests of runs."""

import json
import pathlib

from configs.smoke import get_config
from fedjax_med.core.config import Config
from fedjax_med.report import reported_run as runs


def smoke_config(**changes) -> Config:
  """The smoke config, changed as by ``server__num_rounds=4``, with a model that compiles soon."""
  config = get_config()
  config.model.name = "linear"
  for path, value in changes.items():
    section, _, name = path.partition("__")
    setattr(getattr(config, section) if name else config, name or section, value)
  return config


def run(folder: pathlib.Path, **changes):
  """Runs it in ``folder``; returns the summary."""
  runs.run(smoke_config(**changes), folder, "smoke", "test")
  return json.loads((folder / "summary.json").read_text())


def metrics(folder: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
