"""Files of a workdir are whole or not there, whoever else writes them."""

import concurrent.futures
import json

import pytest

from fedjax_med.folder.writing import write_json, write_whole


def test_writers_of_one_file_at_once_leave_one_of_their_values(tmp_path):
  path = tmp_path / "sweep.json"
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    list(threads.map(lambda k: write_json(path, {"value": [k] * 1000}), range(200)))
  value = json.loads(path.read_text())["value"]
  assert len(value) == 1000
  assert len(set(value)) == 1
  assert [each.name for each in tmp_path.iterdir()] == ["sweep.json"]


def test_what_fails_half_way_leaves_what_was_there(tmp_path):
  path = tmp_path / "results.csv"
  path.write_text("old")

  def fails(place):
    place.write_text("ne")
    raise OSError("disk full")

  with pytest.raises(OSError, match="disk full"):
    write_whole(path, fails)
  assert path.read_text() == "old"
  assert [each.name for each in tmp_path.iterdir()] == ["results.csv"]
