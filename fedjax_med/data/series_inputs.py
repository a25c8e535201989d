"""Windows of recordings as network inputs, and random changes of them, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.data.ranges import parse_ranges

# Changes that may be asked for: (noise, factors, shifts). Spreads are those of Um et al. 2017.
KINDS = {
  "none": (False, False, False),
  "jitter": (True, False, False),
  "scale": (False, True, False),
  "time_shift": (False, False, True),
  "jitter_scale_shift": (True, True, True),
}
JITTER = 0.05  # of the channel's standard deviation in the window
SCALE = 0.1  # standard deviation of the factor of a channel
MAX_SHIFT = 1 / 8  # of the window
FLAT = 1e-5  # of a channel's largest value: a smaller deviation is rounding


def normalise(windows: jax.Array, how: str) -> jax.Array:
  """Turns windows into network inputs, each by itself.

  Args:
    windows: [..., T, 1, C] float32, nan where there is no value.
    how: ``data.ranges``, which become -1 to 1 (values outside are cut), or empty: each channel of
      each window to mean 0 and standard deviation 1, a function of that window alone.

  Returns:
    The same shape, float32; 0 where there is no value. A constant channel becomes 0 where ``how``
    is empty.
  """
  known = ~jnp.isnan(windows)
  values = jnp.where(known, windows, 0)
  if how:
    ends = np.array(parse_ranges(how, windows.shape[-1]), np.float32)
    shape = (*[1] * (windows.ndim - 1), -1)
    low, high = (jnp.asarray(ends[:, end].reshape(shape)) for end in (0, 1))
    scaled = jnp.clip(2 * (values - low) / (high - low) - 1, -1, 1)
  else:
    mean, deviation = _moments(values, known)
    scaled = (values - mean) / deviation
  return jnp.where(known, scaled, 0)


def _moments(values: jax.Array, known: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation of each channel over its known values; 1 where it is constant."""
  axes = (-3, -2)
  count = jnp.maximum(known.sum(axes, keepdims=True), 1).astype(values.dtype)
  mean = values.sum(axes, keepdims=True) / count
  centred = jnp.where(known, values - mean, 0)
  deviation = jnp.sqrt(jnp.square(centred).sum(axes, keepdims=True) / count)
  least = FLAT * jnp.abs(values).max(axes, keepdims=True)
  return mean, jnp.where(deviation > least, deviation, 1)


class Changes(NamedTuple):
  """Changes of every window of an array, in the array's leading shape.

  Attributes:
    seed: [..., 2] uint32 of the draws for its samples and channels.
    jitter: [...] float32, times the channel's deviation the standard deviation of the noise.
    scale: [...] float32, standard deviation of the channels' factors.
    shift: [...] float32 in -1 .. 1, share of the largest shift to later.
  """

  seed: jax.Array
  jitter: jax.Array
  scale: jax.Array
  shift: jax.Array


def draw_changes(key: jax.Array, shape: tuple[int, ...], kind: str) -> Changes:
  """Independent changes for windows of leading ``shape``; ``kind`` is a name of KINDS."""
  jitter, scale, shifts = KINDS[kind]
  keys = jax.random.split(key, 2)
  shift = jnp.zeros(shape, jnp.float32)
  if shifts:
    shift = jax.random.uniform(keys[1], shape, jnp.float32, -1, 1)
  return Changes(
    seed=jax.random.bits(keys[0], (*shape, 2), jnp.uint32),
    jitter=jnp.full(shape, JITTER * jitter, jnp.float32),
    scale=jnp.full(shape, SCALE * scale, jnp.float32),
    shift=shift,
  )


def change(windows: jax.Array, changes: Changes) -> jax.Array:
  """Windows [B, T, 1, C] scaled channel by channel, with noise, and shifted in time.

  A shift repeats the first or the last sample. What has no value (nan) keeps none.
  """

  def one(window, change):
    key = jax.random.wrap_key_data(change.seed, impl="threefry2x32")
    noise_key, scale_key = jax.random.split(key, 2)
    known = ~jnp.isnan(window)
    _, deviation = _moments(jnp.where(known, window, 0), known)
    noise = jax.random.normal(noise_key, window.shape, jnp.float32)
    factors = 1 + change.scale * jax.random.normal(scale_key, (1, 1, window.shape[-1]))
    window = window * factors + change.jitter * deviation * noise
    samples = window.shape[0]
    move = jnp.round(change.shift * MAX_SHIFT * samples).astype(jnp.int32)
    return window[jnp.clip(jnp.arange(samples) - move, 0, samples - 1)]

  return jax.vmap(one)(windows, changes)
