"""Planted records: their gradients are known, so that a release shows which of them were drawn.

The functions that train are run as they are, on the run's own arrays, hyperparameters and key. Two
things are replaced: the images of each hospital, and the network, by one whose gradients are known
(``models.networks.canary``). The attacker knows the accounted mechanism and sees every noised
gradient: ε is claimed for these. A record that is absent is a blank image, whose gradient is
exactly 0: the adjacency of the claim.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.audit.likelihood_ratio import ATTACKS, TRIALS_AT_ONCE, Scores, attack_scores, ratio
from fedjax_med.core.keys import base_key
from fedjax_med.federated.algorithm import Client, Hyper, Pool
from fedjax_med.federated.local import BatchShape, StepContext, private_gradient
from fedjax_med.federated.vector import spec_of, unravel
from fedjax_med.models.networks.canary import canary_model
from fedjax_med.privacy.banded import empty_memory
from fedjax_med.privacy.guarantees import Guarantee
from fedjax_med.privacy.mechanism import Mechanism
from fedjax_med.simulation.mesh import map_over_devices
from fedjax_med.tasks.classification import cross_entropy

# Most planted records of a hospital in one run: fewer than the pixels of 32 x 32.
MAX_CANARIES = 800


class AuditedRun(NamedTuple):
  """The run under audit: its claim, and the arrays that it is executed with.

  Attributes:
    guarantee: the claim for records or patients.
    steps: [K] steps of each hospital in the whole run.
    clients: the arrays that the run is executed with, stacked over K hospitals.
    hyper: the hyperparameters that it is executed with.
    key: base key of its draws.
    clipping: its method of clipping.
    microbatch: units that it clips at once, 0 for all.
    rows_per_unit: rows of a unit that its steps look at.
    seed: seed of the audit's draws.
  """

  guarantee: Guarantee
  steps: tuple[int, ...]
  clients: Client
  hyper: Hyper
  key: jax.Array
  clipping: str
  microbatch: int = 0
  rows_per_unit: int = 1
  seed: int = 0


class Claim(NamedTuple):
  """A hospital's accounted mechanism, which the attacker knows; float32.

  Attributes:
    sampling_probability: q.
    expected_batch_size: q·n / b.
    noise_multiplier: σ.
    coefficients: [b] strategy of the noise; 1 alone where steps' noise is independent.
  """

  sampling_probability: jax.Array
  expected_batch_size: jax.Array
  noise_multiplier: jax.Array
  coefficients: jax.Array


def claim_of(audited: AuditedRun, k: int) -> Claim:
  """The accounted mechanism of hospital k."""
  mechanism = audited.guarantee.mechanisms[k]
  return Claim(
    sampling_probability=jnp.float32(mechanism.sampling_probability),
    expected_batch_size=jnp.float32(mechanism.expected_batch_size),
    noise_multiplier=jnp.float32(mechanism.noise_multiplier),
    coefficients=jnp.asarray(mechanism.coefficients, jnp.float32),
  )


class Setting(NamedTuple):
  """The gradient under audit, and its arguments.

  Attributes:
    pixels: number of pixels of an image, N.
    gradient: the private gradient under audit.
    params: the network's weights, all 0.
    hyper: hyperparameters of the run.
    clip_norm: accounted clip norm C.
  """

  pixels: int
  gradient: Callable[..., Any]
  params: Any
  hyper: Hyper
  clip_norm: float


def setting_for(audited: AuditedRun, pixels: int) -> Setting:
  """The setting with images of ``pixels`` pixels."""
  mechanisms = audited.guarantee.mechanisms
  # Norm of a record's gradient: scale · sqrt(N), four times what clipping lets pass.
  (clip_norm,) = {m.clip_norm for m in mechanisms}
  scale = 4 * clip_norm / math.sqrt(pixels)
  model = canary_model(scale)
  side = math.isqrt(pixels)
  params, _ = model.init(base_key(0), jnp.zeros((1, side, side, 1)))
  shape = BatchShape(
    slots=max(m.batch_cap for m in mechanisms),
    max_examples=audited.clients.indices.shape[1],
    normalisation="image",
    microbatch=audited.microbatch,
    rows_per_unit=audited.rows_per_unit,
  )
  gradient = private_gradient(model, cross_entropy(0.0), audited.clipping, shape)
  return Setting(
    pixels=pixels, gradient=gradient, params=params, hyper=audited.hyper, clip_norm=clip_norm
  )


def _client(audited: AuditedRun, k: int, canaries: int) -> Client:
  """Hospital k: its first records are the pool's ``canaries``, all others its last, blank row."""
  client = jax.tree.map(lambda leaf: jnp.asarray(leaf[k]), audited.clients)
  slots = jnp.arange(client.indices.shape[0], dtype=jnp.int32)
  units = client.units
  if units is not None:  # each of a single row
    number = jnp.arange(units.starts.shape[0], dtype=jnp.int32)
    units = units._replace(starts=number, sizes=jnp.ones_like(number))
  return client._replace(indices=jnp.minimum(slots, canaries), units=units)


