"""Tables become inputs as the manifest says, as by pandas; what is amiss is named or counted."""

import doctest
import pathlib

import numpy as np
import pandas as pd
import pytest

from fedjax_med.core.config import Config, DataConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.moments import sums
from fedjax_med.core.validation import validate
from fedjax_med.data import modality, table_manifest
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.hospitals import build_hospitals, load_hospitals
from fedjax_med.data.sources import load_dataset
from fedjax_med.data.table_manifest import (
  manifest_record,
  parse_manifest,
  plain,
  read_manifest,
)
from fedjax_med.data.tables import constants
from tests.data.table_cases import (
  HEADER,
  MANIFEST,
  columns_file,
  hospitals_folder,
  rows,
  table_file,
)


def table_data(path: pathlib.Path, columns: str, **settings) -> DataConfig:
  return DataConfig(source="table", path=str(path), columns=columns, **settings)


def load(tmp_path: pathlib.Path, text: str, manifest: str = MANIFEST, **settings):
  """The dataset of a table with that text."""
  path = tmp_path / "table.csv"
  path.write_bytes(text.encode("utf-8"))
  return load_dataset(table_data(path, columns_file(tmp_path, manifest), **settings))


def text_of(*lines: str) -> str:
  """A table of ten records, and these lines."""
  return "\n".join([HEADER, *rows(10), *lines]) + "\n"


def by_pandas(path: pathlib.Path) -> np.ndarray:
  """Inputs of a table of ``table_cases``, encoded by pandas alone."""
  frame = pd.read_csv(path)
  pressure = frame["pressure"].replace(0, np.nan)
  sex = pd.get_dummies(pd.Categorical(frame["sex"], categories=["f", "m", "other", "missing"]))
  parts = [
    2 * (frame["age"].clip(20, 80) - 20) / 60 - 1,
    (2 * (pressure.clip(80, 200) - 80) / 120 - 1).fillna(0),
    pressure.isna(),
    *(sex[name] for name in sex.columns),
  ]
  return np.stack([np.asarray(part, np.float64) for part in parts], axis=1)


def test_inputs_are_those_of_pandas_dummies_and_scaling(tmp_path):
  path = table_file(tmp_path / "table.csv", 80)
  dataset = load_dataset(table_data(path, columns_file(tmp_path)))
  assert dataset.table is not None
  assert dataset.table.features == (
    "age", "pressure", "pressure is missing", "sex=f", "sex=m", "sex=other", "sex=missing",
  )  # fmt: skip
  assert dataset.inputs.dtype == np.float32
  np.testing.assert_allclose(dataset.inputs, by_pandas(path), atol=1e-6)
  assert dataset.labels.tolist() == (pd.read_csv(path)["ill"] == "yes").astype(int).tolist()
  assert dataset.class_names == ("no", "yes")


def test_semicolons_decimal_commas_byte_order_marks_and_parquet_give_equal_inputs(tmp_path):
  plain_text = text_of("yes,Q,40.5,120,m,x")
  expected = load(tmp_path, plain_text)
  german = "\ufeff" + plain_text.replace(",", ";").replace("40.5", "40,5").replace("\n", "\r\n")
  np.testing.assert_array_equal(load(tmp_path, german).inputs, expected.inputs)
  frame = pd.read_csv(tmp_path / "table.csv", sep=";", decimal=",", encoding="utf-8-sig")
  frame.to_parquet(tmp_path / "table.parquet")
  stored = load_dataset(table_data(tmp_path / "table.parquet", columns_file(tmp_path)))
  np.testing.assert_array_equal(stored.inputs, expected.inputs)


def test_files_of_a_folder_are_hospitals_and_other_files_are_counted(tmp_path):
  folder = hospitals_folder(tmp_path / "tables")
  (folder / "readme.md").write_text("x")
  config = Config()
  config.data = table_data(folder, columns_file(tmp_path))
  config.partition.scheme, config.partition.num_clients = "site", 0
  validate(config)
  hospitals = load_hospitals(config)
  assert hospitals.names == ("east", "north", "south")
  sizes = hospitals.train.counts + hospitals.test.counts
  assert sizes.tolist() == [40, 60, 50]
  assert [item.name for item in hospitals.dataset.skipped] == ["readme.md"]


