"""Plans look at the program that runs, and estimates of its memory are upper ones."""

import jax
import pytest

from configs.smoke import get_config
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.experiment import build
from fedjax_med.prepare.memory import block_memory, rough_bytes
from fedjax_med.run.single import block_arguments


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"mechanism": "none"}, {"layout": "vmap"}])
def test_the_estimate_from_shapes_is_not_below_what_the_compiled_rounds_need(changes, monkeypatch):
  config, estimates = get_config(), []
  config.execution.layout = changes.get("layout", "auto")
  config.privacy.mechanism = changes.get("mechanism", config.privacy.mechanism)

  def noted(*args):
    estimates.append(rough_bytes(*args))
    return estimates[-1]

  monkeypatch.setattr("fedjax_med.prepare.plan_search.rough_bytes", noted)
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
