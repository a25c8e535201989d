"""The ledger: ε from it alone, nothing lost or doubled, every edit seen."""

import json
import random
import re

import pytest

from fedjax_med import __version__
from fedjax_med.core.errors import UserError
from fedjax_med.privacy import __main__ as command
from fedjax_med.privacy import claims, ledger
from fedjax_med.privacy.accounting import epsilon
from fedjax_med.privacy.clipping import TWO_PASS_GAP
from fedjax_med.privacy.guarantees import Guarantee, accountant_version, baseline_gaps
from fedjax_med.privacy.mechanism import PoissonGaussian

LOCAL = Guarantee(
  "patient",
  ("hospital 1", "hospital 2"),
  (PoissonGaussian(60, 0.2, 28, 1.3, 1.0), PoissonGaussian(40, 0.3, 26, 1.7, 1.0)),
  (1e-3, 2e-3),
)
CENTRAL = Guarantee("client", ("all hospitals",), (PoissonGaussian(9, 1.0, 9, 4.0, 0.5),), (1e-2,))
BOTH = (LOCAL, CENTRAL)
RAN = ledger.Ran(
  fedjax_med=__version__,
  dp_accounting=accountant_version(),
  clipping="book_keeping",
  baselines=False,
)


def counts(rounds):
  return [[2 * rounds, 3 * rounds], [rounds]]


def write(folder, rounds=(1, 2, 5)):
  """A ledger and the privacy.json that goes with it."""
  book = ledger.start(folder, "abc", BOTH)
  for number in rounds:
    book = ledger.record(folder, book, number, counts(number), RAN)
  (folder / "privacy.json").write_text(json.dumps(claims.record_of(book, folder)))


def test_what_was_written_is_read(tmp_path):
  write(tmp_path)
  book = ledger.read(tmp_path)
  assert book.guarantees == BOTH
  assert (book.run_id, book.rounds) == ("abc", 5)
  assert book.counts == ((10, 15), (5,))
  assert book.ran == (RAN,)
  assert book.rounds_at == (0, 0, 1, 2, 5)
  assert len(book.digests) == 5
  assert book.head == book.digests[-1]


def test_a_resumed_run_doubles_nothing_and_loses_nothing(tmp_path):
  write(tmp_path)
  whole = (tmp_path / ledger.FILE).read_bytes()
  book = ledger.start(tmp_path, "abc", BOTH)
  for number in (0, 1, 2, 3, 4, 5):  # rounds that it does again, at other log points too
    book = ledger.record(tmp_path, book, number, counts(number), RAN)
    assert book.rounds == 5
  assert (tmp_path / ledger.FILE).read_bytes() == whole
  book = ledger.record(tmp_path, book, 6, counts(6), RAN)
  assert book.counts == ((12, 18), (6,))
  assert book == ledger.read(tmp_path)


def test_a_ledger_that_lost_or_changed_lines_under_a_run_is_refused_when_it_is_read(tmp_path):
  write(tmp_path)
  path = tmp_path / ledger.FILE
  lines = path.read_text().splitlines(keepends=True)
  for changed in (lines[:-1], [lines[0].replace("1.3", "2.6"), *lines[1:]]):
    path.write_text("".join(lines))
    book = ledger.start(tmp_path, "abc", BOTH)
    path.write_text("".join(changed))
    ledger.record(tmp_path, book, 6, counts(6), RAN)
    with pytest.raises(UserError, match="was edited"):
      ledger.read(tmp_path)


def test_a_kill_at_any_byte_costs_at_most_the_line_that_was_being_written(tmp_path):
  write(tmp_path)
  path = tmp_path / ledger.FILE
  whole = path.read_bytes()
  ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
  chance = random.Random(0)
  for size in sorted(chance.sample(range(len(whole)), 60)) + ends:
    path.write_bytes(whole[:size])
    book = ledger.start(tmp_path, "abc", BOTH)
    complete = sum(end <= size for end in ends)
    assert book.rounds == (0, 0, 0, 1, 2, 5)[complete]
    for number in (1, 2, 5):
      book = ledger.record(tmp_path, book, number, counts(number), RAN)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ('"noise_multiplier": 1.3', '"noise_multiplier": 2.6'),
    ('"counts": [[4, 6], [2]]', '"counts": [[3, 6], [2]]'),
    ('"run_id": "abc"', '"run_id": "abd"'),
    ('"rounds": 5', '"rounds": 4'),
    ('"delta": 0.001', '"delta": 0.002'),
    ('"clipping": "book_keeping"', '"clipping": "two_pass"'),
  ],
)
def test_an_edited_number_is_refused_with_its_line(tmp_path, old, new):
  write(tmp_path)
  path = tmp_path / ledger.FILE
  text = path.read_text()
  assert text.count(old) >= 1
  path.write_text(text.replace(old, new, 1))
  line = text[: text.index(old)].count("\n") + 1
  with pytest.raises(UserError, match=rf"line {line} was edited: its digest.*; restore the file"):
    ledger.read(tmp_path)


