"""Each hospital alone and pooled data, beside the federation."""

import html
import json

import pytest

from tests.running import run


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


@pytest.mark.parametrize("unit", ["record", pytest.param("client", marks=pytest.mark.slow)])
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


@pytest.mark.slow
def test_baselines_that_ended_are_told_also_by_a_later_start_without_them(tmp_path):
  run(tmp_path, eval__local_baselines=True, server__num_rounds=2)
  run(tmp_path, server__num_rounds=2)
  record = json.loads((tmp_path / "privacy.json").read_text())
  assert any("further trainings on the same records" in gap for gap in record["not_covered"])


@pytest.mark.slow
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
