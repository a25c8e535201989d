"""Windows become network inputs, and are varied, as their words say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.data.modality import SERIES
from fedjax_med.data.series_inputs import KINDS, change, draw_changes, normalise

COUNT = 160  # windows of the random changes: one shape, so that each kind compiles nothing new
apply, draw = jax.jit(change), jax.jit(draw_changes, static_argnums=(1, 2))


def windows() -> np.ndarray:
  """[3, 40, 1, 2] float32: the second ends in masked samples, the third has a constant channel."""
  made = np.random.default_rng(0).normal(2, 3, (3, 40, 1, 2)).astype(np.float32)
  made[1, 30:] = np.nan
  made[2, :, :, 1] = 9.81
  return made


def test_each_channel_of_each_window_is_standardised_over_its_own_samples():
  raw = windows()
  found = np.asarray(normalise(jnp.asarray(raw), ""))
  deviation = np.nanstd(raw, axis=1, keepdims=True)
  expected = (raw - np.nanmean(raw, axis=1, keepdims=True)) / np.where(
    deviation > 1e-3, deviation, 1
  )
  expected = np.nan_to_num(expected)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert (found[1, 30:] == 0).all()
  assert np.abs(found[2, :, :, 1]).max() < 1e-5
  alone = np.asarray(normalise(jnp.asarray(raw[:1]), ""))
  np.testing.assert_array_equal(found[:1], alone)


def test_declared_ranges_become_minus_one_to_one_and_cut():
  raw = windows()
  found = np.asarray(normalise(jnp.asarray(raw), "-1,5;0,10"))
  low, high = np.array([-1, 0], np.float32), np.array([5, 10], np.float32)
  expected = np.nan_to_num(np.clip(2 * (raw - low) / (high - low) - 1, -1, 1))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def changed(raw: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
  """The windows [n, 40, 1, 2], repeated to COUNT of them, after random changes."""
  many = np.resize(raw, (COUNT, *raw.shape[1:]))
  return np.asarray(apply(jnp.asarray(many), draw(jax.random.key(seed), (COUNT,), kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_changes_keep_masks_for_what_they_are_and_are_drawn_by_their_key(kind):
  raw = np.resize(windows(), (COUNT, 40, 1, 2))
  once, again = (changed(raw, kind) for _ in range(2))
  np.testing.assert_array_equal(once, again)
  other = changed(raw, kind, 1)
  assert np.array_equal(once, other, equal_nan=True) == (kind == "none")
  if kind in ("none", "jitter", "scale"):
    np.testing.assert_array_equal(np.isnan(once), np.isnan(raw))
  assert KINDS.keys() == set(SERIES.vary.kinds if SERIES.vary else ())


def test_jitter_is_a_twentieth_of_the_deviation():
  raw = np.random.default_rng(0).normal(0, 4, (COUNT, 40, 1, 2)).astype(np.float32)
  noise = changed(raw, "jitter") - raw
  np.testing.assert_allclose(noise.std(), 0.05 * raw.std(axis=1).mean(), rtol=0.03)


def test_scale_is_one_factor_of_a_channel():
  raw = np.random.default_rng(0).normal(0, 4, (COUNT, 40, 1, 2)).astype(np.float32)
  factors = changed(raw, "scale") / raw
  np.testing.assert_allclose(np.ptp(factors, axis=1), 0, atol=1e-5)
  np.testing.assert_allclose(factors[:, 0].std(), 0.1, rtol=0.15)


def test_a_time_shift_repeats_an_end_and_moves_an_eighth_at_most():
  raw = np.arange(40, dtype=np.float32)[None, :, None, None].repeat(2, axis=3)
  moved = changed(raw, "time_shift")[:, :, 0, 0]
  shifts = 20 - moved[:, 20]
  assert np.abs(shifts).max() == 5
  for row, shift in zip(moved, shifts, strict=True):
    np.testing.assert_array_equal(row, np.clip(np.arange(40) - shift, 0, 39))
