"""A whole run over several devices: results, resumption on other devices, baselines, plan."""

import json

import pytest

from configs.smoke import get_config
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.experiment import build
from fedjax_med.run import training
from fedjax_med.simulation.mesh import choose_devices
from tests.running import run


def results(folder) -> dict:
  summary = json.loads((folder / "summary.json").read_text())
  return {key: summary[key] for key in ("run_id", "rounds", "epsilon_max", "test", "clients")}


def assert_close(found, expected) -> None:
  if isinstance(expected, dict):
    assert found.keys() == expected.keys()
    for key in expected:
      assert_close(found[key], expected[key])
  elif isinstance(expected, list):
    for a, b in zip(found, expected, strict=True):
      assert_close(a, b)
  else:
    assert found == (pytest.approx(expected, rel=1e-4) if type(expected) is float else expected)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
  folder = tmp_path_factory.mktemp("one")
  run(folder)
  return results(folder)


@pytest.mark.parametrize("changes", [{}, {"layout": "vmap"}])
def test_eight_devices_end_where_one_does(one_device, changes, tmp_path):
  changes = {f"execution__{name}": value for name, value in changes.items()}
  summary = run(tmp_path, execution__devices=8, **changes)
  assert summary["plan"]["devices"] == 8
  assert_close(results(tmp_path), one_device)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 8), (8, 1)])
def test_a_run_resumes_on_another_number_of_devices(one_device, first, second, tmp_path):
  run(tmp_path, server__num_rounds=4, execution__devices=first)
  run(tmp_path, execution__devices=second)
  assert_close(results(tmp_path), one_device)


@pytest.mark.slow
def test_a_run_over_eight_devices_resumes_bit_for_bit(tmp_path):
  whole = run(tmp_path / "whole", execution__devices=8)
  run(tmp_path / "parts", server__num_rounds=4, execution__devices=8)
  assert run(tmp_path / "parts", execution__devices=8) == whole


@pytest.mark.slow
def test_a_drawn_cohort_over_devices_ends_where_one_device_does(tmp_path):
  changes = {"server__participation": "poisson", "server__participation_rate": 0.5}
  run(tmp_path / "one", **changes)
  run(tmp_path / "two", execution__devices=2, **changes)
  assert_close(results(tmp_path / "two"), results(tmp_path / "one"))


@pytest.mark.slow
def test_baselines_over_devices_end_where_one_device_does(tmp_path):
  changes = {"eval__local_baselines": True, "server__num_rounds": 2}
  one = run(tmp_path / "one", **changes)
  four = run(tmp_path / "four", execution__devices=4, **changes)
  assert_close(four["baselines"], one["baselines"])


def test_dry_run_names_the_devices_and_what_waiting_costs(capsys):
  config = get_config()
  config.model.name = "linear"
  config.execution.devices = 2
  training.dry_run(config)
  output = " ".join(capsys.readouterr().out.split())
  assert "plan: devices 2: as configured" in output
  # Three equal hospitals on two devices: 2 x 2 of 3 turns.
  assert "plan: padding 0% of the useful arithmetic, 33% with devices that wait" in output
  assert "Memory estimate" in output


def test_more_devices_than_there_are_is_a_sentence_with_a_remedy():
  config = get_config()
  config.execution.devices = 9
  with pytest.raises(UserError, match=r"execution.devices=9 exceeds the 8 devices .*; use at most"):
    build(config, load_hospitals(config))


def test_devices_follow_the_flag_and_else_the_backend(monkeypatch):
  assert choose_devices(0, 5)[:2] == (1, None)
  assert choose_devices(1, 5)[:2] == (1, None)
  four = choose_devices(4, 2)
  assert four.number == 4
  assert four.mesh is not None
  assert four.mesh.shape == {"clients": 4}
  monkeypatch.setattr("jax.default_backend", lambda: "gpu")
  assert choose_devices(0, 5).number == 5
  assert choose_devices(0, 100).number == 8
