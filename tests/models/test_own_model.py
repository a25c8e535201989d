"""The network of docs/models.md registers, is covered, and trains, exactly as it is printed."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fedjax_med.models import registry

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def config_file(tmp_path):
  """The Python block of the page that is a whole file, one with a docstring."""
  page = (ROOT / "docs/models.md").read_text()
  (block,) = re.findall(r'```python\n(""".*?)```', page, re.DOTALL)
  path = tmp_path / "mine.py"
  path.write_text(block)
  return path


def test_the_network_of_the_docs_registers_and_its_gradients_are_clipped_fast(
  config_file, monkeypatch
):
  monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
  config = runpy.run_path(str(config_file))["get_config"]()
  assert config.model.name == "net"
  assert "net" in registry.MODELS
  assert registry.code_of("net")
  model = registry.create_model(config.model, 2)
  image = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0), image)
  assert not any(model.uncovered(params, state, image, 16).values())


@pytest.mark.slow
def test_the_network_of_the_docs_trains_a_round_from_the_command_line(config_file, tmp_path):
  command = ["-m", "fedjax_med.train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
  small = ["--config.server.num_rounds=1", "--config.data.num_examples=1000"]
  result = subprocess.run(
    [sys.executable, *command, *small],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert "clipping book_keeping" in result.stdout
  assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 1
