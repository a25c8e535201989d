"""A model of slices predicts every slice of a volume that its run would have read."""

import csv

import numpy as np
import pytest

from fedjax_med.trained import predictions
from fedjax_med.trained.loading import load
from tests.data.folders import SIDE
from tests.running import run

nibabel = pytest.importorskip("nibabel", reason="needs the extra nifti")
SLICES = 3


def test_each_slice_that_the_run_reads_has_a_row_as_the_run_measured(tmp_path):
  rows = ["path,label,split"]
  for number in range(12):
    noise = np.random.default_rng(number).integers(1, 900, (SIDE, SIDE, SLICES)).astype(np.int16)
    name, side = f"{number}.nii", "test" if number > 7 else "train"
    nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), tmp_path / name)
    rows.append(f"{name},{'yes' if number % 2 else 'no'},{side}")
  (tmp_path / "list.csv").write_text("\n".join(rows), encoding="utf-8")
  changes = {"source": "manifest", "path": str(tmp_path / "list.csv"), "slices": "all"}
  changes |= {"image_size": SIDE, "min_size": 8, "num_examples": 4000}
  data = {f"data__{name}": value for name, value in changes.items()}
  partition = {"partition__num_clients": 1, "partition__min_client_size": 1}
  ran = run(tmp_path / "run", **data, **partition, partition__scheme="iid", server__num_rounds=1)
  scans = tmp_path / "scans"
  scans.mkdir()
  for number in range(8, 12):
    (scans / f"{number}.nii").write_bytes((tmp_path / f"{number}.nii").read_bytes())
  output = tmp_path / "out.csv"
  found = predictions.predict_files(load(tmp_path / "run"), scans, output, None, lambda text: None)
  assert found == (4 * SLICES, [])
  with output.open(encoding="utf-8", newline="") as file:
    told = list(csv.DictReader(file))
  assert {row["file"] for row in told} == {
    f"{number}.nii, slice {place}" for number in range(8, 12) for place in range(SLICES)
  }
  truth = ["yes" if int(row["file"].partition(".")[0]) % 2 else "no" for row in told]
  right = [row["predicted"] == label for row, label in zip(told, truth, strict=True)]
  assert ran["test"]["accuracy"] == pytest.approx(np.mean(right))
