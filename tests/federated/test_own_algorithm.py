"""A user's algorithm is registered in one place: its options are fields like all others."""

import dataclasses
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from fedjax_med.core import config as config_lib
from fedjax_med.core.config import (
  Config,
  algorithm_options,
  declared,
  from_dict,
  get_field,
  set_field,
  to_dict,
)
from fedjax_med.core.errors import UserError
from fedjax_med.core.fields import field
from fedjax_med.core.validation import validate
from fedjax_med.federated import registry
from fedjax_med.sweep import grid
from fedjax_med.sweep.points import configure, groups, plan_points, require_read
from tests.prepare import setting_moves
from tests.prepare.setting_cases import base

ROOT = pathlib.Path(__file__).resolve().parents[2]
DAMPING, POWER = "options.damped.damping", "options.damped.power"

PRESET = '''
"""FedAvg whose server damps each mean update."""

import dataclasses

import jax

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.core.fields import field, least
from fedjax_med.federated.fedavg import fedavg
from fedjax_med.federated.registry import Entry, register


@dataclasses.dataclass
class Damped:
  """FedAvg with damped updates."""

  damping: float = field(
    0.5, doc="factor of a mean update.", bounds=least(0, 1, remedy="use 0.5"), traced=True
  )
  power: int = field(1, doc="times that it is applied.", bounds=least(1, 9, remedy="use 1"))


def damped(local, optimizer, *, average, power):
  plain = fedavg(local, optimizer, average=average)

  def server_update(server, delta, share, hyper):
    factor = hyper.algorithm["damping"] ** power
    params = jax.tree.map(lambda leaf: factor * leaf, delta.params)
    return plain.server_update(server, delta._replace(params=params), share, hyper)

  return plain._replace(server_update=server_update)


def without_proximal_term(config):
  require(config.server.proximal_weight == 0, "damped with FedProx", "use one of them")


ENTRY = Entry(
  make=damped, records=True, clients=False, rules=without_proximal_term, options=Damped
)
register("damped", ENTRY)


def get_config():
  config = Config()
  config.server.algorithm = "damped"
  config.options.damped.power = 2
  return config
'''


@pytest.fixture
def bare(monkeypatch):
  """The registries, as they were before this test afterwards."""
  monkeypatch.setattr(registry, "ALGORITHMS", dict(registry.ALGORITHMS))
  monkeypatch.setattr(config_lib, "OPTIONS", dict(config_lib.OPTIONS))
  yield
  setting_moves.KEPT.clear()


@pytest.fixture
def preset(bare, tmp_path):
  """The names that a preset defines which registers the algorithm."""
  path = tmp_path / "damped.py"
  path.write_text(PRESET.lstrip(), encoding="utf-8")
  return runpy.run_path(str(path))


def damped(**changes) -> Config:
  """The smallest run with that algorithm, and with these options."""
  config = base()
  config.server.algorithm = "damped"
  for name, value in changes.items():
    set_field(config, f"options.damped.{name}", value)
  return config


def test_options_are_fields_with_defaults_bounds_and_conditions(preset):
  assert list(declared())[-2:] == [DAMPING, POWER]
  assert declared()[DAMPING].doc == "factor of a mean update."
  config = preset["get_config"]()
  validate(config)
  assert (get_field(config, DAMPING), get_field(config, POWER)) == (0.5, 2)
  config.options.damped.damping = 2.0
  with pytest.raises(UserError, match=f"^{DAMPING}=2.0 must be at least 0 and at most 1; use 0.5"):
    validate(config)


def test_an_option_is_refused_with_another_algorithm(preset):
  config = damped(damping=0.25)
  config.server.algorithm = "fedavg"
  with pytest.raises(UserError, match=rf"{DAMPING}=0.25 is read with server.algorithm=damped only"):
    validate(config)


def test_a_config_that_was_made_before_the_algorithm_was_registered_has_its_options(bare, tmp_path):
  config = base()
  with pytest.raises(AttributeError, match="no algorithm named 'damped' with options"):
    _ = config.options.damped
  (tmp_path / "late.py").write_text(PRESET.lstrip(), encoding="utf-8")
  runpy.run_path(str(tmp_path / "late.py"))
  assert config.options.damped.damping == 0.5
  assert config == base()


def test_options_of_the_algorithm_in_use_survive_the_trip_through_json(preset, monkeypatch):
  config = damped(damping=0.25)
  values = to_dict(config)
  assert values["options"] == {"damped": {"damping": 0.25, "power": 1}}
  assert from_dict(values) == config
  assert "options" not in to_dict(base())
  monkeypatch.setattr(config_lib, "OPTIONS", {})  # a run is read where nobody registers it
  assert to_dict(from_dict(values)) == values


