"""What the target ε leaves open is solved for every hospital, and never past the target."""

import dataclasses
import math

import numpy as np
import pytest

from configs.smoke import get_config
from fedjax_med.core.errors import UserError
from fedjax_med.data.dataset import client_table
from fedjax_med.prepare.protection import protect, require_a_round
from fedjax_med.privacy.accounting import epsilon
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.privacy.guarantees import spent

COUNTS = (80, 40, 120)
NAMES = ("a", "b", "c")


def table():
  ends = np.cumsum(COUNTS)
  return client_table([np.arange(end - n, end) for n, end in zip(COUNTS, ends, strict=True)])


def config_with(**changes):
  config = get_config()
  config.privacy.noise_multiplier = 0.0
  for path, value in changes.items():
    section, _, name = path.partition("__")
    assert hasattr(getattr(config, section), name)
    setattr(getattr(config, section), name, value)
  return config


def protection(groups=None, **changes):
  groups = np.arange(sum(COUNTS)) if groups is None else groups
  return protect(config_with(**changes), NAMES, table(), groups)


def local(found):
  assert found.local is not None
  return found.local


def central(found):
  assert found.central is not None
  return found.central


def epsilons(found, more_rounds=0):
  rounds = found.config.server.num_rounds + more_rounds
  return spent(local(found), found.steps * rounds)


def test_noise_is_calibrated_hospital_by_hospital():
  found = protection(privacy__target_epsilon=3.0)
  assert all(0.995 * 3 <= value <= 3 for value in epsilons(found))
  assert len({m.noise_multiplier for m in local(found).mechanisms}) == 3


def test_one_noise_for_all_is_what_the_neediest_hospital_needs():
  each = [m.noise_multiplier for m in local(protection(privacy__target_epsilon=3.0)).mechanisms]
  found = protection(privacy__target_epsilon=3.0, privacy__same_noise=True)
  assert {m.noise_multiplier for m in local(found).mechanisms} == {max(each)}
  assert max(epsilons(found)) <= 3
  assert min(epsilons(found)) < 0.995 * 3


def test_rounds_are_the_most_that_the_target_allows():
  found = protection(
    privacy__target_epsilon=5.0, privacy__noise_multiplier=1.2, privacy__solve_for="rounds"
  )
  assert found.config.server.num_rounds > 1
  assert max(epsilons(found)) <= 5 < max(epsilons(found, more_rounds=1))


def test_the_batch_size_is_the_largest_that_the_target_allows():
  changes = {"privacy__target_epsilon": 5.0, "privacy__noise_multiplier": 1.2}
  found = protection(**changes, privacy__solve_for="batch_size")
  size = found.config.client.batch_size
  assert 1 < size < max(COUNTS)
  assert max(epsilons(found)) <= 5
  assert max(epsilons(protection(**changes, client__batch_size=size + 1))) > 5


def test_the_clip_norm_is_the_given_noise_over_the_noise_multiplier():
  found = protection(
    privacy__target_epsilon=5.0, privacy__noise_stddev=0.4, privacy__solve_for="clip_norm"
  )
  for mechanism in local(found).mechanisms:
    assert mechanism.noise_multiplier * mechanism.clip_norm == pytest.approx(0.4)
  assert 0.995 * 5 <= max(epsilons(found)) <= 5
  assert found.config.privacy.clip_norm == local(found).mechanisms[0].clip_norm


def test_what_is_solved_is_solved_once():
  found = protection(
    privacy__target_epsilon=5.0, privacy__noise_multiplier=1.2, privacy__solve_for="rounds"
  )
  again = protect(found.config, NAMES, table(), np.arange(sum(COUNTS)), found.steps)
  assert again.config == found.config
  assert local(again) == local(found)


@pytest.mark.parametrize("solve", ["rounds", "batch_size"])
def test_a_target_that_allows_nothing_is_refused_with_the_remedy(solve):
  with pytest.raises(UserError, match=r"privacy.target_epsilon=0.01 .*; raise either"):
    protection(
      privacy__target_epsilon=0.01, privacy__noise_multiplier=0.6, privacy__solve_for=solve
    )


@pytest.mark.parametrize("level", ["privacy", "client_privacy"])
def test_a_budget_without_a_single_round_is_refused_before_anything_is_built(level):
  changes = {f"{level}__noise_multiplier": 0.6, f"{level}__target_epsilon": 0.01}
  if level == "client_privacy":
    changes |= {"client_privacy__mechanism": "dp_fedavg", "privacy__target_epsilon": 3.0}
  found = protection(**changes)  # as of a baseline, which may end at once
  with pytest.raises(UserError, match=rf"^{level}.target_epsilon=0.01 does not allow .* one round"):
    require_a_round(found)


def test_a_batch_size_is_found_also_under_a_cap_that_some_sizes_exceed():
  changes = {"privacy__target_epsilon": 500.0, "privacy__noise_multiplier": 1.2}
  found = protection(**changes, privacy__solve_for="batch_size", privacy__batch_cap=24)
  size = found.config.client.batch_size
  assert all(mechanism.batch_cap == 24 for mechanism in local(found).mechanisms)
  with pytest.raises(UserError, match="batch_cap=24 is under"):
    protection(**changes, privacy__batch_cap=24, client__batch_size=size + 1)


