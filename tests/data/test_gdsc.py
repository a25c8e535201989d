"""Cell lines and drugs: joined as pandas joins them, split by line, tissue or pair, counted."""

import numpy as np
import pandas as pd
import pytest

from fedjax_med.core.config import Config, DataConfig, PartitionConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.gdsc import DRUGS, LINES, METHYLATION, RESPONSES
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.sources import load_dataset
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.run.summaries import hospital_record
from fedjax_med.tasks.regression import targets_of
from tests.data.lines import make_gdsc, tables, write


def config(folder, **changes) -> DataConfig:
  return DataConfig(source="gdsc", path=str(folder), **changes)


def hospitals(folder, scheme="site", **changes):
  data = config(folder, **changes)
  partition = PartitionConfig(scheme=scheme, num_clients=0 if scheme == "site" else 3)
  return build_hospitals(load_dataset(data), data, partition)


def held_by(dealt):
  """The targets and the sites of the dataset."""
  dataset = dealt.dataset
  assert dataset.targets is not None
  assert dataset.sites is not None
  return dataset.targets, dataset.sites


def texts(dealt):
  return [note.text for note in data_notes(hospital_record(dealt), "record", show_names=True)]


def test_lines_are_joined_by_their_names_whatever_the_order_of_the_files(tmp_path):
  held = tables()
  shuffled = dict(held)
  shuffled[RESPONSES] = held[RESPONSES].iloc[:, ::-1]
  shuffled[LINES] = held[LINES].iloc[::-1]
  one = load_dataset(config(write(tmp_path / "a", held)))
  other = load_dataset(config(write(tmp_path / "b", shuffled)))
  expected = held[RESPONSES].T.loc[list(one.names)].to_numpy()
  assert one.targets is not None
  assert other.targets is not None
  np.testing.assert_allclose(one.targets.values, expected, rtol=1e-6)
  np.testing.assert_array_equal(one.targets.values, other.targets.values)
  np.testing.assert_array_equal(one.sites, other.sites)
  np.testing.assert_allclose(one.inputs, 2 * held[METHYLATION].to_numpy() - 1, atol=1e-6)
  assert one.targets.names == ("A", "B (2)", "B (3)", "C")


def test_small_and_unknown_sites_are_joined_as_other(tmp_path):
  dataset = load_dataset(config(make_gdsc(tmp_path / "x")))
  assert dataset.sites is not None
  assert dataset.site_names == ("lung", "skin", "other")
  assert np.bincount(dataset.sites).tolist() == [40, 25, 15]


def test_what_is_left_out_is_counted(tmp_path):
  held = tables()
  names = held[METHYLATION].index
  held[RESPONSES] = held[RESPONSES].drop(columns=names[3])
  held[RESPONSES][names[5]] = np.nan
  held[METHYLATION] = held[METHYLATION].drop(index=[names[7], names[8]])
  held[METHYLATION].iloc[10, 2] = np.nan
  dealt = hospitals(write(tmp_path / "x", held))
  assert len(dealt.dataset.names) == 75
  counts = pd.Series([item.reason for item in dealt.dataset.skipped]).value_counts()
  assert counts.to_dict() == {
    "a line without methylation": 2,
    "no value of any target": 2,
    "no value of the required column 'G2_1_2_3'": 1,
  }
  assert any(text.startswith("Left out: 5 records") for text in texts(dealt))


def test_targets_are_scaled_by_the_training_values_of_all_hospitals(tmp_path):
  dealt = hospitals(make_gdsc(tmp_path / "x"))
  targets, train = held_by(dealt)[0], dealt.split.train
  frame = pd.DataFrame(targets.values[train].astype(float))
  np.testing.assert_allclose(targets.fitted["means"], frame.mean(), rtol=1e-5)
  np.testing.assert_allclose(targets.fitted["spreads"], frame.std(ddof=0), rtol=1e-5)
  assert dealt.dataset.released == ("mean and spread of each target",)
  assert texts(dealt)[-1].startswith("Mean and spread of each target: exact sums or values over")


def test_a_drug_without_training_values_or_with_equal_ones_is_left_out_and_named(tmp_path):
  held = tables()
  held[RESPONSES].loc["GDSC:1"] = np.nan
  held[RESPONSES].loc["GDSC:4"] = held[RESPONSES].loc["GDSC:4"] * 0 + 2.3
  dealt = hospitals(write(tmp_path / "x", held))
  assert held_by(dealt)[0].left_out == (
    ("A", "no training value at any hospital"),
    ("C", "all training values are the same"),
  )
  values = targets_of(dealt.dataset)["values"]
  assert np.isnan(values[:, [0, 3]]).all()
  assert not np.isnan(values[:, [1, 2]]).all()
  assert "Left out: 1 target, all training values are the same, such as C." in texts(dealt)
  held[RESPONSES][:] = 1.0
  with pytest.raises(UserError, match=r"none of the 4 targets has two different values"):
    hospitals(write(tmp_path / "y", held))


