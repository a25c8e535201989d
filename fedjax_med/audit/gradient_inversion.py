"""Attacks that make inputs of a network again from the gradient of a batch.

The first layer of a linear network gives them exactly. For others Geiping et al. 2020 (arXiv
2003.14053): inputs are moved until their gradient points where the observed one does.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.linalg import norm

# Places of the steps at which the step size falls to a tenth (Geiping et al. 2020).
FALLS = (3 / 8, 5 / 8, 7 / 8)
ALIKE = 0.999  # correlation from which two rows of a layer tell of the same input


class Search(NamedTuple):
  """Settings of the search for inputs.

  Attributes:
    steps: steps of Adam, in all.
    restarts: searches from random inputs; that of the smallest objective counts.
    rate: first step size.
    variation: weight of the total variation.
    coarse: the search begins on images whose sides are shorter by this factor, a power of two.
  """

  steps: int = 1500
  restarts: int = 4
  rate: float = 0.1
  variation: float = 0.01
  coarse: int = 4


def labels_of(bias: np.ndarray, probabilities: np.ndarray, count: int) -> np.ndarray:
  """[count] int32 classes of a batch, in order, from the gradient of the head's bias.

  Of the mean cross-entropy it is the mean of p - y over the batch, so that class c stands in
  count · (mean p_c - gradient_c) records. Of one record it is negative at its class alone.

  Args:
    bias: [C] gradient of the head's bias.
    probabilities: [C] mean prediction of the network, which the attacker guesses.
    count: records of the batch.
  """
  if count == 1:
    return np.array([np.argmin(bias)], np.int32)
  number = np.maximum(count * (np.asarray(probabilities, np.float64) - bias), 0)
  number *= count / max(number.sum(), 1e-12)
  whole = np.floor(number).astype(int)
  # The largest remainders get what is left.
  for label in np.argsort(whole - number, kind="stable")[: count - whole.sum()]:
    whole[label] += 1
  return np.repeat(np.arange(len(bias)), whole)[:count].astype(np.int32)


def exact_inputs(kernel: np.ndarray, bias: np.ndarray, count: int) -> np.ndarray:
  """[R, d] inputs of the first layer of a linear network, at most ``count``, from its gradient.

  The column of unit h is Σ_i δ_ih x_i, and its bias Σ_i δ_ih, so that of one record their ratio is
  the input at every unit: the least squares fit over all units then rounds least. Of several
  records a unit gives their mixture, or one of them if it is active for that one alone.

  Args:
    kernel: [d, H] gradient of the kernel.
    bias: [H] gradient of the bias.
    count: records of the batch.
  """
  kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
  if not bias.any():  # not sent: a unit tells the direction, and neither sign nor size
    largest = kernel[:, np.argmax(np.square(kernel).sum(0))]
    return np.stack([largest, -largest]) * math.sqrt(len(kernel)) / max(norm(largest), 1e-300)
  if count == 1:
    return (kernel @ bias / max(bias @ bias, 1e-300))[None]
  found: list[np.ndarray] = []
  for unit in np.argsort(-np.abs(bias), kind="stable"):
    if len(found) == count or bias[unit] == 0:
      break
    made = kernel[:, unit] / bias[unit]
    if all(np.corrcoef(made, other)[0, 1] < ALIKE for other in found):
      found.append(made)
  return np.stack(found) if found else np.zeros((1, len(kernel)))


def cosine_distance(found: Any, target: Any) -> jax.Array:
  """1 - cosine of the angle between two gradients, trees of arrays; in 0 .. 2."""

  def dot(one: Any, other: Any) -> jax.Array:
    products = jax.tree.map(lambda a, b: (a * b).sum(), one, other)
    return sum(jax.tree.leaves(products), jnp.zeros(()))

  norms = jnp.sqrt(dot(found, found) * dot(target, target))
  return 1 - dot(found, target) / jnp.maximum(norms, 1e-20)


def total_variation(images: jax.Array) -> jax.Array:
  """Mean absolute difference of neighbours in images [b, H, W, C], over both axes."""
  down, right = (jnp.abs(jnp.diff(images, axis=axis)).mean() for axis in (1, 2))
  return down + right


def within(images: jax.Array, scaling: str) -> jax.Array:
  """Images [b, H, W, C] among those that ``data.normalisation`` can give."""
  if scaling == "fixed":
    return jnp.clip(images, -1, 1)
  centred = images - images.mean((1, 2, 3), keepdims=True)
  return centred / jnp.sqrt(jnp.square(centred).mean((1, 2, 3), keepdims=True) + 1e-12)


def make_matching(
  gradient: Callable[[jax.Array, jax.Array], Any],
  shape: tuple[int, ...],
  scaling: str,
  search: Search,
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """The search for images whose gradient is like the one observed.

  It minimises the cosine distance of the gradients plus the total variation, by Adam on the signs
  of the objective's gradient. The first images are small, and are enlarged until they have the
  size of the network's; stages share the steps.

  Args:
    gradient: (inputs, labels) -> mean gradient, a tree.
    shape: of the images, [b, H, W, C].
    scaling: value of data.normalisation.
    search: settings.

  Returns:
    (observed gradient, labels [b], key) -> images [b, H, W, C] of the best restart, and objectives
    [restarts]. Not jitted.
  """
  _, height, width, _ = shape
  factors = [2**power for power in range(search.coarse.bit_length())]
  factors = [factor for factor in factors if min(height, width) >= 4 * factor] or [1]
  steps = -(-search.steps // len(factors))

  def sized(factor: int) -> tuple[int, ...]:
    return shape[0], -(-height // factor), -(-width // factor), shape[3]

  def whole(images: jax.Array) -> jax.Array:
    if images.shape != shape:
      images = jax.image.resize(images, shape, "linear")
    return within(images, scaling)

  def objective(images: jax.Array, observed: Any, labels: jax.Array) -> jax.Array:
    inputs = whole(images)
    distance = cosine_distance(gradient(inputs, labels), observed)
    return distance + search.variation * total_variation(inputs)

  def stage(images: jax.Array, observed: Any, labels: jax.Array) -> jax.Array:
    def body(step, carry):
      images, first, second = carry
      slope = jnp.sign(jax.grad(objective)(images, observed, labels))
      first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * jnp.square(slope)
      falls = sum((step >= place * steps).astype(jnp.float32) for place in FALLS)
      count = (step + 1).astype(jnp.float32)
      scaled = jnp.sqrt(second / (1 - 0.999**count)) + 1e-8
      move = search.rate * 0.1**falls * (first / (1 - 0.9**count)) / scaled
      return within(images - move, scaling), first, second

    nothing = jnp.zeros_like(images)
    return jax.lax.fori_loop(0, steps, body, (images, nothing, nothing))[0]

  def one(key: jax.Array, observed: Any, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    images = within(jax.random.normal(key, sized(factors[-1])), scaling)
    for factor in reversed(factors):
      if images.shape != sized(factor):
        images = jax.image.resize(images, sized(factor), "linear")
      images = stage(images, observed, labels)
    return whole(images), objective(images, observed, labels)

  def run(observed: Any, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(key, search.restarts)
    images, objectives = jax.vmap(one, (0, None, None))(keys, observed, labels)
    return images[jnp.argmin(objectives)], objectives

  return run
