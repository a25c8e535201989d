"""ε against the accountants of Opacus and jax-privacy, whose values are in oracles/.

Both libraries remove or add a record; here one is replaced by nothing. Without truncation that is
the same pair of distributions: the noisy sum with the record, a mixture of two Gaussians, and the
one without it. dp_accounting (from_gaussian_mechanism) treats both relations alike and takes the
larger of the two directions; Opacus takes the removal, which is the larger.
"""

import json
import pathlib

import pytest

from fedjax_med.privacy.accounting import epsilon
from fedjax_med.privacy.mechanism import PoissonGaussian

# Made by oracles/make_accountants.py, which says how.
VALUES = json.loads((pathlib.Path(__file__).parent / "oracles" / "accountants.json").read_text())
OPACUS, JAX_PRIVACY = VALUES["opacus"]["poisson"], VALUES["jax_privacy"]["poisson"]
# What the grid of a privacy loss distribution may add to ε (test_accounting holds ours to it).
GRID = 0.005


def mechanism(row) -> PoissonGaussian:
  n = row.get("n", 100)
  m = PoissonGaussian(n, row["q"], row.get("batch_cap", n), row["sigma"], 1.0)
  assert m.drawn_probability == row["q"]
  return m


def setting_of(row) -> str:
  return f"q={row['q']:g},sigma={row['sigma']:g},steps={row['steps']}"


@pytest.mark.parametrize("row", OPACUS, ids=setting_of)
def test_epsilon_lies_between_the_ends_of_opacus_prv_and_under_its_rdp(row):
  value = epsilon(mechanism(row), row["steps"], row["delta"])
  # The exact ε lies between the ends, ours between the exact one and the grid's share above it.
  assert row["prv_high"] - row["prv_low"] <= 3 * VALUES["opacus"]["eps_error"]
  assert row["prv_low"] <= value <= (1 + GRID) * row["prv_high"]
  assert value <= (1 + GRID) * row["rdp"]
  assert row["prv_low"] <= epsilon(mechanism(row), row["steps"], row["delta"], "rdp")


@pytest.mark.parametrize("row", JAX_PRIVACY + VALUES["jax_privacy"]["truncated"], ids=setting_of)
def test_epsilon_is_that_of_jax_privacy_but_for_the_grids(row):
  value = epsilon(mechanism(row), row["steps"], row["delta"])
  # Each is the exact ε and at most the share of its grid.
  assert row["pld"] / (1 + GRID) <= value <= (1 + GRID) * row["pld"]
  if "rdp" in row:
    assert value <= (1 + GRID) * row["rdp"]


def test_the_libraries_agree_with_each_other():
  for opacus, jax_privacy in zip(OPACUS, JAX_PRIVACY, strict=True):
    assert setting_of(opacus) == setting_of(jax_privacy)
    assert opacus["delta"] == jax_privacy["delta"]
    assert opacus["prv_low"] <= jax_privacy["pld"] <= (1 + GRID) * opacus["prv_high"]
