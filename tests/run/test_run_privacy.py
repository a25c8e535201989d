"""What a run promises and writes down: privacy.json, ledger, statement, budgets, units."""

import dataclasses
import html
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.audit import verdict
from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.models.networks import cnn
from fedjax_med.models.registry import MODELS
from fedjax_med.prepare import case
from fedjax_med.prepare.experiment import build, build_baselines
from fedjax_med.privacy import __main__ as command
from fedjax_med.privacy import ledger
from fedjax_med.privacy.banded import Memory
from fedjax_med.privacy.clipping import TWO_PASS_GAP
from fedjax_med.privacy.guarantees import spent
from fedjax_med.report import reported_run as runs
from fedjax_med.run import single, training
from fedjax_med.run.single import train_rounds
from tests.running import metrics, run, smoke_config


def is_memory(leaf) -> bool:
  return isinstance(leaf, Memory)


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


@pytest.mark.slow
def test_correlated_noise_survives_resuming_and_is_in_ledger_statement_and_privacy_file(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  changes = {"privacy__bands": 3, "client__batch_size": 6}
  changes |= {"server__num_rounds": 4, "eval__every": 2}
  expected = run(whole, **changes)

  def killed(experiment, folder, listen, **rest):
    def until(point):
      listen(point)
      if point.rounds == 4:  # before its checkpoint: it resumes from round 2
        raise KeyboardInterrupt

    return train_rounds(experiment, folder, until, **rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training, "train_rounds", killed)
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


@pytest.mark.slow
def test_two_private_trainings_on_the_same_records_never_share_noise():
  config = get_config()
  hospitals = load_hospitals(config)
  first = build(config, hospitals)
  other = dataclasses.replace(config, client=dataclasses.replace(config.client, learning_rate=0.1))
  runs = [first, build(other, hospitals), *build_baselines(first).values()]
  keys = {tuple(np.asarray(jax.random.key_data(run.key)).tolist()) for run in runs}
  assert len(keys) == len(runs)
  again = build(config, hospitals)
  assert (jax.random.key_data(again.key) == jax.random.key_data(first.key)).all()


def test_the_ledger_on_disk_is_never_behind_the_log(tmp_path):
  config = get_config()
  config.model.name, config.eval.every = "linear", 1
  experiment = build(config, load_hospitals(config))
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


def test_an_audit_is_of_the_rounds_that_the_budget_allows(monkeypatch):
  config = smoke_config(privacy__target_epsilon=4.0, server__num_rounds=200)
  experiment = build(config, load_hospitals(config))
  subjects = []

  def seen(subject, *_):
    subjects.append(subject)
    return [verdict.PartyResult("hospital 1", 4.0, 1e-3, 0.0, "none", 1, 0)], [], 0.0

  monkeypatch.setattr(verdict, "audit_units", seen)
  verdict.audit_run(experiment, 1000, 0, lambda _: None)
  (subject,) = subjects
  assert max(spent(subject.guarantee, subject.steps)) <= 4.0
  more = np.array(subject.steps) + experiment.steps
  assert max(spent(subject.guarantee, more)) > 4.0


def test_a_target_epsilon_is_met_at_every_hospital(tmp_path):
  summary = run(tmp_path, privacy__noise_multiplier=0.0, privacy__target_epsilon=3.0)
  record = json.loads((tmp_path / "privacy.json").read_text())
  for hospital in record["guarantees"][0]["parties"]:
    assert 0.995 * 3 <= hospital["epsilon"] <= 3
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
  (party,) = central["parties"]
  assert party["n"] == 3
  # Two releases of one noise multiplier: the mechanism says so, and the device has its numbers.
  assert "a second release of each round" in central["mechanism"]
  assert party["sum_noise_multiplier"] > party["noise_multiplier"] == 3.0
  config = smoke_config(**changes)
  level = build(config, load_hospitals(config)).hyper.client_level
  assert level is not None
  assert float(level.noise_multiplier) == pytest.approx(party["sum_noise_multiplier"])
  assert float(level.count_noise) == pytest.approx(party["count_noise"])
  assert summary["client_epsilon"] == central["epsilon_max"]
  assert summary["epsilon_max"] == local["epsilon_max"]
  report = (tmp_path / "report.html").read_text()
  assert 'id="privacy-record"' in report
  assert 'id="privacy-client"' in report
  statement = (tmp_path / "privacy_statement.md").read_text()
  assert "which sees what hospitals send before it adds the noise" in statement
  assert "joins them by a sum in which each counts 1" in statement
  assert command.recompute(tmp_path)["guarantees"][1]["epsilon_max"] == central["epsilon_max"]


def test_who_took_part_stands_in_nothing_that_is_given_away(tmp_path):
  run(
    tmp_path,
    server__weighting="uniform",
    server__participation="poisson",
    server__participation_rate=0.5,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__noise_multiplier=3.0,
  )
  every = {2 * 6}  # steps of all rounds, whoever was in them
  local = json.loads((tmp_path / "privacy.json").read_text())["guarantees"][0]["parties"]
  assert {party["steps"] for party in local} == every
  assert {count for row in ledger.read(tmp_path).counts[:1] for count in row} == every
  for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
    assert not (line["split"] == "train" and {"clients", "steps"} & line.keys())
    (guarantee, _) = ledger.read(tmp_path).guarantees
    assert line["epsilon_max"] == pytest.approx(max(spent(guarantee, [2 * line["round"]] * 3)))
  statement = (tmp_path / "privacy_statement.md").read_text()
  rows = [line.split(" | ") for line in statement.splitlines() if line.startswith("| hospital")]
  assert {row[6] for row in rows} == {"12"}
  page = html.unescape((tmp_path / "report.html").read_text())
  sentence = "For whom sees who took part: "
  told = statement.replace("*", "").partition(sentence)[2].split("\n")[0]
  assert told in page


def test_an_update_that_is_not_finite_ends_no_run_that_protects_whole_hospitals(tmp_path):
  summary = run(
    tmp_path,
    privacy__mechanism="none",
    privacy__noise_multiplier=0.0,
    server__weighting="uniform",
    client__learning_rate=1e38,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__noise_multiplier=1.0,
  )
  assert summary["stopped"] == "completed"
  lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
  counted = [line["hospitals_not_finite"] for line in lines if line["split"] == "train"]
  assert set(counted) == {3}


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


@pytest.mark.slow
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
  weights = np.asarray(build(config, alike).clients.weight)
  np.testing.assert_allclose(weights, np.array(list(map(len, patients))) / sum(map(len, patients)))


def test_a_run_that_is_extended_has_no_statement_of_the_shorter_one(tmp_path, monkeypatch):
  run(tmp_path, server__num_rounds=2)
  assert (tmp_path / "privacy_statement.md").exists()

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(single, "log_lines", killed)  # at its first log point
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, server__num_rounds=6)
  assert not (tmp_path / "privacy_statement.md").exists()


