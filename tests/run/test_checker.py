"""The checker refuses every edit of what a run claims, and weights that its ledger lacks."""

import json
import shutil

import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.privacy import __main__ as command
from fedjax_med.privacy import claims, guarantees, ledger
from fedjax_med.privacy.accounting import round_up
from fedjax_med.privacy.clipping import TWO_PASS_GAP
from fedjax_med.report.run_page import write_report
from fedjax_med.run.statement import write_statement
from fedjax_med.sweep import table
from fedjax_med.trained import loading
from fedjax_med.trained.exporting import export_model
from tests.command import start
from tests.running import metrics, run


@pytest.fixture(scope="module")
def full(tmp_path_factory):
  """A run with baselines, clipped by two passes: all that privacy.json holds of one guarantee."""
  folder = tmp_path_factory.mktemp("full")
  changes = {"privacy__clipping": "two_pass", "eval__local_baselines": True}
  run(folder, server__num_rounds=2, eval__every=1, **changes)
  return folder


@pytest.fixture
def copy(finished, tmp_path):
  """The finished run of six rounds, whose checkpoints are of rounds 4 and 6, to be edited."""
  return shutil.copytree(finished, tmp_path / "copy")


@pytest.fixture
def bare(full, tmp_path):
  """What privacy.json of the full run is held against, and nothing else, to be edited."""
  for name in (claims.FILE, ledger.FILE):
    shutil.copy(full / name, tmp_path / name)
  return tmp_path


def edit(path, change):
  """Changes a JSON file in place."""
  record = json.loads(path.read_text())
  path.write_text(json.dumps(change(record) or record))


def places(value, path=()):
  """Every place of a JSON value, as the keys that lead there."""
  yield path
  inner = enumerate(value) if isinstance(value, list) else getattr(value, "items", tuple)()
  for key, each in inner:
    yield from places(each, (*path, key))


def alterations(value):
  """Other values in the place of one."""
  if isinstance(value, dict):
    yield {**value, "more": 1.0}
    for key in value:
      yield {other: kept for other, kept in value.items() if other != key}
  elif isinstance(value, list):
    yield [*value, *(value[:1] or ["more"])]
    for number in range(len(value)):
      yield [*value[:number], *value[number + 1 :]]
  elif isinstance(value, str):
    yield value + "x"
  else:
    yield value * 0.9 if value else 0.9
    yield str(value)
    yield None


def replaced(value, path, other):
  """A JSON value with another one at a place."""
  if not path:
    return other
  changed = value.copy()
  changed[path[0]] = replaced(value[path[0]], path[1:], other)
  return changed


def at(value, path):
  for key in path:
    value = value[key]
  return value


def test_every_alteration_of_the_privacy_file_is_refused_with_the_place(bare):
  path = bare / claims.FILE
  whole = json.loads(path.read_text())
  assert command.recompute(bare)["rounds"] == 2
  assert {"baselines_epsilon", "ledger", "not_covered"} < whole.keys()
  assert TWO_PASS_GAP in whole["not_covered"]
  changes = [(place, other) for place in places(whole) for other in alterations(at(whole, place))]
  assert len(changes) > 200
  for place, other in changes:
    path.write_text(json.dumps(replaced(whole, place, other)))
    with pytest.raises(UserError) as error:
      command.recompute(bare)
    assert "privacy.json: " in str(error.value)
    assert all(str(key) in str(error.value) for key in place)


def two_pass_left_out(record):
  record["not_covered"].remove(TWO_PASS_GAP)


def baselines_left_out(record):
  (gap,) = guarantees.baseline_gaps([guarantees.Guarantee("record", (), (), ())])
  record["not_covered"].remove(gap)


def smaller_at_the_baseline(record):
  record["baselines_epsilon"]["pooled"] *= 0.5


@pytest.mark.parametrize(
  ("change", "place"),
  [
    (two_pass_left_out, "not_covered has"),
    (baselines_left_out, "not_covered has"),
    (smaller_at_the_baseline, "baselines_epsilon.pooled is"),
    (lambda record: record["guarantees"][0].update(epsilon_max=1.0), "guarantees[0].epsilon_max"),
    (lambda record: record.update(mechanism="DP-SGD, certified"), "mechanism is"),
    (
      lambda record: record["guarantees"][0]["accountant"].update(version="1.0"),
      "guarantees[0].accountant.version is",
    ),
    (
      lambda record: record["guarantees"][0]["accountant"].update(sensitivity_slack=0.0),
      "guarantees[0].accountant.sensitivity_slack is 0.0",
    ),
  ],
)
def test_who_reads_an_edited_privacy_file_says_nothing_of_it(full, tmp_path, change, place):
  folder = shutil.copytree(full, tmp_path / "copy")
  edit(folder / claims.FILE, change)
  for name in ("report.html", "privacy_statement.md"):
    (folder / name).unlink()
  readers = [
    command.recompute,
    write_statement,
    write_report,
    lambda folder: export_model(loading.load(folder), "safetensors", folder / "model.safetensors"),
    lambda folder: table.rows_of(folder, 0, {}),
  ]
  for reads in readers:
    with pytest.raises(UserError) as error:
      reads(folder)
    assert f"privacy.json: {place}" in str(error.value)
    assert "it was edited" not in str(error.value)
  for name in ("report.html", "privacy_statement.md", "model.safetensors"):
    assert not (folder / name).exists()


def test_the_command_ends_with_code_2_and_one_sentence_that_names_the_place(copy):
  edit(copy / claims.FILE, lambda record: record["guarantees"][0].update(epsilon_max=1.0))
  done = start("privacy", f"--workdir={copy}")
  assert done.returncode == 2
  (sentence,) = done.stderr.strip().splitlines()
  said = "privacy.json: guarantees[0].epsilon_max is 1.0, the ledger gives"
  assert f"{said} {metrics(copy)[-1]['epsilon_max']}; one of the two was edited" in sentence
  assert not done.stdout


