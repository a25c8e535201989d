"""The public functions give what the entry points write, say nothing, and leave configs alone."""

import copy
import doctest
import importlib.util
import json
import math
import subprocess
import sys
import types

import jax
import numpy as np
import pandas as pd
import pytest

import fedjax_med
from fedjax_med import study
from fedjax_med.core.config import to_dict
from fedjax_med.core.training_sections import PartitionConfig
from fedjax_med.run import training
from fedjax_med.run.checkpoints import digest
from fedjax_med.trained.loading import load
from tests.running import metrics, smoke_config

BASELINES = {
  "privacy__mechanism": "none",
  "privacy__noise_multiplier": 0.0,
  "server__num_rounds": 1,
  "eval__local_baselines": True,
}


@pytest.mark.parametrize("name", fedjax_med.__all__)
def test_the_example_of_every_public_name_holds(name):
  public = getattr(fedjax_med, name)
  module = importlib.import_module(public.__module__)
  (example,) = doctest.DocTestFinder(recurse=False).find(public, name, module=module)
  assert example.examples
  outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
  assert outcome.failed == 0


def test_importing_the_package_and_loading_a_config_costs_neither_jax_nor_pandas():
  code = (
    "import sys, fedjax_med; before = set(sys.modules); assert 'numpy' not in before;"
    " assert set(fedjax_med.__all__) <= set(dir(fedjax_med));"
    " fedjax_med.load_config('smoke'); assert not {'jax', 'pandas'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_no_modules_and_modules_keep_their_names():
  for name in fedjax_med.__all__:
    assert not isinstance(getattr(fedjax_med, name), types.ModuleType)
  for name in ("train", "run", "report", "sweep"):
    assert importlib.util.find_spec(f"fedjax_med.{name}") is not None
  with pytest.raises(AttributeError, match="has no attribute 'tran'"):
    fedjax_med.tran  # noqa: B018


@pytest.fixture(scope="module")
def result():
  """The run of ``finished``, without a folder."""
  return fedjax_med.simulate(smoke_config())


def test_a_run_without_a_workdir_has_the_results_of_the_same_run_in_one(result, finished):
  summary = json.loads((finished / "summary.json").read_text())
  for name in ("run_id", "rounds", "stopped", "epsilon_max", "client_epsilon", "weights_sha256"):
    assert getattr(result, name) == summary[name], name
  assert result.overall == {name: summary["test"][name] for name in result.overall}
  assert list(result.per_hospital.index) == [line["name"] for line in summary["clients"]]
  for line in summary["clients"]:
    row = result.per_hospital.loc[line["name"]]
    assert {name: line[name] for name in row.index} == row.to_dict()
    assert result.epsilons[line["name"]] == line["epsilon"]
  assert result.workdir is None
  assert result.baselines is None


def test_the_curve_has_the_lines_of_the_log(result, finished):
  lines = [line for line in metrics(finished) if line["split"] == "test"]
  assert result.curve["round"].tolist() == [0, 2, 4, 6]
  for name in ("auroc", "loss", "epsilon_max"):
    assert result.curve[name].tolist() == [line[name] for line in lines]
  assert "client_epsilon" not in result.curve


def test_weights_are_those_that_the_folder_of_the_run_keeps(result, finished):
  trained = load(finished)
  expected = {"params": trained.params, **trained.state}
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(result.weights))
  jax.tree.map(np.testing.assert_array_equal, result.weights, expected)
  assert digest(result.weights["params"]) == result.weights_sha256
  assert result.hospital_weights == {}


def test_a_metric_that_is_not_defined_is_nan_and_epsilon_is_left_out_without_privacy():
  config = smoke_config(**{**BASELINES, "eval__local_baselines": False})
  config.partition = PartitionConfig(
    scheme="shards", num_clients=3, classes_per_client=1, min_client_size=20
  )
  result = fedjax_med.simulate(config)
  assert result.per_hospital["auroc"].isna().any()
  assert "epsilon" not in result.per_hospital
  assert "epsilon_max" not in result.curve
  assert (result.epsilons, result.epsilon_max, result.client_epsilon) == ({}, None, None)
  assert "ε none" in repr(result)


