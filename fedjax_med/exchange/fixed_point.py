"""Updates as whole numbers on a grid, which masks and ciphertexts carry without any rounding.

A client clips every number of its update to the range, weighs it, multiplies it by the scale and
rounds it by chance, without bias. The server adds modulo 2^bits, takes the representative with a
sign, and divides. The sum of all clients cannot wrap: see ``largest_scale``.

Floats are float32, as everywhere: weight · number is rounded to 24 bits before it is put on the
grid, and the decoded sum after it. What lies between is exact, since scales are powers of two.
"""

import collections
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.exchange.aggregator import Aggregator
from fedjax_med.exchange.transform import Transform, Wire
from fedjax_med.federated.algorithm import ClientDelta

# Weights are float32 shares of 1, whose sum may exceed 1 by rounding.
SUM_SLACK = 1e-5
# Fewer from 0 to the range would be rounding noise alone.
LEAST_STEPS = 8


class Grid(NamedTuple):
  """Whole numbers that stand for the numbers of an update.

  Attributes:
    bits: sums are taken modulo 2^bits.
    range: largest absolute value of a number of the weights and of non-trained state.
    scale: whole numbers to 1 of these.
    extra_range: as ``range``, of what an algorithm sends besides.
    extra_scale: as ``scale``, of that.
    num_clients: most clients whose numbers are added.
  """

  bits: int
  range: float
  scale: float
  extra_range: float
  extra_scale: float
  num_clients: int

  @property
  def rounding_error_bound(self) -> float:
    """Most that rounding moves a number of the sum of all clients: less than a step for each."""
    return self.num_clients / self.scale


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
    UserError: a sum could wrap, the grid would have no steps within the range, or the scale is no
      power of two.
  """
  secure, equal = config.secure, config.client_privacy.mechanism != "none"
  total = float(num_clients if equal else 1)
  largest = largest_scale(secure.bits, secure.range, num_clients, total)
  least = LEAST_STEPS / secure.range
  if largest < least:
    enough = next(
      (b for b in range(8, 33) if largest_scale(b, secure.range, num_clients, total) >= least),
      0,
    )
    require(
      False,
      f"secure.bits={secure.bits} leaves fewer than {LEAST_STEPS} steps from 0 to secure.range="
      f"{secure.range:g} for the sum of {num_clients} hospitals",
      f"use secure.bits={enough} or more" if enough else "use fewer hospitals",
    )
  require(
    secure.scale <= largest,
    f"secure.scale={secure.scale:g}: the sum of {num_clients} hospitals could wrap modulo"
    f" 2^{secure.bits} above {largest:g}",
    f"use 0 or at most {largest:g}",
  )
  require(
    secure.scale == 0 or secure.scale >= least,
    f"secure.scale={secure.scale:g} leaves fewer than {LEAST_STEPS} steps from 0 to secure.range="
    f"{secure.range:g}",
    f"use 0 or at least {least:g}",
  )
  power = 2.0 ** math.floor(math.log2(secure.scale or 1))
  require(
    secure.scale in (0, power),
    f"secure.scale={secure.scale:g} is no power of two, so that numbers would be rounded twice",
    f"use 0 or {power:g}",
  )
  return Grid(
    bits=secure.bits,
    range=secure.range,
    scale=secure.scale or largest,
    extra_range=secure.extra_range,
    extra_scale=largest_scale(secure.bits, secure.extra_range, num_clients, total),
    num_clients=num_clients,
  )


def to_grid(values: jax.Array, range: float, scale: float | jax.Array, key: jax.Array) -> jax.Array:
  """int32 whole numbers of ``values`` · scale, each rounded up with the probability of its rest.

  A value that is not finite becomes 0.

  Args:
    values: float32 of any shape, at most ``range`` but for those that are cut by it.
    range: largest absolute value.
    scale: whole numbers to 1, a power of two.
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

  def settings(message: ClientDelta) -> tuple[list, Any, list[tuple[float, float, str]]]:
    """Leaves, their structure, and the range, the scale and the count of cut numbers of each."""
    plain = (grid.range, grid.scale, "saturated")
    extra = jax.tree.map(
      lambda _: (grid.extra_range, grid.extra_scale, "extra_saturated"), message.extra
    )
    leaves, structure = jax.tree.flatten(message)
    kinds = structure.flatten_up_to(message._replace(params=plain, state=plain, extra=extra))
    return leaves, structure, kinds

  def nothing_cut(message: ClientDelta) -> dict[str, jax.Array]:
    _, _, kinds = settings(message)
    return {name: jnp.zeros(()) for name in (*(name for _, _, name in kinds), "messages")}

  def encode(message, kept, state, sender):
    weight = sender.client.weight if weighted else 1.0
    leaves, structure, kinds = settings(message)
    numbers, held = [], collections.Counter()
    cut = {name: jnp.int32(0) for name in nothing_cut(message)}
    for place, (leaf, (range, scale, name)) in enumerate(zip(leaves, kinds, strict=True)):
      draws = jax.random.fold_in(sender.key, place)
      inside = jnp.clip(leaf, -range, range)
      numbers.append(to_grid(inside * weight, range, scale, draws))
      outside = ~(jnp.abs(leaf) <= range)  # what is not a number among them
      cut[name] += outside.sum(dtype=jnp.int32)
      held[name] += leaf.size
    tally = {n: cut[n].astype(jnp.float32) / max(held[n], 1) for n in cut}
    tally["messages"] = jnp.ones(())
    return structure.unflatten(numbers), kept, tally if counted else ()

  def decode(total, state, tally, receiver):
    leaves, structure, kinds = settings(total)
    weight = jnp.where(receiver.weight > 0, receiver.weight, 1) if weighted else 1.0
    numbers = [
      leaf.astype(jnp.float32) / (scale * weight)
      for leaf, (_, scale, _) in zip(leaves, kinds, strict=True)
    ]
    return structure.unflatten(numbers), jax.tree.map(jnp.add, state, tally)

  def facts(state):
    found = {
      "bits": grid.bits,
      "scale": grid.scale,
      "rounding_error_bound": grid.rounding_error_bound,
    }
    if counted:
      messages = max(float(state["messages"]), 1.0)
      found |= {name: float(cut) / messages for name, cut in state.items() if name != "messages"}
    return found

  return Transform(
    encode=encode,
    decode=decode,
    init_server=lambda message: nothing_cut(message) if counted else (),
    # All numbers, whatever was left out before: none can be left out of a sum.
    wire=lambda wire: Wire(
      dense=wire.dense, sent=wire.dense, value_bits=grid.bits, apart=wire.apart
    ),
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