def cut_to_four_rounds(folder):
  """A ledger without its last line, and the privacy.json that follows from what is left."""
  path = folder / ledger.FILE
  path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
  book = ledger.read(folder)
  (folder / claims.FILE).write_text(json.dumps(claims.record_of(book, folder)))
  return book


def test_weights_of_rounds_that_the_ledger_lost_are_refused(copy):
  last = ledger.read(copy)
  book = cut_to_four_rounds(copy)
  assert book.rounds < last.rounds == 6
  uses = [command.recompute, loading.load]
  for use in uses:
    with pytest.raises(UserError, match="does not hold the line that the newest checkpoint was"):
      use(copy)
  # A checkpoint that was edited to name a line that is there.
  meta = copy / "checkpoints" / "6" / "meta" / "metadata"
  meta.write_text(meta.read_text().replace(last.head, book.head))
  sentence = f"counts {book.rounds} rounds at the line that .* weights were trained for 6; restore"
  for use in uses:
    with pytest.raises(UserError, match=sentence):
      use(copy)


def test_a_private_run_without_its_ledger_gives_no_model(copy):
  (copy / ledger.FILE).unlink()
  with pytest.raises(UserError, match=r"ledger\.jsonl is missing"):
    loading.load(copy)
  (copy / claims.FILE).write_text(json.dumps(guarantees.NO_PRIVACY))
  with pytest.raises(UserError, match=r"ledger\.jsonl is missing"):
    loading.load(copy)


def test_a_folder_without_checkpoints_is_checked_and_says_what_nobody_knows_then(copy, capsys):
  found = command.recompute(copy)
  assert found["rounds_of_weights"] == 6
  command._show(found)
  assert "newest checkpoint are of round 6, which the ledger counts" in capsys.readouterr().out
  shutil.rmtree(copy / "checkpoints")
  found = command.recompute(copy)
  assert found["rounds_of_weights"] is None
  command._show(found)
  assert "No checkpoint holds weights and ledger together" in capsys.readouterr().out


def first_client(record):
  record["clients"][0]["epsilon"] *= 0.5


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("summary.json", lambda s: s.update(epsilon_max=1.0), "epsilon_max is 1.0"),
    ("summary.json", lambda s: s.update(client_epsilon=1.0), "client_epsilon is 1.0"),
    ("summary.json", lambda s: s.update(rounds=4), "rounds is 4, the weights of"),
    ("summary.json", lambda s: s.update(run_id="x"), 'run_id is "x"'),
    ("summary.json", first_client, "clients[0].epsilon is"),
    ("config.json", lambda s: s.update(run_id="x"), 'run_id is "x"'),
  ],
)
def test_an_edited_result_is_refused(copy, name, change, message):
  edit(copy / name, change)
  with pytest.raises(UserError) as error:
    command.recompute(copy)
  assert f"{name}: {message}" in str(error.value)


@pytest.mark.parametrize("name", ["privacy_statement.md", "report.html", "metrics.jsonl"])
def test_every_number_of_epsilon_in_texts_is_held_against_the_ledger(copy, name):
  path = copy / name
  (guarantee,) = json.loads((copy / claims.FILE).read_text())["guarantees"]
  text, largest = path.read_text(), guarantee["epsilon_max"]
  shown = str(largest) if name == "metrics.jsonl" else round_up(largest)
  tails = text.split(shown)
  assert len(tails) > 2
  for number in range(1, len(tails)):
    path.write_text(shown.join(tails[:number]) + "0.75" + shown.join(tails[number:]))
    with pytest.raises(UserError, match=name):
      command.recompute(copy)
  path.write_text(text)
  assert command.recompute(copy)["epsilon_max"] == largest


@pytest.mark.slow
def test_a_run_that_ends_before_its_ledger_is_written_and_checked(copy):
  """Of six rounds ε was told; the weights are of three, of which the ledger has no line."""
  told = ledger.read(copy).told
  shutil.rmtree(copy / "checkpoints")
  summary = run(copy, server__num_rounds=3)
  found = command.recompute(copy)
  assert (found["rounds"], found["rounds_of_weights"], summary["rounds"]) == (6, 3, 3)
  assert max(told[2][0]) < summary["epsilon_max"] < max(told[4][0]) < found["epsilon_max"]
  edit(copy / "summary.json", lambda record: record.update(epsilon_max=0.9 * max(told[2][0])))
  for reads in (command.recompute, write_report, lambda folder: table.rows_of(folder, 0, {})):
    with pytest.raises(UserError, match=r"summary\.json: epsilon_max is .* gives from .* to "):
      reads(copy)
  edit(copy / "summary.json", lambda record: record.update(rounds=7))
  with pytest.raises(UserError, match="is of 7 rounds, the ledger counts 6"):
    write_report(copy)


def test_of_a_run_with_a_task_that_is_not_registered_all_but_the_report_is_checked(copy):
  assert command.recompute(copy)["not_compared"] == ""
  edit(copy / "config.json", lambda record: {**record, "task": "of_mine"})
  found = command.recompute(copy)
  assert found["epsilon_max"] > 0
  assert (
    "report.html was not compared: the run's task 'of_mine' is not part" in found["not_compared"]
  )
  statement = copy / "privacy_statement.md"
  statement.write_text(statement.read_text().replace("ε", "e", 1))
  with pytest.raises(UserError, match=r"privacy_statement\.md says"):
    command.recompute(copy)
  statement.unlink()
  (copy / "report.html").unlink()
  assert command.recompute(copy)["not_compared"] == ""
