"""Recordings become the windows they should, on the side they should; bad input is one sentence."""

import doctest

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import interp1d

from fedjax_med.core.config import Config, DataConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data import ranges, recordings
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.recordings import cut, of_recordings, overlapping, window_starts
from fedjax_med.data.series import load_series
from fedjax_med.data.series_files import read_samples, resample
from tests.data.series_cases import PEOPLE, samples, series_folder, write


def series_data(path, **changes) -> DataConfig:
  """Windows of 2 seconds, one a second, of a folder or a manifest, with these changes."""
  data = DataConfig(source="series", path=str(path), rate=10.0, window_seconds=2, hop_seconds=1)
  data.signals = "ax,ay"
  for name, value in changes.items():
    setattr(data, name, value)
  return data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return series_folder(tmp_path_factory.mktemp("series"))


def hospitals_of(data, scheme="site", clients=0):
  partition = Config().partition
  partition.scheme, partition.num_clients, partition.min_client_size = scheme, clients, 1
  return build_hospitals(load_series(data), data, partition)


def test_windows_begin_where_those_of_seglearn_do():
  # seglearn 1.2.5: Segment(width=200, overlap=.5).fit_transform of np.arange(n)[:, None] for n in
  # 947, 200, 399, 400 gives windows with these first values.
  golden = [[0, 100, 200, 300, 400, 500, 600, 700], [0], [0, 100], [0, 100, 200]]
  for samples_of, starts in zip((947, 200, 399, 400), golden, strict=True):
    assert window_starts(samples_of, 200, 100).tolist() == starts
    windows = cut(np.arange(samples_of, dtype=np.float32)[:, None], 200, 100)
    assert windows.shape == (len(starts), 200, 1, 1)
    assert windows[:, 0, 0, 0].tolist() == starts
    assert windows[:, -1, 0, 0].tolist() == [start + 199 for start in starts]


def test_a_folder_and_a_manifest_are_the_same_windows(root):
  folder, listed = (load_series(series_data(root / name)) for name in ("people", "manifest.csv"))
  np.testing.assert_array_equal(folder.inputs, listed.inputs)
  assert folder.inputs.dtype == np.float32
  assert folder.inputs.shape[1:] == (20, 1, 2)
  assert folder.class_names == ("normal", "tremor")
  assert folder.site_names == PEOPLE == listed.site_names
  for name in ("labels", "sites", "patients"):
    np.testing.assert_array_equal(getattr(folder, name), getattr(listed, name))
  assert folder.names[:2] == ("p1/normal/0.csv@0s", "p1/normal/0.csv@1s")
  first = pd.read_csv(root / "people/p1/normal/0.csv")[["ax", "ay"]].to_numpy(np.float32)
  np.testing.assert_array_equal(folder.inputs[1, :, 0], first[10:30])


def test_other_rates_are_resampled_as_scipy_does_and_counted(root, tmp_path):
  values, times = samples(0, 1, 0), np.arange(50) / 10.0
  found = resample(values, times, 25.0)
  wanted = np.arange(int(4.9 * 25) + 1) / 25
  expected = interp1d(times, values, axis=0)(wanted)
  np.testing.assert_allclose(found.values, expected, atol=1e-6)
  assert found.resampled
  uneven = np.sort(np.random.default_rng(0).uniform(0, 5, 50))
  found = resample(values, uneven, 10.0)
  expected = interp1d(uneven, values, axis=0)(uneven[0] + np.arange(len(found.values)) / 10)
  np.testing.assert_allclose(found.values, expected, atol=1e-6)
  same = load_series(series_data(root / "people", time_column="t", signals=""))
  assert same.series is not None
  assert (same.series.resampled, same.series.channels) == (0, ("ax", "ay"))
  halved = load_series(series_data(root / "people", recorded_rate=20.0))
  assert halved.series is not None
  assert halved.series.resampled == 24
  first = read_samples(root / "people/p1/normal/0.csv").values[:, 1:]
  np.testing.assert_allclose(halved.inputs[0, :, 0], first[::2][:20], atol=1e-6)


