"""The probe's outcome is kept, and says why; timings come from the test."""

import numpy as np

from configs.smoke import get_config
from fedjax_med.prepare.probe import cached_seconds, probed_chunk, wants_probe


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

  first = cached_seconds(config, {"cohort": 3}, measure, [1, 3])
  assert cached_seconds(config, {"cohort": 3}, measure, [1, 3]) == first
  assert calls == [1, 3]
  (path,) = (tmp_path / "plans").iterdir()
  path.write_text("{")
  assert cached_seconds(config, {"cohort": 3}, measure, [1, 3]) == first
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
