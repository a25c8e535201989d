"""Patients are who the file names say, and how many names say it is known."""

import numpy as np
import pytest

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.patients import (
  apart_by_site,
  described,
  number_patients,
  patients_by_pattern,
)
from fedjax_med.prepare.case import federation
from fedjax_med.privacy.guarantees import UNITS
from tests.data.folders import fill, load

NAMES = ["no/P1_a.png", "no/P2_a.png", "yes/P1_b.png", "yes/P2_b.png", "yes/P2_c.png"]


@pytest.mark.parametrize("pattern", [r"^(P\d+)_", r"(P\d+)_", r"^P(\d+)"])
def test_the_pattern_is_searched_in_the_file_name_without_its_folders(pattern):
  found = patients_by_pattern(NAMES, pattern)
  assert found.numbers.dtype == np.int32
  np.testing.assert_array_equal(found.numbers, [0, 1, 0, 1, 1])
  assert found.counts[:2] == (5, 2)


def test_a_pattern_that_wants_folders_matches_nothing_and_says_where_it_is_searched():
  with pytest.raises(UserError, match=r"none of the 5 file names, such as 'P1_a\.png'; it is"):
    patients_by_pattern(NAMES, r"^no/(P\d+)_")


@pytest.mark.parametrize("pattern", [r"^(Q\d+)_", r"(Q*)P"])
def test_a_pattern_that_matches_no_name_is_refused(pattern):
  with pytest.raises(UserError, match=r"matches none of the 5 file names"):
    patients_by_pattern(NAMES, pattern)


def test_a_pattern_that_makes_everybody_one_patient_is_refused():
  with pytest.raises(UserError, match=r"one patient only \('P'\) in all 5 names; choose"):
    patients_by_pattern(NAMES, "(P)")


@pytest.mark.parametrize(
  ("pattern", "sentence"),
  [("(", "is not a regular expression"), ("P1", "has no group; put brackets around")],
)
def test_a_broken_pattern_is_refused(pattern, sentence):
  with pytest.raises(UserError, match=rf"^data\.patient_pattern='.*' {sentence}"):
    patients_by_pattern(NAMES, pattern)


def test_a_name_that_does_not_match_is_a_patient_of_its_own_and_counted():
  found = patients_by_pattern([*NAMES, "yes/x.png", "yes/y.png"], r"^(P\d+)?")
  assert len(set(found.numbers.tolist())) == 4
  assert found.counts[:2] == (5, 2)
  text = described(found.counts, 7, by_site=False)
  assert "5 of 7 names" in text
  assert "2 patients" in text
  assert "may be wrong" in text


def test_one_name_is_one_patient_unless_each_site_is_a_hospital():
  sites = ["a", "b", "a", "a"]
  found = number_patients(["1", "1", "2", "1"], "data.layout", sites)
  np.testing.assert_array_equal(found.numbers, [0, 0, 1, 0])
  assert found.counts == (4, 2, "data.layout", 1)
  apart = apart_by_site(found.numbers, np.array([0, 1, 0, 0]))
  assert apart[0] == apart[3]
  assert len(set(apart.tolist())) == 3


@pytest.mark.parametrize(("scheme", "together"), [("iid", True), ("site", False)])
def test_images_of_one_name_at_two_sites_stay_together_unless_sites_are_hospitals(
  tmp_path, scheme, together
):
  fill(tmp_path, *(f"{site}/{of}/P{n}_{of}.png" for site in "ab" for of in ("no", "yes")
                   for n in range(12)))  # fmt: skip
  dataset, config = load(tmp_path, layout="{site}/{class}/{patient}_*"), config_of("patient")
  config.partition.scheme, config.partition.num_clients = scheme, 2
  made = build_hospitals(dataset, config.data, config.partition)
  assert dataset.patients is not None
  for patient in range(12):
    units = set(made.split.units[dataset.patients == patient].tolist())
    assert len(units) == (1 if together else 2)


def test_a_layout_names_patients_as_a_pattern_does(tmp_path):
  fill(tmp_path, *NAMES)
  first = load(tmp_path, layout="{class}/{patient}_*")
  second = load(tmp_path, patient_pattern=r"^(P\d+)_")
  assert first.patients is not None
  assert second.patients is not None
  np.testing.assert_array_equal(first.patients, second.patients)
  assert first.patient_counts is not None
  assert first.patient_counts[:2] == (5, 2)


def config_of(unit: str) -> Config:
  config = Config()
  config.partition.num_clients, config.partition.min_client_size = 2, 1
  config.partition.scheme = "iid"
  config.client.batch_size = 1
  config.privacy.mechanism, config.privacy.unit, config.privacy.noise_multiplier = "dp_sgd", unit, 1
  return config


def test_no_epsilon_for_patients_is_claimed_where_a_name_does_not_say_the_patient(tmp_path):
  fill(tmp_path, *(f"{of}/P{n}_{of}.png" for of in ("no", "yes") for n in range(8)), "no/x.png")
  dataset = load(tmp_path, patient_pattern=r"^(P\d+)_")
  config = config_of("patient")
  hospitals = build_hospitals(dataset, config.data, config.partition)
  with pytest.raises(UserError, match=r"privacy\.unit='patient' needs .*: 16 of 17 names"):
    federation(config, hospitals)
  assert federation(config_of("record"), hospitals).guarantees
  (tmp_path / "no" / "x.png").unlink()
  whole = load(tmp_path, patient_pattern=r"^(P\d+)_")
  hospitals = build_hospitals(whole, config.data, config.partition)
  assert federation(config, hospitals).guarantees


def test_a_group_of_near_duplicates_is_no_patient(tmp_path):
  fill(tmp_path, *(f"{of}/{n}.png" for of in ("no", "yes") for n in range(8)))
  hospitals = build_hospitals(load(tmp_path), config_of("group").data, config_of("group").partition)
  with pytest.raises(
    UserError, match=r"No name says which patient it shows; name .* privacy\.unit=group"
  ):
    federation(config_of("patient"), hospitals)
  (guarantee,) = federation(config_of("group"), hospitals).guarantees
  assert guarantee.unit == "group"
  assert "patients are not known" in UNITS["group"].protects


def test_one_person_in_two_spellings_is_one_patient():
  found = patients_by_pattern(["a/P1_x.png", "a/p1_y.png", "b/P2_x.png"], "^([Pp][0-9]+)_")
  np.testing.assert_array_equal(found.numbers, [0, 0, 1])
  assert found.counts.patients == 2


def test_a_patient_for_each_image_is_no_patient(tmp_path):
  fill(tmp_path, *(f"{of}/{n}{of}.png" for of in ("no", "yes") for n in range(8)))
  config = config_of("patient")
  dataset = load(tmp_path, patient_pattern="(.*)")
  hospitals = build_hospitals(dataset, config.data, config.partition)
  with pytest.raises(UserError, match="make each of 16 images a patient of its own; mend the"):
    federation(config, hospitals)
