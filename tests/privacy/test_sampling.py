"""The device samplers draw what the accountant assumes; each p-value bound is 1e-4, seeds fixed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.privacy.sampling import epoch_batch, poisson_batch

P_VALUE = 1e-4


def sample_keys(count, seed=0):
  """[count] keys, one a step."""
  return jax.vmap(lambda step: key_for(base_key(seed), Stream.SAMPLE, 0, step))(jnp.arange(count))


@functools.partial(jax.jit, static_argnames=("max_examples", "batch_cap"))
def draw(keys, n, q, *, max_examples, batch_cap):
  """[draws, max_examples] bool of who was drawn, and [draws, cap] slots and mask."""
  sampler = functools.partial(poisson_batch, max_examples=max_examples, batch_cap=batch_cap)
  slots, mask = jax.vmap(sampler, (0, None, None))(keys, n, q)
  chosen = jnp.zeros((keys.shape[0], max_examples), jnp.int32)
  rows = jnp.broadcast_to(jnp.arange(keys.shape[0])[:, None], slots.shape)
  return chosen.at[rows, slots].add(mask.astype(jnp.int32)), slots, mask


def draw_numpy(*args, **kwargs):
  return tuple(np.asarray(value) for value in draw(*args, **kwargs))


def test_every_example_is_drawn_with_probability_q():
  n, q, draws = 40, 0.2, 20_000
  chosen, _, _ = draw_numpy(sample_keys(draws), n, q, max_examples=64, batch_cap=40)
  assert chosen[:, n:].sum() == 0
  assert stats.binomtest(int(chosen.sum()), n * draws, q).pvalue > P_VALUE
  per_slot = [stats.binomtest(int(count), draws, q).pvalue for count in chosen[:, :n].sum(axis=0)]
  assert min(per_slot) > P_VALUE / n
  # p-values of a right sampler are uniform: neither too good nor too bad.
  assert stats.kstest(per_slot, "uniform").pvalue > P_VALUE


def test_examples_are_drawn_independently_of_each_other():
  chosen, _, _ = draw_numpy(sample_keys(20_000), 20, 0.3, max_examples=20, batch_cap=20)
  correlation = np.corrcoef(chosen.T)[np.triu_indices(20, 1)]
  # Under independence sqrt(draws) * r is standard normal: its squares add to a chi-square.
  assert stats.chi2.sf(20_000 * np.sum(correlation**2), len(correlation)) > P_VALUE


@pytest.mark.parametrize(("n", "q", "cap"), [(30, 0.3, 12), (50, 0.1, 50), (8, 0.7, 6)])
def test_batch_size_is_the_truncated_binomial(n, q, cap):
  draws = 20_000
  _, _, mask = draw_numpy(sample_keys(draws, 1), n, q, max_examples=50, batch_cap=cap)
  observed = np.bincount(mask.sum(axis=1), minlength=cap + 1)
  expected = stats.binom.pmf(np.arange(cap + 1), n, q) * draws
  expected[cap] = stats.binom.sf(cap - 1, n, q) * draws
  rare = expected < 10
  observed = np.append(observed[~rare], observed[rare].sum())
  expected = np.append(expected[~rare], expected[rare].sum())
  if expected[-1] < 1e-3:
    observed, expected = observed[:-1], expected[:-1]
  assert stats.chisquare(observed, expected).pvalue > P_VALUE


def test_truncation_keeps_a_uniform_subset():
  n, q, cap, draws = 20, 0.9, 5, 20_000
  chosen, _, mask = draw_numpy(sample_keys(draws, 2), n, q, max_examples=24, batch_cap=cap)
  full = mask.all(axis=1)
  assert full.mean() > 0.999
  counts = chosen[full, :n].sum(axis=0)
  # Counts of a draw of 5 without replacement are less dispersed by (n - cap) / (n - 1).
  statistic = np.sum((counts - counts.mean()) ** 2 / counts.mean()) * (n - 1) / (n - cap)
  assert P_VALUE < stats.chi2.sf(statistic, n - 1) < 1 - P_VALUE
  pairs = (chosen[full, :n].T @ chosen[full, :n])[np.triu_indices(n, 1)]
  expected = full.sum() * cap * (cap - 1) / (n * (n - 1))
  assert np.abs(pairs / expected - 1).max() < 5 / np.sqrt(expected)


def test_drawn_slots_are_distinct_valid_and_first():
  chosen, slots, mask = draw_numpy(sample_keys(500), 11, 0.5, max_examples=16, batch_cap=8)
  assert chosen.max() == 1
  assert slots.dtype == np.int32
  assert mask.dtype == bool
  assert slots.min() >= 0
  assert slots[mask].max() < 11
  assert np.all(slots[~mask] == 0)
  assert np.all(np.diff(mask.astype(int), axis=1) <= 0)


@pytest.mark.parametrize("n", [1, 7, 16])
def test_with_q_1_and_room_everything_is_always_drawn(n):
  chosen, _, _ = draw_numpy(sample_keys(200), n, 1.0, max_examples=16, batch_cap=16)
  assert np.all(chosen[:, :n] == 1)
  assert np.all(chosen[:, n:] == 0)


def test_batch_of_a_hospital_does_not_depend_on_its_neighbours_in_the_vmap():
  keys = sample_keys(3)
  counts = jnp.array([5, 16, 9], jnp.int32)
  rates = jnp.array([0.9, 0.2, 0.5], jnp.float32)
  sampler = functools.partial(poisson_batch, max_examples=16, batch_cap=10)
  together = jax.jit(jax.vmap(sampler))(keys, counts, rates)
  for client in range(3):
    alone = sampler(keys[client], int(counts[client]), float(rates[client]))
    for batched, single in zip(together, alone, strict=True):
      np.testing.assert_array_equal(batched[client], single)


def test_batches_of_clients_steps_and_seeds_are_uncorrelated():
  steps = 4000

  def chosen(seed, client):
    keys = jax.vmap(lambda t: key_for(base_key(seed), Stream.SAMPLE, client, t))(jnp.arange(steps))
    return draw_numpy(keys, 30, 0.4, max_examples=30, batch_cap=30)[0].ravel()

  first = chosen(0, 0)
  others = {"client": chosen(0, 1), "seed": chosen(1, 0), "step": np.roll(first, 30)}
  for name, other in others.items():
    assert abs(np.corrcoef(first, other)[0, 1]) * np.sqrt(first.size) < 4, name
  np.testing.assert_array_equal(first, chosen(0, 0))


def test_one_program_serves_hospitals_of_any_size():
  traces = []

  @jax.jit
  def program(key, n, q):
    traces.append(1)
    return poisson_batch(key, n, q, max_examples=16, batch_cap=4)

  for n, q in ((3, 0.5), (16, 0.1), (9, 1.0)):
    program(base_key(0), jnp.int32(n), jnp.float32(q))
  assert len(traces) == 1


def test_a_traced_cap_cuts_as_a_smaller_batch_does_whatever_the_slots():
  keys = sample_keys(300)

  def draw(max_examples, batch_cap, limit=None):
    def one(key, limit):
      return poisson_batch(
        key, 30, 0.4, max_examples=max_examples, batch_cap=batch_cap, limit=limit
      )

    return jax.jit(jax.vmap(one, (0, None)))(keys, limit)

  slots, mask = draw(30, 12)
  assert mask.all(1).mean() > 0.3  # the cap does cut
  for wide_slots, wide_mask in (draw(30, 20, jnp.int32(12)), draw(45, 20, jnp.int32(12))):
    np.testing.assert_array_equal(wide_slots[:, :12], slots)
    np.testing.assert_array_equal(wide_mask[:, :12], mask)
    assert not wide_mask[:, 12:].any()
    assert not wide_slots[:, 12:].any()


@pytest.mark.parametrize("cap", [0, 17])
def test_cap_outside_the_table_is_refused(cap):
  with pytest.raises(UserError, match=f"batch_cap={cap} must be"):
    poisson_batch(base_key(0), 4, 0.5, max_examples=16, batch_cap=cap)


def epochs(n, batch_size, steps, seed=0, max_examples=24):
  batch = functools.partial(epoch_batch, batch_size=batch_size, max_examples=max_examples)
  run = jax.jit(jax.vmap(batch, (None, 0, None)))
  slots, mask = run(base_key(seed), jnp.arange(steps, dtype=jnp.int32), jnp.int32(n))
  return np.asarray(slots), np.asarray(mask)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (12, 4), (3, 8), (24, 5), (1, 1)])
def test_an_epoch_holds_every_example_once(n, batch_size):
  per_epoch = -(-n // batch_size)
  slots, mask = epochs(n, batch_size, 3 * per_epoch)
  for epoch in range(3):
    part = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
    assert sorted(slots[part][mask[part]].tolist()) == list(range(n))
    sizes = mask[part].sum(axis=1).tolist()
    assert sizes == [batch_size] * (per_epoch - 1) + [n - batch_size * (per_epoch - 1)]
  assert np.all(slots[~mask] == 0)


def test_epochs_and_clients_are_shuffled_differently_and_evenly():
  slots, _ = epochs(6, 6, 6000)
  table = np.stack([np.bincount(slots[:, place], minlength=6) for place in range(6)])
  assert stats.chisquare(table.ravel(), ddof=10).pvalue > P_VALUE
  assert (slots[1:] == slots[:-1]).mean() == pytest.approx(1 / 6, abs=0.02)
  assert (slots == epochs(6, 6, 6000, seed=1)[0]).mean() == pytest.approx(1 / 6, abs=0.02)


def test_epoch_batch_depends_on_the_step_alone():
  slots, mask = epochs(10, 4, 9)
  again = epoch_batch(base_key(0), 7, 10, batch_size=4, max_examples=24)
  np.testing.assert_array_equal(slots[7], again[0])
  np.testing.assert_array_equal(mask[7], again[1])


def test_an_empty_hospital_gives_empty_batches():
  assert not epochs(0, 4, 3)[1].any()
  assert not draw_numpy(sample_keys(20), 0, 1.0, max_examples=8, batch_cap=8)[2].any()
