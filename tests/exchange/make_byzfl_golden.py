"""Writes byzfl_golden.npz: what ByzFL 0.0.11 makes of 200 small sets of vectors.

    python -m pip install --target=SITE --no-deps byzfl==0.0.11
    PYTHONPATH=SITE python tests/exchange/make_byzfl_golden.py

ByzFL's rules and attacks compute with NumPy where they get NumPy arrays; the rest of the package
needs PyTorch, for which a stand-in is enough here.
"""

import importlib.util
import pathlib
import sys
import types
import unittest.mock
from typing import Any

import numpy as np

CASES, MOST, WIDEST = 200, 8, 5
RANDOM, TWINS, WHOLE = 0, 1, 2  # kinds of vectors: the latter two have ties


def byzfl():
  """ByzFL's aggregators, pre-aggregators and attacks, without the parts that train networks."""
  found = importlib.util.find_spec("byzfl")
  assert found is not None
  assert found.submodule_search_locations
  package = types.ModuleType("byzfl")
  package.__path__ = list(found.submodule_search_locations)
  sys.modules["byzfl"] = package
  if importlib.util.find_spec("torch") is None:
    sys.modules["torch"] = torch = unittest.mock.MagicMock(Tensor=type("Tensor", (), {}))
    sys.modules["torch.linalg"] = torch.linalg
  names = ("aggregators.aggregators", "aggregators.preaggregators", "attacks.attacks")
  return [importlib.import_module(f"byzfl.{name}") for name in names]


def make_vectors(random, case):
  """Vectors [n, d] in float32 precision, their f, and their kind."""
  number, width = int(random.integers(3, MOST + 1)), int(random.integers(1, WIDEST + 1))
  f, kind = int(random.integers(1, (number - 1) // 2 + 1)), (RANDOM, RANDOM, TWINS, WHOLE)[case % 4]
  vectors = random.normal(size=(number, width)) * 10.0 ** random.integers(-2, 3)
  vectors += random.normal(size=width)
  if kind == TWINS:  # hostile ones that agree
    vectors[-f:] = vectors[-1]
  if kind == WHOLE:
    vectors = random.integers(-3, 4, (number, width))
  return vectors.astype(np.float32).astype(np.float64), f, kind


def main():
  aggregators, before, attacks = byzfl()
  random = np.random.default_rng(42)
  rows: dict[str, list[np.ndarray]] = {}

  def keep(name, values):
    values = np.asarray(values, np.float32)
    most = (MOST, WIDEST)[-values.ndim :]
    wide = [(0, end - size) for end, size in zip(most, values.shape, strict=True)]
    rows.setdefault(name, []).append(np.pad(values, wide))

  for case in range(CASES):
    vectors, f, kind = make_vectors(random, case)
    for name, value in (("kind", kind), ("f", f), ("n", len(vectors)), ("d", vectors.shape[1])):
      rows.setdefault(name, []).append(np.asarray(value, np.int32))
    keep("vectors", vectors)
    rules = {
      "median": aggregators.Median(),
      "trimmed_mean": aggregators.TrMean(f),
      "geometric_median": aggregators.GeometricMedian(),
      "krum": aggregators.Krum(f),
      "multi_krum": aggregators.MultiKrum(f),
      "meamed": aggregators.Meamed(f),
    }
    for name, rule in rules.items():
      keep(name, rule(vectors.copy()))
    centered = aggregators.CenteredClipping(tau=0.5)
    keep("centered_clipping", centered(vectors.copy()))
    keep("centered_clipping_again", centered(vectors.copy()))  # from its memory
    np.random.seed(case)  # noqa: NPY002
    keep("bucketing", before.Bucketing(2)(vectors.copy()))
    np.random.seed(case)  # noqa: NPY002
    order = np.random.permutation(len(vectors))  # noqa: NPY002
    rows.setdefault("order", []).append(np.pad(order, (0, MOST - len(order))).astype(np.int32))
    keep("nnm", before.NNM(f)(vectors.copy()))
    keep("clipping", before.Clipping(1.0)(vectors.copy()))
    keep("arc", before.ARC(f)(vectors.copy()))
    honest = vectors[:-f]
    keep("sign_flip", attacks.SignFlipping()(honest))
    keep("ipm", attacks.InnerProductManipulation(2.0)(honest))
    keep("mimic", attacks.Mimic()(honest))
    keep("alie", attacks.ALittleIsEnough(1.5)(honest))
    mean, trimmed = aggregators.Average(), aggregators.TrMean(f)
    ipm, alie = attacks.Optimal_InnerProductManipulation, attacks.Optimal_ALittleIsEnough
    optimal = {"ipm": ipm, "alie": alie}
    for name, attack in optimal.items():
      for rule, how in (("mean", mean), ("trimmed_mean", trimmed)):
        keep(f"optimal_{name}_{rule}", attack(how, [], f)(honest))
  place = pathlib.Path(__file__).with_name("byzfl_golden.npz")
  stacked: Any = {name: np.stack(values) for name, values in rows.items()}
  np.savez_compressed(place, **stacked)
  print(f"{place}: {place.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
  main()
