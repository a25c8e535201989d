"""Every field of the configuration moves something where it is read, and is refused elsewhere."""

import jax
import pytest

from fedjax_med.core.config import Config, declared
from fedjax_med.core.errors import UserError
from fedjax_med.core.unread import default_of, unmet
from fedjax_med.core.validation import validate
from fedjax_med.federated.registry import require_rules
from fedjax_med.models import registry
from fedjax_med.prepare.experiment import build
from tests.prepare import setting_moves
from tests.prepare.setting_cases import CASES, Case, changed

# Networks with convolutions, private programs, GANs and calibrations of σ take seconds each.
HEAVY = {
  "client.gan_steps",
  "client_privacy.clip_learning_rate",
  "client_privacy.quantile",
  "client_privacy.target_epsilon",
  "eval.batch_size",
  "execution.remat",
  "model.norm",
  "privacy.augmentation_multiplicity",
  "privacy.same_noise",
  "privacy.target_epsilon",
  "server.num_rounds",
  "server.personal_layers",
  "server.personal_weight",
}
# A difference of programs or of their arguments: whether weights move takes compiling them.
COMPILED = [path for path, case in CASES.items() if case.moves in ("program", "traced")]


@pytest.fixture(autouse=True)
def promotion():
  with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes int32 counts and floats
    yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  yield tmp_path_factory.mktemp("settings")
  setting_moves.KEPT.clear()


def check(config: Config) -> None:
  """Refuses what a run would refuse before it compiles."""
  validate(config)
  require_rules(config)
  registry.require_read(config.model)


def pair(path: str, case: Case, files) -> tuple[Config, Config]:
  """The configuration that reads the field, and the same with the other value."""
  one = changed(case.reads, files)
  other = changed({**case.reads, **case.besides, path: case.value}, files)
  return one, other


def unread(config: Config, path: str) -> bool:
  section, _, name = path.rpartition(".")
  return unmet(config, path) is not None or (
    section == "model" and name in registry.unread(config.model)
  )


def test_every_field_has_a_case():
  assert declared().keys() == CASES.keys()


def pairs_without(path, files):
  """Configurations that do not read the field: with its default, and with the other value."""
  for changes in CASES[path].without:
    one = changed({**changes, path: default_of(path)}, files)
    yield one, changed({**changes, path: CASES[path].value}, files)


@pytest.mark.parametrize("path", [path for path, case in CASES.items() if case.without])
def test_a_setting_without_effect_is_refused_with_its_name(path, files):
  broken = set()
  for one, other in pairs_without(path, files):
    check(one)
    for config in (one, other):
      assert unread(config, path)
    broken.add(unmet(one, path))
    if one == other:  # there is no other value
      continue
    with pytest.raises(UserError, match=rf"{path}=.*read .*; use .*, or leave .*{path} at "):
      check(other)
    if CASES[path].moves == "holders":
      assert not setting_moves.holders(one, other)
  assert broken >= set(declared()[path].read)


def test_settings_without_effect_for_one_reason_are_one_sentence(files):
  config = changed({"privacy.clip_norm": 0.5, "privacy.delta": 1e-5}, files)
  with pytest.raises(UserError) as caught:
    validate(config)
  assert str(caught.value) == (
    "privacy.clip_norm=0.5 and privacy.delta=1e-05 are read with privacy.mechanism=dp_sgd only,"
    " and it is 'none'; use --config.privacy.mechanism=dp_sgd, or leave privacy.clip_norm at 1"
    " and privacy.delta at 0"
  )


def test_a_network_without_a_setting_refuses_it(files, monkeypatch):
  monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
  registry.register("bare", lambda num_classes, **_: registry.MODELS["linear"](num_classes))
  given = {f"model.{name}": value for name, value in registry.SETTINGS.items()}
  config = changed({**given, "model.name": "bare"}, files)
  with pytest.raises(UserError, match=r"norm='batch' and .*dtype='bfloat16' are not read by .*"):
    build(config, setting_moves.dealt(config))
  assert registry.unread(config.model) == tuple(registry.SETTINGS)
  config.model.name = "cnn_small"
  assert registry.unread(config.model) == ()


@pytest.mark.parametrize(
  "path", [pytest.param(path, marks=[pytest.mark.slow] * (path in HEAVY)) for path in CASES]
)
def test_a_setting_that_is_read_moves_something(path, files):
  case = CASES[path]
  one, other = pair(path, case, files)
  for config in (one, other):
    if case.moves != "pretrained":  # refused without a real file
      check(config)
    assert not unread(config, path)
  assert getattr(setting_moves, case.moves)(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("path", COMPILED)
def test_what_moves_a_program_moves_its_weights_and_nothing_where_it_is_not_read(path, files):
  one, other = pair(path, CASES[path], files)
  assert setting_moves.results(one) != setting_moves.results(other)
  for one, other in pairs_without(path, files):
    # Refused before there is a program.
    if not path.startswith(("model.", "client.augmentation", "client.label_smoothing")):
      assert setting_moves.results(one) == setting_moves.results(other)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, case in CASES.items() if case.moves == "plan"])
def test_what_moves_the_plan_moves_nothing_where_it_is_not_read(path, files):
  for one, other in pairs_without(path, files):
    assert not setting_moves.plan(one, other)


def test_what_moves_no_result_says_why():
  silent = ("layout", "probe", "compiled", "prediction", "nothing", "cache", "masked", "encryption")
  assert [path for path, case in CASES.items() if bool(case.why) != (case.moves in silent)] == []
