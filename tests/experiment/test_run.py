"""A whole run in a workdir: its files, its resumption, its refusals."""

import contextlib
import dataclasses
import html
import importlib.util
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.experiment import build
from fedjax_med.experiment import run as runs
from fedjax_med.experiment.loop import train_rounds
from fedjax_med.models.registry import MODELS
from fedjax_med.privacy import __main__ as command
from fedjax_med.privacy import ledger
from fedjax_med.privacy.banded import Memory
from fedjax_med.privacy.clipping import TWO_PASS_GAP

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(folder: pathlib.Path, **changes):
  """Runs the smoke config with changes such as server__num_rounds=4; returns the summary.

  With a linear model, which compiles in a second; the killed run below trains the network.
  """
  config = get_config()
  config.model.name = "linear"
  for path, value in changes.items():
    section, _, name = path.partition("__")
    setattr(getattr(config, section) if name else config, name or section, value)
  runs.run(config, folder, "smoke", "test")
  return json.loads((folder / "summary.json").read_text())


def is_memory(leaf) -> bool:
  return isinstance(leaf, Memory)


def metrics(folder: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  run(folder)
  return folder


def test_a_run_leaves_every_promised_file(finished):
  for name in (
    "config.json",
    "metrics.jsonl",
    "privacy.json",
    "ledger.jsonl",
    "privacy_statement.md",
    "summary.json",
    "hospitals.json",
    "timing.json",
    "report.html",
    "figures/partition.png",
    "figures/rounds.png",
    "figures/hospitals.png",
    "figures/confusion.png",
    "figures/examples.png",
  ):
    assert (finished / name).stat().st_size > 0, name
  assert any((finished / "checkpoints").iterdir())


def test_metrics_hold_a_line_a_log_point_with_every_hospital(finished):
  lines = metrics(finished)
  test = [line for line in lines if line["split"] == "test"]
  assert [line["round"] for line in test] == [0, 2, 4, 6]
  keys = {"loss", "accuracy", "precision", "recall", "specificity", "f1", "auroc", "epsilon_max"}
  for line in test:
    assert keys <= line.keys()
    assert len(line["clients"]) == 3
    for client in line["clients"]:
      assert (keys - {"epsilon_max"}) | {"epsilon"} <= client.keys()
  epsilons = [line["epsilon_max"] for line in test]
  assert epsilons[0] == 0
  assert epsilons == sorted(epsilons)
  assert [line["round"] for line in lines if line["split"] == "train"] == [2, 4, 6]


def test_privacy_file_states_the_mechanism_that_ran(finished):
  record = json.loads((finished / "privacy.json").read_text())
  (guarantee,) = record["guarantees"]
  assert {"unit", "adjacency", "accountant", "epsilon_max"} <= guarantee.keys()
  for hospital in guarantee["parties"]:
    assert hospital["steps"] == 6 * 2
    assert hospital["sampling_probability"] == pytest.approx(min(1, 16 / hospital["n"]))
    assert hospital["delta"] < 1 / hospital["n"]
  assert record["epsilon_max"] == max(party["epsilon"] for party in guarantee["parties"])
  assert record["epsilon_max"] == metrics(finished)[-1]["epsilon_max"]


def test_correlated_noise_survives_resuming_and_is_in_ledger_statement_and_privacy_file(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  changes = {"privacy__bands": 3, "client__batch_size": 6}
  changes |= {"server__num_rounds": 4, "eval__every": 2}
  expected = run(whole, **changes)

  def killed(experiment, folder, listen, *rest):
    def until(point):
      listen(point)
      if point.rounds == 4:  # before its checkpoint: it resumes from round 2
        raise KeyboardInterrupt

    return train_rounds(experiment, folder, until, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runs, "train_rounds", killed)
    with pytest.raises(KeyboardInterrupt):
      run(parts, **changes)
  found = run(parts, **changes)
  assert found["weights_sha256"] == expected["weights_sha256"]
  (guarantee,) = json.loads((parts / "privacy.json").read_text())["guarantees"]
  assert "one of 3 fixed subsets" in guarantee["mechanism"]
  assert "one of 3 fixed subsets" in (parts / "privacy_statement.md").read_text()
  for party in guarantee["parties"]:
    assert len(party["coefficients"]) == 3
    assert party["sampling_probability"] == pytest.approx(min(1, 3 * 6 / party["n"]))
  assert command.recompute(parts)["epsilon_max"] == pytest.approx(guarantee["epsilon_max"])


def test_the_command_recomputes_what_privacy_file_says(finished):
  found = command.recompute(finished)
  record = json.loads((finished / "privacy.json").read_text())
  assert found["epsilon_max"] == pytest.approx(record["epsilon_max"], rel=1e-9)
  assert found["rounds"] == 6


def test_a_run_whose_ledger_is_gone_or_behind_is_not_resumed(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "copy")
  path = folder / ledger.FILE
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:-1]))
  with pytest.raises(UserError, match=r"does not hold the line .*; restore the ledger"):
    run(folder)
  path.unlink()
  with pytest.raises(UserError, match=r"does not hold the line .*; restore the ledger"):
    run(folder)


