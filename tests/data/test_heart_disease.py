"""UCI's Heart Disease: all patients by default, FLamby's rows and split on demand."""

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError
from fedjax_med.core.validation import validate
from fedjax_med.data.heart_disease import paper_split
from fedjax_med.data.hospitals import load_hospitals
from tests.data.table_cases import heart_folder


def heart(path, **settings) -> Config:
  config = Config()
  config.data.source, config.data.path = "heart_disease", str(path)
  config.partition.scheme, config.partition.num_clients = "site", 0
  config.model.name = "linear"
  for name, value in settings.items():
    setattr(config.data, name, value)
  validate(config)
  return config


@pytest.mark.parametrize("counts", [(30, 50), (2, 40), (0, 46), (33, 33), (101, 202), (7, 5)])
def test_the_split_of_a_hospital_is_that_of_scikit_learn(counts):
  labels = np.random.default_rng(sum(counts)).permutation(np.repeat([0, 1], counts))
  stratify = labels if min(counts) > 2 else None
  _, expected = train_test_split(
    np.arange(len(labels)),
    test_size=1 - 0.66,
    train_size=0.66,
    random_state=43,
    shuffle=True,
    stratify=stratify,
  )
  found = paper_split(labels, np.zeros(len(labels), np.int32))
  assert np.flatnonzero(found).tolist() == sorted(np.asarray(expected).tolist())


def test_all_patients_are_kept_unless_the_split_is_that_of_the_paper(tmp_path):
  folder = heart_folder(tmp_path / "heart")
  every, paper = (load_hospitals(heart(folder, split=split)) for split in ("grouped", "paper"))
  assert every.names == ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")
  assert (len(every.dataset.labels), len(every.dataset.skipped)) == (240, 0)
  assert (len(paper.dataset.labels), len(paper.dataset.skipped)) == (216, 24)
  assert (every.split.scheme, paper.split.scheme) == ("grouped", "paper")
  assert paper.train.counts.tolist() == [35, 35, 35, 35]
  assert every.dataset.table is not None
  shares = every.dataset.table.missing.mean(0)
  np.testing.assert_allclose(shares, [0, 0, 0, 0.1, *[0] * 6, 1, 1, 1])


def test_a_folder_without_all_four_files_is_refused(tmp_path):
  folder = heart_folder(tmp_path / "heart")
  (folder / "processed.va.data").unlink()
  with pytest.raises(UserError, match=r"lacks processed.va.data; point --config.data.path at"):
    load_hospitals(heart(folder))


def test_settings_that_the_published_split_leaves_unread_are_refused():
  with pytest.raises(UserError, match=r"data.test_fraction=0.4 is read with a split wh"):
    heart("x", split="paper", test_fraction=0.4)
  with pytest.raises(UserError, match=r"data.seed=3 is read with a split or a partition"):
    heart("x", split="paper", seed=3)
  with pytest.raises(UserError, match=r"data.image_size=64 is read with a data.sourc"):
    heart("x", image_size=64)
  with pytest.raises(
    UserError, match=r"data.scaling='federated' is read with a data.source of tab"
  ):
    heart("", source="phantoms", scaling="federated")


def test_the_rows_and_the_split_of_the_real_files_are_those_of_the_paper(real_data):
  folder = real_data / "heart-disease"
  if not folder.is_dir():
    pytest.skip(f"real data: {folder} is absent")
  paper = load_hospitals(heart(folder, split="paper"))
  assert paper.train.counts.tolist() == [199, 172, 30, 85]
  assert paper.test.counts.tolist() == [104, 89, 16, 45]
  assert paper.dataset.labels[paper.train.indices[2, :30]].all()  # Switzerland's are all ill
  every = load_hospitals(heart(folder))
  assert (every.train.counts + every.test.counts).tolist() == [303, 294, 123, 200]
  assert every.dataset.table is not None
  names = [column.name for column in every.dataset.table.manifest.inputs]
  missing = every.dataset.table.missing[every.dataset.sites == 2].mean(0)
  assert missing[names.index("chol")] == 1
