"""The probe's outcome is kept, and says why; timings come from the test."""

import jax
import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.experiment.build import build
from fedjax_med.experiment.loop import block_arguments
from fedjax_med.experiment.planning import (
  block_memory,
  kept_seconds,
  probed_chunk,
  rough_bytes,
  wants_probe,
)


def test_the_fastest_chunk_wins_unless_it_waits_too_long():
  seconds = {1: 0.01, 4: 0.004}
  assert probed_chunk(seconds, np.full(8, 2), 1)[0] == 4
  assert probed_chunk(seconds, np.array([100, 1, 1, 1]), 1)[0] == 1


def test_what_a_probe_measured_is_read_back_and_a_cut_file_is_measured_again(tmp_path):
  config, calls = get_config(), []
  config.execution.compilation_cache = str(tmp_path)

  def measure(chunk):
    calls.append(chunk)
    return 0.1234567 / chunk

  first = kept_seconds(config, {"cohort": 3}, measure, [1, 3])
  assert kept_seconds(config, {"cohort": 3}, measure, [1, 3]) == first
  assert calls == [1, 3]
  (path,) = (tmp_path / "plans").iterdir()
  path.write_text("{")
  assert kept_seconds(config, {"cohort": 3}, measure, [1, 3]) == first
  assert calls == [1, 3, 1, 3]


def test_short_runs_and_configured_layouts_are_not_probed():
  config, steps = get_config(), np.full(3, 2)
  assert not wants_probe(config, steps, 1000, "cpu")
  config.server.num_rounds = 1000
  assert wants_probe(config, steps, 1000, "cpu")
  assert not wants_probe(config, steps, 10**7, "cpu")
  assert wants_probe(config, steps, 10**7, "gpu")
  config.execution.layout = "scan"
  assert not wants_probe(config, steps, 1000, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"mechanism": "none"}, {"layout": "vmap"}])
def test_the_estimate_from_shapes_is_not_below_what_the_compiled_rounds_need(changes, monkeypatch):
  config, estimates = get_config(), []
  config.execution.layout = changes.get("layout", "auto")
  config.privacy.mechanism = changes.get("mechanism", config.privacy.mechanism)

  def noted(*args):
    estimates.append(rough_bytes(*args))
    return estimates[-1]

  monkeypatch.setattr("fedjax_med.experiment.planning.rough_bytes", noted)
  program = build(config, load_hospitals(config)).program
  needed = block_memory(program.block, program.arguments)
  assert needed is not None
  assert sum(needed.values()) <= estimates[-1] <= 20 * sum(needed.values())


def test_the_program_whose_memory_is_looked_at_is_the_one_that_runs():
  experiment = build(config := get_config(), load_hospitals(config))
  state = jax.eval_shape(experiment.program.initial)

  def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

  run = types((state, *block_arguments(experiment, 1)))
  assert types(experiment.program.arguments) == run