def test_summary_agrees_with_its_own_parts(finished):
  summary = json.loads((finished / "summary.json").read_text())
  confusion = np.array(summary["confusion"])
  assert confusion.sum() == summary["test"]["n"] == sum(c["n"] for c in summary["clients"])
  assert summary["test"]["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())


def test_three_rounds_and_three_more_equal_six(finished, tmp_path):
  run(tmp_path, server__num_rounds=3)
  assert run(tmp_path) == json.loads((finished / "summary.json").read_text())


def test_a_finished_run_started_again_changes_nothing(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "copy")
  before = (folder / "metrics.jsonl").read_bytes()
  assert run(folder) == json.loads((finished / "summary.json").read_text())
  assert (folder / "metrics.jsonl").read_bytes() == before


def test_layouts_change_results_by_rounding_only(finished, tmp_path):
  reference = json.loads((finished / "summary.json").read_text())["test"]
  vmapped = run(tmp_path / "vmap", execution__layout="vmap")["test"]
  chunked = run(tmp_path / "chunk", execution__layout="chunk", execution__chunk_size=2)["test"]
  for other in (vmapped, chunked):
    assert other["loss"] == pytest.approx(reference["loss"], rel=1e-4)
    assert other["auroc"] == pytest.approx(reference["auroc"], abs=0.02)


@pytest.mark.slow
def test_killed_at_random_moments_and_rerun_equals_the_unbroken_run(tmp_path):
  command = [sys.executable, "-m", "fedjax_med.train", "--config=configs/smoke.py"]
  command += ["--config.server.num_rounds=300", "--config.eval.every=5"]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

  def start(name):
    return subprocess.Popen(
      [*command, f"--workdir={tmp_path / name}"],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )

  whole = start("whole")
  _, errors = whole.communicate(timeout=300)
  assert whole.returncode == 0, errors
  chance = random.Random(3)
  kills = 0
  for _ in range(4):
    process = start("broken")
    with contextlib.suppress(subprocess.TimeoutExpired):
      lines = tmp_path / "broken" / "metrics.jsonl"
      seen = lines.stat().st_size if lines.exists() else 0
      while process.poll() is None and not (lines.exists() and lines.stat().st_size > seen + 500):
        time.sleep(0.02)
      process.wait(chance.uniform(0, 1.0))
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.communicate()
  last = start("broken")
  _, errors = last.communicate(timeout=300)
  assert last.returncode == 0, errors
  assert kills >= 2
  for name in ("summary.json", "privacy.json", "hospitals.json", "ledger.jsonl"):
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

  def lines_of(name):
    return [{**line, "seconds": 0} for line in metrics(tmp_path / name)]

  assert lines_of("broken") == lines_of("whole")


def test_another_configuration_is_refused_in_the_same_workdir(finished):
  with pytest.raises(UserError, match=r"holds run \w+, this configuration is run \w+; use another"):
    run(finished, client__learning_rate=0.25)


def newest_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))


