"""Labels of figures: any name can be drawn, none is lost, and none is taken for another."""

import re

import numpy as np
import pytest
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure
from matplotlib.text import Text

from fedjax_med.report import figure_labels as texts
from fedjax_med.report import figures, sweep_figures
from fedjax_med.report.figure_labels import drawable, inches, labels, stand_ins
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.trained import heat_pictures

(CONFUSION,) = CLASSIFICATION.figures

LONG = "University Hospital of the Northern Provinces, department of radiology"
NAMES = (
  *("正常", "مستشفى", "🧠 $\\frac{$ 5 $", "_hidden\nlines", LONG + " A", LONG + " B"),
  *("\x93\udc93", "{b} [bold] %"),
)


def test_ordinary_names_are_their_own_labels():
  names = ["no tumour", "Ahorn", "hospital 12", "Größe é", "a_b", "x" * 20]
  assert labels(names, "class") == names
  assert stand_ins(names, "class") == []


@pytest.mark.parametrize("kind", ["class", "hospital"])
def test_no_two_names_have_one_label_and_every_other_label_is_told(kind):
  made = labels(NAMES, kind)
  assert len(set(made)) == len(NAMES)
  told = dict(stand_ins(NAMES, kind))
  for label, name in zip(made, NAMES, strict=True):
    shown = label.strip().replace("\\$", "$")
    assert told.get(shown, shown) == name
  assert all("\n" not in label and inches([label], 1) <= 0.0085 * 34 for label in made)


def test_a_name_that_no_font_has_gets_a_number_that_is_no_other_name():
  assert labels(["\U000f0000", "hospital 1", "b"], "hospital") == [
    "[hospital 1]",
    "hospital 1",
    "b",
  ]
  assert drawable("path=/a/\U000f0000") == "path=/a/\\U000f0000"


def test_long_names_keep_both_ends_and_names_that_become_alike_get_numbers():
  near = ["Hospital " + "x" * 40 + f" {k}" for k in "AB"]
  first, second = labels(near, "hospital")
  assert first.startswith("Hospital x")
  assert re.search("…x+ A$", first)
  assert second.endswith(" B")
  middle = ["x" * 30 + f"{k}" + "x" * 30 for k in "AB"]
  assert labels(middle, "hospital") == ["hospital 1", "hospital 2"]


def test_a_font_that_is_installed_draws_what_matplotlibs_own_lacks(monkeypatch, tmp_path):
  letter, fonts = "Ⓐ", ("No Such Font", "STIXGeneral")
  monkeypatch.setattr(texts, "FALLBACKS", fonts)
  for cached in (texts.families, texts._letters):
    cached.cache_clear()
  try:
    assert texts.families() == ["DejaVu Sans", "STIXGeneral"]
    assert labels([letter, "b"], "class") == [letter, "b"]
    hospitals, summary = run_of(["A"], [letter, "b"])
    figures.draw_details(
      tmp_path / "confusion.png", CONFUSION, summary, hospitals
    )  # without a warning
  finally:
    for cached in (texts.families, texts._letters):
      cached.cache_clear()


def run_of(names, class_names):
  counts = [[3] * len(class_names)] * len(names)
  metrics = {"accuracy": 0.5, "auroc": 0.5, "loss": 1.0}
  hospitals = {
    "class_names": list(class_names),
    "split": {"scheme": "grouped"},
    "hospitals": [{"name": n, "train": c, "test": c} for n, c in zip(names, counts, strict=True)],
  }
  summary = {
    "clients": [{"name": name, **metrics} for name in names], "test": metrics, "rounds": 1,
    "confusion": np.ones([len(class_names)] * 2, int).tolist(), "epsilon_max": None,
    "predicts": "global model",
  }  # fmt: skip
  return hospitals, summary


def draw_all(folder, suffix):
  """Every figure that holds names."""
  hospitals, summary = run_of(NAMES, NAMES[:3])
  figures.draw_partition(folder / f"partition{suffix}", hospitals)
  figures.draw_hospitals(folder / f"hospitals{suffix}", summary, hospitals, None, CLASSIFICATION)
  figures.draw_details(folder / f"confusion{suffix}", CONFUSION, summary, hospitals)
  figures.draw_details(folder / f"all{suffix}", CONFUSION, *reversed(run_of(["a"], NAMES[3:])))
  image = np.zeros((4, 4), np.uint8)
  made = labels(NAMES, "class")
  columns = made[:5]
  row = [image] * len(columns)
  figures.draw_examples(folder / f"examples{suffix}", [row], [drawable(NAMES[4])], columns)
  line = np.array([1.0, 2.0])
  series = [sweep_figures.Series(name, line, line, line, line, line) for name in NAMES[:8]]
  sweep_figures.draw_frontier(folder / f"f{suffix}", [(NAMES[0], series)], "ε", "AUROC", True)
  sweep_figures.draw_spread(
    folder / f"spread{suffix}", NAMES, [line] * len(NAMES), CLASSIFICATION.headline
  )
  curves = [(name, line, np.ones((2, 2))) for name in NAMES[:8]]
  sweep_figures.draw_curves(folder / f"curves{suffix}", curves, "Accuracy")
  arms = [(name, {"confusion": np.eye(3).tolist()}, NAMES[2:5]) for name in NAMES[2:4]]
  sweep_figures.draw_details(folder / f"confusions{suffix}", CONFUSION, arms)
  seen = [
    heat_pictures.Seen(image, np.ones((2, 2)), None, made[0], 0.5, label) for label in made[:5]
  ]
  heat_pictures.draw_grid(folder / f"grid{suffix}", drawable(NAMES[0], 60), seen, "")
  groups = [(label, [np.ones((2, 3))]) for label in made[:5]]
  heat_pictures.draw_gates(folder / f"gates{suffix}", ["block"], groups)


@pytest.mark.parametrize("suffix", [".png", pytest.param(".pdf", marks=pytest.mark.slow)])
def test_every_figure_draws_any_name_without_a_warning(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(figures, "DPI", 30)
  draw_all(tmp_path, suffix)  # a warning of a missing letter or of no room fails the test
  assert len(list(tmp_path.iterdir())) == 11
  assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())


def test_names_are_drawn_as_letters_and_every_class_is_in_the_legend(tmp_path, monkeypatch):
  drawn = []

  def keep(figure, place, **_):
    backend_agg.FigureCanvasAgg(figure).draw()
    drawn.append(figure)
    place.write_bytes(b"")

  monkeypatch.setattr(Figure, "savefig", keep)
  hospitals, _ = run_of(NAMES, NAMES)
  figures.draw_partition(tmp_path / "partition.png", hospitals)
  (legend,) = drawn[0].legends
  assert [text.get_text() for text in legend.get_texts()] == labels(NAMES, "class")
  texts = [text for text in drawn[0].findobj(Text) if text.get_text()]
  assert all(not text._preprocess_math(text.get_text())[1] for text in texts)  # no formula


def test_a_figure_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
  path = tmp_path / "confusion.png"
  path.write_bytes(b"old")

  def fails(figure, place, **_):
    place.write_bytes(b"ne")
    raise OSError("disk full")

  monkeypatch.setattr(Figure, "savefig", fails)
  hospitals, summary = run_of(["A"], ["no", "yes"])
  with pytest.raises(OSError, match="disk full"):
    figures.draw_details(path, CONFUSION, summary, hospitals)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"confusion.png": b"old"}