def test_a_site_column_says_the_hospital(tmp_path):
  manifest = MANIFEST.replace('patient = "person"', 'site = "remark"').replace(
    'remark = { kind = "ignore" }', ""
  )
  dataset = load(tmp_path, text_of("yes,Q,40,120,m,far"), manifest)
  assert dataset.site_names == ("far", "none")
  with pytest.raises(UserError, match=r"table.csv, line 12: no value of the site column 'remark'"):
    load(tmp_path, text_of("yes,Q,40,120,m,"), manifest)


def test_a_column_that_a_hospital_lacks_is_missing_there(tmp_path):
  folder = hospitals_folder(tmp_path / "tables", (30, 30))
  frame = pd.read_csv(folder / "south.csv").drop(columns="pressure")
  frame.to_csv(folder / "south.csv", index=False)
  dataset = load_dataset(table_data(folder, columns_file(tmp_path)))
  assert dataset.table is not None
  assert dataset.table.absent == {"south.csv": ("pressure",)}
  at_south = dataset.sites == 1
  place = dataset.table.features.index("pressure")
  assert (dataset.inputs[at_south, place] == 0).all()
  assert (dataset.inputs[at_south, place + 1] == 1).all()


def test_unknown_categories_and_values_outside_the_range_are_counted(tmp_path):
  dataset = load(tmp_path, text_of("yes,Q,95,250,x,n", "yes,R,-3,100,d,n"))
  assert dataset.table is not None
  assert dataset.table.outside == {"age": 2, "pressure": 1}
  assert dataset.table.unknown == {"sex": 2}
  assert dataset.inputs[-2:, 0].tolist() == [1, -1]
  assert dataset.inputs[-2:, 3:].tolist() == [[0, 0, 1, 0]] * 2
  with pytest.raises(UserError, match=r"data.strict: 2 of 12 values of 'age' are outside its"):
    load(tmp_path, text_of("yes,Q,95,250,x,n", "yes,R,-3,100,d,n"), strict=True)


def test_rows_without_a_class_or_a_required_value_are_left_out_and_counted(tmp_path):
  lines = (",Q,40,120,m,n", "maybe,R,40,120,m,n", "yes,S,,120,m,n")
  dataset = load(tmp_path, text_of(*lines))
  assert len(dataset.labels) == 10
  assert [item.reason for item in dataset.skipped] == [
    "no value of the target 'ill'",
    "a class that the manifest does not name",
    "no value of the required column 'age'",
  ]
  with pytest.raises(
    UserError, match=r"data.strict: 2 records or files .* 'table.csv:12': no valu"
  ):
    load(tmp_path, text_of(*lines), strict=True)
  load(tmp_path, text_of(lines[2]), strict=True)  # the manifest says so


def test_a_target_may_be_a_number_with_a_threshold(tmp_path):
  manifest = MANIFEST.replace('target = "ill"', 'target = "score"\nabove = 2')
  dataset = load(tmp_path, "score,person,age,pressure,sex\n3,A,40,1,f\n2,B,41,1,f\n4,C,42,1,m\n",
                 manifest)  # fmt: skip
  assert dataset.labels.tolist() == [1, 0, 1]
  dataset = load(tmp_path, (tmp_path / "table.csv").read_text(), manifest, positive="no")
  assert (dataset.labels.tolist(), dataset.class_names) == ([0, 1, 0], ("yes", "no"))


def test_classes_without_a_list_are_ordered_by_their_names(tmp_path):
  manifest = MANIFEST.replace('classes = ["no", "yes"]', "")
  assert load(tmp_path, text_of(), manifest).class_names == ("no", "yes")