def test_a_damaged_checkpoint_is_refused_with_its_reason(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "copy")
  for path in newest_checkpoint(folder).rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      data = bytearray(path.read_bytes())
      data[len(data) // 2 :] = b"\0" * (len(data) - len(data) // 2)
      path.write_bytes(bytes(data))
  with pytest.raises(UserError, match=r"checkpoint .* (cannot be read|was altered).*; delete"):
    run(folder)


def test_a_foreign_checkpoint_is_refused(finished, tmp_path):
  run(tmp_path / "other", seed=5)
  shutil.rmtree(tmp_path / "other" / "checkpoints")
  shutil.copytree(finished / "checkpoints", tmp_path / "other" / "checkpoints")
  with pytest.raises(UserError, match="belongs to run"):
    run(tmp_path / "other", seed=5)


def test_a_loss_that_breaks_stops_with_round_and_hospital_and_keeps_the_checkpoint(tmp_path):
  # Each step multiplies the weights by 1 - 3 * 10: some rounds pass before they overflow.
  with (
    jax.numpy_dtype_promotion("standard"),  # optax's adam mixes int32 counts and floats
    pytest.raises(UserError) as caught,
  ):
    run(
      tmp_path,
      client__optimizer="adamw",
      client__weight_decay=10.0,
      privacy__mechanism="none",
      privacy__noise_multiplier=0.0,
      client__learning_rate=3.0,
      server__num_rounds=60,
      eval__every=1,
    )
  sentence = r"round (\d+): the loss at 'hospital \d' became .* \(round (\d+) is saved\); lower"
  found = re.match(sentence, str(caught.value))
  assert found, str(caught.value)
  assert int(found[1]) == int(found[2]) + 1
  assert newest_checkpoint(tmp_path).name == found[2]
  assert metrics(tmp_path)[-1]["round"] == int(found[2])
  assert not (tmp_path / "summary.json").exists()


def test_a_loss_that_breaks_at_once_says_that_nothing_was_saved(tmp_path):
  changes = {"privacy__mechanism": "none", "privacy__noise_multiplier": 0.0}
  with pytest.raises(UserError, match=r"round 1: the loss at .*\(no round was saved\); lower"):
    run(tmp_path, **changes, client__learning_rate=3e38)


def test_fewer_rounds_than_are_done_are_refused(finished):
  with pytest.raises(UserError, match=r"server.num_rounds=3 is under the 6 rounds done"):
    run(finished, server__num_rounds=3)


def test_two_private_trainings_on_the_same_records_never_share_noise():
  config = get_config()
  hospitals = load_hospitals(config)
  first = build.build(config, hospitals)
  other = dataclasses.replace(config, client=dataclasses.replace(config.client, learning_rate=0.1))
  runs = [first, build.build(other, hospitals), *build.build_baselines(first).values()]
  keys = {tuple(np.asarray(jax.random.key_data(run.key)).tolist()) for run in runs}
  assert len(keys) == len(runs)
  again = build.build(config, hospitals)
  assert (jax.random.key_data(again.key) == jax.random.key_data(first.key)).all()


def test_the_ledger_on_disk_is_never_behind_the_log(tmp_path):
  config = get_config()
  config.model.name, config.eval.every = "linear", 1
  experiment = build.build(config, load_hospitals(config))
  (tmp_path / "figures").mkdir()
  seen = []

  def listen(point):
    record = json.loads((tmp_path / "privacy.json").read_text())
    assert record["epsilon_max"] == max(point.epsilons)
    (guarantee,) = record["guarantees"]
    assert {hospital["steps"] for hospital in guarantee["parties"]} == {2 * point.rounds}
    assert ledger.read(tmp_path).counts == ((2 * point.rounds,) * 3,)
    seen.append(point.rounds)

  train_rounds(experiment, tmp_path, listen)
  assert seen == list(range(7))


def test_the_run_stops_before_the_budget_is_crossed(tmp_path):
  budget = 4.0
  summary = run(tmp_path, privacy__target_epsilon=budget, server__num_rounds=200)
  assert summary["stopped"] == "budget"
  assert summary["epsilon_max"] <= budget
  assert 0 < summary["rounds"] < 200
  more = run(tmp_path / "more", server__num_rounds=summary["rounds"] + 1)
  assert more["epsilon_max"] > budget


def test_a_target_epsilon_is_met_at_every_hospital(tmp_path):
  summary = run(tmp_path, privacy__noise_multiplier=0.0, privacy__target_epsilon=3.0)
  record = json.loads((tmp_path / "privacy.json").read_text())
  for hospital in record["guarantees"][0]["parties"]:
    assert 0.98 * 3 <= hospital["epsilon"] <= 3
  assert summary["stopped"] == "completed"


def test_whole_hospitals_are_protected_beside_their_records_and_both_epsilons_are_reported(
  tmp_path,
):
  changes = {
    "server__weighting": "uniform",
    "client_privacy__mechanism": "dp_fedavg",
    "client_privacy__noise_multiplier": 3.0,
    "client_privacy__clipping": "adaptive",
  }
  summary = run(tmp_path, **changes)
  record = json.loads((tmp_path / "privacy.json").read_text())
  local, central = record["guarantees"]
  assert (local["unit"], central["unit"]) == ("record", "client")
  assert central["parties"][0]["steps"] == 6
  assert central["parties"][0]["n"] == 3
  assert summary["client_epsilon"] == central["epsilon_max"]
  assert summary["epsilon_max"] == local["epsilon_max"]
  report = (tmp_path / "report.html").read_text()
  assert 'id="privacy-record"' in report
  assert 'id="privacy-client"' in report
  assert "which sees every update" in (tmp_path / "privacy_statement.md").read_text()
  assert command.recompute(tmp_path)["guarantees"][1]["epsilon_max"] == central["epsilon_max"]


def test_whole_hospitals_alone_are_protected_and_the_budget_of_theirs_ends_the_run(tmp_path):
  summary = run(
    tmp_path,
    privacy__mechanism="none",
    privacy__noise_multiplier=0.0,
    server__weighting="uniform",
    server__num_rounds=50,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__noise_multiplier=2.0,
    client_privacy__target_epsilon=4.0,
  )
  assert summary["stopped"] == "budget"
  assert 0 < summary["rounds"] < 50
  assert summary["epsilon_max"] == summary["client_epsilon"] <= 4
  (guarantee,) = json.loads((tmp_path / "privacy.json").read_text())["guarantees"]
  assert guarantee["unit"] == "client"


def test_patients_are_counted_sampled_and_reported_as_such(tmp_path):
  config = get_config()
  hospitals = load_hospitals(config)
  groups = np.arange(len(hospitals.dataset.labels), dtype=np.int32) // 3  # three images a patient
  owner = [groups[row] for row in client_rows(hospitals.train)]
  patients = [np.unique(row) for row in owner]
  alike = dataclasses.replace(hospitals, split=dataclasses.replace(hospitals.split, units=groups))
  config.model.name, config.privacy.unit, config.privacy.rows_per_unit = "linear", "patient", 2
  runs.run(config, tmp_path, "smoke", "test", lambda: alike)
  (guarantee,) = json.loads((tmp_path / "privacy.json").read_text())["guarantees"]
  assert guarantee["unit"] == "patient"
  assert [party["n"] for party in guarantee["parties"]] == [len(p) for p in patients]
  weights = np.asarray(build.build(config, alike).clients.weight)
  np.testing.assert_allclose(weights, np.array(list(map(len, patients))) / sum(map(len, patients)))


def test_baselines_train_each_hospital_alone_and_pooled(tmp_path):
  summary = run(tmp_path, eval__local_baselines=True, server__num_rounds=2)
  curves = json.loads((tmp_path / "baselines.json").read_text())
  assert [entry["name"] for entry in curves["alone"]] == [f"hospital {k}" for k in (1, 2, 3)]
  assert [point["round"] for point in curves["alone"][0]["curve"]] == [0, 2]
  assert len(curves["pooled"]["curve"][-1]["clients"]) == 3
  assert summary["baselines"]["pooled"]["accuracy"] is not None
  privacy = json.loads((tmp_path / "privacy.json").read_text())
  alone = curves["alone"][1]["curve"][-1]["all"]["epsilon_max"]
  assert alone == pytest.approx(privacy["guarantees"][0]["parties"][1]["epsilon"])


@pytest.mark.parametrize("unit", ["record", "client"])
def test_baselines_say_what_does_not_protect_them(tmp_path, unit):
  changes = {"privacy__mechanism": "none", "client_privacy__mechanism": "dp_fedavg"}
  changes |= {"client_privacy__noise_multiplier": 1.0, "server__weighting": "uniform"}
  run(
    tmp_path,
    eval__local_baselines=True,
    server__num_rounds=2,
    **(changes if unit == "client" else {}),
  )
  record = json.loads((tmp_path / "privacy.json").read_text())
  gaps = " ".join(record["not_covered"])
  assert ("trained WITHOUT NOISE" in gaps) == (unit == "client")
  assert ("further trainings on the same records" in gaps) == (unit == "record")
  assert record["not_covered"][-1] in (tmp_path / "privacy_statement.md").read_text()
  assert record["not_covered"][-1] in html.unescape((tmp_path / "report.html").read_text())


def test_baselines_that_ended_are_told_also_by_a_later_start_without_them(tmp_path):
  run(tmp_path, eval__local_baselines=True, server__num_rounds=2)
  run(tmp_path, server__num_rounds=2)
  record = json.loads((tmp_path / "privacy.json").read_text())
  assert any("further trainings on the same records" in gap for gap in record["not_covered"])


def test_baselines_that_end_at_budgets_of_their_own_are_reported(tmp_path):
  summary = run(
    tmp_path,
    eval__local_baselines=True,
    eval__every=1,
    server__num_rounds=12,
    partition__scheme="quantity",
    partition__alpha=0.5,
    privacy__target_epsilon=4.0,
  )
  assert summary["stopped"] == "budget"
  curves = json.loads((tmp_path / "baselines.json").read_text())["alone"]
  ends = [curve["curve"][-1]["round"] for curve in curves]
  assert len(set(ends)) > 1
  page = (tmp_path / "report.html").read_text()
  assert f"alone after\n{min(ends)} to {max(ends)}." in page


def test_a_run_that_is_extended_has_no_statement_of_the_shorter_one(tmp_path, monkeypatch):
  run(tmp_path, server__num_rounds=2)
  assert (tmp_path / "privacy_statement.md").exists()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(runs, "train_rounds", killed)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, server__num_rounds=6)
  assert not (tmp_path / "privacy_statement.md").exists()