def test_inputs_are_scaled_as_those_of_any_table(tmp_path):
  folder = make_gdsc(tmp_path / "x")
  dealt = hospitals(folder, scaling="federated")
  raw = 2 * tables()[METHYLATION].to_numpy() - 1
  train = raw[dealt.split.train]
  expected = (raw - train.mean(0)) / train.std(0)
  np.testing.assert_allclose(dealt.dataset.inputs, expected, atol=2e-5)
  assert dealt.dataset.released == (
    "mean and deviation of each number column (data.scaling=federated)",
    "mean and spread of each target",
  )


def test_grouped_holds_out_lines_and_tissue_whole_sites(tmp_path):
  folder = make_gdsc(tmp_path / "x")
  by_line = hospitals(folder)
  assert by_line.split.scheme == "grouped"
  assert by_line.names == ("lung", "skin", "other")
  assert by_line.test.counts.tolist() == [8, 5, 3]
  by_tissue = hospitals(folder, scheme="iid", split="tissue")
  _, sites = held_by(by_tissue)
  assert by_tissue.split.scheme == "tissue"
  assert set(sites[by_tissue.split.train]).isdisjoint(sites[by_tissue.split.test])


def test_pairs_are_all_dealt_to_one_side_each_and_said_to_leak(tmp_path):
  dealt = hospitals(make_gdsc(tmp_path / "x"), split="pairs")
  values = held_by(dealt)[0].values
  train, test = values[dealt.split.train], values[dealt.split.test]
  whole = tables()[RESPONSES].T.to_numpy()
  np.testing.assert_array_equal(np.isnan(train) & np.isnan(test), np.isnan(whole))
  assert not (~np.isnan(train) & ~np.isnan(test)).any()
  assert (~np.isnan(test)).sum() == round(0.2 * (~np.isnan(whole)).sum())
  assert dealt.dataset.notes[-1].startswith("Leaks: pairs of cell line and drug")
  assert dealt.split.scheme == "pairs"
  assert dealt.split.num_test_of_train_patients == 80
  assert not any("equal to another one" in text for text in texts(dealt))


@pytest.mark.parametrize(
  ("source", "split", "scheme", "sentence"),
  [
    (
      "gdsc",
      "paper",
      "site",
      r"data.split='paper' is no split of data.source='gdsc'; use data.spl",
    ),
    ("gdsc", "drug", "site", r"data.split='drug' is refused: a drug that nobody trained on has no"),
    ("gdsc", "tissue", "site", r"holds out whole primary sites, which as hospitals would have no"),
    ("table", "pairs", "site", r"data.split='pairs' is no split of data.source='table'"),
  ],
)
def test_a_split_that_cannot_be_is_refused(source, split, scheme, sentence):
  made = Config()
  made.data.source, made.data.split, made.data.path = source, split, "somewhere"
  made.partition.scheme, made.partition.num_clients = scheme, 0
  with pytest.raises(UserError, match=sentence):
    validate(made)


@pytest.mark.parametrize(
  ("file", "broken", "sentence"),
  [
    (DRUGS, lambda t: t.drop(columns="Name"), r"has no column 'Name', but drug_id"),
    (METHYLATION, lambda t: pd.concat([t, t.iloc[:1]]), r"has the row 'ACH-000000' twice"),
    (METHYLATION, lambda t: t.astype(object).replace(t.iloc[2, 1], "high"),
     r"line 4: column 'G1_1_2_3' holds 'high', which is no finite number"),
    (RESPONSES, lambda t: t.astype(object).replace(t.iloc[2, 0], "low"),
     r"GDSC_IC50.csv, line 4: column 'ACH-000000' holds 'low', which is no finite number"),
    (RESPONSES, lambda t: t.add_prefix("X"), r"no cell line of .* is in .*GDSC_IC50"),
  ],
)  # fmt: skip
def test_a_file_that_is_not_as_published_is_refused(tmp_path, file, broken, sentence):
  held = tables()
  held[file] = broken(held[file])
  with pytest.raises(UserError, match=sentence):
    load_dataset(config(write(tmp_path / "x", held)))


def test_a_missing_file_is_named(tmp_path):
  folder = make_gdsc(tmp_path / "x")
  (folder / LINES).unlink()
  with pytest.raises(UserError, match=rf"has no {LINES}, which data.source='gdsc' needs"):
    load_dataset(config(folder))


def test_the_published_files_give_the_numbers_that_others_report(real_data):
  folder = real_data / "gdsc-ccle"
  if not folder.is_dir():
    pytest.skip(f"real data: {folder} is absent")
  dataset = load_dataset(config(folder))
  assert dataset.targets is not None
  assert dataset.sites is not None
  assert (*dataset.inputs.shape, dataset.targets.values.shape[1]) == (561, 808, 266)
  assert int((~np.isnan(dataset.targets.values)).sum()) == 120_084
  counts = dict(zip(dataset.site_names, np.bincount(dataset.sites).tolist(), strict=True))
  assert len(counts) == 11
  assert (counts["lung"], counts["stomach"], counts["other"]) == (114, 20, 113)
