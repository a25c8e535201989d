"""Times and events of tables: what is read, what is counted, what is refused."""

import importlib.util
import pathlib

import numpy as np
import pytest

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.folder.data_notes import data_notes
from fedjax_med.run.summaries import hospital_record
from tests.data.survival_cases import HEADER, SURVIVAL, survival_folder
from tests.data.table_cases import MANIFEST, columns_file, table_file


def survival_data(folder: pathlib.Path, manifest: str = SURVIVAL, **settings) -> Config:
  config = Config()
  config.data.source, config.data.path = "table", str(survival_folder(folder / "tables"))
  config.data.columns = columns_file(folder, manifest)
  config.partition.scheme, config.partition.num_clients = "site", 0
  for name, value in settings.items():
    setattr(config.data, name, value)
  validate(config)
  return config


def replace(folder: pathlib.Path, old: str, new: str, count: int = 1) -> None:
  """Changes the first ``count`` lines of north.csv that begin with ``old``."""
  path = folder / "tables" / "north.csv"
  lines = path.read_text().splitlines()
  places = [k for k, line in enumerate(lines) if k and line.split(",")[1].startswith(old)]
  for k in places[:count]:
    cells = lines[k].split(",")
    lines[k] = new.format(days=cells[0], rest=",".join(cells[2:]))
  path.write_text("\n".join(lines) + "\n")


def notes_of(config: Config) -> dict[str, bool]:
  held = hospital_record(load_hospitals(config))
  return {note.text: note.warning for note in data_notes(held, "record", show_names=True)}


def test_targets_are_time_and_event_and_sides_keep_the_share_of_events(tmp_path):
  hospitals = load_hospitals(survival_data(tmp_path))
  dataset = hospitals.dataset
  assert (dataset.task, dataset.class_names) == ("survival_cox", ("censored", "event"))
  lines = (tmp_path / "tables" / "south.csv").read_text().splitlines()[1:]
  first = dataset.names.index("south.csv:2")
  expected = [[float(text) for text in line.split(",")[:2]] for line in lines]
  assert dataset.targets is not None
  found = dataset.targets.values[first : first + len(lines)]
  np.testing.assert_array_equal(found, np.array(expected, np.float32))
  np.testing.assert_array_equal(dataset.labels, dataset.targets.values[:, 1])
  shares = [dataset.labels[side].mean() for side in (hospitals.split.train, hospitals.split.test)]
  assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_intervals_are_equal_up_to_the_horizon_or_quantiles_which_are_a_release(tmp_path):
  equal = load_hospitals(survival_data(tmp_path, survival="hazards", intervals=4)).dataset
  assert equal.targets is not None
  assert equal.targets.fitted["ends"].tolist() == [30, 60, 90, 120]
  assert equal.released == ()
  assert equal.table is not None
  assert equal.table.survival is not None
  late = (equal.targets.values[:, 1] == 1) & (equal.targets.values[:, 0] > 120)
  assert equal.table.survival.late == late.sum()
  config = survival_data(tmp_path, survival="hazards", intervals=4, interval_bounds="quantiles")
  hospitals = load_hospitals(config)
  assert hospitals.dataset.targets is not None
  held = hospitals.dataset.targets.values[hospitals.split.train]
  expected = np.quantile(held[held[:, 1] == 1, 0].astype(np.float64), [0.25, 0.5, 0.75, 1])
  np.testing.assert_allclose(hospitals.dataset.targets.fitted["ends"], expected, rtol=1e-6)
  assert hospitals.dataset.released[0].startswith("quantiles of the times of events")
  assert any(text.startswith("Quantiles of the times of events") for text in notes_of(config))


def test_codes_of_the_event_can_be_named(tmp_path):
  config = survival_data(tmp_path, 'event_values = ["alive", "dead"]\n' + SURVIVAL)
  for place in (tmp_path / "tables").iterdir():
    lines = [line.split(",") for line in place.read_text().splitlines()]
    words = {"0": "alive", "1": "dead", "dead": "dead"}
    place.write_text("\n".join(",".join([c[0], words[c[1]], *c[2:]]) for c in lines) + "\n")
  plain = load_hospitals(survival_data(tmp_path / "plain")).dataset
  assert load_hospitals(config).dataset.labels.tolist() == plain.labels.tolist()


@pytest.mark.parametrize("code", ["2", "-1"])
def test_another_code_is_refused_with_its_line(tmp_path, code):
  config = survival_data(tmp_path)
  replace(tmp_path, "1", "{days}," + code + ",{rest}")
  with pytest.raises(UserError) as caught:
    load_hospitals(config)
  problem, remedy = str(caught.value).split("; ")
  assert problem.startswith("north.csv, line ")
  assert problem.endswith(
    f": column 'dead' holds '{code}', which is neither 0 (no event) nor 1 (event)"
  )
  assert "event_values = [1, 2]" in remedy


def test_times_of_zero_or_less_become_the_smallest_one_and_are_counted(tmp_path):
  config = survival_data(tmp_path)
  replace(tmp_path, "1", "-3,1,{rest}")
  replace(tmp_path, "0", "0,0,{rest}")
  dataset = load_hospitals(config).dataset
  assert dataset.table is not None
  assert dataset.targets is not None
  record = dataset.table.survival
  assert record is not None
  assert record.early == 2
  assert (dataset.targets.values[:, 0] == np.float32(record.smallest)).sum() >= 3
  text = "2 records with a time of 0 or less, taken for the smallest positive one"
  assert notes_of(config)[f"{text} ({record.smallest:g})."]
  config.data.strict = True
  with pytest.raises(UserError, match=r"data.strict: 2 values of 'days' are 0 or less"):
    load_hospitals(config)


