"""Discrete Gaussian noise on the device: whole numbers, drawn from random bits alone.

The distribution N(0, s²) on whole numbers has P(z) proportional to exp(-z² / (2 s²)) (Canonne,
Kamath and Steinke, arXiv 2004.00010). No float stands between the bits and the numbers: a draw
looks a table up (the alias method, Walker 1977) whose weights are multiples of 2^-96. A larger s
takes several draws, z_0 + k_1 z_1 + k_2 z_2 + ..., of one base.

Distance from the distribution, per number, has two parts. Sums of scaled draws are a discrete
Gaussian but for a factor whose logarithm ``draw_distance`` bounds, and which ε counts. A table has
a total variation distance of at most ``TABLE_DISTANCE`` from its Gaussian, which no ε counts.
"""

import decimal
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.core.keys import require_threefry

# Numbers that a table holds, from -_HALF on: 16 standard deviations of the largest base either way.
_BITS = 14
_HALF = 2 ** (_BITS - 1)
LARGEST_BASE = 512.0
# Random bits of a draw: three words, of which the first _BITS choose a bin.
_WORDS = 96
# Weights are rounded down to multiples of 2^-96 and the rest goes to 0; tails have under 2^-180.
TABLE_DISTANCE = 2.0 ** (_BITS - _WORDS)
MOST_LEVELS = 4
# Of the standard deviation from one level of draws to the next.
_RATIO = 200.0
# Digits of a weight before it is rounded.
_FIXED = 256


class Sampler(NamedTuple):
  """Arrays that a device draws from.

  Attributes:
    table: [2^14, 4] uint32, a bin's threshold in three words, from the highest, and its alias.
    multipliers: [4] int32 k of each level of draws; the first is 1.
    levels: [] int32 levels in use.
  """

  table: jax.Array
  multipliers: jax.Array
  levels: jax.Array


def levels_of(sigma: float) -> tuple[float, tuple[int, ...]]:
  """The base's standard deviation, at most 512, and the multipliers whose sum has ``sigma``."""
  number = max(1, 1 + math.ceil(math.log(sigma / LARGEST_BASE) / math.log(_RATIO)))
  ratio = (sigma / LARGEST_BASE) ** (1 / (number - 1)) if number > 1 else 1.0
  multipliers, squares = [1], 1
  for _ in range(number - 1):
    multipliers.append(math.ceil(ratio * math.sqrt(squares)))
    squares += multipliers[-1] ** 2
  return sigma / math.sqrt(squares), tuple(multipliers)


def draw_distance(base: float, multipliers: tuple[int, ...]) -> float:
  """Bound on |log(P(z) / Q(z))|, P as it is drawn from exact tables and Q the discrete Gaussian.

  Let a² be the variance so far and b that of the base. exp(-(z - k j)² / 2a² - j² / 2b²) is
  exp(-z² / 2s²) exp(-(j - m)² / 2v) with s² = a² + k² b², v = a² b² / s² and some m. The sum over j
  is the same for every m but for a factor of 1 ± 2.01 exp(-2 π² v) (Poisson, v of 1/2 or more), and
  P is normalised: 5 exp(-2 π² v) a level. Bounds of levels add up, as a convolution keeps them.
  """
  squares, total = 1, 0.0
  for k in multipliers[1:]:
    spread = base**2 * squares / (squares + k**2)
    assert spread >= 0.5, spread
    total += 5 * math.exp(-2 * math.pi**2 * spread)
    squares += k**2
  return total


def sum_distance(sigma: float, number: int) -> float:
  """τ of Kairouz et al. (arXiv 2102.06387, theorem 1) of a sum of discrete Gaussians.

  It says how far the sum is from one discrete Gaussian of ``number`` · sigma².
  """
  terms = (math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, number))
  return 10 * sum(terms)


def make_sampler(sigma: float) -> Sampler:
  """The Sampler of standard deviation ``sigma``, at least 4; the host computes it.

  Raises:
    UserError: sigma takes more levels of draws than there are, from 4e9 on.
  """
  base, multipliers = levels_of(sigma)
  require(
    sigma >= 4 and len(multipliers) <= MOST_LEVELS,
    f"discrete Gaussian noise of standard deviation {sigma:g} is outside 4 to 4e9",
    "use another scale",
  )
  padded = multipliers + (0,) * (MOST_LEVELS - len(multipliers))
  return Sampler(
    table=jnp.asarray(_alias_table(base)),
    multipliers=jnp.asarray(padded, jnp.int32),
    levels=jnp.asarray(len(multipliers), jnp.int32),
  )


def weights_of(sigma: float) -> list[int]:
  """Weights of -2^13 to 2^13 - 1, in whole 2^-96; they add up to 2^96."""
  with decimal.localcontext(decimal.Context(prec=100)):
    exponent = -1 / (2 * decimal.Decimal(sigma) ** 2)
    first = int(exponent.exp() * 2**_FIXED)
  # exp(-z² / 2s²) from one z to the next: times q^(2z + 1), q = exp(-1 / 2s²).
  step, square = first, first * first >> _FIXED
  weight, side = 1 << _FIXED, []
  for _ in range(_HALF + 1):
    side.append(weight)
    weight, step = weight * step >> _FIXED, step * square >> _FIXED
  values = side[:0:-1] + side[:_HALF]
  total = sum(values)
  weights = [(value << _WORDS) // total for value in values]
  weights[_HALF] += (1 << _WORDS) - sum(weights)
  return weights


@functools.lru_cache(maxsize=32)
def _alias_table(sigma: float) -> np.ndarray:
  """[2^14, 4] uint32 thresholds and aliases, of exactly ``weights_of(sigma)``."""
  full = 1 << (_WORDS - _BITS)  # the weight of one bin
  left = weights_of(sigma)
  size = len(left)
  kept, alias = [full] * size, list(range(size))
  small = [place for place in range(size) if left[place] < full]
  large = [place for place in range(size) if left[place] >= full]
  while small:
    low, high = small.pop(), large[-1]
    kept[low], alias[low] = left[low], high
    left[high] -= full - left[low]
    if left[high] < full:
      small.append(large.pop())
  word = 2**32 - 1
  rows = [(each >> 64 & word, each >> 32 & word, each & word) for each in kept]
  table = np.column_stack([np.asarray(rows, np.uint32), np.asarray(alias, np.uint32)])
  table.flags.writeable = False
  return table


def draw(key: jax.Array, sampler: Sampler, shape: tuple[int, ...]) -> jax.Array:
  """Independent discrete Gaussian numbers, int32 (modulo 2^32 where they leave it).

  Args:
    key: threefry key.
    sampler: of the standard deviation.
    shape: of the result.

  Raises:
    UserError: ``key`` is of another generator.
  """
  require_threefry(key)
  size = math.prod(shape)

  def level(number: jax.Array, total: jax.Array) -> jax.Array:
    words = jax.random.bits(jax.random.fold_in(key, number), (3, size), jnp.uint32)
    place = words[0] >> jnp.uint32(32 - _BITS)
    rest = words[0] & jnp.uint32(2 ** (32 - _BITS) - 1)
    high, middle, low, alias = jnp.moveaxis(sampler.table[place], -1, 0)
    kept = (words[1] < middle) | ((words[1] == middle) & (words[2] < low))
    kept = (rest < high) | ((rest == high) & kept)
    number_drawn = jnp.where(kept, place, alias).astype(jnp.int32) - jnp.int32(_HALF)
    return total + sampler.multipliers[number] * number_drawn

  total = jax.lax.fori_loop(0, sampler.levels, level, jnp.zeros((size,), jnp.int32))
  return total.reshape(shape)
