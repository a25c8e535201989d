"""A run with any names on any terminal: all is printed and written, and each name can be told."""

import dataclasses
import functools
import html
import io
import json
import pathlib
import re
import sys
import types
from typing import Any

import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.core.text import encodable, readable, use_any_terminal
from fedjax_med.data.grey import EIGHT_BITS
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.data.modality import PICTURES
from fedjax_med.report import reported_run as runs
from fedjax_med.report import run_page
from fedjax_med.run import console as terminal
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.tasks.regression import REGRESSION
from fedjax_med.tasks.task import Targets
from fedjax_med.trained import loading
from tests.running import smoke_config

CLASSES = ("正常 [red]", "腫瘍 ü [bold] $x$")
HOSPITALS = ("医院 [/]", "A:smile:\\B | [link=x]", readable("\udc93\udcaa\n"))
LEFT_OUT = readable("a/\udc93\udcaa.png")


@functools.cache
def weird_hospitals(config_of=smoke_config):
  hospitals = load_hospitals(config_of(server__num_rounds=1, eval__every=1))
  skipped = ((LEFT_OUT, "cannot be read ([Errno 2] …)"),)
  dataset = dataclasses.replace(hospitals.dataset, class_names=CLASSES, skipped=skipped)
  return dataclasses.replace(hospitals, dataset=dataset, names=HOSPITALS)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  """(workdir, what an ASCII terminal shows) of a run whose folder has a name like any other."""
  folder = tmp_path_factory.mktemp("run") / "[bold] 脳"
  config = smoke_config(server__num_rounds=1, eval__every=1)
  stream = io.BytesIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii", errors="strict"))
    patch.setattr(run_page, "_draw_all", lambda *_: None)  # test_labels draws all figures
    patch.setattr("fedjax_med.report.reported_run._draw_examples", lambda *_: None)
    use_any_terminal()
    runs.run(config, folder, "smoke", "train \udc93", weird_hospitals)
    sys.stdout.flush()
    return folder, stream.getvalue().decode("ascii")


def words(text):
  """A text without the borders of tables and the ends of lines."""
  return " ".join(re.sub(r"[|+\-]{2,}", " ", text).split())


def test_an_ascii_terminal_shows_every_name_and_what_we_say_in_letters(told):
  folder, shown = told
  for name in (*CLASSES, HOSPITALS[0], "would spend epsilon =", "epsilon planned"):
    assert encodable(name, "ascii") in words(shown), name
  assert encodable(LEFT_OUT, "ascii") not in words(shown)  # of a private run
  assert json.loads((folder / "files.json").read_text())["skipped"][0][0] == LEFT_OUT
  assert "A:smile:" in shown
  assert f"Report: {encodable(str(folder), 'ascii')}/report.html" in shown.replace("\n", "")
  assert "\\x93\\xaa\\x0a" in shown


def test_columns_of_tables_stand_below_each_other_on_an_ascii_terminal(told):
  lines = told[1].splitlines()
  (head,) = (k for k, line in enumerate(lines) if "epsilon planned" in line)
  table = lines[head - 1 : head + 6]
  assert len(table[0]) == len(table[1]) == len(table[3])


def test_the_terminal_names_the_positive_class_beside_sensitivity(told):
  positive = encodable(CLASSES[1], "ascii")
  text = words(told[1])
  assert f"positive class: '{positive}'" in text
  last = words(told[1].partition("Test results after")[2])
  assert f"precision and F1 are of the positive class '{positive}'." in last


def test_the_report_is_whole_utf_8_and_holds_the_names_as_they_are(told):
  folder, _ = told
  page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
  assert page.rstrip().endswith("</html>")
  for name in (*CLASSES, *HOSPITALS, "train \\x93"):
    assert name in page
  statement = (folder / "privacy_statement.md").read_text(encoding="utf-8")
  assert "| 医院 [/] |" in statement
  assert "| A:smile:\\B &#124; [link=x] |" in statement


def test_three_classes_have_macro_averages_on_the_terminal():
  values = dict.fromkeys(("accuracy", "auroc", "recall", "specificity", "f1"), 0.5)
  point: Any = types.SimpleNamespace(
    rounds=1, epsilons=(), test={"n": 3, **values}, clients=(), recordings=None
  )
  outcome: Any = types.SimpleNamespace(last=point, stopped="")

  def shown(class_names):
    dataset = dataclasses.replace(weird_hospitals().dataset, class_names=class_names)
    hospitals = dataclasses.replace(weird_hospitals(), dataset=dataset)
    experiment: Any = types.SimpleNamespace(hospitals=hospitals)
    stream = io.StringIO()
    terminal.results(terminal.Terminal(file=stream, width=200), experiment, outcome)
    return words(stream.getvalue())

  assert "macro averages" in shown(("a", "b", "[c]"))
  assert "of the positive class '[c]'" in shown(("a", "[c]"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_live_bar_works_on_any_terminal(encoding, monkeypatch):
  stream = io.BytesIO()
  out = io.TextIOWrapper(stream, encoding=encoding, errors="strict")
  monkeypatch.setattr(sys, "stdout", out)
  use_any_terminal()
  console = terminal.Terminal(force_terminal=True, width=150)
  with terminal.progress(console, "医院 [/] alone", 4, CLASSIFICATION) as listen:
    test = {"accuracy": 0.5, "auroc": None}
    point: Any = types.SimpleNamespace(test=test, epsilons=(1.0,), rounds=2, client_epsilon=None)
    listen(point)
  out.flush()
  shown = stream.getvalue().decode(encoding)
  assert encodable("医院 [/] alone", encoding) in shown
  assert "2/4" in shown


def test_a_folder_that_checkpoints_cannot_have_is_refused_before_anything_runs(tmp_path):
  place = tmp_path / "runs \udc93"
  with pytest.raises(UserError, match=r"no UTF-8.*; rename the folder or choose another one"):
    runs.run(smoke_config(), place, "smoke", "", lambda: pytest.fail("data were read"))
  assert not place.exists()
  place.mkdir()
  with pytest.raises(UserError, match="no UTF-8"):
    loading.load(place)


def test_what_goes_with_an_exported_model_can_be_written_whatever_its_run_holds():
  from fedjax_med.trained.exporting import describe

  nothing: Any = None
  model = loading.Trained(
    folder=pathlib.Path(),
    run_id="id",
    config=smoke_config(),
    class_names=("no", "\udc93"),
    rounds=1,
    model=nothing,
    params={},
    state={},
    grey=EIGHT_BITS,
    modality=PICTURES,
    task=CLASSIFICATION,
    stem_pool_padding="",
    hospital="\udcaa",
  )
  about = describe(model, {})
  text = json.dumps(about, ensure_ascii=False)
  assert text.encode("utf-8")
  assert (about["classes"], about["positive_class"]) == (["no", "\\x93"], "\\x93")
  fitted = {"means": np.array([2.0]), "spreads": np.array([0.5])}
  targets = Targets(values=np.zeros((0, 1)), names=("dose",), unit="mg", fitted=fitted)
  about = describe(model._replace(task=REGRESSION, targets=targets), {})
  assert (about["targets"], about["unit"], about["means"]) == (["dose"], "mg", [2.0])
  assert "classes" not in about
