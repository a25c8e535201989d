"""The report on a sweep or on several runs: its numbers, its figures, its page in a browser."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedjax_med import study
from fedjax_med.core.errors import UserError
from fedjax_med.report import sweep_page
from fedjax_med.report.run_page import environment
from fedjax_med.sweep import table
from tests.sweep.sweeping import AXES, base, sweep

SIGMA, TARGET, ALPHA = "privacy.noise_multiplier", "privacy.target_epsilon", "partition.alpha"
POINTS = [
  {TARGET: target, SIGMA: 0.0, ALPHA: alpha, "seed": seed}
  for target in (2.0, 8.0, math.inf)
  for alpha in (0.3, 100.0)
  for seed in (0, 1)
]
FIGURES = ("frontier", "spread", "curves", "confusions", "partition")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  sweep(folder, POINTS)
  sweep_page.write(sweep_page.read_sweep(folder), folder)
  return folder


def cells(page, name):
  """Rows of a table, each a list of its cells' texts."""
  body = re.search(rf'<table id="{name}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
  assert body is not None
  rows = re.findall(r"<tr.*?</tr>", body[1], re.DOTALL)
  return [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_page_needs_nothing_but_itself_and_has_every_figure(swept):
  page = (swept / "report.html").read_text()
  assert page.count("data:image/png;base64,") == len(FIGURES)
  assert not re.search(r"https?:|url\(|@import|<script|<link", page)
  for name in FIGURES:
    assert (swept / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (swept / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
  for note in json.loads((table.folder_of(swept, 0) / "config.json").read_text())["notes"]:
    assert note in page


def test_a_setting_has_the_mean_and_the_interval_of_its_points(swept):
  page = (swept / "report.html").read_text()
  frame = study.load(swept)
  rows = cells(page, "arms")
  assert len(rows) == 6
  found = study.aggregate(frame, [TARGET, ALPHA], "all.auroc")
  for row, (target, alpha) in zip(rows, [(p[TARGET], p[ALPHA]) for p in POINTS[::2]], strict=True):
    assert row[0].startswith(f"target_epsilon={target:g}, alpha={alpha:g}")
    own = found[(found[TARGET] == target) & (found[ALPHA] == alpha)]
    values = [float(v) for v in re.findall(r'value="(.*?)"', row[4])]
    assert values == pytest.approx(own[["mean", "low", "high"]].to_numpy(float)[0])
    epsilon = re.sub("<.*?>", "", row[3]).strip()
    assert (epsilon == "none") == math.isinf(target)
    assert row[2] == ("none" if math.isinf(target) else "record")
    if epsilon != "none":
      assert float(epsilon) <= target


def test_tables_for_papers_hold_the_same_numbers(swept):
  shown = pd.read_csv(swept / "table.csv")
  frame = study.aggregate(study.load(swept), [TARGET, ALPHA], "worst.recall")
  merged = shown.merge(frame, on=[TARGET, ALPHA])
  assert len(merged) == 6
  np.testing.assert_allclose(merged["worst.recall"], merged["mean"])
  np.testing.assert_allclose(merged["worst.recall.low"], merged["low"])
  text = (swept / "table.tex").read_text()
  assert text.count(r"\\") == 7
  assert r"\varepsilon" in text
  first = shown[["auroc", "auroc.low", "auroc.high"]].to_numpy(float)[0]
  assert "{:.3f} [{:.3f}, {:.3f}]".format(*first) in text
  ends = shown.filter(regex=r"\.(low|high)$").to_numpy(float)
  assert np.nanmin(ends) >= 0
  assert np.nanmax(ends) <= 1


def test_the_same_files_give_the_same_bytes(swept, tmp_path):
  again = tmp_path / "again"
  shutil.copytree(swept, again)
  sweep_page.write(sweep_page.read_sweep(again), again)
  for name in ("report.html", "table.csv", "table.tex", "figures/frontier.pdf"):
    assert (again / name).read_bytes() == (swept / name).read_bytes()


def test_the_frontier_has_a_line_a_partition_and_a_level_without_privacy(swept):
  runs = sweep_page.read_sweep(swept)
  axes = sweep_page._axes(runs)
  assert axes == [TARGET, ALPHA]
  frontier = sweep_page._frontier(axes, sweep_page._arms(runs.frame, axes), "auroc")
  assert frontier is not None
  ((title, lines),), name, log = frontier
  assert title == ""
  assert (name, log) == ("ε of the worst hospital", True)
  assert [line.label for line in lines] == ["alpha=0.3", "alpha=100"]
  frame = study.load(swept)
  for line, alpha in zip(lines, (0.3, 100.0), strict=True):
    own = frame[frame[ALPHA] == alpha]
    spent = sorted(own.groupby(TARGET)["epsilon_max"].max())
    assert list(line.x) == pytest.approx(spent)
    assert math.isinf(line.x[-1])
    known = own[own[TARGET] == 8.0].groupby("point")["all.auroc"].first()
    assert line.mean[1] == pytest.approx(known.mean())


def test_many_lines_are_shared_out_to_panels_by_the_first_axes():
  axes = ["privacy.unit", "partition.num_clients", TARGET, ALPHA]
  stats = {key: {"n": 1, "mean": 0.5, "low": 0.4, "high": 0.6} for key in ("auroc", "alone.auroc")}
  arms = [
    {
      "values": dict(zip(axes, (unit, k, target, a), strict=True)),
      "epsilon": target,
      "stats": stats,
    }
    for unit in ("record", "patient")
    for k in (5, 20)
    for target in (1.0, 8.0)
    for a in (0.1, 1.0, 100.0)
  ]
  frontier = sweep_page._frontier(axes, arms, "auroc")
  assert frontier is not None
  panels = dict(frontier[0])
  titles = [f"unit={unit}, num_clients={k}" for unit in ("record", "patient") for k in (5, 20)]
  assert list(panels) == titles
  assert [line.label for line in panels[titles[0]]] == ["alpha=0.1", "alpha=1", "alpha=100"]
  assert all(list(line.x) == [1.0, 8.0] for lines in panels.values() for line in lines)
  # What follows from other axes tells nothing apart: batch size of hospitals, rate of ε.
  for arm in arms:
    batch = {5: 64, 20: 32}[arm["values"]["partition.num_clients"]]
    rate = 0.1 if arm["values"][TARGET] == 1.0 else 0.3
    arm["values"] |= {"client.batch_size": batch, "client.learning_rate": rate}
  more = sweep_page._frontier([*axes, "client.batch_size", "client.learning_rate"], arms, "auroc")
  assert more is not None
  for (title, lines), (known, same) in zip(more[0], frontier[0], strict=True):
    assert title == known
    assert [line.label for line in lines] == [line.label for line in same]
    assert [list(line.x) for line in lines] == [list(line.x) for line in same]


def test_an_arm_of_which_no_round_was_affordable_is_not_on_the_logarithmic_axis():
  stats = {key: {"n": 1, "mean": 0.5, "low": 0.4, "high": 0.6} for key in ("auroc", "alone.auroc")}
  arms = [
    {"values": {SIGMA: sigma}, "epsilon": epsilon, "stats": stats}
    for sigma, epsilon in ((0.5, 0.0), (1.0, 7.6), (4.0, 1.6))
  ]
  frontier = sweep_page._frontier([SIGMA], arms, "auroc")
  assert frontier is not None
  (((_, (line,)),), _, _) = frontier
  assert list(line.x) == [1.6, 7.6]


def test_several_runs_by_themselves_are_compared_by_what_differs(swept, tmp_path):
  folders = [table.folder_of(swept, number) for number in (0, 4)]
  path = sweep_page.write(sweep_page.read_runs(folders), tmp_path / "both")
  page = path.read_text()
  assert "Compared are settings of privacy.target_epsilon" in page
  assert [row[0].strip() for row in cells(page, "arms")] == ["target_epsilon=2", "target_epsilon=8"]
  with pytest.raises(UserError, match="holds no run that has ended"):
    sweep_page.read_runs([folders[0], tmp_path])


def test_a_sweep_of_which_nothing_has_ended_is_a_sentence(tmp_path):
  table.begin(tmp_path, base(), POINTS, AXES)
  with pytest.raises(UserError, match=r"no point of .* has ended"):
    sweep_page.read_sweep(tmp_path)


def test_points_that_diverged_are_told_and_not_averaged(tmp_path):
  config = base(privacy__mechanism="none", privacy__noise_multiplier=0.0)
  rates = [{"client.learning_rate": rate} for rate in (0.1, 1e38)]
  sweep(tmp_path, rates, config)
  page = sweep_page.write(sweep_page.read_sweep(tmp_path), tmp_path).read_text()
  _, broken = cells(page, "arms")
  assert "(1 diverged)" in broken[0]
  assert "–" in broken[4]
  assert "There is no formal guarantee".lower() in page.lower()


def test_the_template_names_nothing_that_is_not_there():
  with pytest.raises(Exception, match="undefined"):
    environment().get_template("sweep.html").render(title="x")


@pytest.mark.slow
def test_a_browser_shows_the_page(swept, tmp_path):
  browser = shutil.which("chromium") or shutil.which("chromium-browser")
  if browser is None:
    pytest.skip("no chromium on this machine to open the page in")
  picture = tmp_path / "page.png"
  command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
  command += ["--window-size=1100,3000", f"--screenshot={picture}", f"file://{swept}/report.html"]
  subprocess.run(command, check=True, timeout=120, capture_output=True)
  pixels = np.asarray(Image.open(picture).convert("RGB"))
  assert pixels.shape == (3000, 1100, 3)
  blue = (pixels == (0, 114, 178)).all(2)  # the first line of the frontier, and only figures
  assert blue.sum() > 200
  assert (pixels[:, :20] == 255).all()  # nothing runs out of the page
  assert (pixels[:, -20:] == 255).all()
