"""Arrays and steps of a run are what is accounted for, or the audit and the run itself fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.audit.replay import replay_checks
from fedjax_med.audit.verdict import audit_run
from fedjax_med.core.keys import Stream
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.exchange.registry import TRANSFORMS
from fedjax_med.federated import local
from fedjax_med.prepare import accounted_arrays
from fedjax_med.prepare import experiment as experiments
from fedjax_med.prepare.experiment import build, build_baselines
from fedjax_med.privacy import noise
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.simulation.evaluation import batches_of
from fedjax_med.sweep import programs
from tests.exchange.parts import halved
from tests.running import smoke_config

SECRET = bytes(range(16))


def built(**changes):
  config = smoke_config(**changes)
  return build(config, load_hospitals(config), SECRET)


@pytest.fixture(scope="module")
def experiment():
  return built()


# What stands on the device instead of what is accounted for.
WRONG = {
  "no noise": lambda clients: clients._replace(noise_multiplier=clients.noise_multiplier * 0),
  "σ x .01": lambda clients: clients._replace(noise_multiplier=clients.noise_multiplier * 0.01),
  "shared keys": lambda clients: clients._replace(number=clients.number * 0),
  "q = 1": lambda clients: clients._replace(
    sampling_probability=jnp.ones_like(clients.sampling_probability)
  ),
  "another denominator": lambda clients: clients._replace(
    expected_batch_size=clients.expected_batch_size * 2
  ),
  "hospitals exchanged": lambda clients: clients._replace(
    sampling_probability=clients.sampling_probability[::-1]
  ),
  "another cap": lambda clients: clients._replace(batch_cap=clients.batch_cap + 1),
  "steps twice": lambda clients: clients._replace(num_steps=clients.num_steps * 2),
  "one record in every slot": lambda clients: clients._replace(indices=clients.indices * 0),
  "a unit less": lambda clients: clients._replace(num_examples=clients.num_examples - 1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_no_run_baseline_or_point_begins_on_other_arrays_than_are_accounted_for(wrong, monkeypatch):
  right = experiments._stack_clients
  monkeypatch.setattr(experiments, "_stack_clients", lambda *given: WRONG[wrong](right(*given)))
  with pytest.raises(RuntimeError, match=r"the program would not run what ε is computed from: "):
    built()


@pytest.mark.parametrize("unit", ["clip_norm", "client_level"])
def test_no_run_begins_on_other_hyperparameters_than_are_accounted_for(unit, monkeypatch):
  changes = {"client_privacy__mechanism": "dp_fedavg", "client_privacy__noise_multiplier": 1.5}
  right = experiments._hyper

  def wrong(*given):
    hyper = right(*given)
    if unit == "clip_norm":
      return hyper._replace(clip_norm=hyper.clip_norm * 2)
    level = hyper.client_level
    assert level is not None
    return hyper._replace(client_level=level._replace(noise_multiplier=jnp.float32(0.1)))

  monkeypatch.setattr(experiments, "_hyper", wrong)
  with pytest.raises(RuntimeError, match="on the device and"):
    built(**changes)


def test_arrays_of_a_run_and_its_baselines_are_those_that_are_accounted_for(experiment):
  runs = [experiment, *build_baselines(experiment).values()]
  assert len(runs) == 1 + len(experiment.names) + 1
  for run in runs:
    case = run.case
    assert (
      accounted_arrays.differences(case.protection, case.numbers, case.rows, run.clients, run.hyper)
      == []
    )
    mechanisms = case.protection.local.mechanisms
    expected = np.asarray([m.noise_multiplier for m in mechanisms], np.float32)
    np.testing.assert_array_equal(run.clients.noise_multiplier, expected)


def test_no_point_of_a_sweep_begins_on_the_arrays_of_another(monkeypatch, experiment):
  other = built(seed=1, privacy__noise_multiplier=2.0)
  batches = batches_of([np.arange(4)], (1, 4))[0]
  point = programs.stack([experiment, other], [batches] * 2)
  assert point.clients.noise_multiplier[:, 0].tolist() == [1.0, 2.0]
  monkeypatch.setattr(
    programs.jnp, "stack", lambda leaves: jnp.concatenate([leaf[None] for leaf in leaves[::-1]])
  )
  with pytest.raises(RuntimeError, match=r"noise_multiplier of '.*' is 2.0 on the device and 1.0"):
    programs.stack([experiment, other], [batches] * 2)


def test_a_replayed_step_of_every_hospital_is_the_clipped_sum_and_its_noise(experiment):
  checks = replay_checks(experiment)
  assert len(checks) == 3 * len(experiment.names)
  assert all(check.passed for check in checks), checks


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"privacy__unit": "group", "privacy__rows_per_unit": 2},
    {"privacy__bands": 2, "client__batch_size": 8},
    {"client__augmentation": "flip", "privacy__augmentation_multiplicity": 2},
    {"execution__microbatch": 4, "execution__layout": "vmap"},
    {"model__name": "cnn_small", "model__dropout": 0.3},
    {"privacy__noise_multiplier": 100.0},
  ],
  ids=lambda changes: " ".join(changes),
)
def test_replays_agree_for_every_unit_noise_layout_and_network(changes):
  checks = replay_checks(built(**changes))
  assert all(check.passed for check in checks), checks


def without_noise(clipped_sum, key, sigma, clip_norm, size):
  return noise.private_mean(clipped_sum, key, 0.0, clip_norm, size)


def other_key(base, stream, *counters):
  first = local_key(base, stream, *counters)
  return jax.random.fold_in(first, 1) if stream == Stream.NOISE else first


def everybody(key, number, q, **sizes):
  return poisson_batch(key, number, jnp.ones_like(q), **sizes)


local_key = local.key_for


def first_round(base, stream, client, round, *counters):
  return local_key(base, stream, client, 0 * round, *counters)


def first_step(base, stream, client, round, step, *counters):
  return local_key(base, stream, client, round, 0 * step, *counters)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [first_round, first_step])
def test_draws_that_repeat_over_rounds_or_steps_do_not_pass_the_replay(
  mutant, experiment, monkeypatch
):
  monkeypatch.setattr(local, "key_for", mutant)
  checks = replay_checks(experiment)
  assert not all(check.passed for check in checks)


@pytest.mark.parametrize(
  ("name", "mutant"),
  [("private_mean", without_noise), ("key_for", other_key)],
  ids=["no noise", "another key"],
)
def test_a_program_that_does_something_else_does_not_pass_the_replay(
  name, mutant, experiment, monkeypatch
):
  monkeypatch.setattr(local, name, mutant)
  assert not any(check.passed for check in replay_checks(experiment))


@pytest.mark.slow
def test_an_audit_uses_other_devices_than_the_run_and_agrees_with_it():
  result = audit_run(built(execution__devices=2), 1000, 1, lambda text: None)
  assert result["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["no noise", "σ x .01", "shared keys", "q = 1"])
def test_the_audit_of_a_run_on_other_arrays_fails(wrong, experiment):
  broken = experiment._replace(clients=WRONG[wrong](experiment.clients))
  result = audit_run(broken, 1000, 0, lambda text: None)
  assert not result["passed"]
  failed = [check["name"] for check in result["audits"][0]["checks"] if not check["passed"]]
  assert any("on the device" in name or "share the numbers" in name for name in failed)
  by_use = [name for name in failed if "on the device" not in name and "share the" not in name]
  assert by_use, "the arrays alone told it: neither a draw nor a replay did"


def test_a_private_run_with_a_transform_is_replayed_without_it_and_baselines_send_nothing():
  assert TRANSFORMS["halved"] is halved
  experiment = built(server__transforms="halved")
  checks = replay_checks(experiment)
  assert len(checks) >= 3
  assert all(check.passed for check in checks), checks
  for baseline in build_baselines(experiment).values():
    server = baseline.case.config.server
    assert (server.transforms, server.aggregator) == ("", "mean")