def _images(pixels: int, canaries: int) -> np.ndarray:
  """[canaries + 1, side, side, 1] uint8: each its own bright pixel; the last is blank."""
  images = np.zeros((canaries + 1, pixels), np.uint8)
  images[np.arange(canaries), np.arange(canaries)] = 255
  side = math.isqrt(pixels)
  return images.reshape(-1, side, side, 1)


def _directions(images: np.ndarray) -> np.ndarray:
  """[canaries, N] unit vectors along which the records move the sum."""
  rows = images[:-1].reshape(len(images) - 1, -1).astype(np.float64)
  rows -= rows.mean(1, keepdims=True)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def memory_of(setting: Setting, client: Client) -> Any:
  """The memory of the mechanism before the first step; () without correlated noise."""
  if client.coefficients is None:
    return ()
  return empty_memory(spec_of(setting.params).size, client.coefficients.shape[-1])


def release(
  setting: Setting,
  claim: Claim,
  client: Client,
  pool: Pool,
  key: jax.Array,
  step: Any,
  memory: Any,
) -> tuple[jax.Array, jax.Array, Any]:
  """The release of a step, in units of the clip norm on the sum; ``step`` counts over all rounds.

  Returns:
    signal: [N] the part that tells records apart; along record j it is 1 if j was drawn.
    noise: [2, N] the sums over classes of the two layers. They hold noise alone, of standard
      deviation σ if the noise of steps is independent.
    memory: the memory of the next step.
  """
  round, place = step // client.num_steps, step % client.num_steps
  context = StepContext(
    client=client, pool=pool, hyper=setting.hyper, key=key, round=round, step=place
  )
  vector, _, memory, _ = setting.gradient(setting.params, {}, memory, context)
  gradient = unravel(vector, spec_of(setting.params))
  factor = claim.expected_batch_size / (setting.clip_norm * math.sqrt(2))
  kernels = [gradient[name]["kernel"] * factor for name in ("first", "second")]
  apart = [kernel[:, 1] - kernel[:, 0] for kernel in kernels]
  signal = (apart[0] + apart[1]) / math.sqrt(2)
  return signal, jnp.stack([kernel.sum(1) for kernel in kernels]), memory


