"""UCI's Heart Disease at four hospitals: all 920 patients, or the rows and the split of FLamby."""

import dataclasses
import pathlib

import numpy as np

from fedjax_med.core.config import DataConfig
from fedjax_med.data.dataset import Dataset
from fedjax_med.data.table_manifest import Manifest, read_manifest
from fedjax_med.data.tables import read_dataset

SEED, TRAIN_SHARE = 43, 0.66  # of FLamby's split
FEW = 2  # patients of a class up to which FLamby does not stratify a hospital


def manifest(paper: bool) -> Manifest:
  """The manifest of the files, shipped with the package; ``paper`` takes FLamby's rows."""
  name = "heart_disease_paper.toml" if paper else "heart_disease.toml"
  return read_manifest(pathlib.Path(__file__).with_name(name))


def load_heart_disease(data: DataConfig) -> Dataset:
  """The dataset of ``data.source=heart_disease``; UserError where ``data.path`` lacks a file."""
  paper = data.split == "paper"
  dataset = read_dataset(pathlib.Path(data.path).expanduser(), manifest(paper), data)
  if not paper:
    return dataset
  assert dataset.sites is not None
  return dataclasses.replace(dataset, in_test=paper_split(dataset.labels, dataset.sites))


def paper_split(labels: np.ndarray, sites: np.ndarray) -> np.ndarray:
  """[N] bool test side of FLamby: in each site what scikit-learn's train_test_split draws.

  Args:
    labels: [N] 0 or 1.
    sites: [N] site numbers.
  """
  in_test = np.zeros(len(labels), bool)
  for site in np.unique(sites):
    rows = np.flatnonzero(sites == site)
    in_test[rows[_test_rows(labels[rows])]] = True
  return in_test


def _test_rows(labels: np.ndarray) -> np.ndarray:
  """Rows of a hospital's test side."""
  random = np.random.RandomState(SEED)  # the generator of the published split
  counts = np.bincount(labels, minlength=2)
  num_train = int(TRAIN_SHARE * len(labels))
  num_test = len(labels) - num_train
  if counts.min() <= FEW:
    return random.permutation(len(labels))[:num_test]
  train = _rounded(counts, num_train, random)
  test = _rounded(counts - train, num_test, random)
  chosen = []
  for label, (first, number) in enumerate(zip(train, test, strict=True)):
    order = np.flatnonzero(labels == label)[random.permutation(counts[label])]
    chosen.append(order[first : first + number])
  return np.concatenate(chosen)


def _rounded(
  counts: np.ndarray,
  total: int,
  random: np.random.RandomState,
) -> np.ndarray:
  """Whole shares of ``total`` in proportion to ``counts``; ties are drawn, as in scikit-learn."""
  exact = counts / counts.sum() * total
  whole = np.floor(exact)
  rest, missing = exact - whole, int(total - whole.sum())
  for value in np.unique(rest)[::-1]:
    if missing <= 0:
      break
    (tied,) = np.nonzero(rest == value)
    add = min(len(tied), missing)
    whole[random.choice(tied, size=add, replace=False)] += 1
    missing -= add
  return whole.astype(np.int64)
