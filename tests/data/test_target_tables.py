"""Tables whose manifest names numbers to predict: read as by pandas, missing values counted."""

import numpy as np
import pandas as pd
import pytest

from fedjax_med.core.config import DataConfig, PartitionConfig
from fedjax_med.core.errors import UserError
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.sources import load_dataset
from fedjax_med.data.table_files import read_cells
from fedjax_med.data.table_manifest import manifest_record, parse_manifest, read_manifest
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.run.summaries import hospital_record
from tests.data.table_cases import TARGETS, columns_file, target_folder


def config(folder, manifest=TARGETS, **changes) -> DataConfig:
  tables = target_folder(folder / "tables")
  columns = columns_file(folder, manifest)
  return DataConfig(source="table", path=str(tables), columns=columns, **changes)


def test_targets_are_the_numbers_of_pandas_and_nan_where_missing(tmp_path):
  data = config(tmp_path)
  dataset = load_dataset(data)
  files = [tmp_path / "tables" / f"{name}.csv" for name in ("east", "north", "south")]
  frame = pd.concat([pd.read_csv(path, na_values="?") for path in files])
  frame = frame.dropna(subset=["dose", "days"], how="all")
  assert dataset.task == "regression"
  assert dataset.targets is not None
  assert (dataset.targets.names, dataset.targets.unit) == (("dose", "days"), "units")
  np.testing.assert_allclose(dataset.targets.values, frame[["dose", "days"]], rtol=1e-6)
  assert len(dataset.skipped) == 150 - len(frame) > 0
  assert {item.reason for item in dataset.skipped} == {"no value of any target"}


def test_known_missing_and_left_out_values_are_told(tmp_path):
  data = config(tmp_path)
  dealt = build_hospitals(load_dataset(data), data, PartitionConfig(scheme="site", num_clients=0))
  held = hospital_record(dealt)
  assert dealt.dataset.targets is not None
  known = ~np.isnan(dealt.dataset.targets.values)
  assert held["targets"]["known"] == known.sum()
  north = dealt.dataset.sites == dealt.names.index("north")
  assert held["targets"]["missing"]["north"] == pytest.approx(1 - known[north].mean(), abs=1e-4)
  assert held["released"] == ["mean and spread of each target"]
  texts = [note.text for note in data_notes(held, "record", show_names=True)]
  assert f"Predicted: dose, days (units); {known.sum()} known values of them, missing ones" in str(
    texts
  )
  assert not any("of one class only" in text for text in texts)


def test_a_target_that_a_hospital_never_measured_is_missing_there(tmp_path):
  data = config(tmp_path)
  path = tmp_path / "tables" / "south.csv"
  frame = pd.read_csv(path)
  frame.drop(columns="days").to_csv(path, index=False)
  dataset = load_dataset(data)
  assert dataset.targets is not None
  assert dataset.table is not None
  assert dataset.table.absent == {"south.csv": ("days",)}
  south = dataset.sites == dataset.site_names.index("south")
  assert np.isnan(dataset.targets.values[south, 1]).all()
  assert not np.isnan(dataset.targets.values[~south, 1]).all()


def test_small_sites_are_joined_where_the_manifest_says_so(tmp_path):
  dataset = load_dataset(config(tmp_path, "join_sites_below = 55\n" + TARGETS))
  assert dataset.site_names == ("north", "other")


def test_a_column_without_a_name_is_called_as_pandas_calls_it(tmp_path):
  path = tmp_path / "x.csv"
  pd.DataFrame({"a": [1, 2]}, index=["p", "q"]).to_csv(path)
  assert read_cells(path).header == tuple(pd.read_csv(path).columns)


def test_a_manifest_of_targets_survives_the_trip_through_json(tmp_path):
  manifest = read_manifest(tmp_path / columns_file(tmp_path, TARGETS))
  assert parse_manifest(manifest_record(manifest), "x") == manifest


@pytest.mark.parametrize(
  ("before", "after", "sentence"),
  [
    ('["dose", "days"]', '["dose", "dose"]', r"target 'dose' is listed twice"),
    ('["dose", "days"]', "[]", r"has no 'target'; name it there"),
    ("[columns]", 'target = "sex"\n[columns]', r"names a target, whose values are classes, and"),
    ("[columns]", "above = 3\n[columns]", r"above is not read of targets, which are numbers"),
    ('["dose", "days"]', '["dose", "age"]', r"'age' is an input, and target"),
    ('["dose", "days"]', '["dose", "hours"]', r"has no column 'hours', which the manifest names"),
    ('["dose", "days"]', '["remark"]', r"has no column 'remark'"),
    ("[columns]", "join_sites_below = -5\n[columns]", r"join_sites_below = -5 is under 0"),
    ('missing = ["", "?"]', 'missing = [""]', r"column 'days' holds '\?', which is no finite num"),
  ],
)
def test_a_manifest_that_cannot_be_is_refused(tmp_path, before, after, sentence):
  assert before in TARGETS
  with pytest.raises(UserError, match=sentence):
    load_dataset(config(tmp_path, TARGETS.replace(before, after)))


def test_a_positive_class_is_refused_where_there_are_no_classes(tmp_path):
  with pytest.raises(UserError, match=r"data.positive='yes' is of classes, and the manifest names"):
    load_dataset(config(tmp_path, positive="yes"))
