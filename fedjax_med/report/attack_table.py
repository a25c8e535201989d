"""Rules of aggregation against attacks, of a sweep: scores of all pairs, and each rule's worst."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fedjax_med.tasks.task import Metric

KIND = "attack.kind"
PREFIX = "attack."


class AttackTable(NamedTuple):
  """Scores of honest hospitals' test examples, means over points.

  Attributes:
    rules: label of each row: values of the axes that are of no attack.
    attacks: label of each column.
    values: [rules, attacks], NaN where the sweep has no such point.
    worst: [rules] worst value under an attack, NaN where there is none.
    worst_attacks: [rules] the attack that it is of, "" where there is none.
  """

  rules: list[str]
  attacks: list[str]
  values: np.ndarray
  worst: np.ndarray
  worst_attacks: list[str]

  @property
  def frame(self) -> pd.DataFrame:
    """A row a rule: its scores, its worst one and the attack."""
    columns = dict(zip(self.attacks, self.values.T, strict=True))
    ends = {"worst": self.worst, "worst attack": self.worst_attacks}
    return pd.DataFrame({"rule": self.rules, **columns, **ends})


def attack_table(
  arms: Sequence[dict[str, Any]],
  telling: Callable[[list[str], list[dict[str, Any]]], list[str]],
  label: Callable[[dict[str, Any]], str],
  metric: Metric,
) -> AttackTable | None:
  """The table of a sweep that has an axis ``attack.kind``; None of any other.

  Args:
    arms: of the sweep's report: combinations of its axes, with their scores.
    telling: (axes, arms) -> those axes that do not follow from others.
    label: values of axes -> text.
    metric: score that is shown.
  """
  axes = list(arms[0]["values"])
  if KIND not in axes:
    return None
  of_attacks = telling([name for name in axes if name.startswith(PREFIX)], list(arms))
  of_rules = telling([name for name in axes if not name.startswith(PREFIX)], list(arms))

  def rule_of(arm: dict[str, Any]) -> str:
    return label({name: arm["values"][name] for name in of_rules}) or "all points"

  def attack_of(arm: dict[str, Any]) -> str:
    values = {name: arm["values"][name] for name in of_attacks}
    kind = values.pop(KIND)  # 0 and "" stand for what goes with the kind
    return f"{kind} {label({name: value for name, value in values.items() if value})}".strip()

  rules = list(dict.fromkeys(map(rule_of, arms)))
  attacks = list(dict.fromkeys(map(attack_of, arms)))
  hostile = [attack_of(arm) for arm in arms if arm["values"][KIND] != "none"]
  values = np.full((len(rules), len(attacks)), np.nan)
  for arm in arms:
    values[rules.index(rule_of(arm)), attacks.index(attack_of(arm))] = arm["stats"][metric.name][
      "mean"
    ]
  worst, of_worst = [], []
  for row in values:
    under = {
      attack: float(value)
      for attack, value in zip(attacks, row, strict=True)
      if attack in hostile and not np.isnan(value)
    }
    worst.append(metric.worst(list(under.values())) if under else np.nan)
    of_worst.append(next((name for name, value in under.items() if value == worst[-1]), ""))
  return AttackTable(
    rules=rules,
    attacks=attacks,
    values=values,
    worst=np.array(worst, float),
    worst_attacks=of_worst,
  )