def test_patients_and_groups_stay_on_one_side_and_equal_rows_do_not(tmp_path):
  manifest = MANIFEST.replace('patient = "person"', 'patient = "person"\ngroup = "house"')
  lines = [f"{line},H{number // 3}" for number, line in enumerate(rows(90))]
  text = "\n".join([HEADER + ",house", *lines, *["no,X,30,90,f,n,"] * 6, *["no,,30,90,f,n,"] * 4])
  dataset = load(tmp_path, text, manifest)
  split = build_hospitals(dataset, table_data(tmp_path, ""), Config().partition).split
  house = np.arange(90) // 3
  assert not np.isin(house[split.test[split.test < 90]], house[split.train[split.train < 90]]).any()
  same_person = split.units[90:96]
  assert len(set(same_person.tolist())) == 1
  assert len(set(split.units[96:].tolist())) == 4
  assert split.num_in_duplicate_groups >= 10


def test_a_patient_at_several_hospitals_is_counted_and_stops_a_strict_run(tmp_path):
  folder = hospitals_folder(tmp_path / "tables", (30, 30))
  with (folder / "south.csv").open("a") as file:
    file.write("yes,P01,40,100,f,none\n")
  dataset = load_dataset(table_data(folder, columns_file(tmp_path)))
  assert dataset.patient_counts is not None
  assert dataset.patient_counts.shared == 1
  with pytest.raises(UserError, match=r"data.strict: 1 patients stand at several hospitals"):
    load_dataset(table_data(folder, columns_file(tmp_path), strict=True))


def scaled_hospitals(tmp_path, scaling):
  config = Config()
  data = table_data(hospitals_folder(tmp_path / "tables"), columns_file(tmp_path), scaling=scaling)
  config.partition.scheme, config.partition.num_clients = "site", 0
  return build_hospitals(load_dataset(data), data, config.partition)


def test_federated_scaling_is_the_standard_scaler_of_all_training_records(tmp_path):
  from sklearn.preprocessing import StandardScaler

  hospitals = scaled_hospitals(tmp_path, "federated")
  dataset = hospitals.dataset
  frame = pd.concat(
    pd.read_csv(tmp_path / "tables" / f"{n}.csv") for n in ("east", "north", "south")
  )
  values = frame[["age", "pressure"]].to_numpy(np.float64)
  expected = StandardScaler().fit(values[hospitals.split.train]).transform(values)
  np.testing.assert_allclose(dataset.inputs[:, :2], np.nan_to_num(expected), atol=1e-5)
  assert dataset.table is not None
  assert len(dataset.table.shift) == 2


def test_hospital_scaling_is_by_the_training_records_of_each(tmp_path):
  hospitals = scaled_hospitals(tmp_path, "hospital")
  for rows_of in client_rows(hospitals.train):
    ages = hospitals.dataset.inputs[rows_of, 0]
    assert abs(ages.mean()) < 1e-5
    assert ages.std() == pytest.approx(1, abs=1e-5)
  assert hospitals.dataset.table is not None
  assert hospitals.dataset.table.shift == ()


def test_a_constant_or_empty_column_is_not_blown_up():
  values = np.array([[3.0, np.nan], [3.0, np.nan]])
  mean, deviation = constants(sums(values))
  assert (mean.tolist(), deviation.tolist()) == ([3, 0], [1, 1])


def test_cells_that_mean_the_same_are_one_category():
  assert [plain(value) for value in (" 1.0", 1, "1", "-9.0", "a ", True)] == [
    "1", "1", "1", "-9", "a", "true",
  ]  # fmt: skip


@pytest.mark.parametrize("module", [modality, table_manifest])
def test_examples_in_docstrings_are_true(module):
  outcome = doctest.testmod(module)
  assert outcome.attempted > 0
  assert outcome.failed == 0


def test_a_manifest_survives_the_trip_through_json(tmp_path):
  text = MANIFEST.replace('patient = "person"', 'group = "g"\nnames = ["a"]\nsites = { f = "F" }')
  manifest = read_manifest(pathlib.Path(columns_file(tmp_path, text)))
  assert (
    parse_manifest(manifest_record(manifest), "again")._replace(columns=manifest.columns)
    == manifest
  )
  record = manifest_record(manifest)
  assert (
    manifest_record(parse_manifest(record, "again"))["columns"].keys() == record["columns"].keys()
  )


