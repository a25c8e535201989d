"""A manifest's pictures, classes, patients, sites and sides are those of its rows."""

import dataclasses
import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from fedjax_med.core.config import DataConfig, PartitionConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import Dataset, client_rows
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.sources import load_dataset
from fedjax_med.sweep.image_sets import digest
from tests.data.folders import SIDE, fill, load, pattern, save
from tests.prepare.setting_cases import base

ROWS = 24


def rows(**columns) -> pd.DataFrame:
  """Rows of pictures scans/0.png, ...: a class, a patient of two, a site of three."""
  numbers = np.arange(ROWS)
  frame = pd.DataFrame(
    {
      "path": [f"scans/{number}.png" for number in numbers],
      "label": np.where(numbers // 2 % 2 == 0, "no", "yes"),
      "patient": [f"P{number // 2}" for number in numbers],
      "site": np.array(["north", "south", "east"])[numbers // 2 % 3],
    }
  )
  return frame.assign(**columns)


def write(folder: pathlib.Path, frame: pd.DataFrame, name: str = "list.csv", **options):
  """The table and its pictures; those that lie there already stay."""
  folder.mkdir(exist_ok=True)
  for number in range(ROWS):
    place = folder / "scans" / f"{number}.png"
    if not place.exists():
      save(place, pattern(number))
  if name.endswith(".parquet"):
    frame.to_parquet(folder / name)
  else:
    frame.to_csv(folder / name, index=False, **options)
  return folder / name


def read(path: pathlib.Path, **changes) -> Dataset:
  options = {"image_size": SIDE, "min_size": 8, "source": "manifest", "path": str(path)}
  return load_dataset(DataConfig(**(options | changes)))


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("list.csv", {}),
    ("list.csv", {"sep": ";", "encoding": "utf-8-sig"}),
    ("list.tsv", {"sep": "\t"}),
    ("list.parquet", {}),
  ],
)
def test_every_row_is_an_example_with_its_class_patient_and_site(tmp_path, name, options):
  frame = rows()
  dataset = read(write(tmp_path, frame, name, **options))
  assert dataset.names == tuple(frame.path)
  np.testing.assert_array_equal(dataset.inputs[..., 0], np.stack([pattern(k) for k in range(ROWS)]))
  assert [dataset.class_names[label] for label in dataset.labels] == frame.label.tolist()
  assert dataset.sites is not None
  assert [dataset.site_names[site] for site in dataset.sites] == frame.site.tolist()
  assert dataset.patients is not None
  pairs = set(zip(dataset.patients.tolist(), frame.patient, strict=True))
  assert len(pairs) == frame.patient.nunique() == len(set(dataset.patients.tolist()))
  assert dataset.patient_counts == (ROWS, 12, "the manifest", 0)
  assert dataset.in_test is None


def test_a_manifest_and_a_folder_of_the_same_pictures_are_one_dataset(tmp_path):
  fill(tmp_path, *(f"{name}/{number}.png" for name in ("no", "yes") for number in range(4)))
  by_folder = load(tmp_path)
  frame = pd.DataFrame({"path": by_folder.names})
  frame["label"] = frame.path.str.split("/").str[0]
  frame.to_csv(tmp_path / "list.csv", index=False)
  assert digest(read(tmp_path / "list.csv")) == digest(by_folder)


def test_sides_that_a_column_gives_are_kept_or_drawn_anew(tmp_path):
  frame = rows(split=np.where(np.arange(ROWS) % 8 < 4, "Train", "test"))
  path = write(tmp_path, frame)
  partition = PartitionConfig(scheme="site", num_clients=0, min_client_size=1)
  data = DataConfig(source="manifest", path=str(path), image_size=SIDE, min_size=8)
  hospitals = build_hospitals(load_dataset(data), data, partition)
  assert hospitals.split.scheme == "given"
  assert hospitals.names == ("east", "north", "south")
  assert hospitals.split.test.tolist() == np.flatnonzero(frame.split == "test").tolist()
  assert hospitals.split.num_test_of_train_patients == 0
  drawn = read(path, given_split=False, test_fraction=0.4)
  assert drawn.in_test is None
  with pytest.raises(UserError, match=r"test_fraction=0.4 is not read: column 'split' of .*give"):
    read(path, test_fraction=0.4)