@pytest.fixture(scope="module")
def personal(tmp_path_factory):
  """A run in a folder whose heads stay at the hospitals, and its result."""
  folder = tmp_path_factory.mktemp("personal")
  config = smoke_config(**BASELINES, server__algorithm="fedper")
  config.model.name = "mlp"
  return folder, fedjax_med.simulate(config, folder)


def test_models_of_hospitals_are_those_that_the_folder_keeps(personal):
  folder, result = personal
  assert result.weights is None
  assert list(result.hospital_weights) == ["hospital 1", "hospital 2", "hospital 3"]
  for name, weights in result.hospital_weights.items():
    trained = load(folder, hospital=name)
    jax.tree.map(np.testing.assert_array_equal, weights["params"], trained.params)
  one, other, _ = (digest(weights) for weights in result.hospital_weights.values())
  assert one != other


def test_baselines_are_those_of_the_folder(personal):
  folder, result = personal
  held = json.loads((folder / "summary.json").read_text())["baselines"]
  frame = result.baselines.set_index(["baseline", "tested_on"])
  for k, line in enumerate(held["alone"], 1):
    assert frame.loc[(f"alone-{k}", f"hospital {k}"), "accuracy"] == line["own"]["accuracy"]
    assert frame.loc[(f"alone-{k}", "all hospitals"), "loss"] == line["all"]["loss"]
  assert frame.loc[("pooled", "all hospitals"), "loss"] == held["pooled"]["loss"]
  assert len(frame) == 4 * 4


def test_a_workdir_gets_all_files_and_is_resumed(tmp_path):
  half = fedjax_med.simulate(smoke_config(server__num_rounds=2), tmp_path / "run")
  whole = fedjax_med.simulate(smoke_config(server__num_rounds=4), tmp_path / "run")
  assert (half.rounds, whole.rounds) == (2, 4)
  assert whole.curve["round"].tolist() == [0, 2, 4]
  assert whole.workdir == tmp_path / "run"
  for name in ("config.json", "privacy_statement.md", "report.html", "summary.json"):
    assert (tmp_path / "run" / name).exists()
  assert whole.workdir is not None
  command = json.loads((whole.workdir / "config.json").read_text())["command"]
  assert command == f"fedjax_med.simulate(config, {str(whole.workdir)!r})"


def test_nothing_is_printed_unless_asked_for_and_the_config_stays_as_it_is(capfd, tmp_path):
  config = smoke_config(server__num_rounds=1, privacy__noise_multiplier=0.0)
  config.privacy.target_epsilon = 8
  before = copy.deepcopy(to_dict(config))
  result = fedjax_med.simulate(config, tmp_path)
  assert capfd.readouterr() == ("", "")
  assert to_dict(config) == before
  result.config.seed = 99
  assert config.seed == 0
  fedjax_med.simulate(config, verbose=True)
  assert "3 hospitals share 300 images" in capfd.readouterr().out
  assert to_dict(config) == before


def wrong_name(config):
  config.privacy.clipnorm = 1.0


def wrong_type(config):
  config.client.batch_size = "16"


def wrong_value(config):
  config.partition.alpha = -1.0


def without_effect(config):
  config.client.momentum = 0.5


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (wrong_name, "^privacy.clipnorm is unknown; did you mean 'privacy.clip_norm'?"),
    (wrong_type, "^client.batch_size='16' is str; give a whole number such as 32"),
    (wrong_value, "^partition.alpha=-1.0 must be above 0 and"),
    (without_effect, "^client.momentum=0.5 is read with client.optimizer=momentum only"),
  ],
)
def test_a_wrong_config_is_refused_before_anything_runs(monkeypatch, change, sentence):
  monkeypatch.setattr(training, "load_hospitals", None)
  config = smoke_config()
  change(config)
  with pytest.raises(fedjax_med.UserError, match=sentence):
    fedjax_med.simulate(config)


