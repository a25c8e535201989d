"""A report names the positive class, and what figures show for a name; it is whole or not there."""

import html
import json
import pathlib
import re

import pytest

from fedjax_med.report import figures, run_page
from fedjax_med.report.run_page import write_report
from fedjax_med.run.statement import write_statement
from tests.report.test_run_page import fake_workdir, outline


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
  """Reports without their figures, which test_labels draws."""
  monkeypatch.setattr(run_page, "_draw_all", lambda *_: None)


def page_of(folder, **changes):
  fake_workdir(folder, num_log_points=1, private=False, baselines=False, **changes)
  return html.unescape(write_report(folder).read_text(encoding="utf-8"))


def test_the_positive_class_stands_beside_every_sensitivity(tmp_path):
  page = page_of(tmp_path, class_names=("No_DR", "DR"))
  tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
  tiles = re.findall(r"<div><b>.*?</div>", page)
  shown = [part for part in (*tables, *tiles) if "Sensitivity" in part]
  assert len(shown) == 2
  assert all("DR" in re.sub("No_DR", "", part) for part in shown)
  assert "F1 are of the positive class 'DR'." in next(part for part in shown if "<table" in part)
  assert "(positive: “DR”)" in next(part for part in shown if "<table" not in part)
  assert "macro" not in page


def test_three_classes_have_macro_averages_in_every_table_of_sensitivity(tmp_path):
  page = page_of(tmp_path, class_names=("a", "b", "c"))
  tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
  assert all("macro averages" in part for part in tables if "Sensitivity" in part)
  assert "positive class" not in page
  assert "(macro)" in page


def test_the_page_says_what_figures_show_for_a_name(tmp_path):
  names = ("\U000f0000", "ordinary <b>")
  page = page_of(tmp_path, class_names=names)
  (line,) = re.findall(r'<p class="quiet" id="labels">(.*?)</p>', page)
  assert line == "In the figures “class 1” is “\U000f0000”."
  assert "ordinary <b>" in page
  assert "<b>" not in outline((tmp_path / "report.html").read_text(encoding="utf-8")).rows
  assert 'id="labels"' not in page_of(tmp_path / "other")


def test_a_run_whose_files_hold_bytes_that_are_no_text_has_a_report(tmp_path):
  page = page_of(tmp_path, class_names=("no", "\udc93\udcaa"))
  assert "'\\x93\\xaa'" in page


@pytest.mark.parametrize("write", [write_report, write_statement])
def test_what_a_kill_cuts_short_leaves_the_old_file(tmp_path, monkeypatch, write):
  fake_workdir(tmp_path, num_log_points=1, baselines=False)
  path = write(tmp_path)
  before = {place.name: place.read_bytes() for place in tmp_path.rglob("*") if place.is_file()}
  written = pathlib.Path.write_bytes

  def fails(place, content):
    written(place, content[: len(content) // 2])
    raise OSError("disk full")

  monkeypatch.setattr(pathlib.Path, "write_bytes", fails)
  with pytest.raises(OSError, match="disk full"):
    write(tmp_path)
  assert path.name in before
  assert {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_many_hospitals_are_not_in_figures_and_not_in_the_line(tmp_path):
  number = figures.MAX_BARS + 1
  fake_workdir(tmp_path, num_hospitals=number, num_log_points=1, private=False, baselines=False)
  for name in ("hospitals.json", "summary.json"):
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(re.sub(r'"H(\d+)"', r'"\\u533b\1"', text))
  assert json.loads((tmp_path / "hospitals.json").read_text())["hospitals"][0]["name"] == "医000"
  assert 'id="labels"' not in write_report(tmp_path).read_text(encoding="utf-8")