def test_a_hospital_without_an_event_is_named(tmp_path):
  config = survival_data(tmp_path)
  replace(tmp_path, "1", "{days},0,{rest}", count=100)
  text = "'north' has no event among its training records: its loss has no gradient."
  assert notes_of(config)[text]


def test_a_table_without_censoring_is_read_and_one_without_an_event_is_refused(tmp_path):
  config = survival_data(tmp_path)
  for place in (tmp_path / "tables").iterdir():
    lines = [line.split(",") for line in place.read_text().splitlines()]
    events = [",".join([cells[0], "1", *cells[2:]]) for cells in lines[1:]]
    place.write_text("\n".join([HEADER, *events]) + "\n")
  assert load_hospitals(config).dataset.class_names == ("event",)
  for place in (tmp_path / "tables").iterdir():
    lines = [line.split(",") for line in place.read_text().splitlines()]
    events = [",".join([cells[0], "0", *cells[2:]]) for cells in lines[1:]]
    place.write_text("\n".join([HEADER, *events]) + "\n")
  with pytest.raises(UserError, match=r"no record has an event: the column 'dead' holds 0 only"):
    load_hospitals(config)


def test_records_without_a_time_are_left_out_and_counted(tmp_path):
  config = survival_data(tmp_path)
  replace(tmp_path, "1", ",1,{rest}")
  replace(tmp_path, "0", "{days},NA,{rest}", count=2)
  skipped = load_hospitals(config).dataset.skipped
  reasons = sorted(item.reason for item in skipped)
  assert reasons == ["no value of the target 'days'"] + 2 * ["no value of the target 'dead'"]


@pytest.mark.parametrize(
  ("line", "problem"),
  [
    ('target = "dead"', r"target is not read beside time and event"),
    ('event_values = ["a"]', r"event_values=\['a'\] are not two different values"),
    ("site_required = true", r"site_required is not read without 'site'"),
  ],
)
def test_manifests_that_contradict_themselves_are_refused(tmp_path, line, problem):
  with pytest.raises(UserError, match=problem):
    load_hospitals(survival_data(tmp_path, f"{line}\n{SURVIVAL}"))


def test_settings_that_nothing_reads_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"data.intervals=4 is read with data.survival=hazards only"):
    survival_data(tmp_path, intervals=4)
  with pytest.raises(
    UserError, match=r"data.positive='1' is of classes, and the manifest names time"
  ):
    load_hospitals(survival_data(tmp_path, positive="1"))
  bare = SURVIVAL.replace("horizon = 120", "")
  with pytest.raises(UserError, match=r"'equal' and the manifest gives no horizon; give there"):
    load_hospitals(survival_data(tmp_path, bare, survival="hazards"))
  config = survival_data(tmp_path, MANIFEST, survival="hazards")
  config.data.path = str(table_file(tmp_path / "classes.csv"))
  with pytest.raises(UserError, match=r"data.survival='hazards' and the manifest names no time"):
    load_hospitals(config)


def test_small_sites_are_joined_and_rows_without_a_site_left_out_where_it_is_required(tmp_path):
  sites = SURVIVAL.replace('patient = "person"', 'site = "person"\njoin_sites_below = 30')
  config = survival_data(tmp_path, sites + "\n")
  lines = [f"{k + 1},{k % 2},{site},50,1" for k, site in enumerate(["a"] * 30 + ["b"] * 29 + ["c"])]
  path = tmp_path / "one.csv"
  path.write_text("\n".join([HEADER, *lines, "5,1,,50,1"]) + "\n")
  config.data.path = str(path)
  with pytest.raises(UserError, match=r"no value of the site column 'person', as in 1 rows"):
    load_hospitals(config)
  config.data.columns = columns_file(tmp_path, "site_required = true\n" + sites)
  hospitals = load_hospitals(config)
  assert hospitals.names == ("a", "other")
  assert [item.reason for item in hospitals.dataset.skipped] == [
    "no value of the required column 'person'"
  ]


@pytest.mark.skipif(
  importlib.util.find_spec("lifelines") is None, reason="lung.csv is part of lifelines"
)
def test_lung_is_227_patients_with_164_deaths_at_ten_institutions():
  spec = importlib.util.find_spec("lifelines")
  assert spec is not None
  assert spec.origin is not None
  config = Config()
  config.data.source = "lung"
  config.data.path = str(pathlib.Path(spec.origin).parent / "datasets" / "lung.csv")
  config.partition.scheme, config.partition.num_clients = "site", 0
  validate(config)
  hospitals = load_hospitals(config)
  assert (len(hospitals.dataset.labels), hospitals.dataset.labels.sum()) == (227, 164)
  assert len(hospitals.names) == 10


def test_the_smallest_time_is_told_only_where_it_is_used_and_then_it_is_a_release(tmp_path):
  config = survival_data(tmp_path)
  dataset = load_hospitals(config).dataset
  assert dataset.table is not None
  assert dataset.table.survival is not None
  assert dataset.table.survival.smallest == 0
  assert dataset.released == ()
  replace(tmp_path, "0", "0,0,{rest}")
  (told,) = load_hospitals(config).dataset.released
  assert told.startswith("smallest time above 0")
