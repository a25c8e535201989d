"""Runs in which hospitals add the noise: what is told, checked, refused and audited."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.audit.verdict import audit_run
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.accounted_arrays import differences, larger_updates
from fedjax_med.prepare.experiment import build
from fedjax_med.privacy import __main__ as command
from fedjax_med.privacy import claims, ledger
from fedjax_med.privacy.discrete_gaussian import make_sampler
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.run.statement import statement_text
from tests.run.test_checker import alterations, at, places, replaced
from tests.running import metrics, run, smoke_config

CHANGES = {
  "server__weighting": "uniform",
  "client_privacy__mechanism": "dp_fedavg",
  "client_privacy__noise": "distributed",
  "client_privacy__noise_multiplier": 3.0,
  "secure__protocol": "masking",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A finished run of both mechanisms, of records and of whole hospitals."""
  made = tmp_path_factory.mktemp("shared")
  run(made, server__num_rounds=2, eval__every=1, **CHANGES)
  return made


@pytest.fixture(scope="module")
def experiment():
  config = smoke_config(server__num_rounds=2, privacy__mechanism="none", **CHANGES)
  return build(config, load_hospitals(config))


def test_both_epsilons_are_told_with_all_that_that_of_hospitals_follows_from(folder):
  local, central = json.loads((folder / claims.FILE).read_text())["guarantees"]
  assert (local["unit"], central["unit"]) == ("record", "client")
  (party,) = central["parties"]
  mechanism = ledger.read(folder).guarantees[1].mechanisms[0]
  assert isinstance(mechanism, DistributedGaussian)
  assert (party["n"], party["colluders"], party["noise_multiplier"]) == (3, 1, 3.0)
  assert (party["rho"], party["xi"]) == (mechanism.rho, mechanism.xi)
  assert party["scale"] == mechanism.scale >= 2.0**20
  assert (
    party["num_parameters"] == json.loads((folder / "summary.json").read_text())["num_parameters"]
  )
  assert metrics(folder)[-1]["client_epsilon"] == central["epsilon_max"]
  found = command.recompute(folder)["guarantees"][1]
  assert found["epsilon_max"] == central["epsilon_max"]
  assert found["parties"][0]["epsilon"] < found["parties"][0]["epsilon_rdp"]


def test_the_statement_says_against_whom_and_what_it_rests_on(folder):
  text = statement_text(folder)
  assert "the server, which sees sums over all hospitals only, together with any one other" in text
  assert "**not** against 2 or more other hospitals that tell each other" in text
  assert "**Noise of the hospitals:** σ is that of 2 of the 3 hospitals together" in text
  assert "rests on a secure aggregation that shows it nothing else" in text
  assert "has to be trusted" not in text


def test_every_alteration_of_what_is_claimed_for_hospitals_is_refused(folder, tmp_path):
  for name in (claims.FILE, ledger.FILE):
    shutil.copy(folder / name, tmp_path / name)
  path = tmp_path / claims.FILE
  whole = json.loads(path.read_text())
  claims.read(tmp_path)
  inner = whole["guarantees"][1]
  changes = [(place, other) for place in places(inner) for other in alterations(at(inner, place))]
  assert len(changes) > 80
  for place, other in changes:
    path.write_text(json.dumps(replaced(whole, ("guarantees", 1, *place), other)))
    with pytest.raises(UserError, match=r"privacy.json: guarantees"):
      claims.read(tmp_path)


def test_a_run_whose_server_would_see_single_updates_does_not_begin(tmp_path):
  changes = {**CHANGES, "secure__protocol": "none"}
  with pytest.raises(UserError, match="the server would see each update"):
    run(tmp_path, **changes)
  assert not (tmp_path / ledger.FILE).exists()


def test_arrays_that_are_not_those_of_the_account_are_named(experiment):
  case, hyper = experiment.case, experiment.hyper
  level = hyper.client_level

  def wrong(**changes):
    other = hyper._replace(client_level=level._replace(**changes))
    return differences(case.protection, case.numbers, case.rows, experiment.clients, other)

  assert wrong() == []
  shares, sampler = level.shares, level.shares.sampler
  less = make_sampler(case.protection.central.mechanisms[0].share / 2)
  assert "scale" in wrong(shares=shares._replace(scale=shares.scale / 2))[0]
  assert any("another table" in text for text in wrong(shares=shares._replace(sampler=less)))
  none = sampler._replace(levels=jnp.int32(0))
  assert "another levels" in wrong(shares=shares._replace(sampler=none))[0]
  assert "is not on the device" in wrong(shares=None)[0]
  size = case.protection.central.mechanisms[0].num_parameters
  assert larger_updates(case.protection, size) == []
  assert "numbers and" in larger_updates(case.protection, size + 1)[0]


@pytest.mark.slow
def test_the_audit_agrees_with_the_claim_and_refutes_a_device_with_half_the_noise(experiment):
  found = audit_run(experiment, 3000, 0, lambda text: None)
  assert found["passed"]
  assert found["audits"][0]["unit"] == "client"
  assert len(found["audits"][0]["checks"]) == 5
  mechanism, level = experiment.central.mechanisms[0], experiment.hyper.client_level
  half = level.shares._replace(sampler=make_sampler(mechanism.share / 2))
  hyper = experiment.hyper._replace(client_level=level._replace(shares=half))
  found = audit_run(experiment._replace(hyper=hyper), 3000, 0, lambda text: None)
  assert not found["passed"]
  failed = [check["name"] for check in found["audits"][0]["checks"] if not check["passed"]]
  assert len(failed) == 2


def test_noise_moves_the_weights_of_a_run_and_another_secret_draws_another(experiment):
  program = experiment.program
  arguments = (experiment.clients, experiment.pool, experiment.hyper)
  ends = []
  for key in (experiment.key, jax.random.fold_in(experiment.key, 1)):
    state, _ = program.block(program.initial(), *arguments, key, jnp.asarray(1))
    ends.append(np.asarray(state.server.params))
  distance = np.linalg.norm(ends[0] - ends[1])
  # Two draws of σ C sqrt(K / (K - c)) / K in each of P numbers.
  expected = np.sqrt(2 * ends[0].size) * 3.0 * np.sqrt(3 / 2) / 3
  assert distance == pytest.approx(expected, rel=0.15)
