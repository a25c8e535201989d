"""A metric is added in one place and then seen everywhere; folders that lack it stay readable."""

import html
import io
import re
import types
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from fedjax_med import study
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder.reading import read_json
from fedjax_med.report import figures, run_page, sweep_page
from fedjax_med.report.run_page import write_report
from fedjax_med.run import console as terminal
from fedjax_med.run import trackers
from fedjax_med.sweep import progress, table
from fedjax_med.tasks import registry
from fedjax_med.tasks.classification import CLASSIFICATION, classification_metrics
from fedjax_med.tasks.task import Metric
from tests.running import smoke_config
from tests.sweep.sweeping import base, sweep

SIGMA = "privacy.noise_multiplier"
GAP = Metric(name="gap", label="Squared gap", better="lower", bounds=(0.0, 2.0))


def with_gap(probabilities, labels):
  squares = np.square(probabilities - np.eye(probabilities.shape[1])[labels])
  value = float(squares.sum(axis=1).mean()) if len(labels) else None
  return {**classification_metrics(probabilities, labels), "gap": value}


NEW = CLASSIFICATION._replace(shown=(*CLASSIFICATION.shown, GAP), metrics=with_gap)
SETTING = {"server__num_rounds": 1, "eval__every": 1, "eval__local_baselines": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two sweeps of the same points: one of before the metric was added, one of after."""
  old, new = (tmp_path_factory.mktemp(name) for name in ("old", "new"))
  points = [{SIGMA: 1.0}, {SIGMA: 2.0}]
  sweep(old, points, base(**SETTING))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(registry.TASKS, "classification", NEW)
    sweep(new, points, base(**SETTING))
  return old, new


@pytest.fixture(autouse=True)
def added(monkeypatch, folders):
  monkeypatch.setitem(registry.TASKS, "classification", NEW)


def column_of(page, table_id, heading):
  """Texts of the cells of a column of a table, top to bottom."""
  body = re.search(rf'<table id="{table_id}">.*?</table>', page, re.DOTALL)
  assert body is not None
  rows = [
    [html.unescape(re.sub("<.*?>", "", cell)).strip() for cell in
     re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
    for row in re.findall(r"<tr.*?</tr>", body[0], re.DOTALL)
  ]  # fmt: skip
  place = rows[0].index(heading)
  return [row[place] for row in rows[1:]]


def panels(monkeypatch, draw):
  """Titles of all panels of the figures that ``draw`` makes."""
  titles = []

  def keep(figure, place, **_):
    titles.extend(axis.get_title(loc="left") for axis in figure.axes)
    place.write_bytes(b"")

  with monkeypatch.context() as patch:
    patch.setattr(Figure, "savefig", keep)
    draw()
  return titles


def test_a_new_metric_is_in_the_files_and_in_every_table_of_the_report(folders, monkeypatch):
  monkeypatch.setattr(run_page, "_draw_all", lambda *_: None)
  folder = table.folder_of(folders[1], 0)
  summary = read_json(folder / "summary.json")
  page = write_report(folder).read_text(encoding="utf-8")
  values = [summary["test"]["gap"], *(client["gap"] for client in summary["clients"])]
  results = column_of(page, "results", "Squared gap")
  shown = [results[0], *results[3:]]
  assert shown == ["–" if value is None else f"{value:.3f}" for value in values]
  known = [value for value in values[1:] if value is not None]
  assert results[2] == f"{max(known):.3f}"  # lower is better
  assert column_of(page, "comparison", "Squared gap, all test images")[0] == results[0]
  assert re.search(r"<div><b>[^/]*/data></b><span>Squared gap</span></div>", page)


def test_a_new_metric_has_a_panel_in_the_figures_of_a_run(folders, monkeypatch):
  folder = table.folder_of(folders[1], 0)
  run = run_page.read_run(folder)
  titles = panels(monkeypatch, lambda: run_page._draw_all(folder / "figures", run, ".png"))
  assert titles.count("Squared gap") == 2  # over rounds, and for each hospital


@pytest.mark.parametrize("with_baselines", [True, False])
def test_a_new_metric_of_many_hospitals_has_a_panel(folders, monkeypatch, tmp_path, with_baselines):
  run = run_page.read_run(table.folder_of(folders[1], 0))
  monkeypatch.setattr(figures, "MAX_BARS", 1)
  baselines = run["baselines"] if with_baselines else None

  def draw():
    held, path = run["hospitals"], tmp_path / "x.png"
    figures.draw_hospitals(path, run["summary"], held, baselines, NEW)

  titles = panels(monkeypatch, draw)
  assert [title.partition(":")[0] for title in titles] == ["AUROC", "accuracy", "Squared gap"]


def test_a_new_metric_is_on_the_page_and_in_the_papers_of_a_sweep(folders, tmp_path, monkeypatch):
  monkeypatch.setattr(sweep_page, "_draw", lambda *_: None)
  page = sweep_page.write(sweep_page.read_sweep(folders[1]), tmp_path).read_text(encoding="utf-8")
  reached = [read_json(table.folder_of(folders[1], k) / "summary.json") for k in (0, 1)]
  expected = [f"{summary['test']['gap']:.3f}" for summary in reached]
  assert column_of(page, "arms", "Squared gap") == expected
  worst = [max(client["gap"] for client in summary["clients"]) for summary in reached]
  found = column_of(page, "hospitals", "Squared gap, worst hospital")
  assert found == [f"{value:.3f}" for value in worst]
  assert "Squared gap" in (tmp_path / "table.tex").read_text(encoding="utf-8")
  assert "worst.gap" in pd.read_csv(tmp_path / "table.csv")


def test_study_averages_a_new_metric_within_its_bounds(folders):
  frame = study.load(folders[1])
  found = study.aggregate(frame, SIGMA, "worst.gap")
  worst = frame.groupby("point")["gap"].max().to_numpy()
  np.testing.assert_allclose(found["mean"], worst)
  assert study.bounds_of(frame, "all.gap") == (0.0, 2.0)


def shown_on_terminal(values):
  """What the terminal shows of a log point, in the progress line and in the final table."""
  hospitals = load_hospitals(smoke_config())
  client = {"name": "hospital 1", "n": 3, **values}
  point: Any = types.SimpleNamespace(
    rounds=1,
    epsilons=(),
    client_epsilon=None,
    test={"n": 3, **values},
    clients=[client],
    recordings=None,
  )
  outcome: Any = types.SimpleNamespace(last=point, stopped="")
  experiment: Any = types.SimpleNamespace(hospitals=hospitals)
  stream = io.StringIO()
  console = terminal.Terminal(file=stream, width=200)
  with terminal.progress(console, "run", 1, NEW) as listen:
    listen(point)
  line = stream.getvalue()
  terminal.results(console, experiment, outcome)
  return line, stream.getvalue()[len(line) :]


@pytest.mark.slow
def test_the_terminal_shows_a_new_metric(folders):
  line, results = shown_on_terminal({"auroc": 0.5, "gap": 0.125})
  assert "Squared gap 0.125" in line
  assert "Squared gap" in results
  assert results.count("0.125") == 2
  stream = io.StringIO()
  points = [{SIGMA: 1.0}, {SIGMA: 2.0}]
  progress.results(Console(file=stream, width=200), table.collect(folders[1]), points)
  assert "Squared gap" in stream.getvalue()


def test_a_tracker_gets_a_new_metric(folders):
  (line, *_) = run_page.read_run(table.folder_of(folders[1], 0))["log"]
  values = trackers.values_of(line, NEW)
  assert values["test/gap"] == line["gap"]


def test_a_metric_that_an_old_run_lacks_is_a_dash_in_its_report(folders):
  folder = table.folder_of(folders[0], 0)
  assert "gap" not in read_json(folder / "summary.json")["test"]
  page = write_report(folder).read_text(encoding="utf-8")  # with its figures
  assert set(column_of(page, "results", "Squared gap")) == {"–"}
  assert set(column_of(page, "comparison", "Squared gap, all test images")) == {"–"}
  assert all(cell != "–" for cell in column_of(page, "results", "Accuracy"))


@pytest.mark.slow
def test_a_metric_that_an_old_sweep_lacks_is_a_dash_on_its_page_and_missing_in_study(folders):
  page = sweep_page.write(sweep_page.read_sweep(folders[0]), folders[0]).read_text(encoding="utf-8")
  assert column_of(page, "arms", "Squared gap") == ["–", "–"]
  frame = study.load(folders[0])
  found = study.aggregate(frame, SIGMA, "all.gap")
  assert found["missing"].tolist() == [1, 1]
  assert found["mean"].isna().all()
  stream = io.StringIO()
  progress.results(Console(file=stream, width=200), frame, [{SIGMA: 1.0}, {SIGMA: 2.0}])
  assert "–" in stream.getvalue()


def test_a_metric_that_a_log_point_lacks_is_a_dash_on_the_terminal():
  line, results = shown_on_terminal({"auroc": 0.5})
  assert "Squared gap –" in line
  assert "–" in results


def test_a_run_whose_task_this_version_does_not_know_is_named(folders):
  record = read_json(table.folder_of(folders[0], 0) / "config.json")
  assert registry.task_of(record).name == "classification"
  assert registry.task_of({"run_id": "of an older version"}).name == "classification"
  with pytest.raises(ValueError, match=r"run's task 'survival' is not part of .*; give --network"):
    registry.task_of({**record, "task": "survival"})