BAD_MANIFESTS = {
  "low = 20, high = 80": ("low = 80, high = 20", r"column 'age': low=80 is not under high=20; giv"),
  '["f", "m"]': ('["f", "m", "f"]', r"column 'sex': category 'f' is listed twice; list it once"),
  'categories = ["f", "m"]': ("categories = []", r"column 'sex' lists no categories; list them"),
  'kind = "ignore"': ('kind = "text"', r"column 'remark': kind='text' is unknown; "),
  "low = 80, high = 200": ("low = 80", r"column 'pressure' has low and not the other end"),
  "required": ("requird", r"column 'age': 'requird' is unknown; did you mean 'required'\?"),
  'target = "ill"': ("", r"has no 'target'; name it there"),
  'target = "ill" ': ('target = "age"', r"'age' is an input, and target, site, patient or group"),
  '"no", "yes"': ('"no", "no"', r"class 'no' is listed twice; list it once"),
  'target = "ill"\n': ('target = "ill"\nabove = "x"\n', r"above='x' is no number; correct it"),
  "[columns]": ("[columns", r"is no TOML \("),
}


@pytest.mark.parametrize("part", BAD_MANIFESTS)
def test_a_manifest_that_contradicts_itself_is_refused_in_a_sentence(tmp_path, part):
  wrong, message = BAD_MANIFESTS[part]
  text = MANIFEST.replace(part.rstrip(" "), wrong, 1)
  with pytest.raises(UserError, match=message):
    load(tmp_path, text_of(), text)


def test_a_number_without_a_range_needs_another_scaling(tmp_path):
  manifest = MANIFEST.replace(", low = 20, high = 80", "")
  with pytest.raises(
    UserError, match=r"data.scaling='ranges' and the manifest gives no range of ag"
  ):
    load(tmp_path, text_of(), manifest)
  load(tmp_path, text_of(), manifest, scaling="federated")


BAD_TABLES = {
  "": r"table.csv is empty; give a table",
  HEADER: r"table.csv has no rows; give a table with records",
  text_of().replace("pressure", "presure"): (
    r"table.csv has no column 'pressure', which the manifest names; its columns are ill, person,"
  ),
  text_of("yes,Q,old,120,m,n"): r"table.csv, line 12: column 'age' holds 'old', which is no finite",
  text_of("yes,Q,inf,120,m,n"): r"table.csv, line 12: column 'age' holds 'inf', which is no finite",
  text_of("yes,Q,40,120,m"): r"table.csv, line 12: 5 cells under a header of 6 columns; correct",
  text_of("yes,Q,40,120,m,a,b"): r"table.csv, line 12: 7 cells under a header of 6 columns",
  text_of().replace("remark", "age", 1): r"table.csv has the column 'age' twice; give each",
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_a_table_that_is_not_as_it_must_be_is_refused_in_a_sentence(tmp_path, text):
  with pytest.raises(UserError, match=BAD_TABLES[text]):
    load(tmp_path, text)


def test_what_is_not_there_is_named(tmp_path):
  columns = columns_file(tmp_path)
  with pytest.raises(UserError, match=r"data.path=.*none does not exist; point"):
    load_dataset(table_data(tmp_path / "none", columns))
  with pytest.raises(UserError, match=r"data.columns=.*none.toml is not a file; give"):
    load_dataset(table_data(tmp_path, str(tmp_path / "none.toml")))
  with pytest.raises(UserError, match=r"needs data.columns, which is empty; give the TOML"):
    load_dataset(table_data(tmp_path, ""))
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match=r"holds no table; give a folder with files ending in .csv"):
    load_dataset(table_data(tmp_path / "empty", columns))
  (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(UserError, match=r"table.csv is not UTF-8 .*; save it as CSV in UTF-8"):
    load_dataset(table_data(tmp_path / "table.csv", columns))
  (tmp_path / "table.parquet").write_bytes(b"none")
  with pytest.raises(UserError, match=r"table.parquet cannot be read as Parquet .*; restore"):
    load_dataset(table_data(tmp_path / "table.parquet", columns))
