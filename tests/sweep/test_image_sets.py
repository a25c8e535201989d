"""A sweep is bound to its images: no start, shard or merge mixes points of two data sets."""

import concurrent.futures
import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedjax_med.core.errors import UserError
from fedjax_med.sweep import image_sets, merge, missing, runner, table
from fedjax_med.sweep.points import configure
from tests.command import smoke, start
from tests.sweep.sweeping import AXES, base, output, plan

POINTS = [{"client.learning_rate": rate} for rate in (0.1, 0.2)]


def with_dataset(planned, **changes):
  """The runs with another dataset, and the path that it lies at."""

  def changed(run):
    path = changes.get("path", run.case.config.data.path)
    data = dataclasses.replace(run.case.config.data, path=path)
    config = dataclasses.replace(run.case.config, data=data)
    fields = {name: value for name, value in changes.items() if name != "path"}
    dataset = dataclasses.replace(run.case.hospitals.dataset, **fields)
    hospitals = dataclasses.replace(run.case.hospitals, dataset=dataset)
    return run._replace(case=run.case._replace(config=config, hospitals=hospitals))

  return [changed(run) for run in planned]


@pytest.fixture(scope="module")
def planned():
  return plan(POINTS)


@pytest.fixture(scope="module")
def other_pixel(planned):
  inputs = planned[0].case.hospitals.dataset.inputs.copy()
  inputs[7, 3, 3, 0] ^= 1
  return inputs


def test_every_part_of_the_images_is_bound_and_their_place_is_not(planned, other_pixel, tmp_path):
  dataset = planned[0].case.hospitals.dataset
  image_sets.bind(tmp_path, planned)
  image_sets.bind(tmp_path, with_dataset(planned, path="moved"))
  others = {
    "inputs": other_pixel,
    "labels": 1 - dataset.labels,
    "names": ("other", *dataset.names[1:]),
    "class_names": tuple(reversed(dataset.class_names)),
    "sites": dataset.sites[::-1],
    "patients": np.arange(len(dataset.labels), dtype=np.int32),
  }
  for name, value in others.items():
    with pytest.raises(UserError, match=r"began with the images of .*; give the data of the first"):
      image_sets.bind(tmp_path, with_dataset(planned, **{name: value}))
  (record,) = image_sets.records(tmp_path).values()
  assert record["sha256"] == image_sets.digest(dataset)
  with_synthetic = plan([{"client.synthetic": "gan"}], base_without_privacy())
  assert with_synthetic[0].case.hospitals.dataset.num_synthetic
  image_sets.bind(tmp_path, with_synthetic)  # of the same real images


def base_without_privacy():
  return base(privacy__mechanism="none", privacy__noise_multiplier=0.0)


def test_axes_that_make_other_images_have_digests_of_their_own(planned, other_pixel, tmp_path):
  here, there = (
    [run._replace(point={"data.path": path})] for run, path in zip(planned, "ab", strict=True)
  )
  both = with_dataset(here, path="a") + with_dataset(there, path="b", inputs=other_pixel)
  image_sets.bind(tmp_path, both)
  assert len(image_sets.records(tmp_path)) == 2
  swapped = with_dataset(both[:1], path="a", inputs=other_pixel)
  with pytest.raises(UserError, match=r"images of data\.path=a .*, and data\.path=a .* others now"):
    image_sets.bind(tmp_path, swapped)
  seeds = plan([{"seed": 0}, {"seed": 1}], seed_axes=("partition", *AXES))
  image_sets.bind(tmp_path, seeds)  # phantoms of two seeds
  assert len(image_sets.records(tmp_path)) == 4


def test_of_shards_that_start_at_once_with_other_images_one_kind_is_refused(
  planned, other_pixel, tmp_path
):
  sets = [planned, with_dataset(planned, inputs=other_pixel)] * 4

  def bind(runs):
    try:
      image_sets.bind(tmp_path, runs)
    except UserError:
      return False
    return True

  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    went = list(threads.map(bind, sets))
  assert went in ([True, False] * 4, [False, True] * 4)
  assert [path.suffix for path in (tmp_path / image_sets.FOLDER).iterdir()] == [".json"]


def pictures(folder, bright, count=12, side=40):
  """A folder of two classes, of which one is brighter."""
  random = np.random.default_rng(bright)
  for label, name in enumerate(("no", "yes")):
    (folder / name).mkdir(parents=True)
    for number in range(count):
      pixels = random.integers(0, 200, (side, side)) + bright * label
      Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
  return folder