def test_patients_and_groups_stay_on_one_side_and_in_one_hospital(tmp_path):
  family = np.where(np.arange(ROWS) < 8, "", np.arange(ROWS) // 4).astype(str)
  path = write(tmp_path, rows(family=family).drop(columns="site"))
  data = DataConfig(source="manifest", path=str(path), image_size=SIDE, min_size=8)
  data = dataclasses.replace(data, group_columns="family")
  dataset = load_dataset(data)
  partition = PartitionConfig(scheme="iid", num_clients=2, min_client_size=1)
  hospitals = build_hospitals(dataset, data, partition)
  where = np.full(ROWS, -1)
  for k, row in enumerate([*client_rows(hospitals.train), *client_rows(hospitals.test)]):
    where[row] = k
  assert (where.reshape(-1, 2)[:, :1] == where.reshape(-1, 2)).all()  # a patient is two rows
  assert (where.reshape(-1, 4)[2:, :1] == where.reshape(-1, 4)[2:]).all()  # a family is four
  assert len(np.unique(hospitals.split.units)) == 4 + 4
  with pytest.raises(UserError, match=r"split='paper' deals slices .*use data.split=grouped"):
    build_hospitals(dataset, dataclasses.replace(data, split="paper"), partition)


def test_columns_are_named_by_flags_and_by_a_file_beside_and_flags_win(tmp_path):
  frame = rows().rename(columns={"path": "file", "label": "dx", "patient": "who", "site": "at"})
  path = write(tmp_path, frame.assign(other=frame.dx.map({"no": "a", "yes": "no_a"})))
  flags = {"path_column": "file", "label_column": "dx", "patient_column": "who"}
  by_flags = read(path, **flags, site_column="at")
  (tmp_path / "list.toml").write_text(
    'path = "file"\nlabel = "other"\npatient = "who"\nsite = "at"\ngroups = ["at"]\n', "utf-8"
  )
  beside = read(path)
  assert beside.class_names == ("no_a", "a")
  assert beside.kept_together is not None
  assert len(set(beside.kept_together.tolist())) == 3
  np.testing.assert_array_equal(beside.patients, by_flags.patients)
  assert read(path, label_column="dx").class_names == ("no", "yes")


def test_columns_of_1_and_0_are_labels_and_others_numbers(tmp_path):
  frame = rows().drop(columns="label")
  count = len(frame)
  found = [["1", "0", ""][number % 3] for number in range(count)]
  frame = frame.assign(fluid=found, mass="0", age=[str(40.5 + number) for number in range(count)])
  frame.loc[2, "fluid"] = "1"
  path = write(tmp_path, frame)
  labelled = read(path, target_columns="fluid,mass")
  assert labelled.targets is not None
  assert (labelled.task, labelled.targets.names) == ("multilabel", ("fluid", "mass"))
  expected = frame["fluid"].map({"1": 1.0, "0": 0.0, "": np.nan})
  np.testing.assert_array_equal(labelled.targets.values[:, 0], expected.astype(np.float32))
  np.testing.assert_array_equal(labelled.labels, frame["fluid"] == "1")
  (tmp_path / "list.toml").write_text('targets = ["age"]')
  aged = read(path)
  assert aged.targets is not None
  assert (aged.task, aged.class_names) == ("regression", ("example",))
  np.testing.assert_array_equal(aged.targets.values[:, 0], frame["age"].astype(np.float32))
  with pytest.raises(UserError, match="column 'site' is named as the class, and age as targets"):
    read(path, label_column="site")
  with pytest.raises(UserError, match=r"column age is named as a target and once more; name each"):
    read(path, target_columns="age,age")
  for cell, sentence in (
    ("old", r"column 'age', row 4 below the header: 'old' is no number"),
    ("1e39", r"column 'age', row 4 below the header: '1e39' is no number that float32 holds"),
    ("", r"1 row without a value of any target \(row 4 below the header\)"),
  ):
    frame.loc[3, "age"] = cell
    changed = write(tmp_path, frame)
    with pytest.raises(UserError, match=sentence):
      read(changed)


def test_labels_are_text_however_they_are_typed(tmp_path):
  path = write(tmp_path, rows(label=np.arange(ROWS) // 2 % 2 * 1.0), "list.parquet")
  assert read(path).class_names == ("0", "1")
  path = write(tmp_path, rows(label=np.where(np.arange(ROWS) % 2, "NA", "None")))
  assert read(path, positive="NA").class_names == ("None", "NA")


def test_files_that_cannot_be_read_are_counted_and_listed_masks_are_read(tmp_path):
  path = write(tmp_path, rows())
  (tmp_path / "scans" / "3.png").write_bytes(b"none")
  save(tmp_path / "scans" / "4.png", (pattern(4) > 128).astype(np.uint8) * 255)
  dataset = read(path)
  assert [(left.name, left.class_name) for left in dataset.skipped] == [("scans/3.png", "yes")]
  assert len(dataset.labels) == len(dataset.patients) == ROWS - 1  # pyright: ignore
  with pytest.raises(UserError, match=r"data.strict: 1 files of .*list.csv are left out, such as"):
    read(path, strict=True)


def test_patients_may_come_from_file_names_but_not_from_two_places(tmp_path):
  path = write(tmp_path, rows())
  with pytest.raises(UserError, match=r"patient_pattern is read where no column names the pati"):
    read(path, patient_pattern=r"^(\d)")
  write(tmp_path, rows().drop(columns="patient"))
  assert read(path, patient_pattern=r"^(\d)").patient_counts == (
    ROWS, 10, "data.patient_pattern", 2,
  )  # fmt: skip


def with_cell(row: int, column: str, value: str) -> pd.DataFrame:
  frame = rows(split=np.where(np.arange(ROWS) % 8 < 4, "train", "test"))
  frame.loc[row, column] = value
  return frame


@pytest.mark.parametrize(
  ("frame", "sentence"),
  [
    (rows().drop(columns="label"), "has no column label but path, patient, site; name its columns"),
    (rows().iloc[:0], "has no rows below its header; list the pictures"),
    (rows(label="no"), r"lists one class only \('no'\); add rows"),
    (with_cell(4, "label", " "), r"1 row without a label in column 'label' \(row 5 below the head"),
    (with_cell(4, "site", ""), r"1 row without a site in column 'site'"),
    (with_cell(4, "split", ""), r"1 row without a split in column 'split'"),
    (with_cell(4, "path", ""), r"1 row without a path in column 'path'"),
    (with_cell(4, "split", "val"), r"'split' of .* holds val in 1 row, which is neither train nor"),
    (with_cell(5, "split", "train"), r"one name of column 'patient' in train and in test: 1 name, "
     r"such as that of scans/5.png; give each"),
    (with_cell(5, "path", "scans/4.png"), r"1 file more than once: scans/4.png; keep one row"),
    (with_cell(5, "path", "./scans/../scans/4.png"), r"once: ./scans/../scans/4.png \(also sca"),
    (with_cell(5, "path", "../x.png"), r"lists 1 path outside of its folder: ../x.png; move"),
    (with_cell(5, "path", "/etc/hosts"), r"lists 1 path outside of its folder: /etc/hosts; move"),
    (rows(patient=""), r"column 'patient' of .* is empty in every row; fill it, or remove it"),
    (rows(label=np.where(np.arange(ROWS) % 2, "Yes", "yes")), "'Yes' and 'yes' differ in case"),
  ],
)  # fmt: skip
def test_a_wrong_manifest_is_refused_in_a_sentence(tmp_path, frame, sentence):
  with pytest.raises(UserError, match=sentence):
    read(write(tmp_path, frame))


def test_all_files_that_are_not_there_are_named_and_counted(tmp_path):
  frame = rows()
  frame.loc[[3, 7, 9, 11, 13, 15, 17], "path"] = [f"gone{number}.png" for number in range(7)]
  names = ", ".join(f"gone{number}.png" for number in range(7))
  with pytest.raises(UserError, match=rf"^7 files of {ROWS} that .* are not there: {names}; put"):
    read(write(tmp_path, frame))


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("path,label\na,b,c\n", "cannot be read .*save it as CSV"),
    ("path,label,label\na,b,c\n", "several columns named label; rename"),
    ("", "cannot be read"),
  ],
)
def test_a_broken_table_is_refused(tmp_path, text, sentence):
  (tmp_path / "list.csv").write_text(text, "utf-8")
  with pytest.raises(UserError, match=sentence):
    read(tmp_path / "list.csv")


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("labels = 'dx'\n", "'labels' is unknown; did you mean 'label'"),
    ("label = 3\n", 'label = 3 names no column; write label = "name of the column"'),
    ("groups = 'a'\n", r"groups = 'a' names no column; write groups = \[\"family\"\]"),
    ("label\n", "cannot be read as TOML"),
    ("site = 'ward'\n", "has no column ward but"),
  ],
)
def test_a_wrong_file_of_columns_is_refused(tmp_path, text, sentence):
  path = write(tmp_path, rows())
  path.with_suffix(".toml").write_text(text, "utf-8")
  with pytest.raises(UserError, match=sentence):
    read(path)


