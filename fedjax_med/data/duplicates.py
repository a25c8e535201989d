"""Finds near-duplicate images: mirrored, contrast-changed, re-cropped or re-compressed copies."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fedjax_med.data.dataset import Contradictions, Dataset, array_leaves
from fedjax_med.data.grey import as_grey, stretched

SIDE = 32  # pixels of a descriptor's side
# Correlation from which two images count as copies. On Br35H, pairs of groups drawn at random and
# judged by eye: 30 of 30 from 0.90 to 0.95 show one slice, about half of those from 0.85 to 0.90.
# At 0.90 adjacent slices of SARS-CoV-2-CT chain into one group of 521 of 2481; at 0.92 of 64.
THRESHOLD = 0.92
SHOWN = 20  # pairs of pictures in several classes that are named
BLOCK = 1024  # rows of the similarity matrix held at once


def near_duplicate_groups(images: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
  """Groups images that are copies of one another, directly or by a chain of copies.

  Two images are copies if their descriptors, or those of a mirror image (left-right, up-down,
  both), correlate at ``threshold`` or more. Single linkage: in a set of adjacent slices the chain
  may be long, which keeps all of them together.

  Args:
    images: [N, H, W], [N, H, W, 1] or [N, H, W, 3] uint8 or uint16.
    threshold: correlation from which two images are joined.

  Returns:
    [N] int32 group numbers in the order in which groups first appear.
  """
  pairs = list(similar_pairs(images, threshold))
  rows, columns = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int64)
  graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(images),) * 2)
  return number_groups(connected_components(graph, directed=False)[1])


def similar_pairs(images: np.ndarray, threshold: float = THRESHOLD) -> Iterator[np.ndarray]:
  """Yields [2, pairs] numbers of images that are copies by themselves, block of rows by block.

  Args:
    images: [N, H, W], [N, H, W, 1] or [N, H, W, 3] uint8 or uint16.
    threshold: correlation of the descriptors from which two images are copies.
  """
  return _correlated_pairs(descriptors(images), threshold)


def contents(inputs: Any) -> np.ndarray:
  """[N] numbers, equal for examples that are equal value for value."""
  examples = zip(*array_leaves(inputs), strict=True)
  whole = (b"".join(leaf.tobytes() for leaf in example) for example in examples)
  digests = [hashlib.blake2b(values, digest_size=16).digest() for values in whole]
  return np.unique(digests, return_inverse=True)[1]


def descriptors(images: np.ndarray) -> np.ndarray:
  """[N, SIDE, SIDE] float32 of norm 1 (0 for a blank image), blind to grey scale and margins.

  The dark margin is cropped away (re-crops), greys become ranks (any monotone change of contrast
  gives the same ranks), and only detail between one pixel and an eighth of the side is kept: all
  heads are alike in outline, slices differ in structure.
  """
  images = stretched(as_grey(images))
  ranks = np.zeros((len(images), SIDE, SIDE), np.float32)
  for number, (image, level) in enumerate(zip(images, _noise_levels(images), strict=True)):
    content = Image.fromarray(_content(image, level)).resize((SIDE, SIDE), Image.Resampling.BOX)
    small = np.asarray(content)
    counts = np.bincount(small.ravel(), minlength=256)
    ranks[number] = (np.cumsum(counts) - counts / 2)[small]

  def blur(sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(ranks, (0, sigma, sigma))

  detail = blur(1.0) - blur(SIDE / 8)
  detail -= detail.mean((1, 2), keepdims=True)
  norms = np.linalg.norm(detail, axis=(1, 2), keepdims=True)
  return np.divide(detail, norms, out=np.zeros_like(detail), where=norms > 1e-3)


def _noise_levels(images: np.ndarray) -> np.ndarray:
  """[N] grey levels up to which a pixel may be noise; many images at a time, one by one is slow."""
  blocks = (images[start : start + BLOCK] for start in range(0, len(images), BLOCK))
  high = [np.percentile(block.reshape(len(block), -1), 99, axis=1) for block in blocks]
  return np.maximum(12.0, 0.12 * np.concatenate([np.zeros(0), *high]))


def _content(image: np.ndarray, noise_level: float) -> np.ndarray:
  """The rows and columns that hold more than noise; the whole image if they are too few."""
  bright = image > noise_level
  rows = np.flatnonzero(bright.mean(1) > 0.03)
  columns = np.flatnonzero(bright.mean(0) > 0.03)
  if len(rows) < 8 or len(columns) < 8:
    return image
  return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _correlated_pairs(found: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
  """[2, pairs] image numbers that correlate, block of rows by block of rows."""
  n = len(found)
  # A mirror changes the sign of the parts that are odd along its axis, so four products of a
  # quarter of the pixels give the correlations with all four mirror images.
  parts = [part.reshape(n, -1) for half in _even_odd(found, 1) for part in _even_odd(half, 2)]
  for start in range(0, n, BLOCK):
    # A pair correlates the same from either side: the columns before this block are done.
    products = [part[start : start + BLOCK] @ part[start:].T for part in parts]
    even, odd = products[0] + products[1], products[2] + products[3]
    flipped_even, flipped_odd = products[0] - products[1], products[2] - products[3]
    best = np.maximum(even + np.abs(odd), flipped_even + np.abs(flipped_odd))
    rows, others = np.nonzero(best >= threshold)
    rows, others = rows + start, others + start
    keep = rows < others
    yield np.stack([rows[keep], others[keep]])


def _even_odd(images: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
  """The parts of ``images`` that a flip along ``axis`` keeps and negates; squared norms add up."""
  first, second = np.split(images, 2, axis)
  mirrored = np.flip(second, axis)
  return (first + mirrored) * np.float32(0.5**0.5), (first - mirrored) * np.float32(0.5**0.5)


def find_contradictions(
  dataset: Dataset,
  groups: np.ndarray,
  pairs_of: Callable[[Any], Iterator[np.ndarray]] = similar_pairs,
) -> Contradictions:
  """Finds examples that stand in several classes, themselves or as near-duplicates.

  Args:
    dataset: the examples.
    groups: [N] near-duplicate group of each. Within a group only pairs that are similar themselves
      count: a chain may lead from one class to another by small steps.
    pairs_of: ``similar`` of the dataset's modality.
  """
  same = contents(dataset.inputs)
  identical, alike = np.zeros((2, len(groups)), bool)
  pairs: list[tuple[int, int]] = []
  for members in _mixed(same, dataset.labels):
    identical[members] = True
    labels = dataset.labels[members]
    pairs.append((int(members[0]), int(members[labels != labels[0]][0])))
  for members in _mixed(groups, dataset.labels):
    found = list(pairs_of(dataset.inputs[members]))
    rows, others = members[np.concatenate(found, axis=1)]
    close = dataset.labels[rows] != dataset.labels[others]
    alike[rows[close]] = alike[others[close]] = True
    pairs += [
      (int(one), int(other)) for one, other in zip(rows[close][:1], others[close][:1], strict=True)
    ]
  return Contradictions(
    identical=int(identical.sum()),
    similar=int((identical | alike).sum()),
    pairs=tuple(
      (dataset.names[one], dataset.names[other]) for one, other in dict.fromkeys(pairs[:SHOWN])
    ),
  )


def _mixed(groups: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
  """Examples of each group that holds several classes, in the order in which groups appear."""
  order = np.argsort(groups, kind="stable")
  parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
  mixed = [part for part in parts if len(np.unique(labels[part])) > 1]
  return sorted(mixed, key=lambda part: part[0])


def join_groups(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Smallest groups that keep every group of both together: [N] int32, numbered by first member."""
  n = len(first)
  offset = int(first.max(initial=-1)) + 1
  nodes = np.unique(np.concatenate([first, second + offset]), return_inverse=True)[1]
  graph = coo_array((np.ones(n, bool), (nodes[:n], nodes[n:])), shape=(2 * n, 2 * n))
  return number_groups(connected_components(graph, directed=False)[1][nodes[:n]])


def number_groups(groups: np.ndarray) -> np.ndarray:
  """The same grouping as [N] int32 numbers 0, 1, … in the order in which groups first appear."""
  _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
  return np.argsort(np.argsort(first)).astype(np.int32)[inverse]
