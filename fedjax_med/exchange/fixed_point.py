"""Updates as whole numbers on a grid, which masks and ciphertexts carry without any rounding.

A client clips every number of its update to the range, weighs it, multiplies it by the scale and
rounds it by chance, without bias. The server adds modulo 2^bits, takes the representative with a
sign, and divides. The sum of all clients cannot wrap: see ``largest_scale``.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.exchange.aggregator import Aggregator
from fedjax_med.exchange.transform import Transform
from fedjax_med.federated.algorithm import ClientDelta

# Weights are float32 shares of 1, whose sum may exceed 1 by rounding.
SUM_SLACK = 1e-5


class Grid(NamedTuple):
  """Whole numbers that stand for the numbers of an update.

  Attributes:
    bits: sums are taken modulo 2^bits.
    range: largest absolute value of a number of the weights and of non-trained state.
    scale: whole numbers to 1 of these.
    extra_range: as ``range``, of what an algorithm sends besides.
    extra_scale: as ``scale``, of that.
  """

  bits: int
  range: float
  scale: float
  extra_range: float
  extra_scale: float


def largest_scale(bits: int, range: float, num_clients: int, total_weight: float) -> float:
  """The largest power of two at which the sum of all clients cannot wrap; it may be under 1.

  A client's number is at most weight · range · scale, and rounding adds less than 1. So
  |sum| < total_weight · range · scale + K, which must stay under 2^(bits - 1).
  """
  room = 2.0 ** (bits - 1) - 1 - num_clients
  if room <= 0:
    return 0.0
  return 2.0 ** math.floor(math.log2(room / (range * total_weight * (1 + SUM_SLACK))))


def choose_grid(config: Config, num_clients: int) -> Grid:
  """The grid of a run.

  Raises:
    UserError: a sum could wrap, or the grid would have no steps within the range.
  """
  secure, equal = config.secure, config.client_privacy.mechanism != "none"
  total = float(num_clients if equal else 1)
  largest = largest_scale(secure.bits, secure.range, num_clients, total)
  if largest * secure.range < 8:
    enough = next(
      (
        b
        for b in range(8, 33)
        if largest_scale(b, secure.range, num_clients, total) >= 8 / secure.range
      ),
      0,
    )
    require(
      False,
      f"secure.bits={secure.bits} leaves fewer than 8 steps from 0 to secure.range="
      f"{secure.range:g} for the sum of {num_clients} hospitals",
      f"use secure.bits={enough} or more" if enough else "lower secure.range",
    )
  require(
    secure.scale <= largest,
    f"secure.scale={secure.scale:g}: the sum of {num_clients} hospitals could wrap modulo"
    f" 2^{secure.bits} above {largest:g}",
    f"use 0 or at most {largest:g}",
  )
  return Grid(
    bits=secure.bits,
    range=secure.range,
    scale=secure.scale or largest,
    extra_range=secure.extra_range,
    extra_scale=largest_scale(secure.bits, secure.extra_range, num_clients, total),
  )


def to_grid(values: jax.Array, range: float, scale: float | jax.Array, key: jax.Array) -> jax.Array:
  """int32 whole numbers of ``values`` · scale, each rounded up with the probability of its rest.

  A value that is not finite becomes 0.

  Args:
    values: float32 of any shape, at most ``range`` but for those that are cut by it.
    range: largest absolute value.
    scale: whole numbers to 1.
    key: of the draws.
  """
  bounded = jnp.clip(jnp.where(jnp.isfinite(values), values, 0), -range, range)
  scaled = bounded * scale
  below = jnp.floor(scaled)
  up = jax.random.uniform(key, values.shape) < scaled - below
  return below.astype(jnp.int32) + up.astype(jnp.int32)


def fixed_point(grid: Grid, *, weighted: bool = True, counted: bool = True) -> Transform:
  """Sends whole numbers of the update (int32), and makes numbers of their sum again.

  Args:
    grid: the whole numbers.
    weighted: whether a client multiplies by its weight; else each counts 1.
    counted: whether clients tell how many of their numbers were cut.
  """

  def scales(message: ClientDelta) -> ClientDelta:
    extra = jax.tree.map(lambda _: (grid.extra_range, grid.extra_scale), message.extra)
    plain = (grid.range, grid.scale)
    return message._replace(params=plain, state=plain, extra=extra)

  def encode(message, kept, state, sender):
    weight = sender.client.weight if weighted else 1.0
    leaves, structure = jax.tree.flatten(message)
    pairs = structure.flatten_up_to(scales(message))
    numbers, cut, held = [], 0.0, 0
    for place, (leaf, (range, scale)) in enumerate(zip(leaves, pairs, strict=True)):
      draws = jax.random.fold_in(sender.key, place)
      inside = jnp.clip(leaf, -range, range)
      numbers.append(to_grid(inside * weight, range, scale, draws))
      cut, held = cut + (jnp.abs(leaf) > range).sum().astype(jnp.float32), held + leaf.size
    tally = (cut / held, jnp.ones(())) if counted else ()
    return structure.unflatten(numbers), kept, tally

  def decode(total, state, tally, receiver):
    leaves, structure = jax.tree.flatten(total)
    pairs = structure.flatten_up_to(scales(total))
    weight = jnp.where(receiver.weight > 0, receiver.weight, 1) if weighted else 1.0
    numbers = [
      leaf.astype(jnp.float32) / (scale * weight)
      for leaf, (_, scale) in zip(leaves, pairs, strict=True)
    ]
    state = jax.tree.map(jnp.add, state, tally) if counted else state
    return structure.unflatten(numbers), state

  def facts(state):
    if not counted:
      return {}
    cut, messages = (float(value) for value in state)
    return {"saturated": cut / max(messages, 1.0)}

  return Transform(
    encode=encode,
    decode=decode,
    init_server=lambda message: (jnp.zeros(()), jnp.zeros(())) if counted else (),
    wire=lambda wire: wire._replace(value_bits=grid.bits),
    facts=facts,
    clients=True,
  )


def signed(total: jax.Array, bits: int) -> jax.Array:
  """int32 representatives in [-2^(bits-1), 2^(bits-1)) of uint32 sums modulo 2^bits."""
  left = 32 - bits
  return jax.lax.shift_right_arithmetic(
    (total << jnp.uint32(left)).astype(jnp.int32), jnp.int32(left)
  )


def modular_sum(bits: int, *, equal: bool = False) -> Aggregator:
  """The sum of whole numbers modulo 2^bits; every message counts once, its weight is inside it.

  Args:
    bits: of the modulus, at most 32.
    equal: whether the weights of clients are all 1 (DP-FedAvg).
  """

  def combine(messages, weights, joint):
    def add(leaf):
      column = (weights > 0).reshape((-1,) + (1,) * (leaf.ndim - 1))
      return jnp.where(column, leaf.astype(jnp.uint32), jnp.uint32(0)).sum(0, dtype=jnp.uint32)

    return jax.tree.map(add, messages)

  def share(weight, num_clients):
    return weight / num_clients if equal else weight

  return Aggregator(
    weigh=jnp.ones_like if equal else lambda weights: weights,
    combine=combine,
    finish=lambda total, weight: jax.tree.map(lambda leaf: signed(leaf, bits), total),
    share=share,
  )
