"""A name that nothing has is answered with one sentence and the nearest name, however it is set."""

import dataclasses
import warnings

import pytest

import fedjax_med
from fedjax_med.core.config import declared
from fedjax_med.core.errors import UserError
from fedjax_med.core.source_facts import SOURCE_FACTS
from fedjax_med.data import sources
from fedjax_med.sweep.points import configure
from tests.command import smoke, start
from tests.running import smoke_config

# field: (a name that nothing has, the nearest that there is)
REGISTERED = {
  "data.source": ("fodler", "folder"),
  "model.name": ("vgg61", "vgg16"),
  "server.algorithm": ("fedavgg", "fedavg"),
  "server.transforms": ("identiti", "identity"),
  "server.aggregator": ("meen", "mean"),
}
CHOSEN = [path for path, field in declared().items() if field.choices]
PRESETS = ("smoke", "br35h")


def sentence(field):
  name, near = REGISTERED[field]
  return f"{field}='{name}' is unknown; did you mean '{near}'?"


@pytest.mark.parametrize("field", REGISTERED)
def test_an_unknown_name_of_a_registry_is_answered_by_load_config_or_the_run_it_is_for(field):
  def run():
    fedjax_med.simulate(fedjax_med.load_config("smoke", {field: REGISTERED[field][0]}))

  with warnings.catch_warnings():
    warnings.simplefilter("error")  # the mistake alone is told
    with pytest.raises(UserError) as caught:
      run()
  assert str(caught.value) == sentence(field)


@pytest.mark.parametrize("field", REGISTERED)
def test_an_unknown_name_of_a_registry_is_answered_at_its_point_of_a_sweep(field):
  name, near = REGISTERED[field]
  with pytest.raises(UserError) as caught:
    fedjax_med.simulate_grid(smoke_config(), {field: [near, name]})
  assert str(caught.value).startswith(f"point {field}=")
  if near != "folder":  # the other point lacks a path
    assert str(caught.value) == f"point {field}={name}: {sentence(field)}"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("field", ["data.source", *CHOSEN])
def test_an_unknown_choice_of_any_field_is_answered_whatever_the_preset_sets_besides(preset, field):
  name = "x" + (declared()[field].choices or ("folder",))[0]
  with pytest.raises(UserError, match=f"^{field}='{name}' is unknown; (did you mean '|choose one)"):
    fedjax_med.load_config(preset, {field: name})
  base = fedjax_med.load_config(preset)
  with pytest.raises(UserError, match=f"^point {field}={name}: {field}='{name}' is unknown; "):
    configure(base, {field: name}, ())


@pytest.fixture
def misnamed(monkeypatch):
  """A config whose source names a task that there is not."""

  def load(data):
    return dataclasses.replace(sources.SOURCES["phantoms"].load(data), task="clasification")

  monkeypatch.setitem(sources.SOURCES, "mine", sources.Source(load=load))
  monkeypatch.setitem(SOURCE_FACTS, "mine", sources.SourceFacts(reads_files=False))
  config = smoke_config()
  config.data = type(config.data)(source="mine", image_size=16)
  config.partition = type(config.partition)(scheme="iid", num_clients=3)
  return config


def test_an_unknown_task_of_a_dataset_is_answered_by_a_run_and_a_sweep(misnamed):
  expected = "task='clasification' is unknown; did you mean 'classification'?"
  with pytest.raises(UserError) as caught:
    fedjax_med.simulate(misnamed)
  assert str(caught.value) == expected
  with pytest.raises(UserError) as caught:
    fedjax_med.simulate_grid(misnamed, {"seed": [1]})
  assert str(caught.value) == f"point seed=1: {expected}"


@pytest.mark.parametrize("preset", PRESETS)
def test_an_unknown_source_is_one_sentence_of_the_command_line(preset):
  name, _ = REGISTERED["data.source"]
  done = start(
    "train", f"--config=configs/{preset}.py", f"--config.data.source={name}", "--dry_run"
  )
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == f"error: {sentence('data.source')}\n"


@pytest.mark.slow
@pytest.mark.parametrize("field", REGISTERED)
def test_an_unknown_name_of_a_registry_is_one_sentence_of_both_command_lines(field):
  name, near = REGISTERED[field]
  done = smoke(("-m", "fedjax_med.train"), "--dry_run", f"--config.{field}={name}")
  assert done.returncode == 2
  assert done.stderr == f"error: {sentence(field)}\n"
  known = {"data.source": "phantoms"}.get(field, near)
  done = smoke(("-m", "fedjax_med.sweep"), "--dry_run", f"--grid={field}={name},{known}")
  assert done.returncode == 2
  assert done.stderr == f"error: point {field}={name}: {sentence(field)}\n"