def test_a_cap_too_small_for_any_batch_is_named():
  changes = {"privacy__target_epsilon": 500.0, "privacy__noise_multiplier": 1.2}
  with pytest.raises(UserError, match=r"privacy.batch_cap=2 is too small even"):
    protection(**changes, privacy__solve_for="batch_size", privacy__batch_cap=2)


def test_patients_are_the_units_of_sampling_noise_and_delta():
  groups = np.arange(sum(COUNTS)) // 4
  found = protection(groups, privacy__target_epsilon=3.0, privacy__unit="patient")
  assert [m.num_units for m in local(found).mechanisms] == [20, 10, 30]
  assert local(found).unit == "patient"
  assert found.rows_per_unit == 8
  larger = np.maximum(groups, 2)  # one patient of 12 images
  found_larger = protection(larger, privacy__target_epsilon=3.0, privacy__unit="patient")
  assert found_larger.rows_per_unit == 8  # nothing public follows the largest patient
  assert local(found).deltas == (1 / 200, 1 / 100, 1 / 300)
  assert local(found).mechanisms[0].sampling_probability == 16 / 20
  records = protection(privacy__target_epsilon=3.0)
  assert local(records).mechanisms[0].sampling_probability == 16 / 80


def test_whole_hospitals_have_one_mechanism_of_cohorts():
  found = protection(
    privacy__target_epsilon=3.0,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__target_epsilon=6.0,
  )
  (mechanism,) = central(found).mechanisms
  assert (mechanism.num_units, mechanism.sampling_probability) == (3, 1.0)
  assert central(found).deltas == (1 / 30,)
  rounds = found.config.server.num_rounds
  assert 0.995 * 6 <= epsilon(mechanism, rounds, 1 / 30) <= 6
  assert mechanism.sum_noise_multiplier == mechanism.noise_multiplier


def test_an_adaptive_clip_norm_takes_its_noise_out_of_the_same_epsilon():
  changes = {"privacy__target_epsilon": 3.0, "client_privacy__mechanism": "dp_fedavg"}
  changes |= {"client_privacy__noise_multiplier": 2.0, "client_privacy__clipping": "adaptive"}
  found = protection(**changes)
  (mechanism,) = central(found).mechanisms
  assert mechanism.noise_multiplier == 2.0
  together = mechanism.sum_noise_multiplier**-2 + (2 * mechanism.count_noise) ** -2
  assert together == pytest.approx(2.0**-2)
  with pytest.raises(UserError, match=r"count_noise=0.5 must be above half"):
    protection(**changes, client_privacy__count_noise=0.5)


def test_noise_of_the_hospitals_own_is_calibrated_on_the_grid_that_it_runs_on():
  changes = {
    "privacy__mechanism": "none",
    "client_privacy__mechanism": "dp_fedavg",
    "client_privacy__noise": "distributed",
    "secure__protocol": "masking",
  }

  def mechanism(**more):
    config = config_with(**changes, **more)
    found = protect(config, NAMES, table(), np.arange(sum(COUNTS)), update_size=514)
    (only,) = central(found).mechanisms
    assert isinstance(only, DistributedGaussian)
    assert (only.num_units, only.num_parameters) == (3, 514)
    assert spent(central(found), [found.config.server.num_rounds])[0] > 0
    return only, epsilon(only, found.config.server.num_rounds, 1 / 30)

  found, spends = mechanism(client_privacy__target_epsilon=6.0)
  assert 0.995 * 6 <= spends <= 6
  assert found.colluders == 1
  given, _ = mechanism(client_privacy__noise_multiplier=2.0, client_privacy__colluders=0)
  assert (given.noise_multiplier, given.colluders, given.scale) == (2.0, 0, 2.0**26)
  coarser, _ = mechanism(client_privacy__noise_multiplier=2.0, secure__scale=2.0**16)
  assert coarser.scale == 2.0**16
  with pytest.raises(UserError, match=r"256 sqrt\(P\) for the P = 514 numbers"):
    mechanism(client_privacy__noise_multiplier=2.0, secure__scale=1024.0)


def test_poisson_participation_is_the_sampling_of_whole_hospitals_only():
  config = config_with(
    privacy__target_epsilon=3.0,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__noise_multiplier=2.0,
    server__participation="poisson",
    server__participation_rate=0.5,
  )
  rows = client_table([np.arange(40 * k, 40 * k + 40) for k in range(100)])
  names = tuple(map(str, range(100)))
  found = protect(config, names, rows, np.arange(4000))
  (mechanism,) = central(found).mechanisms
  assert mechanism.sampling_probability == 0.5
  assert mechanism.batch_cap == 75  # 50 and 5 standard deviations
  everybody = dataclasses.replace(config.server, participation="full")
  full = protect(dataclasses.replace(config, server=everybody), names, rows, np.arange(4000))
  assert local(full) == local(found)  # no credit for records
  steps = math.ceil(found.config.server.num_rounds)
  assert spent(central(found), [steps])[0] < spent(central(full), [steps])[0]
