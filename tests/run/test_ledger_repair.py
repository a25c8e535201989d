"""A ledger with broken lines at its end: mended where no release is hidden, refused elsewhere."""

import json
import shutil

import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.prepare.experiment import build
from fedjax_med.privacy import __main__ as command
from fedjax_med.privacy import claims, ledger
from fedjax_med.run import ledger_repair
from fedjax_med.run.single import train_rounds
from tests.running import metrics, smoke_config

RAN = ledger.Ran(
  fedjax_med="0.3.0", dp_accounting="0.6.0", clipping="book_keeping", baselines=False
)


def built(**changes):
  config = smoke_config(**{"server__num_rounds": 6, "eval__every": 2, **changes})
  return build(config, load_hospitals(config))


@pytest.fixture(scope="module")
def experiment():
  return built()


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
  """An unbroken run of six rounds."""
  folder = tmp_path_factory.mktemp("whole")
  train_rounds(experiment, folder)
  return folder


@pytest.fixture(scope="module")
def killed(experiment, tmp_path_factory):
  """The same run, killed when round 4 was told and its checkpoint not saved."""
  folder = tmp_path_factory.mktemp("killed")

  def until(point):
    if point.rounds == 4:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train_rounds(experiment, folder, until)
  return folder


def by_hand(folder, experiment, rounds=(2, 4), logged=4):
  """Ledger, privacy.json and log of a run; returns the digest of the line of round 2."""
  book = ledger.start(folder, experiment.run_id, experiment.guarantees)
  for number in rounds:
    counts = [[number * int(n) for n in experiment.steps]]
    book = ledger.record(folder, book, number, counts, RAN)
  (folder / "privacy.json").write_text(json.dumps(claims.record_of(book, folder)))
  lines = [{"round": number, "split": "test"} for number in range(0, logged + 1, 2)]
  (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  return book.digests[2]


def garbage(lines):
  return [*lines[:-1], b"\0" * 40 + b"\n"]


def more_garbage(lines):
  return [*lines, b"\0" * 40 + b"\n", b'{"rounds": 6}\n']


def edited(lines):
  return [*lines[:-1], lines[-1].replace(b'"rounds": 4', b'"rounds": 3')]


def interleaved(lines):
  *first, two, four = lines
  return [*first, two, two, four, four]


BROKEN = [garbage, more_garbage, edited, interleaved]


def break_ledger(folder, how):
  path = folder / ledger.FILE
  path.write_bytes(b"".join(how(path.read_bytes().splitlines(keepends=True))))
  return path


@pytest.mark.parametrize("how", BROKEN)
def test_a_run_with_a_broken_tail_goes_on_to_the_ledger_and_epsilon_of_the_unbroken_one(
  experiment, whole, killed, tmp_path, capsys, how
):
  folder = shutil.copytree(killed, tmp_path / "run")
  before = break_ledger(folder, how).read_bytes()
  with pytest.raises(UserError, match="was edited"):  # who only reads is refused
    command.recompute(folder)
  assert (folder / ledger.FILE).read_bytes() == before
  train_rounds(experiment, folder)
  expected = (whole / ledger.FILE).read_bytes()
  assert (folder / ledger.FILE).read_bytes() == expected
  assert command.recompute(folder) == command.recompute(whole)
  assert "lines, the first of them line" in capsys.readouterr().out
  # Nothing is lost: each line is in one of the two files.
  apart = (folder / f"{ledger.FILE}.broken-1").read_bytes().splitlines()
  assert set(before.splitlines()) <= {*expected.splitlines(), *apart}
  assert [line["round"] for line in metrics(folder)] == [line["round"] for line in metrics(whole)]


@pytest.mark.parametrize("how", BROKEN)
def test_what_was_given_out_is_counted_from_the_moment_of_the_mending(experiment, tmp_path, how):
  head = by_hand(tmp_path, experiment)
  break_ledger(tmp_path, how)
  ledger_repair.mend(experiment, tmp_path, head, lambda _: None)
  book = ledger.read(tmp_path)  # as it is if the run is killed now
  rounds = 6 if how is more_garbage else 4  # that a line, or else the log, speaks of
  assert book.rounds == rounds
  assert book.counts == (tuple(rounds * int(n) for n in experiment.steps),)


@pytest.mark.parametrize("source", ["log", "privacy file", "line"])
def test_the_most_rounds_that_any_file_speaks_of_are_counted(experiment, tmp_path, source):
  head = by_hand(tmp_path, experiment, logged=4 if source == "log" else 0)
  if source != "privacy file":
    record = json.loads((tmp_path / "privacy.json").read_text())
    (tmp_path / "privacy.json").write_text(json.dumps({**record, "ledger": head}))
  break_ledger(tmp_path, edited if source == "line" else garbage)
  if source == "line":  # which speaks of fewer, as it was edited to do
    path = tmp_path / ledger.FILE
    path.write_bytes(path.read_bytes().replace(b'"rounds": 3', b'"rounds": 5'))
  ledger_repair.mend(experiment, tmp_path, head, lambda _: None)
  assert ledger.read(tmp_path).rounds == (5 if source == "line" else 4)


def test_lines_after_the_checkpoint_that_are_intact_stay(experiment, tmp_path):
  head = by_hand(tmp_path, experiment, rounds=(2, 3, 4))
  intact = (tmp_path / ledger.FILE).read_bytes()
  break_ledger(tmp_path, lambda lines: [*lines, b"?\n"])
  ledger_repair.mend(experiment, tmp_path, head, lambda _: None)
  assert (tmp_path / ledger.FILE).read_bytes() == intact
  break_ledger(tmp_path, lambda lines: [*lines, b"!\n"])
  ledger_repair.mend(experiment, tmp_path, head, lambda _: None)
  for number, text in ((1, b"?\n"), (2, b"!\n")):
    assert (tmp_path / f"{ledger.FILE}.broken-{number}").read_bytes() == text


def refused(experiment, folder, head, sentence):
  """A run of ``folder`` does not start, and nothing is touched."""
  before = (folder / ledger.FILE).read_bytes()

  def start():
    ledger_repair.mend(experiment, folder, head, print)
    ledger.start(folder, experiment.run_id, experiment.guarantees)

  with pytest.raises(UserError, match=sentence):
    start()
  assert (folder / ledger.FILE).read_bytes() == before
  assert not list(folder.glob("*.broken-*"))


def test_an_edit_before_the_checkpoints_line_or_without_a_checkpoint_is_refused(
  experiment, tmp_path
):
  head = by_hand(tmp_path, experiment)
  path = tmp_path / ledger.FILE
  text = path.read_text()
  path.write_text(text.replace('"rounds": 2', '"rounds": 1'))
  refused(experiment, tmp_path, head, "line 3 was edited: .*; restore the file")
  path.write_text(text.replace('"noise_multiplier": 1.0', '"noise_multiplier": 2.0', 1))
  refused(experiment, tmp_path, head, "line 1 was edited")
  path.write_text(text + "?\n")
  refused(experiment, tmp_path, None, "line 5 was edited")
  refused(experiment, tmp_path, "0" * 64, "line 5 was edited")


def test_a_run_that_ends_before_what_was_given_out_is_refused(experiment, tmp_path):
  head = by_hand(tmp_path, experiment)
  break_ledger(tmp_path, garbage)
  shorter = built(server__num_rounds=2)
  assert shorter.run_id == experiment.run_id
  sentence = "speak of 4 rounds where this start ends after server.num_rounds=2; .*ask for 4 rounds"
  refused(shorter, tmp_path, head, sentence)


def test_other_mechanisms_or_another_run_are_not_mended(experiment, tmp_path):
  head = by_hand(tmp_path, experiment)
  break_ledger(tmp_path, garbage)
  other = built(seed=5)
  refused(other, tmp_path, head, "line 4 was edited")


@pytest.mark.parametrize("text", [None, "{", '{"ledger": 3, "guarantees": []}', "[]"])
def test_a_privacy_file_that_does_not_say_what_was_given_out_is_refused(experiment, tmp_path, text):
  head = by_hand(tmp_path, experiment)
  break_ledger(tmp_path, garbage)
  if text is None:
    (tmp_path / "privacy.json").unlink()
  else:
    (tmp_path / "privacy.json").write_text(text)
  refused(experiment, tmp_path, head, "privacy.json does not say how many rounds were given out")


def test_rounds_of_hospitals_that_were_drawn_are_known_from_intact_lines_alone(tmp_path):
  drawn = built(server__participation="poisson", server__participation_rate=0.5)
  head = by_hand(tmp_path, drawn)
  text = break_ledger(tmp_path, garbage).read_bytes()
  refused(drawn, tmp_path, head, "privacy.json does not say how many rounds")
  record = json.loads((tmp_path / "privacy.json").read_text())
  (tmp_path / "privacy.json").write_text(json.dumps({**record, "ledger": head}))
  refused(drawn, tmp_path, head, "which hospitals took part in the 2 rounds after")
  (tmp_path / "metrics.jsonl").write_text('{"round": 2}\n')  # nothing of round 4 was given out
  ledger_repair.mend(drawn, tmp_path, head, lambda _: None)
  assert ledger.read(tmp_path).rounds == 2
  assert np.array_equal(ledger.read(tmp_path).counts, [2 * drawn.steps])
  assert text.startswith((tmp_path / ledger.FILE).read_bytes())
