"""Dense matrices of correlated noise and mechanisms with bands, for its tests."""

import numpy as np
from scipy import linalg

from fedjax_med.privacy.calibration import PrivacyTarget, plan_mechanisms
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.strategy import toeplitz_strategy


def dense(coefficients, steps):
  """The strategy matrix C."""
  column = np.zeros(max(steps, len(coefficients)))
  column[: len(coefficients)] = coefficients
  return linalg.toeplitz(column[:steps], np.zeros(steps))


def dense_prefix(coefficients, steps):
  """A C⁻¹: what the noise of all steps puts into each prefix sum."""
  inverse = linalg.solve_triangular(dense(coefficients, steps), np.eye(steps), lower=True)
  return np.tril(np.ones((steps, steps))) @ inverse


def mechanism(**changes):
  values = {
    "num_units": 90,
    "sampling_probability": 0.4,
    "batch_cap": 23,
    "noise_multiplier": 1.5,
    "clip_norm": 2.0,
    "coefficients": tuple(toeplitz_strategy(20, 4)),
  }
  return PoissonGaussian(**(values | changes))


def plan_banded(num_units, batch_size, bands, *, steps, **values):
  return plan_mechanisms([num_units], batch_size, [steps], PrivacyTarget(bands=bands, **values))[0]
