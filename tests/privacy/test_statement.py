"""The statement: every promise and every gap of privacy.json, ε never rounded down, tuning paid."""

import dp_accounting
import pytest
from dp_accounting import dp_event, rdp

from fedjax_med.core.errors import UserError
from fedjax_med.privacy.accounting import RDP_ORDERS, ceil_digits, epsilon, round_up
from fedjax_med.privacy.guarantees import (
  BANDS_GAP,
  BASELINES,
  NO_PRIVACY,
  UNITS,
  Guarantee,
  privacy_record,
)
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.statement import ASSUMPTIONS, tuning_costs, write_out
from fedjax_med.privacy.tuning import tuned_epsilon

MECHANISM = PoissonGaussian(200, 0.2, 72, 1.5, 1.0)
RECORD_ONLY = Guarantee("record", ("North",), (MECHANISM,), (4e-4,))
RECORD = privacy_record(
  [
    Guarantee("patient", ("North", "South"), (MECHANISM, MECHANISM), (4e-4, 3e-4)),
    Guarantee("client", ("all hospitals",), (PoissonGaussian(9, 1.0, 9, 4.0, 0.5),), (1e-2,)),
  ],
  [[30, 20], [6]],
)


def tuned(*arguments):
  found = tuned_epsilon(*arguments)
  assert found is not None
  return found


def test_everything_a_data_officer_asks_for_is_there():
  text = write_out({**RECORD, "ledger": "5e" * 32}, "abc")
  for guarantee in RECORD["guarantees"]:
    unit = UNITS[guarantee["unit"]]
    for phrase in (unit.protects, unit.adjacency, unit.mechanism, *unit.holds_against):
      assert phrase in text
    for party in guarantee["parties"]:
      assert f"| {party['name']} | {party['n']} |" in text
      assert f"| {ceil_digits(party['delta'])} | {round_up(party['epsilon'])} |" in text
  assert f"**not** against {UNITS['client'].not_against[0]}" in text
  for phrase in (*RECORD["not_covered"], *ASSUMPTIONS, "No audit was made", "5e5e"):
    assert phrase in text


def audited(lower=1.234, silent=9.0, failed=0, unit="record"):
  checks = [{"name": "σ", "p_value": 0.0, "passed": k >= failed} for k in range(3)]
  return {
    "unit": unit,
    "epsilon": 7.9,
    "epsilon_lower": lower,
    "epsilon_lower_without_noise": silent,
    "passed": lower <= 7.9 and not failed,
    "parties": [{"epsilon": 7.9, "epsilon_lower": lower}],
    "checks": checks,
  }


def told(*audits):
  record = {**RECORD, "epsilon_max": 7.9}
  return write_out(record, "abc", {"confidence": 0.95, "audits": audits})


def test_an_audit_is_told_with_its_claim_and_a_contradiction_is_loud():
  assert "ε ≥ 1.23 (with 95% confidence)" in told(audited())
  assert "CONTRADICTS" not in told(audited())
  assert "The bound from below CONTRADICTS THE CLAIM" in told(audited(lower=8.0))
  broken = told(audited(failed=2))
  assert "2 of 3 checks of what is executed FAILED, which CONTRADICTS THE CLAIM" in broken
  assert "bound from below CONTRADICTS" not in broken


@pytest.mark.parametrize("claim", [7.0, 7.9, 9.0])
def test_an_audit_older_than_the_last_rounds_says_so_and_hides_nothing(claim):
  # Hospitals that were not drawn spend less than was audited: the audit covers that.
  record = {**RECORD, "epsilon_max": claim}
  text = write_out(record, "abc", {"confidence": 0.95, "audits": [audited(lower=8.0)]})
  assert ("older than the last rounds" in text) == (claim > 7.9)
  assert "the claim of that audit was ε ≤ 7.90" in text
  assert "CONTRADICTS THE CLAIM" in text


def test_every_audited_unit_is_told():
  text = told(audited(), audited(lower=2.0, unit="client"))
  assert "Planted records whose presence an attacker guesses gave ε ≥ 1.23" in text
  assert "Updates of one hospital whose presence an attacker guesses gave ε ≥ 2.00" in text


