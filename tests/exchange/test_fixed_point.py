"""Whole numbers on a grid: sums that cannot wrap, rounding without bias, exact decoding."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.exchange.clip_and_noise import clip_and_noise
from fedjax_med.exchange.fixed_point import (
  choose_grid,
  fixed_point,
  largest_scale,
  to_grid,
)
from fedjax_med.exchange.transform import Wire, chain
from fedjax_med.federated.algorithm import ClientDelta
from tests.exchange.sent import (
  configured,
  deltas_of,
  encoded,
  exchange_of,
  received,
  signed_sum,
)
from tests.federated.toy import KEY

SLOTS = 64  # clients of every case: absent ones have the weight 0, so that shapes are few
BITS = (8, 9, 12, 16, 20, 24, 31, 32)


def grid_of(num_clients: int, **changes):
  return choose_grid(configured(secure__protocol="grid", **changes), num_clients)


def wrapping_cases():
  """(bits, K, range, weights [SLOTS], total weight); half of the ranges come close to the limit."""
  random = np.random.default_rng(0)
  for bits in BITS:
    for number in range(6):
      clients = int(random.integers(1, 20 if bits == 8 else SLOTS + 1))
      equal = number % 3 == 0
      weights = np.zeros(SLOTS, np.float32)
      weights[:clients] = 1 if equal else random.dirichlet(np.full(clients, 0.3))
      total = clients if equal else 1
      if number % 2:
        reach = float(random.uniform(0.01, 9))
      else:  # the largest that still has this power of two as its scale
        reach = (2 ** (bits - 1) - 1 - clients) / (total * (1 + 1e-5)) / 2.0 ** (bits // 2)
      yield bits, clients, reach, weights, total


def numbers_sent():
  """A compiled function (updates, weights, range, scale) -> whole numbers of each client."""

  def send(values, weights, reach, scale):
    grid = grid_of(3)._replace(range=reach, scale=scale)
    return encoded(fixed_point(grid), deltas_of(values), weights)[0].params

  return jax.jit(send)


def check_no_wrap(send, bits, weights, reach, scale):
  """Asserts that sums modulo 2^bits are sums of whole numbers, where all clients do their worst."""
  signs = np.stack([np.ones(SLOTS), -np.ones(SLOTS), np.resize([1, -1, -1], SLOTS)], -1)
  for factor in (1.0, 3.0):  # at the range, and over it
    numbers = send(signs * reach * factor, weights, jnp.float32(reach), jnp.float32(scale))
    assert np.all(np.asarray(numbers)[weights == 0] == 0)
    exact = np.asarray(numbers).astype(np.int64).sum(0)
    np.testing.assert_array_equal(signed_sum(numbers, bits), exact)


@pytest.mark.parametrize("rounding", ["up", "down", "drawn"])
def test_no_sum_wraps_however_rounding_falls_and_at_twice_the_scale_one_does(rounding, monkeypatch):
  if rounding != "drawn":  # all clients at once
    value = 0.0 if rounding == "up" else 1.0
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, value))
  send, wrapped = numbers_sent(), 0
  for bits, clients, reach, weights, total in wrapping_cases():
    scale = largest_scale(bits, reach, clients, total)
    check_no_wrap(send, bits, weights, reach, scale)
    near = total * reach * scale > 0.9 * 2 ** (bits - 1) - clients
    if near and clients < 2 ** (bits - 3):
      wrapped += 1
      with pytest.raises(AssertionError, match="Arrays are not equal"):
        check_no_wrap(send, bits, weights, reach, 2 * scale)
  assert wrapped >= 24


def test_the_largest_scale_is_the_published_one():
  # |Σ| < 2^31 at C=1 with weights of 1: 2^28 for 5 hospitals, 2^26 for 16, 2^24 for 64; 2^20, 1024.
  found = [math.log2(largest_scale(32, 1.0, k, k)) for k in (5, 16, 64, 1024)]
  assert found == [28, 26, 24, 20]
  assert largest_scale(32, 4.0, 5, 1) == 2**28
  assert largest_scale(8, 4.0, 127, 1) == 0


def test_rounding_is_unbiased_and_moves_less_than_a_step():
  values = np.array([0, 0.25, -0.25, 1e-3, -1e-3, 0.999, 77.5, -1e6 - 0.5, 3], np.float32) / 1024
  many = jnp.broadcast_to(jnp.asarray(values), (4096, len(values)))
  numbers = np.asarray(to_grid(many, 4e3, 1024.0, KEY)).astype(np.float64)
  scaled = values.astype(np.float64) * 1024
  assert np.abs(numbers - scaled).max() < 1
  rest = scaled - np.floor(scaled)
  error = np.sqrt(rest * (1 - rest) / 4096)
  assert np.all(np.abs(numbers.mean(0) - scaled) <= 4 * error)
  assert (error > 0).sum() == 7
  nearest = np.round(scaled)  # would be caught
  assert not np.all(np.abs(nearest - scaled) <= 4 * error)


def test_large_numbers_are_exact_up_to_the_last_bit_of_float32():
  scale, random = 2.0**28, np.random.default_rng(3)
  values = np.concatenate(
    [
      np.nextafter(np.float32(4), np.float32(0)) * np.array([1, -1], np.float32),
      [3.9999, -2.0, 1 / 3],
    ]
  )
  values = np.concatenate([values, random.uniform(-4, 4, 500)]).astype(np.float32)
  numbers = np.asarray(to_grid(jnp.asarray(values), 4.0, scale, KEY))
  for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
    exact = fractions.Fraction(value) * int(scale)
    assert number == exact if abs(exact) >= 2**23 else abs(number - exact) < 1
  assert np.abs(numbers).max() == 2**30 - 64  # the float32 before 4


@pytest.mark.parametrize(("bits", "clients"), [(32, 5), (24, 16), (16, 7)])
def test_the_decoded_sum_is_that_of_numpy_bit_for_bit_and_within_the_bound(bits, clients):
  random = np.random.default_rng(bits)
  values = random.normal(size=(clients, 300)).astype(np.float32) * random.choice([0.01, 1, 3], 300)
  weights = random.dirichlet(np.ones(clients)).astype(np.float32)
  exchange = exchange_of(clients, secure__protocol="grid", secure__bits=bits)
  grid = grid_of(clients, secure__bits=bits)
  deltas = deltas_of(values)
  numbers = encoded(exchange.transform, deltas, weights)[0].params
  joined, update, state = received(exchange, deltas, weights)
  expected = signed_sum(numbers, bits)
  np.testing.assert_array_equal(joined.params, expected)
  divisor = np.float32(grid.scale) * weights.sum(dtype=np.float32)
  decoded = expected.astype(np.float32) / np.float32(divisor)
  np.testing.assert_allclose(update.params, decoded, rtol=3e-7, atol=0)  # Σ weights in any order
  # The products as float32 has them, added in float64.
  inside = np.clip(np.asarray(deltas.params), -grid.range, grid.range)
  products = (inside * weights[:, None]).astype(np.float32).astype(np.float64)
  error = np.abs(expected / grid.scale - products.sum(0))
  assert error.max() <= grid.rounding_error_bound == clients / grid.scale
  assert error.max() > 0
  facts = exchange.transform.facts(state)
  assert facts["saturated"] == pytest.approx((np.abs(values) > 4).mean(), rel=1e-5)
  assert (facts["bits"], facts["scale"]) == (bits, grid.scale)
  assert facts["rounding_error_bound"] == clients / grid.scale


def test_what_is_no_number_counts_nothing_and_is_counted_beside_numbers_that_are_cut():
  values = np.ones((3, 8), np.float32)
  values[0, :4] = np.nan, np.inf, -np.inf, 4.5
  exchange = exchange_of(3, secure__protocol="grid", server__algorithm="scaffold")
  deltas = deltas_of(values)
  extra = jnp.asarray(np.where(values == 4.5, 2000, values), jnp.float32)
  _, update, state = received(exchange, deltas._replace(extra=extra), [0.5, 0.25, 0.25])
  np.testing.assert_allclose(update.params, [0.5, 2.5, -1.5, 2.5, 1, 1, 1, 1], atol=1e-6)
  np.testing.assert_allclose(update.extra, [0.5, 512.5, -511.5, 512.5, 1, 1, 1, 1], atol=1e-4)
  facts = exchange.transform.facts(state)
  assert facts["saturated"] == pytest.approx(4 / 24)
  assert facts["extra_saturated"] == pytest.approx(4 / 24)


@pytest.mark.parametrize("bits", [8, 20, 31, 32])
def test_a_message_has_so_many_bits_a_number(bits):
  wire = exchange_of(3, secure__protocol="grid", secure__bits=bits).transform.wire
  for numbers in (1, 7, 25_471):
    assert wire(Wire(dense=numbers, sent=numbers)).size == -(-numbers * bits // 8)


def rounded_norm(shrunk: bool, monkeypatch) -> float:
  """Norm of an update of 400 weights that was clipped to 1 and rounded away from 0 by a step."""
  exchange = exchange_of(
    3,
    secure__protocol="grid",
    secure__scale=64.0,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__clip_norm=1.0,
  )
  grid = grid_of(3, secure__scale=64.0)
  plain = chain(clip_and_noise(1.0), fixed_point(grid, weighted=False))
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.zeros(shape))
  values = np.random.default_rng(0).uniform(0.5, 100, (3, 400))
  numbers = encoded(exchange.transform if shrunk else plain, deltas_of(values), [1 / 3] * 3)[
    0
  ].params
  return float(np.linalg.norm(np.asarray(numbers).astype(np.float64) / 64, axis=-1).max())


def test_under_client_level_privacy_an_update_is_within_the_clip_norm_after_rounding(monkeypatch):
  assert 0.8 < rounded_norm(True, monkeypatch) <= 1
  assert rounded_norm(False, monkeypatch) > 1.05  # what the smaller clip is for


def test_a_grid_whose_rounding_is_as_large_as_the_clip_norm_is_refused():
  exchange = exchange_of(
    3,
    secure__protocol="grid",
    secure__scale=16.0,
    client_privacy__mechanism="dp_fedavg",
    client_privacy__clip_norm=1.0,
  )
  with pytest.raises(UserError, match=r"clip_norm=1 leaves nothing of an update of 400 .*; raise"):
    encoded(exchange.transform, deltas_of(np.ones((3, 400))), [1 / 3] * 3)


@pytest.mark.parametrize(
  ("changes", "clients", "message"),
  [
    (
      {"bits": 8},
      120,
      r"secure.bits=8 leaves fewer than 8 steps .* of 120 hospitals; use secure.bits=9 or more",
    ),
    ({"scale": 2.0**29}, 5, r"2\^32 above 2.68435e\+08; use 0 or at most 2.68435e\+08"),
    ({"scale": 1.0}, 5, r"secure.scale=1 leaves fewer than 8 steps .*; use 0 or at least 2"),
    ({"scale": 1000.0}, 5, r"secure.scale=1000 is no power of two.*; use 0 or 512"),
  ],
)
def test_grids_that_cannot_hold_the_sum_are_refused(changes, clients, message):
  with pytest.raises(UserError, match=message):
    grid_of(clients, **{f"secure__{name}": value for name, value in changes.items()})


def test_draws_differ_between_clients_rounds_and_parts_of_a_message():
  exchange = exchange_of(3, secure__protocol="grid", secure__bits=8)
  values = deltas_of(np.full((3, 200), 0.1))
  values = ClientDelta(params=values.params, state=values.params)
  messages = [encoded(exchange.transform, values, [1 / 3] * 3, round=r)[0] for r in (0, 1)]
  rows = [np.asarray(leaf)[k] for m in messages for leaf in (m.params, m.state) for k in range(3)]
  assert len({row.tobytes() for row in rows}) == 12
