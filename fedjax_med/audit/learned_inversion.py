"""Inversion that was learned: ridge regression from gradients to the inputs that they came from.

The attacker has other records of the same kind, here those of the other hospitals, computes the
gradients that they give, and fits what turns them into records (Wu et al. 2023, arXiv 2210.10880,
with a linear map in the place of their network).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the penalty, over the mean square of features
HELD_OUT = 5  # one in so many examples chooses the strength


class Learned(NamedTuple):
  """A fitted map from features [F] to inputs [d]; see ``fit``."""

  examples: np.ndarray
  centre: np.ndarray
  mean: np.ndarray
  dual: np.ndarray

  def inputs(self, features: np.ndarray) -> np.ndarray:
    """[n, d] inputs of ``features`` [n, F]."""
    return (features - self.centre) @ self.examples.T @ self.dual + self.mean


def features_of(gradients: np.ndarray, bias: slice, sizes: Sequence[int]) -> np.ndarray:
  """[n, P] features of gradients [n, P]: each layer of norm 1, with the sign of the class.

  With two classes the gradient of a record has the same direction under both, and another sign:
  that of the head's bias. With more, classes stay apart in the features by themselves.

  Args:
    gradients: of single records.
    bias: places of the head's bias in a gradient.
    sizes: numbers of each array of a gradient, in order.
  """
  ends = np.cumsum(sizes)[:-1]
  parts = np.split(np.asarray(gradients, np.float64), ends, axis=1)
  norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
  units = [part / np.where(norm > 0, norm, 1) for part, norm in zip(parts, norms, strict=True)]
  sign = np.sign(gradients[:, bias][:, :1])
  made = np.concatenate(units, axis=1)
  two = gradients[:, bias].shape[1] == 2
  return made * np.where(sign == 0, 1, sign) if two else made


def fit(features: np.ndarray, inputs: np.ndarray) -> Learned:
  """Ridge regression of ``inputs`` [n, d] on ``features`` [n, F], in its dual form.

  One example in ``HELD_OUT`` chooses the strength of the penalty; then all are fitted.
  """
  chosen = np.arange(len(features)) % HELD_OUT == 0
  strength = STRENGTHS[0]
  if chosen.sum() > 1:

    def error(strength: float) -> float:
      part = _ridge(features[~chosen], inputs[~chosen], strength)
      return float(np.square(part.inputs(features[chosen]) - inputs[chosen]).mean())

    strength = min(STRENGTHS, key=error)
  return _ridge(features, inputs, strength)


def _ridge(features: np.ndarray, inputs: np.ndarray, strength: float) -> Learned:
  centre, mean = features.mean(0), inputs.mean(0)
  examples = features - centre
  products = examples @ examples.T
  penalty = strength * max(np.trace(products) / len(products), 1e-12)
  dual = np.linalg.solve(products + penalty * np.eye(len(products)), inputs - mean)
  return Learned(examples=examples, centre=centre, mean=mean, dual=dual)