def decorrelate(
  coefficients: jax.Array, past: jax.Array, released: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The step's row of C Y, whose noise is that of no other row, from releases Y.

  Args:
    coefficients: [b] strategy.
    past: [b - 1, ...] releases before this one, newest first; zeros before the first.
    released: [...] this one.

  Returns:
    [...] the row, and ``past`` of the next step.
  """
  recent = jnp.concatenate([released[None], past])
  weights = coefficients.reshape((-1,) + (1,) * released.ndim)
  return (weights * recent).sum(0), recent[:-1]


class AttackerState(NamedTuple):
  """State of an attack between two steps, along D directions.

  Attributes:
    memory: memory of the mechanism.
    past: [b - 1, D] releases, newest first.
    rows: [b, D] rows of C Y, newest last.
    scores: [D, attacks] log-likelihood ratios so far.
  """

  memory: Any
  past: jax.Array
  rows: jax.Array
  scores: jax.Array


def _attack(
  setting: Setting,
  claim: Claim,
  client: Client,
  pool: Pool,
  key: jax.Array,
  directions: jax.Array,
  shares: jax.Array,
  steps: Any,
) -> jax.Array:
  """[D, attacks] scores of the records in slots 0 .. D - 1, for noise of each share of σ.

  With b bands a record in slot s can be drawn in steps t = s modulo b, and is seen in b rows of C Y
  from there: their sum, weighted by the coefficients, has a share 1 of it and noise σ. Of a block
  that the run's end cuts nothing is made.
  """
  strategy, count = claim.coefficients, len(directions)
  bands, sigmas = strategy.shape[0], claim.noise_multiplier * shares

  def body(step, attacker):
    signal, _, memory = release(setting, claim, client, pool, key, step, attacker.memory)
    row, past = decorrelate(strategy, attacker.past, directions @ signal)
    rows = jnp.concatenate([attacker.rows[1:], row[None]])
    seen = (strategy[:, None] * rows).sum(0)[:, None]
    begin = step - (bands - 1)
    whole = (begin >= 0) & (begin % bands == jnp.arange(count) % bands)
    ratios = ratio(seen, claim.sampling_probability, sigmas[None])
    return AttackerState(
      memory=memory,
      past=past,
      rows=rows,
      scores=attacker.scores + jnp.where(whole[:, None], ratios, 0),
    )

  start = AttackerState(
    memory=memory_of(setting, client),
    past=jnp.zeros((bands - 1, count)),
    rows=jnp.zeros((bands, count)),
    scores=jnp.zeros((count, len(sigmas))),
  )
  return jax.lax.fori_loop(0, steps, body, start).scores


def key_of(key: jax.Array, use: int, seed: int) -> jax.Array:
  """A key of the audit: the result must not depend on the draws of the run."""
  return jax.random.fold_in(jax.random.fold_in(key, 2**31 + use), seed)


def num_canaries(mechanism: Mechanism) -> int:
  """Number of a hospital's records that are canaries in a run with many."""
  return min(mechanism.num_units, MAX_CANARIES)


def plant(audited: AuditedRun, k: int, bits: np.ndarray) -> tuple[Setting, Client, Pool, jax.Array]:
  """Hospital k with those canaries present whose bit is True.

  Returns:
    The setting, the hospital, its images, and [canaries, N] directions along which ``release``
    shows each canary, whether it is present or not.
  """
  canaries = len(bits)
  # More pixels than canaries, so that some tell what else is in a sum.
  setting = setting_for(audited, math.ceil(math.sqrt(1.25 * canaries + 2)) ** 2)
  images = _images(setting.pixels, canaries)
  directions = jnp.asarray(_directions(images), jnp.float32)
  images[:-1][~bits] = 0
  pool = Pool(jnp.asarray(images), jnp.zeros((canaries + 1,), jnp.int32))
  return setting, _client(audited, k, canaries), pool, directions


def make_trials(audited: AuditedRun, devices: int) -> Callable:
  """Independent runs with one planted record or none, shared out over ``devices``.

  Returns:
    ((client, claim, steps, key), (numbers [T], present [T])) -> scores [T, attacks]. The key is an
    argument, as in all programs: constants are written into the compiler's cache.
  """
  # All units at once: a loop over parts, which ``plant`` keeps, takes half as long again.
  setting = setting_for(audited._replace(microbatch=0), 4)
  images = _images(4, 1)
  direction = jnp.asarray(_directions(images), jnp.float32)
  shares = jnp.asarray([share for share, _ in ATTACKS], jnp.float32)

  def trial(hospital, numbered):
    (client, claim, steps, hospital_key), (number, present) = hospital, numbered
    key = jax.random.fold_in(hospital_key, number)
    pool = Pool(jnp.asarray(images) * present.astype(jnp.uint8), jnp.zeros((2,), jnp.int32))
    return _attack(setting, claim, client, pool, key, direction, shares, steps)[0]

  return map_over_devices(trial, devices, TRIALS_AT_ONCE)


def single_canaries(
  audited: AuditedRun, trials: Callable, k: int, number: int, noise: bool
) -> Scores:
  """Scores of ``number`` runs of hospital k whose records are all blank, and of some with one."""
  client = _client(audited, k, 1)
  if not noise:
    client = client._replace(noise_multiplier=jnp.float32(0))
  hospital = (
    client,
    claim_of(audited, k),
    jnp.int32(audited.steps[k]),
    key_of(audited.key, 0, audited.seed),
  )
  return attack_scores(lambda *runs: trials(hospital, runs), number)


def many_canaries(audited: AuditedRun, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Scores and bits of one run of hospital k: each record (up to 800) is planted by a fair coin."""
  mechanism = audited.guarantee.mechanisms[k]
  canaries = num_canaries(mechanism)
  bits = np.random.default_rng([audited.seed, k]).integers(0, 2, canaries).astype(bool)
  setting, client, pool, directions = plant(audited, k, bits)
  claim, key = claim_of(audited, k), jax.random.fold_in(key_of(audited.key, 1, audited.seed), k)

  @jax.jit
  def run(client, pool, key):
    whole = jnp.ones(1, jnp.float32)
    return _attack(setting, claim, client, pool, key, directions, whole, audited.steps[k])[:, 0]

  return np.asarray(run(client, pool, key), np.float64), bits
