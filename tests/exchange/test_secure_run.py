"""Runs under secure aggregation: what console, files and statement say of it."""

import contextlib
import io
import json

import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.report import reported_run
from tests.running import run, smoke_config

SECURE = {
  "secure__protocol": "masking",
  "secure__dropout": 0.3,
  "secure__bits": 24,
  "server__num_rounds": 6,
  "eval__every": 6,
  "cost__uplink_mbps": "20",
  "cost__step_seconds": 0.1,
}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
  """(folder, summary, what the terminal showed) of a run in which messages are lost."""
  folder, told = tmp_path_factory.mktemp("masked"), io.StringIO()
  with contextlib.redirect_stdout(told):
    summary = run(folder, **SECURE)
  return folder, summary, " ".join(told.getvalue().split())


def test_the_summary_counts_messages_rounds_cut_numbers_and_bytes(masked):
  folder, summary, _ = masked
  facts = summary["exchange"]
  assert facts["bits"] == 24
  assert facts["scale"] == 2.0**20  # ±4 and 3 roundings under 2^23
  assert facts["rounding_error_bound"] == 3 / 2**20
  assert 0 <= facts["saturated"] < 1
  lost = sum(facts["lost"].values())
  assert lost >= facts["recovered"] > 0
  # Of three hospitals two must answer: in a failed round at least two messages were lost.
  assert lost - facts["recovered"] >= 2 * facts["failed_rounds"]
  assert lost - facts["recovered"] <= 3 * facts["failed_rounds"]
  beside = 2 * 32 + (2 * 2 + 3) * 32
  assert summary["bytes_up"] == 3 * summary["num_parameters"] + beside
  assert summary["bytes_down"] == 4 * summary["num_parameters"] + 2 * 2 * (32 + 32)
  sent = 6 * 3 * (summary["bytes_up"] + summary["bytes_down"])
  assert summary["megabytes"] * 1e6 == pytest.approx(sent - lost * summary["bytes_up"])
  deployment = json.loads((folder / "deployment.json").read_text())
  assert deployment["gigabytes"] == pytest.approx(summary["megabytes"] / 1e3)


def test_config_and_statement_say_who_sees_what(masked):
  folder, _, _ = masked
  record = json.loads((folder / "config.json").read_text())["exchange"]
  assert record["protocol"] == "masking"
  assert record["server_sees"] == "sums of updates only"
  assert (record["masks"], record["dropout"], record["fewest"]) == ("elided", 0.3, 2)
  assert record["grid"]["scale"] == 2.0**20
  assert record["grid"]["rounding_error_bound"] == 3 / 2**20
  text = (folder / "privacy_statement.md").read_text()
  assert "learns sums over at least 2 of 3 hospitals" in text
  assert "rounded by chance to a multiple of 2^-20" in text
  assert "(threefry) is not certified" in text
  assert "they know the last one's" in text


@pytest.mark.slow
def test_executed_masks_end_in_the_same_digest_of_weights(masked, tmp_path):
  _, summary, _ = masked
  executed = run(tmp_path, **SECURE, secure__masks="executed")
  assert executed["run_id"] == summary["run_id"]  # masks move no result
  assert executed["weights_sha256"] == summary["weights_sha256"]
  assert executed["exchange"] == summary["exchange"]


def test_the_console_tells_the_scale_and_why_no_sum_wraps(masked):
  _, _, told = masked
  assert "by protocol masking as whole numbers of 24 bits: ±4, 2^20 steps to 1" in told
  assert "a sum of 3 is at most 4194307, under 2^23, so that it cannot wrap" in told
  assert "masks elided, a round needs 2 answers" in told


def test_a_run_of_two_hospitals_is_refused_before_anything_compiles(tmp_path):
  config = smoke_config(**SECURE, partition__num_clients=2)
  with pytest.raises(UserError, match="'masking' with 2 hospitals"):
    reported_run.run(config, tmp_path, "smoke", "test")