def test_networks_of_one_name_and_other_code_never_share_noise(tmp_path, monkeypatch):
  config, code = get_config(), (pathlib.Path(cnn.__file__)).read_text()
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
    return case.federation(config, hospitals).run_id

  same = built(code)
  assert built(code) == same
  assert built(code + "# other code\n") != same


def test_correlated_noise_goes_on_from_every_step_that_was_taken(tmp_path):
  config = get_config()
  config.model.name, config.privacy.bands, config.client.batch_size = "linear", 2, 8
  config.server.participation, config.server.participation_rate = "poisson", 0.5
  experiment = build(config, load_hospitals(config))
  assert experiment.local is not None
  np.testing.assert_array_equal(
    experiment.clients.coefficients,
    np.array([m.coefficients for m in experiment.local.mechanisms], np.float32),
  )
  state = train_rounds(experiment, tmp_path).state
  (memory,) = [
    leaf for leaf in jax.tree.leaves(state.client_states, is_leaf=is_memory) if is_memory(leaf)
  ]
  np.testing.assert_array_equal(memory.step, state.steps)
  everything = config.server.num_rounds * config.client.num_local_steps
  assert np.asarray(state.steps).min() < everything  # somebody was absent
  bare = experiment._replace(clients=experiment.clients._replace(coefficients=None))
  with pytest.raises(ValueError, match="do not go with a memory of 2 bands"):
    train_rounds(bare, tmp_path / "bare")