def test_missing_values_are_drawn_in_and_a_channel_without_any_is_masked_and_both_counted(tmp_path):
  root = series_folder(tmp_path)
  broken = samples(0, 0, 0)
  broken[3:6, 0], broken[:2, 1] = np.nan, np.nan
  write(root / "people/p1/normal/0.csv", broken)
  empty = samples(0, 0, 1)
  empty[:, 0], empty[:, 1] = np.nan, 4.0
  write(root / "people/p1/normal/1.csv", empty)
  dataset = load_series(series_data(root / "people"))
  series = dataset.series
  assert series is not None
  assert series.bridged == {"ax": 3, "ay": 2}
  assert (series.empty, series.constant) == ({"ax": 1}, {"ay": 1})
  line = pd.Series(broken[:, 0]).interpolate().to_numpy(np.float32)
  np.testing.assert_allclose(dataset.inputs[0, :, 0, 0], line[:20], atol=1e-6)
  assert dataset.inputs[0, 0, 0, 1] == np.float32(round(broken[2, 1], 6))
  masked = dataset.inputs[series.recordings == 1]
  assert np.isnan(masked[..., 0]).all()
  assert (masked[..., 1] == 4).all()


def test_a_recording_shorter_than_a_window_is_padded_with_masked_samples_and_counted(tmp_path):
  root = series_folder(tmp_path)
  write(root / "people/p1/normal/0.csv", samples(0, 0, 0)[:15])
  dataset = load_series(series_data(root / "people"))
  assert dataset.series is not None
  assert dataset.series.padded == 1
  assert np.isnan(dataset.inputs[0, 15:]).all()
  assert not np.isnan(dataset.inputs[0, :15]).any()
  assert not np.isnan(dataset.inputs[1:]).any()