def test_a_sweep_goes_on_with_moved_data_and_not_with_other_data(tmp_path, monkeypatch):
  easy, hard = pictures(tmp_path / "easy", 55), pictures(tmp_path / "hard", 5)
  moved = shutil.copytree(easy, tmp_path / "moved")
  calls = []
  monkeypatch.setattr(missing, "run_points", lambda planned, *_: calls.append(planned))
  workdir = tmp_path / "sweep"

  def begin(path, own):
    config = base_without_privacy()
    config.data.source, config.data.path, config.data.image_size = "folder", str(path), 16
    config.partition.num_clients, config.partition.min_client_size = 2, 2
    config.partition.scheme = "iid"
    configs = [configure(config, point, AXES) for point in POINTS]
    table.begin(workdir, config, POINTS, AXES)
    selection = missing.Selection(points=POINTS, configs=configs, numbers=own)
    missing.run_missing(Console(quiet=True), workdir, selection, name="", command_of=lambda _: "")

  begin(easy, [0])
  begin(moved, [1])
  assert len(calls) == 2
  for own in ([1], [0, 1]):
    with pytest.raises(UserError) as error:
      begin(hard, own)
    for words in (f"data.path={easy} (24 images", f"data.path={hard} (24 images", "--workdir="):
      assert words in str(error.value)
  Image.fromarray(np.zeros((40, 40), np.uint8)).save(moved / "no" / "more.png")
  with pytest.raises(UserError, match=r"\(25 images.*\) holds others now"):
    begin(moved, [0, 1])
  assert len(calls) == 2
  assert not any((workdir / "points").iterdir())


def test_a_point_whose_folder_holds_another_run_is_found_before_anything_is_planned(
  planned, tmp_path, monkeypatch
):
  monkeypatch.setattr(runner, "make_group_program", None)
  folder = table.folder_of(tmp_path, 1)
  folder.mkdir(parents=True)
  (folder / "config.json").write_text('{"run_id": "other"}')
  done = {planned[1].key}
  with pytest.raises(UserError, match="holds run other, this configuration is run"):
    runner.run_points(planned, done, output(tmp_path))


def test_folders_of_other_images_are_not_merged_and_nothing_is_copied(
  planned, other_pixel, tmp_path, capsys
):
  folders = [tmp_path / name for name in ("one", "two", "three", "old")]
  moved = with_dataset(planned, path="elsewhere")
  for folder, runs in zip(
    folders, (planned, moved, with_dataset(planned, inputs=other_pixel), []), strict=True
  ):
    table.begin(folder, base(), POINTS, AXES)
    image_sets.bind(folder, runs)
  one, two, three, old = folders
  with pytest.raises(UserError) as error:
    merge.join(tmp_path / "all", [one, two, three])
  for words in (str(one), str(three), "merge folders of the same images"):
    assert words in str(error.value)
  assert not (tmp_path / "all" / table.DEFINITION).exists()
  merge._take([one, two], tmp_path / "all")
  assert image_sets.records(tmp_path / "all") == image_sets.records(one)
  with pytest.raises(UserError, match="merge folders of the same images"):
    merge._take([three], tmp_path / "all")
  (old / "points" / "00000").mkdir()
  merge._tell_unknown(folders)
  assert capsys.readouterr().out.startswith(f"{old} does not say which images its points are of")


@pytest.mark.slow
def test_shards_and_resumed_sweeps_on_other_data_are_refused_from_the_command_line(tmp_path):
  easy, hard = (pictures(tmp_path / name, n, 60) for name, n in (("easy", 55), ("hard", 5)))
  sweep = functools.partial(
    smoke,
    ("-m", "fedjax_med.sweep"),
    "--grid=privacy.noise_multiplier=1,2",
    "--config.data.source=folder",
    "--config.data.image_size=16",
    "--config.partition.scheme=iid",
  )
  shared, apart = (f"--workdir={tmp_path / name}" for name in ("shared", "apart"))
  first = sweep(shared, "--shard=0/2", f"--config.data.path={easy}")
  assert first.returncode == 0, first.stderr
  for arguments in (["--shard=1/2"], ["--resume"]):
    second = sweep(shared, *arguments, f"--config.data.path={hard}")
    assert second.returncode == 2
    assert f"began with the images of data.path={easy} (120 images" in second.stderr
    assert "Traceback" not in second.stderr
  assert [path.name for path in (tmp_path / "shared" / "points").iterdir()] == ["00000"]
  other = sweep(apart, "--shard=1/2", f"--config.data.path={hard}")
  assert other.returncode == 0, other.stderr
  merged = start("sweep", "merge", shared, str(tmp_path / "apart"))
  assert merged.returncode == 2
  assert "merge folders of the same images" in merged.stderr
  easy.rename(tmp_path / "moved")
  rest = sweep(shared, "--resume", f"--config.data.path={tmp_path / 'moved'}")
  assert rest.returncode == 0, rest.stderr
  digests = [json.loads(path.read_text()) for path in (tmp_path / "shared" / "data").iterdir()]
  assert len(digests) == 1