@pytest.mark.parametrize("silent", [7.9, 3.21])
def test_an_audit_that_could_not_have_refuted_the_claim_says_so(silent):
  text = told(audited(silent=silent))
  assert "no power to refute the claim" in text
  assert f"no more than ε ≥ {silent:.2f}. " in text
  assert "10 e^ε = 2.7e+04 trials: raise --trials" in text
  assert "no power" not in told(audited())
  assert "no power" not in told(audited(silent=silent, failed=1))  # it did refute


def test_without_a_mechanism_it_promises_nothing():
  text = write_out(NO_PRIVACY, "abc")
  assert "no formal privacy guarantee" in text
  assert "ε ≤" not in text


@pytest.mark.parametrize(
  ("sigma", "strength"),
  [(0.0, "**How strongly:** not at all (ε = ∞)"), (0.02, "at most a factor of e^ε = 10^")],
)
def test_a_claim_without_worth_is_called_so(sigma, strength):
  weak = PoissonGaussian(200, 0.2, 72, sigma, 1.0)
  record = privacy_record([Guarantee("record", ("North",), (weak,), (4e-4,))], [[3]])
  assert strength in write_out(record, "abc")


def test_a_delta_that_promises_little_is_called_so():
  three = Guarantee("client", ("all",), (PoissonGaussian(3, 1.0, 3, 4.0, 0.5),), (1 / 30,))
  text = write_out(privacy_record([three], [[6]]), "abc")
  assert "at δ ≤ 0.034," in text
  assert "δ IS LARGE: in up to one of 30 cases nothing at all is promised" in text
  assert "IS LARGE" not in write_out(privacy_record([RECORD_ONLY], [[6]]), "abc")


def test_correlated_noise_is_described_as_it_is_and_its_checkpoints_are_secret():
  banded = PoissonGaussian(60, 0.4, 30, 1.3, 1.0, (0.8, 0.6))
  guarantee = Guarantee("record", ("North",), (banded,), (1e-3,))
  text = write_out(privacy_record([guarantee], [[5]]), "abc")
  assert "one of 2 fixed subsets of the records, which take turns" in text
  assert "T / 2 releases, rounded up" in text
  assert BANDS_GAP in text
  assert BANDS_GAP not in write_out(RECORD, "abc")


@pytest.mark.parametrize("place", ["alone", "pooled"])
def test_a_baseline_promises_nothing_against_whoever_trains_it(place):
  text = write_out(privacy_record([RECORD_ONLY._replace(place=place)], [[5]]), "abc")
  holds, fails = BASELINES[place]
  assert f"- {holds[0]};" in text
  assert f"- **not** against {fails[0]};" in text
  assert "server" not in text.split("What ε does not cover")[0]
  assert ("where the images are pooled" in text) == (place == "pooled")
  assert ("at the hospital" in text) == (place == "alone")


def test_an_adaptive_clip_norm_is_described_as_two_releases():
  central = PoissonGaussian(30, 0.4, 30, 1.5, 0.3, count_noise=2.0)
  record = privacy_record([Guarantee("client", ("all",), (central,), (1e-3,))], [[5]])
  assert "a second release of each round" in write_out(record, "abc")
  (party,) = record["guarantees"][0]["parties"]
  assert party["noise_multiplier"] == 1.5
  assert party["count_noise"] == 2.0
  assert party["sum_noise_multiplier"] == pytest.approx((1.5**-2 - 4.0**-2) ** -0.5)
  assert "Gaussian noise of sum_noise_multiplier * clip_norm" in write_out(record, "abc")
  assert "second release" not in write_out(RECORD, "abc")


def test_choosing_the_best_of_many_runs_costs_more_the_more_there_are():
  costs = tuning_costs(RECORD["guarantees"][0])
  values = [RECORD["guarantees"][0]["parties"][0]["epsilon"], *(cost["epsilon"] for cost in costs)]
  assert values == sorted(values)
  assert all(4e-4 < cost["delta"] < 1 / 200 for cost in costs)


def test_the_cost_of_choosing_is_the_librarys_where_no_batch_is_ever_cut():
  whole = PoissonGaussian(200, 0.2, 200, 1.5, 1.0)
  step = dp_accounting.PoissonSampledDpEvent(
    whole.drawn_probability, dp_accounting.GaussianDpEvent(1.5 / 1.001)
  )
  event = dp_event.RepeatAndSelectDpEvent(dp_accounting.SelfComposedDpEvent(step, 30), 20, 0.0)
  accountant = rdp.RdpAccountant(RDP_ORDERS).compose(event)
  value, delta = tuned(whole, 30, 4e-4, 20)
  assert value == pytest.approx(accountant.get_epsilon(4e-4))
  assert delta == 4e-4