def test_a_line_removed_or_moved_is_refused(tmp_path):
  write(tmp_path)
  path = tmp_path / ledger.FILE
  lines = path.read_text().splitlines(keepends=True)
  for changed in (lines[:1] + lines[2:], [lines[0], lines[2], lines[1], lines[3]], lines[1:]):
    path.write_text("".join(changed))
    with pytest.raises(UserError, match="was edited"):
      ledger.read(tmp_path)


def test_a_ledger_that_lost_its_last_line_does_not_cover_the_checkpoint(tmp_path):
  write(tmp_path)
  head = ledger.read(tmp_path).head
  path = tmp_path / ledger.FILE
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
  with pytest.raises(UserError, match="does not hold the line that the newest checkpoint"):
    ledger.require_covers(ledger.read(tmp_path), tmp_path, head, 5)


def test_other_mechanisms_in_the_same_folder_are_refused(tmp_path):
  write(tmp_path)
  with pytest.raises(UserError, match="other mechanisms than this run's; use another --workdir"):
    ledger.start(tmp_path, "abc", (LOCAL,))


def test_fewer_releases_for_more_rounds_are_refused(tmp_path):
  write(tmp_path)
  book = ledger.read(tmp_path)
  with pytest.raises(UserError, match="counts 10, 15; 5 releases after 5 rounds, the run 9"):
    ledger.record(tmp_path, book, 6, [[9, 15], [6]], RAN)
  with pytest.raises(UserError, match="releases after 5 rounds, the run 99"):
    ledger.record(tmp_path, book, 4, [[99, 12], [4]], RAN)


def test_a_missing_ledger_is_a_sentence(tmp_path):
  with pytest.raises(UserError, match=r"ledger.jsonl is missing; give the --workdir"):
    ledger.read(tmp_path)


def test_epsilon_is_recomputed_from_the_ledger_alone_at_any_delta(tmp_path):
  write(tmp_path)
  found = command.recompute(tmp_path)
  local, central = found["guarantees"]
  assert [p["epsilon"] for p in local["parties"]] == [
    epsilon(LOCAL.mechanisms[0], 10, 1e-3),
    epsilon(LOCAL.mechanisms[1], 15, 2e-3),
  ]
  assert central["parties"][0]["epsilon"] == epsilon(CENTRAL.mechanisms[0], 5, 1e-2)
  assert found["epsilon_max"] == local["epsilon_max"]
  for party in (*local["parties"], *central["parties"]):
    assert party["epsilon"] <= party["epsilon_rdp"]
    curve = [value for _, value in party["curve"]]
    assert curve == sorted(curve, reverse=True)
    assert len(curve) >= 7
  small = command.recompute(tmp_path, delta=1e-6)["guarantees"][0]["parties"][0]
  assert small["delta"] == 1e-6
  assert small["epsilon"] == epsilon(LOCAL.mechanisms[0], 10, 1e-6)
  with pytest.raises(UserError, match=r"delta=0.05 must be"):
    command.recompute(tmp_path, delta=0.05)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (("guarantees", 0, "parties", 1, "epsilon"), 0.5, r"guarantees[0].parties[1].epsilon is 0.5"),
    (("guarantees", 0, "parties", 0, "steps"), 9, "parties[0].steps is 9, the ledger gives 10;"),
    (("guarantees", 1, "parties", 0, "delta"), 0.02, "guarantees[1].parties[0].delta is 0.02"),
    (("guarantees", 0, "epsilon_max"), 1.0, "guarantees[0].epsilon_max is 1.0, the ledger gives"),
    (("epsilon_max",), 0.1, "privacy.json: epsilon_max is 0.1, the ledger gives"),
    (("epsilon_max",), None, "privacy.json: epsilon_max is null"),
    (("ledger",), "0" * 64, 'ledger is "0000'),
    (("guarantees",), [], "guarantees has 0 entries, the ledger gives 2"),
    (("guarantees", 0, "parties", 0, "noise_multiplier"), 99.0, "noise_multiplier is 99.0"),
    (("guarantees", 0, "parties", 1, "n"), 10**6, "guarantees[0].parties[1].n is 1000000"),
    (("guarantees", 0, "parties", 1, "coefficients"), [0.8, 0.6], "coefficients has 2 entries"),
    (("guarantees", 0, "protects"), "everybody", 'guarantees[0].protects is "everybody"'),
    (("guarantees", 0, "accountant", "version"), "9.9", 'accountant.version is "9.9"'),
    (("mechanism",), "none", 'privacy.json: mechanism is "none", the ledger gives'),
    (("baselines_epsilon",), {"pooled": 1.0}, "which the ledger does not give"),
    (("not_covered",), [], "not_covered has 0 entries"),
  ],
)
def test_a_privacy_file_that_claims_something_else_is_refused(tmp_path, path, value, message):
  write(tmp_path)
  file = tmp_path / "privacy.json"
  record = json.loads(file.read_text())
  place = record
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  file.write_text(json.dumps(record))
  with pytest.raises(UserError, match=re.escape(message)):
    command.recompute(tmp_path)


