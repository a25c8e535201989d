"""What a deployment would cost, against hand computations, and who is late."""

import json

import numpy as np
import pytest

from fedjax_med.core.config import Config, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.prepare.deployment import client_seconds, deployment_record, late, links_of

NAMES = ("A", "B", "C")


def known(value):
  """The value, which is not None."""
  assert value is not None
  return value


def config(**changes):
  made = Config()
  for name, value in {"uplink_mbps": "10", **changes}.items():
    set_field(made, f"cost.{name}", value)
  return made


def test_a_round_takes_as_long_as_the_slowest_hospital_by_hand():
  made = config(uplink_mbps="8,16,4", downlink_mbps="80", latency_ms=100.0, client_speed="1,2,1")
  links = known(links_of(made, 3))
  steps = np.array([10, 10, 20])
  # 1 MB down at 80 Mbit/s 0.1 s, 2 MB up at 8, 16, 4 Mbit/s 2, 1, 4 s, twice 0.1 s on the way,
  # steps of 0.3 s: 3, 1.5, 6 s.
  expected = [0.1 + 2 + 0.2 + 3, 0.1 + 1 + 0.2 + 1.5, 0.1 + 4 + 0.2 + 6]
  found = client_seconds(links, (1_000_000, 2_000_000), steps, 0.3)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  more = client_seconds(links, (1_000_000, 2_000_000), steps, 0.3, more=1.0)
  np.testing.assert_allclose(more - found, [1, 0.5, 1], rtol=1e-12)
  made.cost.price_gb = 0.5
  record = known(deployment_record(made, NAMES, (1_000_000, 2_000_000), steps, 100, 0.3, 9e8))
  assert record["round_seconds"] == pytest.approx(10.3)
  assert record["waits_for"] == "C"
  assert record["hours"] == pytest.approx(1030 / 3600)
  assert record["gigabytes"] == pytest.approx(0.9)
  assert record["price"] == pytest.approx(0.45)
  assert json.loads(json.dumps(record)) == record


def test_a_deadline_bounds_the_round_and_names_who_is_late():
  made = config(uplink_mbps="8", latency_ms=0.0, client_speed="1,1,0.1", step_seconds=1.0)
  made.cost.deadline_s = 5.0
  steps, message = np.full(3, 2), (0, 1_000_000)  # 3, 3 and 21 s
  assert known(late(made, NAMES, message, steps)).tolist() == [False, False, True]
  record = known(deployment_record(made, NAMES, message, steps, 10, 99.0, 2e7))
  assert record["round_seconds"] == 5
  assert [row["late"] for row in record["hospitals"]] == [False, False, True]
  made.cost.deadline_s = 0.0
  assert late(made, NAMES, message, steps) is None


def test_without_links_nothing_is_said():
  assert deployment_record(Config(), NAMES, (1, 1), np.ones(3), 1, 1.0, 0) is None


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"uplink_mbps": "0"}, r"cost.uplink_mbps='0' has a number that is not above 0"),
    ({"uplink_mbps": "1,2"}, r"cost.uplink_mbps='1,2' has 2 numbers for 3 hospitals; give one"),
    ({"downlink_mbps": "fast"}, r"cost.downlink_mbps='fast' is no number and no list"),
    ({"client_speed": "1,inf,1"}, r"cost.client_speed='1,inf,1' has a number that is not above 0"),
    ({"deadline_s": 3.0}, r"cost.step_seconds=0: who is late would follow from this machine"),
  ],
)
def test_links_that_cannot_be_are_refused(changes, words):
  with pytest.raises(UserError, match=words):
    links_of(config(**changes), 3)


def test_a_deadline_that_nobody_meets_is_refused_with_the_least_that_works():
  made = config(step_seconds=1.0, deadline_s=0.5, latency_ms=0.0)
  with pytest.raises(UserError, match=r"every hospital is late, the fastest, 'B', takes 2.*use at"):
    late(made, NAMES, (0, 0), np.array([3, 2, 4]))
