"""What a run promises: every party, the largest ε, each unit in its own words, failing closed."""

import importlib.metadata
import math

import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.privacy.accounting import epsilon
from fedjax_med.privacy.guarantees import (
  NO_PRIVACY,
  UNITS,
  Guarantee,
  describe,
  privacy_record,
  spent,
)
from fedjax_med.privacy.mechanism import PoissonGaussian, batch_size_bound


def mechanism(n=300, batch_size=30, sigma=2.0, clip_norm=1.0):
  q = min(1.0, batch_size / n)
  return PoissonGaussian(n, q, min(n, batch_size_bound(n, q, 5)), sigma, clip_norm)


def guarantee(unit="record"):
  mechanisms = (mechanism(), mechanism(n=60, clip_norm=0.5))
  return Guarantee(unit, ("North", "South"), mechanisms, (1e-4, 1e-3))


def test_a_guarantee_has_every_party_and_the_largest_epsilon():
  given = guarantee()
  described = describe(given, np.array([100, 20]))
  expected = [epsilon(given.mechanisms[0], 100, 1e-4), epsilon(given.mechanisms[1], 20, 1e-3)]
  assert described["epsilon_max"] == max(expected)
  assert [party["epsilon"] for party in described["parties"]] == expected
  assert described["parties"][1] == {
    "name": "South",
    "n": 60,
    "sampling_probability": 0.5,
    "batch_cap": given.mechanisms[1].batch_cap,
    "noise_multiplier": 2.0,
    "clip_norm": 0.5,
    "coefficients": [1.0],
    "steps": 20,
    "delta": 1e-3,
    "epsilon": expected[1],
  }
  assert described["adjacency"].startswith("zero-out")
  assert described["accountant"]["version"] == importlib.metadata.version("dp-accounting")
  assert described["accountant"]["value_discretization_interval"] <= 2**-8


def test_epsilons_of_different_units_stand_side_by_side_and_are_never_added():
  central = Guarantee("client", ("all hospitals",), (mechanism(n=20, batch_size=20),), (1e-3,))
  record = privacy_record([guarantee("patient"), central], [[100, 20], [7]])
  first, second = record["guarantees"]
  assert (first["unit"], second["unit"]) == ("patient", "client")
  assert record["epsilon_max"] == first["epsilon_max"] == max(spent(guarantee(), [100, 20]))
  assert second["epsilon_max"] == epsilon(central.mechanisms[0], 7, 1e-3)


def test_only_a_client_level_guarantee_needs_a_trusted_server():
  assert any("server" in who for who in UNITS["record"].holds_against)
  assert any("server" in who for who in UNITS["patient"].holds_against)
  assert not any("server" in who for who in UNITS["client"].holds_against)
  assert any("server" in who for who in UNITS["client"].not_against)


def test_what_is_not_covered_is_listed_and_depends_on_the_unit():
  record = privacy_record([guarantee()], [[1, 1]])
  topics = ("loss", "normalisation", "validation", "tuning", "float32", "threefry", "rounding")
  text = " ".join(record["not_covered"]).lower()
  assert [topic for topic in topics if topic not in text] == []
  assert "several records" in text
  patients = privacy_record([guarantee("patient")], [[1, 1]])
  assert "several records" not in " ".join(patients["not_covered"])


@pytest.mark.parametrize(
  ("names", "counts", "deltas"),
  [
    (("A",), [1, 1], (1e-4,)),
    ((), [], ()),
    (("A",), [-1], (1e-4,)),
    (("A",), [math.nan], (1e-4,)),
    (("A",), [1], (math.nan,)),
    (("A",), [1], (0.5,)),
  ],
)
def test_a_guarantee_fails_closed(names, counts, deltas):
  with pytest.raises(UserError):
    describe(Guarantee("record", names, (mechanism(),) * len(names), deltas), counts)


def test_epsilon_is_infinite_without_noise_and_absent_without_a_mechanism():
  open_one = Guarantee("record", ("A", "B"), (mechanism(), mechanism(sigma=0.0)), (1e-4, 1e-4))
  assert describe(open_one, [1, 1])["epsilon_max"] == math.inf
  assert privacy_record([], []) == NO_PRIVACY