def test_no_finite_claim_stands_beside_a_ledger_without_noise(tmp_path):
  bare = Guarantee("record", ("North",), (PoissonGaussian(60, 0.2, 28, 0.0, 1.0),), (1e-3,))
  book = ledger.record(tmp_path, ledger.start(tmp_path, "abc", (bare,)), 1, [[2]], RAN)
  record = claims.record_of(book, tmp_path)
  record["epsilon_max"] = record["guarantees"][0]["parties"][0]["epsilon"] = 0.5
  (tmp_path / "privacy.json").write_text(json.dumps(record))
  with pytest.raises(UserError, match=r"is 0\.5, the ledger gives Infinity"):
    command.recompute(tmp_path)


def test_a_ledger_of_before_correlated_noise_is_read(tmp_path):
  old = ledger._to_json(LOCAL)
  for party in old["parties"]:
    del party["coefficients"]
  ledger._append(tmp_path / ledger.FILE, "", {"run_id": "abc", "guarantees": [old]})
  assert ledger.read(tmp_path).guarantees == (LOCAL,)


def test_a_ledger_that_does_not_say_how_it_ran_is_refused_with_its_version(tmp_path):
  write(tmp_path)
  old = {"run_id": "abc", "guarantees": [ledger._to_json(LOCAL)]}
  (tmp_path / ledger.FILE).unlink()
  head = ledger._append(tmp_path / ledger.FILE, "", old)
  ledger._append(tmp_path / ledger.FILE, head, {"rounds": 5, "counts": [[10, 15]]})
  assert ledger.read(tmp_path).counts == ((10, 15),)
  with pytest.raises(UserError, match=r"release 0\.2\.0 .* does not say how .*; use the version"):
    command.recompute(tmp_path)


def test_a_gap_of_one_start_stays_whatever_comes_after_it(tmp_path):
  book = ledger.start(tmp_path, "abc", BOTH)
  starts = [RAN, RAN._replace(clipping="two_pass"), RAN._replace(baselines=True), RAN, RAN]
  for number, ran in enumerate(starts, 1):
    book = ledger.record(tmp_path, book, number, counts(number), ran)
  assert book == ledger.read(tmp_path)
  assert book.ran == tuple(starts[:3])  # what is known is not said again
  gaps = claims.record_of(book, tmp_path)["not_covered"]
  assert TWO_PASS_GAP in gaps
  assert set(baseline_gaps(BOTH)) < set(gaps)
  newer = RAN._replace(dp_accounting="99.0")
  assert ledger.record(tmp_path, book, 5, counts(5), newer) == book  # nothing new was told by it
  book = ledger.record(tmp_path, book, 6, counts(6), newer)
  assert claims.record_of(book, tmp_path)["guarantees"][0]["accountant"]["version"] == "99.0"
  assert TWO_PASS_GAP in claims.record_of(book, tmp_path)["not_covered"]