def test_overrides_that_take_away_what_a_setting_is_read_with_warn(tmp_path):
  with pytest.warns(UserWarning, match="noise_multiplier=1 of the preset is not read with these"):
    config = fedjax_med.load_config("smoke", {"privacy.mechanism": "none"})
  assert config.privacy.noise_multiplier == 0
  with pytest.raises(fedjax_med.UserError, match=r"preset=nowhere\.py is not a file; "):
    fedjax_med.load_config("nowhere.py")
  with pytest.raises(fedjax_med.UserError, match="'privacy' is a section; set its fields: privacy"):
    fedjax_med.load_config("smoke", {"privacy": "none"})


def test_the_same_noise_key_gives_the_same_weights_and_another_one_others(tmp_path, result):
  weights = []
  for digits in ("0f" * 16, "1e" * 16):
    path = tmp_path / digits
    path.write_text(digits)
    path.chmod(0o600)
    weights.append(fedjax_med.simulate(smoke_config(), noise_key=path).weights_sha256)
  assert len({*weights, result.weights_sha256}) == 3


AXES = {"privacy.noise_multiplier": np.array([1.0, 2.0]), "seed": range(2)}


def test_a_grid_crosses_its_axes_and_each_point_is_the_run_by_itself(tmp_path, capfd):
  base = smoke_config(server__num_rounds=2)
  frame = fedjax_med.simulate_grid(base, AXES, tmp_path)
  assert capfd.readouterr() == ("", "")
  values = frame.groupby("point")[["privacy.noise_multiplier", "seed"]].first()
  assert values.to_numpy().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
  pd.testing.assert_frame_equal(frame, study.load(tmp_path))
  folder = tmp_path / "points" / "00003"
  config = fedjax_med.load_config(base, {"privacy.noise_multiplier": 2.0, "seed": 1})
  alone = fedjax_med.simulate(config, noise_key=folder / "noise.key")
  row = frame[frame["point"] == 3].iloc[0]
  assert row["run_id"] == alone.run_id
  assert row["epsilon_max"] == alone.epsilon_max
  assert math.isclose(row["all.loss"], alone.overall["loss"], rel_tol=1e-4)
  command = json.loads((folder / "config.json").read_text())["command"]
  changes = {"seed": 1, "privacy.noise_multiplier": 2.0}
  assert command == f"fedjax_med.simulate(fedjax_med.load_config(config, {changes}), WORKDIR)"


@pytest.mark.parametrize(
  ("axes", "sentence"),
  [
    ({}, "^axes is empty; give fields and values"),
    ({"seed": []}, "^axis 'seed' has no values; give a list"),
    ({"privacy.sigma": [1.0]}, "^axis 'privacy.sigma' is no field that can vary"),
    ({"seed": ["one"]}, "^seed='one' of a point is no int; correct the point"),
    ({"client.momentum": [0.5]}, "^point client.momentum=0.5: client.momentum=0.5 is read with"),
  ],
)
def test_wrong_axes_are_refused(axes, sentence):
  with pytest.raises(fedjax_med.UserError, match=sentence):
    fedjax_med.simulate_grid(smoke_config(), axes)


def test_a_report_is_written_on_a_run_and_on_several(finished, tmp_path):
  assert fedjax_med.write_report(str(finished)) == finished / "report.html"
  assert fedjax_med.write_report([finished], None) == finished / "report.html"
  for folders, out, sentence in (
    ([], None, "workdir is empty; give the folder"),
    (finished, tmp_path, "is read with several folders only; leave it out"),
    ([finished, finished], None, "out is missing; name a folder"),
  ):
    with pytest.raises(fedjax_med.UserError, match=sentence):
      fedjax_med.write_report(folders, out)
