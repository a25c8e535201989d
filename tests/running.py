"""Small configs and runs, for the tests of runs."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from configs.smoke import get_config
from fedjax_med.core.config import Config, set_field
from fedjax_med.core.validation import validate
from fedjax_med.report import reported_run as runs

# A few short rounds of a small network at the sites that the data name.
AT_SITES = {
  "partition.scheme": "site",
  "partition.num_clients": 0,
  "model.name": "linear",
  "client.batch_size": 64,
  "client.num_local_steps": 4,
  "client.learning_rate": 0.5,
  "server.num_rounds": 4,
  "eval.every": 2,
  "execution.devices": 1,
  "execution.compilation_cache": "",
}


def config_of(fields: Mapping[str, Any], **changes) -> Config:
  """A valid config of fields by dotted name, changed as by ``server__num_rounds=4``."""
  config = Config()
  for path, value in fields.items():
    set_field(config, path, value)
  for path, value in changes.items():
    set_field(config, path.replace("__", "."), value)
  validate(config)
  return config


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