def test_traced_options_go_to_the_program_and_the_others_into_it(preset):
  config = damped(power=2)
  assert algorithm_options(config, traced=True) == {"damping": 0.5}
  assert algorithm_options(config, traced=False) == {"power": 2}
  assert setting_moves.traced(config, damped(power=2, damping=0.25))
  assert setting_moves.program(config, damped(power=3))
  assert algorithm_options(base(), traced=True) == {}


def test_a_traced_option_moves_the_weights_of_one_compiled_program(preset):
  assert setting_moves.weights(damped(), damped(damping=0.25))


def test_options_and_source_are_part_of_the_run_id(preset):
  ids = {setting_moves.experiment_of(damped(damping=value)).run_id for value in (0.5, 0.25)}
  fedavg = base()
  before = setting_moves.experiment_of(fedavg).run_id
  registry.register("other", preset["ENTRY"]._replace(options=None))
  setting_moves.KEPT.clear()
  assert setting_moves.experiment_of(fedavg).run_id == before
  assert len(ids | {before}) == 3
  assert registry.algorithm_code("damped")
  assert registry.algorithm_code("fedavg") == ""


def test_an_option_is_an_axis_of_a_sweep_and_traced_ones_share_a_program(preset):
  points = grid.points(damped(), list(declared()), grid=[f"{DAMPING}=0,0.25", f"{POWER}=1,2"])
  configs = [configure(damped(), point, ()) for point in points]
  require_read(damped(), points, configs, ())
  planned = plan_points(points, configs, range(4))
  shared = [[one.point[POWER] for one in group] for group in groups(planned)]
  assert shared == [[1, 1], [2, 2]]
  with pytest.raises(UserError, match=rf"{DAMPING}=0 is read with server.algorithm=damped only"):
    configure(base(), points[0], ())


def test_the_rules_of_an_entry_are_kept_before_anything_compiles(preset):
  config = damped()
  config.server.proximal_weight = 0.1
  with pytest.raises(UserError, match="damped with FedProx; use one of them"):
    setting_moves.experiment_of(config)
  with pytest.raises(UserError, match="point seed=1: damped with FedProx"):
    configure(config, {"seed": 1}, ("sampling",))


def test_an_entry_read_once_more_replaces_itself_and_another_one_is_refused(preset, tmp_path):
  config = damped(damping=0.25)
  again = runpy.run_path(str(tmp_path / "damped.py"))["ENTRY"]
  assert again.make is not preset["damped"]
  assert config == damped(damping=0.25)
  for change in ({"make": registry.ALGORITHMS["fedavg"].make}, {"records": False}):
    with pytest.raises(UserError, match="'damped' is registered already; choose another name"):
      registry.register("damped", again._replace(**change))


def options_of(**declarations) -> type:
  """A dataclass of these fields: their types are those of their defaults."""
  kinds = dict.fromkeys(declarations, float)
  return type("Wrong", (), {"__annotations__": kinds, **declarations})


@pytest.mark.parametrize(
  ("name", "declarations", "sentence"),
  [
    ("wrong", {"pull": 0.1}, "pull has no declaration; write NAME: float = core.fields.field"),
    ("wrong", {"pull": field(1, doc="x.")}, "pull: <class 'float'> = 1; let type and default be"),
    ("a-b", {"pull": field(0.1, doc="x.")}, "cannot stand in --config.options.NAME; name the"),
  ],
)
def test_options_that_cannot_be_fields_are_refused(bare, name, declarations, sentence):
  options = dataclasses.dataclass(options_of(**declarations))
  entry = registry.ALGORITHMS["fedavg"]._replace(options=options)
  with pytest.raises(UserError, match=sentence):
    registry.register(name, entry)
  assert name not in registry.ALGORITHMS


def run(folder, *arguments):
  done = subprocess.run(
    [sys.executable, "-m", "fedjax_med.train", "--config=damped.py", *arguments],
    cwd=folder,
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    encoding="utf-8",
    timeout=120,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def test_help_and_errors_of_the_command_line_know_the_options(preset, tmp_path):
  code, out, err = run(tmp_path, "--help")
  assert (code, err) == (0, "")
  assert "\noptions.damped: FedAvg with damped updates.\n" in out
  assert f"--config.{DAMPING}=0.5  (float)" in out
  assert "factor of a mean update. Read with server.algorithm=damped." in out
  code, _, err = run(tmp_path, "--config.options.damped.dampng=1")
  assert (code, err) == (
    2,
    "error: --config.options.damped.dampng is unknown; did you mean"
    " '--config.options.damped.damping'?\n",
  )