def test_networks_of_one_name_and_other_code_never_share_noise(tmp_path, monkeypatch):
  config, code = get_config(), (ROOT / "fedjax_med" / "models" / "cnn.py").read_text()
  config.model.name = "mine"
  hospitals = load_hospitals(config)

  def built(text):
    path = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(MODELS, "mine", module.linear)
    return build.federation(config, hospitals).run_id

  same = built(code)
  assert built(code) == same
  assert built(code + "# other code\n") != same


def test_correlated_noise_goes_on_from_every_step_that_was_taken(tmp_path):
  config = get_config()
  config.model.name, config.privacy.bands, config.client.batch_size = "linear", 2, 8
  config.server.participation, config.server.participation_rate = "poisson", 0.5
  experiment = build.build(config, load_hospitals(config))
  assert experiment.local is not None
  np.testing.assert_array_equal(
    experiment.clients.coefficients,
    np.array([m.coefficients for m in experiment.local.mechanisms], np.float32),
  )
  state = train_rounds(experiment, tmp_path, lambda _: None).state
  (memory,) = [leaf for leaf in jax.tree.leaves(state.kept, is_leaf=is_memory) if is_memory(leaf)]
  np.testing.assert_array_equal(memory.step, state.steps)
  assert len(set(np.asarray(state.steps).tolist())) > 1
  bare = experiment._replace(clients=experiment.clients._replace(coefficients=None))
  with pytest.raises(ValueError, match="do not go with a memory of 2 bands"):
    train_rounds(bare, tmp_path / "bare", lambda _: None)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"privacy__bands": 5}, "privacy.bands=5 times client.batch_size=16 exceeds the"),
    (
      {"privacy__bands": 2, "privacy__solve_for": "rounds", "privacy__target_epsilon": 3.0},
      "which privacy.solve_for='rounds' leaves open",
    ),
    ({"privacy__target_epsilon": 1e-9}, "privacy.target_epsilon=1e-09 is under 1e-06"),
  ],
)
def test_what_correlated_noise_cannot_do_is_a_sentence(tmp_path, changes, sentence):
  config = get_config()
  for path, value in changes.items():
    section, _, name = path.partition("__")
    setattr(getattr(config, section), name, value)

  def start():
    validate(config)
    build.build(config, load_hospitals(config))

  with pytest.raises(UserError) as error:
    start()
  assert sentence in str(error.value)


def test_rounding_that_has_no_bound_is_told(tmp_path):
  for clipping in ("two_pass", "book_keeping"):
    run(tmp_path / clipping, privacy__clipping=clipping, server__num_rounds=1)
    record = json.loads((tmp_path / clipping / "privacy.json").read_text())
    assert (TWO_PASS_GAP in record["not_covered"]) == (clipping == "two_pass")
  assert TWO_PASS_GAP in (tmp_path / "two_pass" / "privacy_statement.md").read_text()


def test_an_unwritable_workdir_is_a_sentence(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--workdir=.* cannot be written .*; choose"):
    run(tmp_path / "file" / "run")


def test_more_clients_than_examples_is_a_sentence(tmp_path):
  config = get_config()
  config.partition.num_clients = 1000
  with pytest.raises(UserError, match=r"partition.num_clients=1000 exceeds the \d+ training units"):
    load_hospitals(config)