def test_how_releases_of_broken_lines_were_clipped_is_not_lost_with_them(tmp_path):
  book = ledger.start(tmp_path, "abc", BOTH)
  for number, ran in ((1, RAN), (2, RAN._replace(clipping="two_pass"))):
    book = ledger.record(tmp_path, book, number, counts(number), ran)
  path = tmp_path / ledger.FILE
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join([*lines[:3], b"?\n", *lines[3:]]))
  parts = ledger.split(tmp_path)
  assert parts is not None
  assert parts.intact.rounds == 1
  ledger.set_apart(tmp_path, parts, 2, book.counts)
  assert ledger.read(tmp_path) == book


def test_another_accountant_is_told_and_its_numbers_compared(tmp_path):
  foreign = RAN._replace(dp_accounting="99.0", fedjax_med="77.0")
  book = ledger.start(tmp_path, "abc", BOTH)
  book = ledger.record(tmp_path, book, 5, counts(5), foreign)
  (tmp_path / claims.FILE).write_text(json.dumps(claims.record_of(book, tmp_path)))
  assert "ε was told by dp-accounting 99.0; " in command.recompute(tmp_path)["note"]
  (tmp_path / ledger.FILE).unlink()
  write(tmp_path)
  assert command.recompute(tmp_path)["note"] == ""


@pytest.mark.parametrize("whose", ["the run", "a baseline"])
def test_an_epsilon_in_the_ledger_that_its_mechanisms_do_not_give_is_refused(tmp_path, whose):
  book = ledger.start(tmp_path, "abc", BOTH)
  book = ledger.record(tmp_path, book, 5, counts(5), RAN._replace(fedjax_med="77.0"))
  assert book.spent.epsilons is not None
  smaller = tuple(tuple(0.5 * value for value in row) for row in book.spent.epsilons)
  if whose == "the run":
    line = {"rounds": 6, "counts": counts(6), "epsilons": smaller}
    book = ledger._continued(tmp_path / ledger.FILE, book, [line])
  else:
    ended = book._replace(spent=book.spent._replace(epsilons=smaller))
    book = ledger.record_baselines(tmp_path, book, {"pooled": ended, "alone-1": None})
    assert book == ledger.read(tmp_path)
    assert ledger.record_baselines(tmp_path, book, {"pooled": ended, "alone-1": None}) == book
  record = claims.record_of(book, tmp_path)
  if whose == "a baseline":
    assert record["baselines_epsilon"] == {"pooled": max(smaller[0]), "alone-1": None}
  (tmp_path / claims.FILE).write_text(json.dumps(record))
  place = r"of the baseline 'pooled', " if whose == "a baseline" else ", "
  sentence = rf"tells ε .* at 'hospital 1' \(unit patient\) ?{place}its mechanisms give .*77\.0"
  with pytest.raises(UserError, match=sentence):
    command.recompute(tmp_path)


def test_numbers_may_differ_by_rounding_and_by_no_more():
  truth = {"a": [1.0, {"b": 3}], "c": None, "d": True}
  same = [truth, {"a": [1, {"b": 3.0}], "c": None, "d": True}]
  same.append({"a": [1 + 1e-12, {"b": 3}], "c": None, "d": True})
  assert all(not claims.difference(said, truth) for said in same)
  others = {
    "a[0] is 1.00000001, ": {**truth, "a": [1.00000001, {"b": 3}]},
    "a[0] is true, ": {**truth, "a": [True, {"b": 3}]},
    "a[0] is NaN, ": {**truth, "a": [float("nan"), {"b": 3}]},
    'a[1].b is "3", ': {**truth, "a": [1.0, {"b": "3"}]},
    "a[1].b is missing": {**truth, "a": [1.0, {}]},
    "d is 1, ": {**truth, "d": 1},
    "c is missing": {"a": truth["a"], "d": True},
    "e is null, which the ledger does not give": {**truth, "e": None},
    "the file is [], ": [],
  }
  for sentence, said in others.items():
    assert sentence in claims.difference(said, truth)
