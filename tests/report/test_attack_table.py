"""The table of rules against attacks: worst scores, and sweeps that have none."""

import numpy as np
import pytest

from fedjax_med.report.attack_table import attack_table
from fedjax_med.report.sweep_page import _label, _telling
from fedjax_med.tasks.task import Metric

SCORES = {
  ("mean", "none", 0.0): 0.9,
  ("mean", "ipm", 0.0): 0.8,
  ("mean", "ipm", 20.0): 0.2,
  ("median", "none", 0.0): 0.3,
  ("median", "ipm", 0.0): 0.7,
}


def arms():
  """Combinations of a sweep's axes; the number of attackers follows from their kind."""
  return [
    {
      "values": {
        "server.aggregator": rule,
        "attack.kind": kind,
        "attack.strength": strength,
        "attack.number": 1 if kind == "none" else 2,
      },
      "stats": {"auroc": {"mean": score}},
    }
    for (rule, kind, strength), score in SCORES.items()
  ]


@pytest.mark.parametrize(("better", "worst"), [("higher", 0.2), ("lower", 0.8)])
def test_the_worst_of_a_rule_is_under_an_attack_and_has_its_name(better, worst):
  table = attack_table(arms(), _telling, _label, Metric("auroc", "AUROC", better=better))
  assert table is not None
  assert table.rules == ["aggregator=mean", "aggregator=median"]
  assert table.attacks == ["none", "ipm", "ipm strength=20"]
  np.testing.assert_equal(table.values, [[0.9, 0.8, 0.2], [0.3, 0.7, np.nan]])
  assert table.worst.tolist() == [worst, 0.7]
  assert table.worst_attacks == ["ipm strength=20" if worst == 0.2 else "ipm", "ipm"]
  assert list(table.frame.columns) == ["rule", *table.attacks, "worst", "worst attack"]


def test_a_sweep_without_an_axis_of_attacks_has_no_table():
  plain = [{"values": {"server.aggregator": "mean"}, "stats": {"auroc": {"mean": 0.5}}}]
  assert attack_table(plain, _telling, _label, Metric("auroc", "AUROC")) is None
