"""What lies in a folder at any moment: killed at every write, it understates nothing."""

import contextlib
import copy
import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder import secret, writing
from fedjax_med.prepare.experiment import build, build_baselines
from fedjax_med.privacy import claims, ledger
from fedjax_med.run import baselines, checkpoints, training, writer
from fedjax_med.run.console import make_console
from fedjax_med.run.single import train_rounds
from fedjax_med.run.statement import statement_text
from fedjax_med.run.summaries import summary_record
from fedjax_med.sweep import runner, table
from fedjax_med.sweep.programs import Placement
from tests.running import metrics, smoke_config
from tests.sweep.sweeping import base, sweep

# Functions that change a folder, with the module that they are looked up in.
WRITES = [
  (writing, "write_whole"),
  (writing, "append_metrics"),
  (ledger, "_append"),
  (ledger, "_write"),
  (secret, "keep"),
  (checkpoints, "save"),
]
QUIET = make_console(quiet=True)


class Killed(BaseException):
  """Ends a process in a test."""


@contextlib.contextmanager
def killed_at(number: int):
  """Ends what runs inside in the place of its write of that number, from 1.

  Yields a list that is empty as long as nothing was ended.
  """
  counter, killed = itertools.count(1), []

  def interrupted(write):
    def or_killed(*arguments, **names):
      if next(counter) == number:
        killed.append(write)
        raise Killed
      return write(*arguments, **names)

    return or_killed

  unlink = pathlib.Path.unlink

  def remove(path, missing_ok=False):
    results = path.name in (writing.SUMMARY, writing.REPORT, writing.STATEMENT)
    (interrupted(unlink) if results else unlink)(path, missing_ok=missing_ok)

  with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
    for module, name in WRITES:
      patch.setattr(module, name, interrupted(getattr(module, name)))
    patch.setattr(pathlib.Path, "unlink", remove)
    yield killed


def require_promises(folder):
  """Nothing on disk understates: results have their releases, a summary has its statement."""
  for place in (folder, *folder.glob("baselines/*")):
    book = ledger.read(place) if (place / ledger.FILE).exists() else None
    for line in writing.read_metrics(place):
      assert book is not None
      assert line["round"] <= book.rounds
    if not (place / "summary.json").exists():
      continue
    assert (place / "privacy_statement.md").read_text() == statement_text(place)
    summary = json.loads((place / "summary.json").read_text())
    claims.require_told(place, summary, summary["rounds"], book)


NAMES = ("summary.json", "privacy.json", "ledger.jsonl", "hospitals.json", "privacy_statement.md")


def files_of(folder):
  """Everything that is the same in an unbroken and a resumed run, by its path."""
  found = {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.name in (*NAMES, "baselines.json", "config.json", "noise.key")
  }
  for place in (folder, *folder.glob("baselines/*")):
    lines = [{**line, "seconds": 0} for line in metrics(place)]
    found[f"{place.name} log" if place != folder else "log"] = lines
  return found


def kill_at_every_write(start, tmp_path, least):
  """Starts in folder after folder, each killed one write later and resumed to the same end.

  ``least`` is a number of writes that a start has at least.
  """
  start(tmp_path / "whole")
  expected = files_of(tmp_path / "whole")
  number, killed = 0, ["the first start"]
  while killed:
    number += 1
    folder = tmp_path / f"killed{number}"
    with killed_at(number) as killed:
      start(folder)
    require_promises(folder)
    start(folder)
    require_promises(folder)
    assert files_of(folder) == expected
  assert number > least


@pytest.fixture(scope="module")
def experiments():
  """A private run of one round that is built and compiled once, and its baselines."""
  config = smoke_config(server__num_rounds=1, eval__every=1, eval__local_baselines=True)
  experiment = build(config, load_hospitals(config))
  return experiment, build_baselines(experiment)