def test_what_is_no_manifest_and_a_split_that_is_not_there_are_refused(tmp_path):
  path = write(tmp_path, rows())
  with pytest.raises(UserError, match=r"is not a file; point --config.data.path at the manifest"):
    read(tmp_path)
  with pytest.raises(UserError, match=r"ends in '.txt', which is no manifest; give a file ending"):
    read(path.rename(tmp_path / "list.txt"))
  path = write(tmp_path, rows())
  with pytest.raises(UserError, match=r"given_split=False with .*, which has no column 'split'"):
    read(path, given_split=False)
  with pytest.raises(UserError, match=re.escape("no column ward but")):
    read(path, site_column="ward")


def test_a_scheme_that_becomes_site_refuses_what_it_does_not_read(tmp_path):
  dataset = read(write(tmp_path, rows()))
  partition = PartitionConfig(scheme="auto", num_clients=0, min_client_size=1)
  data = DataConfig(source="manifest")
  assert build_hospitals(dataset, data, partition).by_site
  with pytest.raises(UserError, match=r"alpha=0.1 is not read: partition.scheme=auto is site"):
    build_hospitals(dataset, data, dataclasses.replace(partition, alpha=0.1))


def test_columns_are_read_with_manifests_only():
  config = base()
  config.data.label_column = "dx"
  with pytest.raises(
    UserError, match=r"label_column='dx' is read with data.source=manifest or series"
  ):
    validate(config)