def test_seconds_in_no_window_are_those_after_the_last(root):
  series = load_series(series_data(root / "people")).series
  assert series is not None
  sizes = [len(samples(p, c, t)) for p in range(4) for c in range(2) for t in range(3)]
  assert series.left_over == pytest.approx(sum(size % 10 for size in sizes) / 10)
  apart = load_series(series_data(root / "people", hop_seconds=3)).series
  assert apart is not None
  held = sum(20 * ((size - 20) // 30 + 1) for size in sizes)
  assert apart.left_over == pytest.approx((sum(sizes) - held) / 10)


def test_people_are_on_one_side_and_those_in_test_are_no_hospitals(root):
  hospitals = hospitals_of(series_data(root / "people", test_fraction=0.4))
  dataset, split = hospitals.dataset, hospitals.split
  assert dataset.sites is not None
  assert not set(dataset.sites[split.train]) & set(dataset.sites[split.test])
  tested = {PEOPLE[site] for site in dataset.sites[split.test]}
  assert tested == set(hospitals.visiting)
  assert set(hospitals.names) == set(PEOPLE) - tested
  assert hospitals.by_site
  assert hospitals.num_elsewhere == 0
  assert hospitals.test.counts.sum() == len(split.test)


def test_named_people_are_the_test_set(root):
  hospitals = hospitals_of(series_data(root / "people", test_persons="P2+p3"))
  assert hospitals.names == ("p1", "p4")
  assert hospitals.visiting == {"p2": "p1", "p3": "p4"}
  assert hospitals.split.scheme == "given"


def test_recordings_are_on_one_side_and_people_on_both_with_split_recording(root):
  for share in (0.2, 0.5):
    data = series_data(root / "people", split="recording", test_fraction=share)
    hospitals = hospitals_of(data)
    assert hospitals.dataset.series is not None
    rows, split = hospitals.dataset.series.recordings, hospitals.split
    assert not set(rows[split.train]) & set(rows[split.test])
    assert hospitals.names == PEOPLE
    assert abs(len(split.test) / len(rows) - share) < 0.1
    assert split.num_test_of_train_patients == len(split.test)


def test_a_person_with_one_recording_is_counted_and_whole(tmp_path):
  root = series_folder(tmp_path)
  write(root / "people/p5/normal/0.csv", samples(4, 0, 0))
  data = series_data(root / "people", split="recording", test_fraction=0.3)
  for seed in range(4):
    data.seed = seed
    hospitals = hospitals_of(data)
    series = hospitals.dataset.series
    assert series is not None
    assert series.alone == 1
    assert ("p5" in hospitals.names) != ("p5" in hospitals.visiting)


def test_the_random_split_counts_test_windows_that_overlap_a_training_window(root):
  hospitals = hospitals_of(series_data(root / "people", split="paper"))
  series, split = hospitals.dataset.series, hospitals.split
  assert series is not None
  found = overlapping(series, split.train, split.test)
  for place, row in enumerate(split.test):
    near = [
      series.recordings[other] == series.recordings[row]
      and abs(int(series.starts[other]) - int(series.starts[row])) < series.length
      for other in split.train
    ]
    assert found[place] == any(near)
  assert found.mean() > 0.5
  grouped = hospitals_of(series_data(root / "people")).split
  assert not overlapping(series, grouped.train, grouped.test).any()


def test_a_recording_is_the_mean_of_its_windows():
  predictions = np.random.default_rng(0).random((7, 3)).astype(np.float32)
  rows = np.array([4, 4, 1, 1, 1, 9, 4])
  means, first = of_recordings(predictions, rows)
  expected = pd.DataFrame(predictions).groupby(rows).mean().to_numpy()
  np.testing.assert_allclose(means, expected, atol=1e-7)
  assert rows[first].tolist() == [1, 4, 9]


def test_a_manifest_gives_sites_sides_and_groups(root, tmp_path):
  frame = pd.read_csv(root / "manifest.csv")
  frame["site"] = frame.patient.map({"p1": "north", "p2": "north", "p3": "south", "p4": "south"})
  frame.to_csv(root / "sites.csv", index=False)
  hospitals = hospitals_of(series_data(root / "sites.csv", test_fraction=0.5))
  assert hospitals.names == ("north", "south")
  assert hospitals.visiting == {}
  assert hospitals.dataset.patients is not None
  for side in (hospitals.split.train, hospitals.split.test):
    assert len(set(hospitals.dataset.patients[side])) == 2
  few = hospitals_of(series_data(root / "sites.csv", test_fraction=0.2, seed=1))
  assert few.names == ("north", "south")
  assert few.dataset.patients is not None
  assert len(set(few.dataset.patients[few.split.test])) == 1
  frame["split"] = np.where(frame.path.str.contains("/0.csv"), "test", "train")
  frame.drop(columns="patient").to_csv(root / "sides.csv", index=False)
  split = hospitals_of(series_data(root / "sides.csv")).split
  assert split.scheme == "given"
  frame.drop(columns="split").assign(pair=frame.path.str[-5]).to_csv(root / "p.csv", index=False)
  data = series_data(root / "p.csv", group_columns="pair", split="recording", test_fraction=0.3)
  dataset = load_series(data)
  assert dataset.kept_together is not None
  assert len(set(dataset.kept_together)) == 3


def test_text_and_arrays_are_read_as_csv_is(tmp_path):
  values = samples(0, 0, 0).round(6)
  write(tmp_path / "a.csv", values)
  frame = pd.DataFrame(values, columns=["ax", "ay"])
  frame.to_csv(tmp_path / "b.csv", sep=";", decimal=",", index=False, encoding="utf-8-sig")
  np.savetxt(tmp_path / "c.txt", values, fmt="%.6f")
  np.save(tmp_path / "d.npy", values)
  frame.to_csv(tmp_path / "e.tsv", sep="\t", index=False)
  with (tmp_path / "e.tsv").open("a") as file:
    file.write("\n\n")
  expected = {"a.csv": ("t", "ax", "ay"), "b.csv": ("ax", "ay"), "c.txt": ("1", "2"),
              "d.npy": ("1", "2"), "e.tsv": ("ax", "ay")}  # fmt: skip
  for name, columns in expected.items():
    found = read_samples(tmp_path / name)
    assert found.columns == columns
    np.testing.assert_allclose(found.values[:, -2:], values)


def test_declared_ranges_count_what_they_cut(root):
  dataset = load_series(series_data(root / "people", ranges="-0.5,0.5;-9,9"))
  assert dataset.series is not None
  outside = int((np.abs(dataset.inputs[..., 0]) > 0.5).sum())
  assert dataset.series.outside == {"ax": outside}
  with pytest.raises(UserError, match=r"data.strict: \d+ of \d+ values of 'ax' are outside its"):
    load_series(series_data(root / "people", ranges="-0.5,0.5", strict=True))


def test_other_files_are_left_out_and_counted(tmp_path):
  root = series_folder(tmp_path)
  (root / "people" / "notes.pdf").write_bytes(b"none")
  (root / "people" / ".DS_Store").write_bytes(b"none")
  dataset = load_series(series_data(root / "people"))
  assert [item.reason for item in dataset.skipped] == [
    "written by the operating system",
    "no recording (CSV, text or .npy)",
  ]
  with pytest.raises(UserError, match=r"data.strict: 1 files .* left out, such as 'notes.pdf'"):
    load_series(series_data(root / "people", strict=True))


BAD = {
  "channels": r"p2/normal/0.csv has 1 channels \(ax\) and .*p1/normal/0.csv has 2 \(ax, ay\); give",
  "text": r"p1/normal/0.csv, line 4: column 'ay' holds 'high', which is no number; correct it",
  "infinite": r"p1/normal/0.csv, sample 3: column 'ax' is infinite; correct it",
  "ragged": r"p1/normal/0.csv cannot be read \(.*line 3.*\); save it as CSV",
  "empty": r"p1/normal/0.csv cannot be read \(.*\); save it as CSV|holds no samples; remove it",
  "shallow": r"'p9/0.csv' is not below a folder of a person and one of a class; give a folder",
  "twice": r"p1/normal/0.csv has the column 'ax' twice; give each a name of its own",
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_not_as_it_must_be_is_refused_in_a_sentence(tmp_path, what):
  root = series_folder(tmp_path)
  path, rows = root / "people/p1/normal/0.csv", [f"0.{k},1,2" for k in range(30)]
  if what == "channels":
    (root / "people/p2/normal/0.csv").write_text("ax\n" + "1\n" * 30)
  elif what == "shallow":
    write(root / "people/p9/0.csv", samples(0, 0, 0))
  else:
    text = {
      "text": ["t,ax,ay", *rows[:2], "0.3,1,high", *rows[3:]],
      "infinite": ["t,ax,ay", *rows[:2], "0.3,inf,1", *rows[3:]],
      "ragged": ["t,ax,ay", rows[0], "1,2,3,4,5", *rows[2:]],
      "empty": [""],
      "twice": ["t,ax,ax", *rows],
    }[what]
    path.write_text("\n".join(text))
  data = series_data(root / "people", signals="", time_column="" if what == "channels" else "t")
  if what == "channels":
    for other in (root / "people").rglob("*.csv"):
      if other.parent != root / "people/p2/normal" or other.name != "0.csv":
        pd.read_csv(other)[["ax", "ay"]].to_csv(other, index=False)
  with pytest.raises(UserError, match=BAD[what]):
    load_series(data)


def refused(root, message, **changes):
  with pytest.raises(UserError, match=message):
    load_series(series_data(root / "people", **changes))


def test_settings_that_contradict_the_data_are_refused_in_a_sentence(root):
  refused(root, r"data.window_seconds=60 is longer than every recording: the longest, p4/normal/2."
                r"csv, has 6.5 seconds at data.rate=10; use", window_seconds=60)  # fmt: skip
  refused(root, r"data.hop_seconds=0.01 at data.rate=10 is 0 samples; use 0.1", hop_seconds=0.01)
  refused(root, r"p1/normal/0.csv has no column 'az' but t, ax, ay; correct", signals="ax,az")
  refused(root, r"nobody is called 'p7'; did you mean 'p\d'\?", test_persons="p1+p7")
  refused(root, r"data.test_persons='p1\+p2\+p3\+p4' leaves nobody", test_persons="p1+p2+p3+p4")
  refused(root, r"data.recorded_rate=20 is not read: data.time_column='t' tells",
          time_column="t", recorded_rate=20.0)  # fmt: skip
  refused(root, r"'ax' is missing or not after the one before it; sort", time_column="ax",
          signals="ay")  # fmt: skip
  refused(root, r"data.test_persons='\+' names nobody; write", test_persons="+")
  refused(root, r"has 50 samples in 4.9 seconds by column 't'; write the time in seconds, or lowe",
          time_column="t", rate=2e4)  # fmt: skip
  refused(root, r"data.label_column=class is read of a manifest only, and", label_column="class")
  refused(root, r"data.ranges='1,0': 1 is not under 0; give", ranges="1,0")
  refused(root, r"data.ranges='0,1;0,1;0,1' has 3 pairs for 2 channels; give", ranges="0,1;0,1;0,1")
  refused(root, r"'0.1' is no pair of numbers; write LOW,HIGH", ranges="0.1")
  with pytest.raises(UserError, match=r"data.path=.*none does not exist; point"):
    load_series(series_data(root / "none"))


def test_a_manifest_that_does_not_say_whose_recordings_it_lists_is_refused(root):
  frame = pd.read_csv(root / "manifest.csv").rename(columns={"patient": "person"})
  frame.to_csv(root / "person.csv", index=False)
  with pytest.raises(UserError, match=r"person.csv does not say whose each recording is; name the"):
    load_series(series_data(root / "person.csv"))
  dataset = load_series(series_data(root / "person.csv", patient_column="person"))
  assert dataset.site_names == PEOPLE


def test_settings_that_do_nothing_are_refused(root):
  config = Config()
  config.data = series_data(root / "people")
  config.model.name, config.partition.scheme, config.partition.num_clients = "cnn1d", "site", 0
  validate(config)
  for kind, message in {
    "flip": r"'flip' is none of data.source='series'; choose one of none, jitter, scale",
    "scale": r"'scale' with data.ranges='': each window is scaled by its own deviation, which",
  }.items():
    config.client.augmentation = kind
    with pytest.raises(UserError, match=message):
      validate(config)
  config.client.augmentation, config.data.rate = "jitter", 0.0
  with pytest.raises(UserError, match=r"data.rate=0.0 must be above 0 .*; use 20 to 100"):
    validate(config)
  phantoms = Config()
  phantoms.data.split = "recording"
  with pytest.raises(UserError, match=r"data.split='recording' is no split of data.source='phan"):
    validate(phantoms)


@pytest.mark.parametrize("module", [ranges, recordings])
def test_examples_in_docstrings_are_true(module):
  outcome = doctest.testmod(module)
  assert outcome.attempted > 0
  assert outcome.failed == 0


def test_the_watch_data_have_the_windows_that_seglearn_counts(real_data):
  manifest = real_data / "smartwatch-physio" / "manifest.csv"
  if not manifest.exists():
    pytest.skip(f"real data: {manifest} is absent")
  dataset = load_series(DataConfig(source="series", path=str(manifest)))
  assert dataset.inputs.shape == (2229, 200, 1, 6)  # Segment(width=200, overlap=.5) on the 140
  assert dataset.series is not None
  assert len(dataset.series.recording_names) == 140
  assert len(dataset.site_names) == 10


def with_sessions(tmp_path):
  """A manifest in which p1 and p2 share a session, and p3 and p4."""
  rows = (series_folder(tmp_path) / "manifest.csv").read_text(encoding="utf-8").splitlines()
  session = {"p1": "a", "p2": "A", "p3": "b", "p4": "b"}
  lines = [f"{row},{session[row.rpartition(',')[2]]}" for row in rows[1:]]
  path = tmp_path / "sessions.csv"
  path.write_text("\n".join(["path,label,patient,session", *lines]) + "\n", encoding="utf-8")
  return path


def test_a_person_who_trains_in_the_group_of_another_is_not_said_to_be_in_test_only(tmp_path):
  data = series_data(with_sessions(tmp_path), group_columns="session", test_fraction=0.5)
  with pytest.raises(UserError, match=r"site 'p\d' has 0 training examples"):
    hospitals_of(data)


def test_named_people_take_their_whole_group_with_them(tmp_path):
  path = with_sessions(tmp_path)
  data = series_data(path, group_columns="session", test_persons="p1")
  with pytest.raises(UserError, match=r"data.test_persons='p1' puts rows of one name of column"):
    load_series(data)
  load_series(series_data(path, group_columns="session", test_persons="p1+p2"))


def test_a_header_alone_holds_no_samples_and_a_quoted_one_may_hold_commas(tmp_path):
  path = tmp_path / "a.csv"
  path.write_text("ax,ay\n")
  with pytest.raises(UserError, match=r"a.csv holds no samples; remove it"):
    read_samples(path)
  path.write_text('"a, x","a, y"\n1,2\n')
  assert read_samples(path).columns == ("a, x", "a, y")
  np.save(tmp_path / "b.npy", np.zeros((3, 0)))
  with pytest.raises(UserError, match=r"float64\[3, 0\], which is no recording"):
    read_samples(tmp_path / "b.npy")


@pytest.mark.parametrize("first", ["0,1", ",0,1", "0;1;2"])
def test_a_header_of_numbers_is_neither_taken_for_a_sample_nor_dropped(tmp_path, first):
  path = tmp_path / "a.csv"
  path.write_text(f"{first}\n0.5,1.5\n")
  with pytest.raises(
    UserError, match=r"the first line of .*a.csv is 0, 1.*, which may be the head"
  ):
    read_samples(path)
