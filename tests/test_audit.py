"""The command line of the audit: what it prints, where, and what it refuses before it begins."""

import functools
import json

import pytest

from tests.command import smoke

audit = functools.partial(smoke, ("-m", "fedjax_med.audit"), "--trials=1000")


@pytest.mark.parametrize(
  ("arguments", "sentence"),
  [
    (["--trials=999"], "--trials=999 is under 1000; use 40000"),
    (["--audit_seed=-1"], "--audit_seed=-1 must be in [0, 2^31); use 0"),
    (["--shadow_runs=3"], "--shadow_runs=3 must be at least 4, or 0 for none; use 16"),
  ],
)
def test_what_is_refused_is_refused_in_one_sentence_before_the_audit(arguments, sentence):
  result = audit(*arguments)
  assert result.returncode == 2
  assert result.stderr == f"error: {sentence}\n"
  assert result.stdout == ""


@pytest.mark.slow
def test_json_is_all_of_stdout_and_progress_is_on_stderr():
  result = audit("--json")
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  assert found["passed"]
  assert len(found["audits"][0]["parties"]) == 3
  for party in found["audits"][0]["parties"]:
    assert party["name"] in result.stderr


@pytest.mark.slow
def test_an_audit_that_could_not_have_refuted_the_claim_says_so():
  result = audit()  # ε = 10.7 at the hospital of 21 records, of which 1000 trials tell nothing
  assert result.returncode == 0, result.stderr
  assert "no power to refute the claim" in result.stdout
  assert "could not have refuted it (unit record)" in result.stdout
  assert "agrees" not in result.stdout


@pytest.mark.slow
def test_an_audit_that_could_have_refuted_the_claim_agrees_with_it():
  result = audit("--config.privacy.noise_multiplier=4")
  assert result.returncode == 0, result.stderr
  assert result.stdout.endswith("The audit agrees with the claim.\n")
  assert "power" not in result.stdout


@pytest.mark.slow
def test_shadow_runs_that_fail_do_not_lose_the_audit_before_them(tmp_path):
  start = (
    "from fedjax_med import flags\n"
    "from fedjax_med.audit import __main__ as door, shadow_models\n"
    "def fails(_):\n"
    "  raise MemoryError('the device is full')\n"
    "shadow_models.attack = fails\n"
    "flags.run_main(door.main)\n"
  )
  folder = f"--workdir={tmp_path / 'run'}"
  assert smoke(("-m", "fedjax_med.train"), folder).returncode == 0
  result = smoke(("-c", start), "--trials=1000", "--shadow_runs=4", folder)
  assert result.returncode != 0
  assert "the device is full" in result.stderr
  kept = json.loads((tmp_path / "run" / "audit.json").read_text())
  assert kept["membership"] is None
  assert len(kept["audits"][0]["parties"]) == 3
  assert "Planted records" in (tmp_path / "run" / "privacy_statement.md").read_text()