@pytest.fixture
def start(experiments, monkeypatch):
  """Starts ``training.run`` of the built run in a folder, with baselines or without."""
  experiment, others = experiments
  monkeypatch.setattr(training, "build", lambda *_: experiment)
  monkeypatch.setattr(baselines, "build_baselines", lambda _: others)

  def run(folder, with_baselines):
    if not with_baselines:
      monkeypatch.setattr(training, "run_baselines", lambda *_: {})
    hospitals = experiment.hospitals
    return training.run(
      experiment.config, folder, "smoke", "test", lambda: hospitals, console=QUIET
    )

  return run


@pytest.mark.parametrize("with_baselines", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_killed_at_every_write_understates_nothing_and_ends_in_the_same_bytes(
  start, tmp_path, with_baselines
):
  least = 90 if with_baselines else 18
  kill_at_every_write(lambda folder: start(folder, with_baselines), tmp_path, least)
  assert (tmp_path / "whole/baselines/pooled/summary.json").exists() == with_baselines


@pytest.fixture(scope="module")
def ended(experiments, tmp_path_factory):
  """A run and its baselines whose last files are still to be written, and its summary."""
  folder = tmp_path_factory.mktemp("ended")
  experiment, others = experiments
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(baselines, "build_baselines", lambda _: others)
    outcome = train_rounds(experiment, folder)
    baselines.run_baselines(experiment, folder, "smoke", "test", QUIET)
  return folder, summary_record(experiment, outcome, "smoke"), outcome


def test_no_summary_stands_without_its_statement_while_baselines_join_the_results(
  experiments, ended, tmp_path
):
  source, summary, _ = ended
  case, seconds = experiments[0].case, {"total": 0.0}
  whole = shutil.copytree(source, tmp_path / "whole")
  writer.finish(whole, summary, seconds, case)
  require_promises(whole)
  number, at_once, later = 0, whole, whole
  killed = killed_later = ["the first start"]
  while killed or killed_later:
    number += 1
    at_once, later = (shutil.copytree(source, tmp_path / f"{name}{number}") for name in "ab")
    with killed_at(number) as killed:
      writer.finish(at_once, summary, seconds, case)
    require_promises(at_once)
    writer.finish(later, summary, seconds)  # a point, whose baselines end after it
    with killed_at(number) as killed_later:
      writer.add_baselines(case, later)
    require_promises(later)
  assert number > 6
  assert files_of(at_once) == files_of(later) == files_of(whole)


def test_an_ended_run_whose_ledger_broke_is_extended_and_understates_nothing_killed_at_every_write(
  experiments, ended, tmp_path
):
  experiment, (source, summary, _) = experiments[0], ended
  config = copy.deepcopy(experiment.config)
  config.server.num_rounds = 2
  longer = experiment._replace(case=experiment.case._replace(config=config))
  whole = shutil.copytree(source, tmp_path / "whole")
  writer.finish(whole, summary, {"total": 0.0})
  require_promises(whole)
  head = ledger.read(whole).head
  with (whole / ledger.FILE).open("ab") as file:
    file.write(b'{"rounds": 2}\n')  # of which something may have been given out
  broken = (whole / ledger.FILE).read_bytes()

  def begin(folder):
    writer.begin(longer, folder, "test", saved=1, head=head, tell=lambda _: None)

  number, killed, mended = 0, ["the first start"], 0
  while killed:
    number += 1
    folder = shutil.copytree(whole, tmp_path / f"killed{number}")
    with killed_at(number) as killed:
      begin(folder)
    if (folder / ledger.FILE).read_bytes() != broken:
      mended += 1
      require_promises(folder)
      assert not (folder / writing.STATEMENT).exists()  # it is of one round, the ledger of two
    begin(folder)
    assert ledger.read(folder).rounds == 2
  assert number > 6
  assert mended > 2


def test_baselines_whose_ledger_was_edited_are_refused_and_the_points_results_stay(
  experiments, ended, tmp_path
):
  source, summary, _ = ended
  folder = shutil.copytree(source, tmp_path / "point")
  writer.finish(folder, summary, {"total": 0.0})
  before = files_of(folder)
  for place in ("baselines/pooled", "."):
    path = folder / place / ledger.FILE
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"rounds": 1', b'"rounds": 0'))
    with pytest.raises(UserError, match="was edited"):
      writer.add_baselines(experiments[0].case, folder)
    path.write_bytes(text)
    assert files_of(folder) == before
  assert (folder / writing.SUMMARY).exists()
  require_promises(folder)


def test_a_point_of_a_sweep_killed_at_every_write_understates_nothing(experiments, ended, tmp_path):
  (experiment, _), (source, _, outcome) = experiments, ended
  trained = runner.EndedRun(outcome=outcome, lines=metrics(source))
  placement = Placement(chunks=[], size=1, at_once=1, mesh=None)

  def write(folder):
    runner.write_point(experiment, placement, trained, folder, "smoke", "test")

  kill_at_every_write(write, tmp_path, least=14)


@pytest.mark.slow
def test_a_sweep_killed_while_baselines_join_its_points_is_finished_to_the_same_bytes(tmp_path):
  points, config = [{"privacy.noise_multiplier": sigma} for sigma in (1.0, 2.0)], base()
  config.eval.local_baselines = True
  sweep(tmp_path / "whole", points, config)
  broken = tmp_path / "broken"
  # The second point's baselines, then its statement once it has run again.
  for name, last in (("_write_baselines", 1), ("write_statement", 2)):
    calls, real = itertools.count(), getattr(writer, name)

    def or_killed(*arguments, last=last, calls=calls, real=real):
      if arguments[-1].parent.name == "points" and next(calls) == last:
        raise Killed
      return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(writer, name, or_killed)
      with pytest.raises(Killed):
        sweep(broken, points, config)
    folders = [table.folder_of(broken, number) for number in range(len(points))]
    assert [(folder / "summary.json").exists() for folder in folders] == [True, False]
    for folder in folders:
      require_promises(folder)
  sweep(broken, points, config)
  for number, folder in enumerate(folders):
    assert files_of(folder) == files_of(table.folder_of(tmp_path / "whole", number))


def test_a_private_run_leaves_no_secret_in_the_folder_of_a_sweep(tmp_path):
  table.begin(tmp_path, smoke_config(), [{"seed": 0}], ("sampling",))
  with pytest.raises(UserError, match="holds a sweep; use another --workdir for the run"):
    training.run(smoke_config(), tmp_path, console=QUIET)
  assert not (tmp_path / secret.FILE).exists()


def test_without_a_folder_a_run_has_the_same_results_writes_nothing_and_prints_nothing(
  start, experiments, tmp_path, monkeypatch, capsys
):
  (tmp_path / "nothing").mkdir()
  monkeypatch.chdir(tmp_path / "nothing")
  found = start(None, True)
  expected = start(tmp_path / "run", True)
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert not any((tmp_path / "nothing").iterdir())
  assert capsys.readouterr() == ("", "")
  for result in (found, expected):
    record = summary_record(result.experiment, result.outcome, "smoke")
    assert {**record, "baselines": summary["baselines"]} == {
      **summary,
      "plan": {**summary["plan"], "reasons": record["plan"]["reasons"]},
    }
    assert [point.rounds for point in result.curve] == [0, 1]
    assert result.baselines.keys() == experiments[1].keys()
    pooled = result.baselines["pooled"].last.test
    assert pooled == {key: summary["baselines"]["pooled"][key] for key in pooled}
  assert max(found.outcome.last.epsilons) == summary["epsilon_max"] > 0
  for ours, theirs in zip(
    *map(jax.tree.leaves, (found.weights(), expected.weights())), strict=True
  ):
    assert isinstance(ours, np.ndarray)
    np.testing.assert_array_equal(ours, theirs)


def test_a_tracker_without_a_folder_is_refused():
  config = smoke_config(eval__tracker="tensorboard")
  with pytest.raises(UserError, match=r"eval\.tracker=tensorboard without a workdir.*; give"):
    training.run(config, console=QUIET)