def test_the_cost_of_choosing_is_above_that_of_one_run_even_for_one_run_on_average():
  value, _ = tuned(MECHANISM, 30, 4e-4, 1.01)
  assert value > epsilon(MECHANISM, 30, 4e-4)


def test_a_tight_cap_or_no_noise_has_no_bound_for_choosing():
  assert tuned_epsilon(PoissonGaussian(200, 0.2, 52, 1.5, 1.0), 300, 4e-4, 100) is None
  assert tuned_epsilon(PoissonGaussian(200, 0.2, 72, 0.0, 1.0), 30, 4e-4, 5) is None
  with pytest.raises(UserError, match=r"mean_runs=1.0 must be above 1"):
    tuned_epsilon(MECHANISM, 30, 4e-4, 1.0)


SMALL, LARGE = (PoissonGaussian(n, q, cap, sigma, 1.0) for n, q, cap, sigma in (
  (57, 0.5, 45, 3.0), (2500, 0.05, 175, 1.2)))  # fmt: skip


def unlike_hospitals():
  return privacy_record(
    [Guarantee("record", ("small", "large"), (SMALL, LARGE), (1 / 570, 1 / 25000))], [[40, 40]]
  )


def test_the_headline_holds_for_every_party_at_its_own_delta():
  record = unlike_hospitals()
  (guarantee,) = record["guarantees"]
  text = write_out(record, "abc")
  headline = (
    f"ε ≤ {round_up(guarantee['epsilon_max'])} at δ ≤ {ceil_digits(1 / 570)}, for every party"
  )
  assert headline in text
  for party in guarantee["parties"]:
    assert party["epsilon"] <= guarantee["epsilon_max"]
    assert party["delta"] <= 1 / 570


def test_a_large_delta_of_any_party_is_called_so():
  mechanism = PoissonGaussian(9, 1.0, 9, 4.0, 1.0)
  record = privacy_record(
    [Guarantee("record", ("few", "many"), (mechanism, LARGE), (0.05, 4e-5))], [[1, 400]]
  )
  parties = record["guarantees"][0]["parties"]
  assert parties[0]["epsilon"] < parties[1]["epsilon"]  # the one of large δ is not the worst
  assert "δ IS LARGE" in write_out(record, "abc")


def test_tuning_costs_hold_for_every_party_or_have_no_bound():
  (guarantee,) = unlike_hospitals()["guarantees"]
  for cost in tuning_costs(guarantee):
    each = [
      tuned_epsilon(mechanism, 40, delta, cost["runs"])
      for mechanism, delta in ((SMALL, 1 / 570), (LARGE, 1 / 25000))
    ]
    if None in each:
      assert (cost["epsilon"], cost["delta"]) == (None, None)
      continue
    assert cost["epsilon"] == max(pair[0] for pair in each if pair)
    assert cost["delta"] == max(pair[1] for pair in each if pair)
  tight = PoissonGaussian(2500, 0.05, 147, 1.2, 1.0)  # its overflow leaves no δ under 1/n
  record = privacy_record(
    [Guarantee("record", ("a", "b"), (SMALL, tight), (1 / 570, 1 / 25000))], [[40, 4000]]
  )
  assert tuned_epsilon(tight, 4000, 1 / 25000, 100) is None
  assert tuning_costs(record["guarantees"][0])[-1]["epsilon"] is None
  assert "no bound" in write_out(record, "abc")


def test_what_hides_a_hospital_in_the_draw_is_told_without_it_too():
  drawn = PoissonGaussian(50, 0.2, 25, 2.0, 1.0)
  record = privacy_record([Guarantee("client", ("all",), (drawn,), (1e-3,))], [[100]])
  text = write_out(record, "abc")
  always = PoissonGaussian(50, 1.0, 50, 2.0, 1.0)
  for rounds in (20, 100):
    assert f"ε ≤ {round_up(epsilon(always, rounds, 1e-3))}" in text
  everybody = privacy_record([Guarantee("client", ("all",), (always,), (1e-3,))], [[100]])
  assert "took part" not in write_out(everybody, "abc").partition("## What ε does not cover")[0]
