"""What must be known of the data stands on the console, in the report and in the statement."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
from rich.console import Console

from fedjax_med.core.config import Config
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.report.run_page import write_report
from fedjax_med.run import console as terminal
from fedjax_med.run.statement import write_statement
from fedjax_med.run.summaries import hospital_record
from tests.data.folders import fill, load, pattern, save
from tests.running import run

HELD = {
  "class_names": ["no", "yes"],
  "hospitals": [{"name": "A", "train": [6, 2], "test": [1, 1]}],
  "split": {"scheme": "grouped"},
  "skipped": [],
}
GREY = {"low": 0, "high": 255, "deep": False, "rule": "pictures of 8 bits", "levels": 200}
PATIENTS = {"named": 10, "patients": 4, "source": "data.layout", "shared": 0}
TWINS = {"identical": 2, "similar": 3, "pairs": [["no/a.png", "yes/b.png"]]}


def notes_of(unit: str = "record", names: bool = True, **changes) -> dict[str, bool]:
  """{sentence: whether it is a warning} of a record with these changes."""
  held = {**HELD, "grey": GREY, **changes}
  return {note.text: note.warning for note in data_notes(held, unit, names)}


def said(words: str, notes: dict[str, bool]) -> bool | None:
  """Whether the one sentence with these words is a warning; None if there is none."""
  found = [warning for text, warning in notes.items() if words in text]
  assert len(found) < 2
  return found[0] if found else None


@pytest.mark.parametrize(
  ("words", "warning", "changes"),
  [
    ("No name says which patient it shows.", False, {}),
    ("a group of near-duplicates, which is less than a patient", True, {"unit": "group"}),
    ("10 of 10 names say which patient they are of (data.layout): 4 patients", False,
     {"patients": PATIENTS}),
    ("7 of 10 names say", True, {"patients": {**PATIENTS, "named": 7}}),
    ("none of them has two images", False, {"patients": {**PATIENTS, "patients": 10}}),
    ("3 of these names stand at several sites, each for one person", False,
     {"patients": {**PATIENTS, "shared": 3}}),
    ("taken for different people there; if they are the same, ε holds", True,
     {"patients": {**PATIENTS, "shared": 3}, "sites": {"count": 2, "are_hospitals": True}}),
    ("Grey values 0 (black) to 255 (white): pictures of 8 bits.", False, {}),
    ("at most 16 different grey values", True, {"grey": {**GREY, "levels": 16}}),
    ("37% of all pixels lie outside", False, {"grey": {**GREY, "deep": True, "outside": 0.37}}),
    ("sides are those that the data give", False, {"split": {"scheme": "given"}}),
    ("5 test images of patients who are in train", True,
     {"split": {"scheme": "paper", "num_test_of_train_patients": 5}}),
    ("3 sites named by the data are not the hospitals", False,
     {"sites": {"count": 3, "are_hospitals": False}}),
    ("7 images at another hospital than its site", True, {"num_elsewhere": 7}),
    ("2 pictures with an equal one in another class, such as no/a.png and yes/b.png", True,
     {"contradictions": TWINS}),
    ("1 picture with a near-duplicate in another class", True, {"contradictions": TWINS}),
    ("4 train images moved to 1 hospital under partition.min_client_size", True,
     {"num_moved": 4, "mixture_shifts": {"A": 0.25}}),
    ("differs from what was drawn by 0.05", False,
     {"num_moved": 4, "mixture_shifts": {"A": 0.05}}),
    ("Left out: 2 files, 2 of class yes, no file ending (2), for example yes/x.", True,
     {"skipped": [["yes/x", "no file ending", "yes"], ["yes/y", "no file ending", "yes"]]}),
    ("Left out as written by the operating system: 1 file.", False,
     {"skipped": [["yes/.DS_Store", "written by the operating system", "yes"]]}),
  ],
)  # fmt: skip
def test_what_must_be_known_is_a_sentence(words, warning, changes):
  assert said(words, notes_of(**changes)) is warning
  if changes:
    assert said(words, notes_of()) is None or "No name" in words


def test_notes_for_private_reports_name_no_file():
  changes = {"contradictions": TWINS, "skipped": [["yes/x", "no file ending", "yes"]]}
  texts = " ".join(notes_of(names=False, **changes))
  assert "no/a.png" not in texts
  assert "yes/x" not in texts
  assert "2 pictures with an equal one" in texts


def test_an_older_record_is_read_as_far_as_it_goes():
  older = {**HELD, "skipped": [["yes/x", "cannot be read"]], "num_moved": 0}
  assert any("Left out: 1 file" in note.text for note in data_notes(older, "record", True))


def test_notes_stand_on_the_console_in_the_report_and_in_the_statement(tmp_path, capsys):
  root = tmp_path / "data"
  for number in range(24):
    name = ("no", "yes")[number % 2]
    save(root / name / f"P{number // 4}_{number}.png", pattern(number, 20, 20))
  (root / "yes" / "notes.txt").write_text("text")
  (root / "yes" / "P07_SMITH_JOHN_broken.png").write_text("no picture")
  save(root / "no" / "P3_twin.png", pattern(19, 20, 20))  # P3_19 is of the other class
  folder = tmp_path / "run"
  summary = run(
    folder,
    data__source="folder", data__path=str(root), data__num_examples=4000, data__min_size=8,
    data__patient_pattern=r"^P(\d+)_", partition__scheme="iid", partition__alpha=0.5,
    partition__min_client_size=1, partition__num_clients=2, client__batch_size=4,
    server__num_rounds=1, privacy__unit="patient",
  )  # fmt: skip
  assert summary["rounds"] == 1
  sentence = "25 of 25 names say which patient they are of (data.patient_pattern): 6 patients."
  page = html.unescape((folder / "report.html").read_text())
  notes = page[page.index('<ul id="data">') :].partition("</ul>")[0]
  assert sentence in notes
  assert "Grey values 0 (black) to 255 (white)" in notes
  assert "a .txt file is no picture (1)" in notes
  # Of a private run: a name may be a patient's.
  paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "files.json"]
  texts = [path.read_text(errors="replace") for path in paths]
  shown = capsys.readouterr().out
  for name in ("notes.txt", "SMITH", "P3_"):
    assert all(name not in text for text in (shown, *texts)), name
  assert "which files: files.json" in shown
  named = json.loads((folder / "files.json").read_text())
  assert (folder / "files.json").stat().st_mode & 0o777 == 0o600
  assert [row[0] for row in named["skipped"]] == ["yes/P07_SMITH_JOHN_broken.png", "yes/notes.txt"]
  assert "P3_twin.png" in str(named["contradictions"])
  assert sentence in (folder / "privacy_statement.md").read_text()
  held = json.loads((folder / "hospitals.json").read_text())
  assert held["patients"] == {
    "named": 25, "patients": 6, "source": "data.patient_pattern", "shared": 0,
  }  # fmt: skip
  held["patients"]["named"] = 20
  (folder / "hospitals.json").write_text(json.dumps(held))
  write_statement(folder)
  assert "20 of 25 names say" in (folder / "privacy_statement.md").read_text()
  assert "20 of 25 names say" in html.unescape(write_report(folder).read_text())


def test_the_console_tells_the_notes(tmp_path, monkeypatch, capsys):
  run(tmp_path, server__num_rounds=1)
  text = " ".join(re.sub(r"\s+", " ", capsys.readouterr().out).split())
  assert "300 of 300 names say which patient they are of (phantoms)" in text
  assert "Grey values 0 (black) to 255 (white): pictures of 8 bits." in text
  assert "5 sites named by the data are not the hospitals here" in text
  assert isinstance(terminal.make_console(), Console)


def test_images_that_are_kept_together_at_another_hospital_are_counted(tmp_path):
  fill(tmp_path, *(f"{site}/{name}/{n}.png" for site in "ab" for name in ("no", "yes")
                   for n in range(6)))  # fmt: skip
  twin = (tmp_path / "a" / "no" / "0.png").read_bytes()
  for number in range(6, 9):
    (tmp_path / "a" / "no" / f"{number}.png").write_bytes(twin)
  (tmp_path / "b" / "no" / "9.png").write_bytes(twin)
  dataset = load(tmp_path, layout="{site}/{class}/*")
  config = Config()
  partition = dataclasses.replace(config.partition, scheme="site", num_clients=0, min_client_size=1)
  made = build_hospitals(dataset, config.data, partition)
  assert made.num_elsewhere == 1
  assert said("1 image at another hospital", {
    note.text: note.warning for note in data_notes(hospital_record(made), "record", True)
  })  # fmt: skip
  assert np.isin(dataset.names.index("b/no/9.png"), made.train.indices[0]) or np.isin(
    dataset.names.index("b/no/9.png"), made.test.indices[0]
  )