@pytest.mark.slow
def test_a_network_with_penalties_trains_privately_by_its_name(tmp_path):
  network = ModelConfig(name="fedxnet", width=0.25)
  summary = run(tmp_path, model=network, server__num_rounds=1, eval__every=1)
  assert np.isfinite(summary["test"]["loss"])
  assert summary["plan"]["clipping"] == "book_keeping"


@pytest.mark.slow
def test_correlated_noise_is_the_same_in_every_layout(tmp_path):
  changes = {"privacy__bands": 3, "client__batch_size": 6, "server__num_rounds": 3}
  changes |= {"eval__every": 3}
  one_by_one = run(tmp_path / "scan", **changes)["test"]
  vmapped = run(tmp_path / "vmap", **changes, execution__layout="vmap")["test"]
  chunks = {"execution__layout": "chunk", "execution__chunk_size": 2}
  for other in (vmapped, run(tmp_path / "chunk", **changes, **chunks)["test"]):
    assert other["loss"] == pytest.approx(one_by_one["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_budget_ends_correlated_noise_before_it_is_crossed(tmp_path):
  changes = {"privacy__bands": 3, "client__batch_size": 6, "eval__every": 50}
  summary = run(tmp_path, **changes, privacy__target_epsilon=5.0, server__num_rounds=400)
  assert summary["stopped"] == "budget"
  assert summary["epsilon_max"] <= 5.0
  (guarantee,) = ledger.read(tmp_path).guarantees
  further = [count + 3 for count in ledger.read(tmp_path).counts[0]]
  assert max(spent(guarantee, further)) > 5.0


@pytest.mark.slow
def test_baselines_and_patients_go_with_correlated_noise(tmp_path):
  changes = {"privacy__bands": 2, "privacy__unit": "patient", "client__batch_size": 6}
  run(tmp_path, **changes, server__num_rounds=2, eval__every=2, eval__local_baselines=True)
  record = json.loads((tmp_path / "privacy.json").read_text())
  (guarantee,) = record["guarantees"]
  assert guarantee["unit"] == "patient"
  for name, place in (("alone-1", "at the hospital"), ("pooled", "where the images are pooled")):
    folder = tmp_path / "baselines" / name
    (own,) = json.loads((folder / "privacy.json").read_text())["guarantees"]
    assert own["mechanism"].startswith(f"DP-SGD {place} with correlated noise")
    assert command.recompute(folder)["epsilon_max"] == pytest.approx(own["epsilon_max"])
    assert record["baselines_epsilon"][name] == own["epsilon_max"] > 0


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
    build(config, load_hospitals(config))

  with pytest.raises(UserError) as error:
    start()
  assert sentence in str(error.value)


@pytest.mark.slow
def test_rounding_that_has_no_bound_is_told(tmp_path):
  for clipping in ("two_pass", "book_keeping"):
    run(tmp_path / clipping, privacy__clipping=clipping, server__num_rounds=1)
    record = json.loads((tmp_path / clipping / "privacy.json").read_text())
    assert (TWO_PASS_GAP in record["not_covered"]) == (clipping == "two_pass")
  assert TWO_PASS_GAP in (tmp_path / "two_pass" / "privacy_statement.md").read_text()
