"""Every table of a sweep says which class its sensitivity and F1 are of."""

import html
import io
import json
import pathlib
import re
import shutil

import pandas as pd
import pytest
from rich.console import Console

from fedjax_med.report import latex, sweep_page
from fedjax_med.sweep import progress, table
from fedjax_med.tasks.classification import CLASSIFICATION
from tests.sweep.sweeping import base, sweep

SIGMA = "privacy.noise_multiplier"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  folder = tmp_path_factory.mktemp("positive")
  sweep(folder, [{SIGMA: 1.0}, {SIGMA: 2.0}], base(server__num_rounds=1, eval__every=1))
  return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
  monkeypatch.setattr(sweep_page, "_draw", lambda *_: None)


def page_of(runs, target):
  return html.unescape(sweep_page.write(runs, target).read_text(encoding="utf-8"))


def renamed(swept, target, names):
  """Copies of the points, of which each has these names of its classes."""
  folders = []
  for number, class_names in enumerate(names):
    folder = shutil.copytree(table.folder_of(swept, number), target / f"run{number}")
    held = json.loads((folder / "hospitals.json").read_text())
    (folder / "hospitals.json").write_text(json.dumps({**held, "class_names": class_names}))
    folders.append(folder)
  return folders


def tables_with_sensitivity(page):
  found = re.findall(r"<table.*?</table>", page, re.DOTALL)
  return [part for part in found if "Sensitivity" in part.partition("</thead>")[0]]


def test_every_table_of_the_page_names_the_one_positive_class(swept, tmp_path):
  page = page_of(sweep_page.read_sweep(swept), tmp_path / "report")
  assert len(tables_with_sensitivity(page)) == 2
  for part in tables_with_sensitivity(page):
    assert "F1 are of the positive class 'tumour'." in part
    assert '<th class="text">Positive class' not in part
  assert "F1 (positive: tumour)" in (tmp_path / "report" / "table.tex").read_text()
  assert set(pd.read_csv(tmp_path / "report" / "table.csv")["positive_class"]) == {"tumour"}
  assert set(table.collect(swept)["positive_class"]) == {"tumour"}


def test_runs_with_other_positive_classes_name_each(swept, tmp_path):
  folders = renamed(swept, tmp_path, (["no", "yes <b>"], ["DR", "No_DR"]))
  page = page_of(sweep_page.read_runs(folders), tmp_path / "both")
  for part in tables_with_sensitivity(page):
    assert "differs: see the column" in part
    assert re.search(r"noise_multiplier=1</th>(?s:.)*?yes <b>(?s:.)*?No_DR", part)
  text = (tmp_path / "both" / "table.tex").read_text()
  assert "positive class" in text
  assert "No\\_DR" in text


def test_arms_of_several_positive_classes_say_that_it_differs(swept, tmp_path):
  folders = renamed(swept, tmp_path, (["no", "yes"], ["yes", "no"]))
  runs = sweep_page.read_runs(folders)
  (arm,) = sweep_page._arms(runs.frame, [])
  assert arm["positive"] == "differs"
  three = renamed(swept, tmp_path / "three", (["a", "b", "c"],) * 2)
  (arm,) = sweep_page._arms(sweep_page.read_runs(three).frame, [])
  assert arm["positive"] == "macro average"
  page = page_of(sweep_page.read_runs(three), tmp_path / "page")
  assert all("macro averages" in part for part in tables_with_sensitivity(page))
  assert "F1 (macro)" in (tmp_path / "page" / "table.tex").read_text()


@pytest.mark.parametrize(
  ("positives", "sentence"),
  [
    (("[b]", "[b]"), "F1 are of the positive class '[b]'"),
    (("", ""), "macro averages"),
    (("[b]", ""), "differs: see the column"),
  ],
)
def test_the_terminal_names_it_point_by_point_where_it_differs(positives, sentence):
  frame = pd.DataFrame(
    [
      {"point": k, "task": "classification", "positive_class": name, "stopped": "completed",
       "rounds": 1, "epsilon_max": 1.0, "all.auroc": 0.5, "all.accuracy": 0.5, "all.f1": 0.5}
      for k, name in enumerate(positives)
    ]
  )  # fmt: skip
  stream = io.StringIO()
  progress.results(Console(file=stream, width=200), frame, [{"seed": 0}, {"seed": 1}])
  shown = " ".join(stream.getvalue().split())
  assert sentence in shown
  assert ("positive class ┃" in shown) == (len(set(positives)) > 1)
  assert shown.count("[b]") == positives.count("[b]") if "differs" in sentence else True


def test_latex_prints_any_name_and_says_where_letters_need_another_engine():
  assert latex.as_text(r"a_b & 5% \x93 {$~^#") == (
    r"a\_b \& 5\% \textbackslash{}x93 \{\$\textasciitilde{}\textasciicircum{}\#"
  )
  shown = {"data.path": ["/a/正常"], "unit": ["none"], "epsilon": [1.0], "positive_class": ["a"]}
  ends = [f"{name}{end}" for name in ("auroc", "worst.auroc") for end in ("", ".low", ".high")]
  task = CLASSIFICATION._replace(shown=CLASSIFICATION.shown[:1])
  text = latex.table_of(
    pd.DataFrame({**shown, **{end: [0.5] for end in ends}}), ["data.path"], task
  )
  assert text.startswith("% Compile with xelatex")
  assert "/a/正常" in text


def test_a_path_with_bytes_that_are_no_text_is_in_every_table(swept, tmp_path):
  folder = shutil.copytree(swept, tmp_path / "sweep")
  for number in (0, 1):
    path = table.folder_of(folder, number) / "config.json"
    record = json.loads(path.read_text())
    record["config"]["data"]["path"] = "/a/\udc93"
    path.write_text(json.dumps(record))
  frame = table.write(folder)
  assert set(frame["data.path"]) == {"/a/\\x93"}
  assert "/a/\\x93" in (folder / "results.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
  ("name", "part"), [("report.html", b"</html>"), ("table.tex", b"toprule"), ("table.csv", b"")]
)
def test_what_fails_half_way_leaves_the_old_report(swept, tmp_path, monkeypatch, name, part):
  runs, written = sweep_page.read_sweep(swept), pathlib.Path.write_bytes
  sweep_page.write(runs, tmp_path)
  (tmp_path / name).write_text("old")

  def fails(place, content):
    if part not in content:
      return written(place, content)
    written(place, b"ne")
    raise OSError("disk full")

  if part:
    monkeypatch.setattr(pathlib.Path, "write_bytes", fails)
  else:
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda frame, place, **_: fails(place, b""))
  with pytest.raises(OSError, match="disk full"):
    sweep_page.write(runs, tmp_path)
  assert (tmp_path / name).read_text() == "old"
  assert not list(tmp_path.glob(".*"))
