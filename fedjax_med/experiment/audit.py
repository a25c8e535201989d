"""An audit of DP-SGD as it is executed: planted records, an attacker, and checks of every draw.

The functions that train are run as they are, with the run's hospital sizes, sampling, clipping and
noise, on a network whose gradients are known (``models.canary``). The attacker sees every noised
gradient, which is what ε is claimed for. A record that is absent is a blank image, whose gradient
is exactly 0: the adjacency of the claim.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from scipy import stats

from fedjax_med.core.keys import base_key
from fedjax_med.federated.algorithm import Client, Hyper, Pool, Units
from fedjax_med.federated.local import StepContext, cross_entropy, private_gradient
from fedjax_med.models.canary import canary_model
from fedjax_med.privacy.auditing import (
  inclusion_p_value,
  noise_std_p_value,
  one_run_epsilon,
  threshold_epsilon,
  uncorrelated_p_value,
)
from fedjax_med.privacy.calibration import gaussian_mu
from fedjax_med.privacy.guarantees import Guarantee, spent
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.simulation.mesh import CLIENTS, client_mesh

CONFIDENCE = 0.95
# Chance that one check refuses a correct program; its numbers follow from the seed.
ALARM = 1e-6
# Canaries of a hospital in one run at most: pixels of 32 x 32, some to spare.
MAX_CANARIES = 800
# Steps whose every number is looked at.
WATCHED = 32
# The attacker's likelihood ratios are made for the claimed noise, and for less than that.
ATTACKS = ((1.0, (1.5, 2.3, 3.0)), (0.5, (1.5, 3.0)), (0.1, (0.0,)))
TRIALS_AT_ONCE = 512


class Subject(NamedTuple):
  """What is audited.

  Attributes:
    guarantee: the claim for records or patients.
    steps: [K] steps of each hospital in the whole run.
    steps_a_round: [K] of them in a round.
    clipping: method of clipping, as the run's plan has it.
    seed: of the audit's own draws.
  """

  guarantee: Guarantee
  steps: tuple[int, ...]
  steps_a_round: tuple[int, ...]
  clipping: str
  seed: int = 0


class Check(NamedTuple):
  """One property of the execution.

  Attributes:
    name: the property.
    p_value: chance of what was seen if the property holds; 0 or 1 for one that is certain.
    passed: whether it is believed.
  """

  name: str
  p_value: float
  passed: bool


class Found(NamedTuple):
  """What an attack on one hospital found.

  Attributes:
    name: the hospital.
    epsilon: claimed at ``delta``.
    delta: δ.
    epsilon_lower: bound from below at the confidence of the audit.
    attack: which attack it comes from.
    trials: runs with one planted record, present or not.
    canaries: planted records of the run with many.
  """

  name: str
  epsilon: float
  delta: float
  epsilon_lower: float
  attack: str
  trials: int
  canaries: int


def audit(
  subject: Subject,
  max_trials: int,
  devices: int = 1,
  tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[Found], list[Check], float]:
  """Attacks every hospital and checks the execution; all bounds hold together at CONFIDENCE.

  Args:
    subject: what is audited.
    max_trials: runs with one planted record at a hospital, at most.
    devices: that trials are shared out over.
    tell: hears of progress.

  Returns:
    What was found at each hospital, the checks, and the bound that the same attack gives at the
    hospital of the largest ε if its noise is left out: how much the audit is able to find.
  """
  checks = check_execution(subject)
  hospitals = len(subject.guarantee.names)
  claims = spent(subject.guarantee, subject.steps)
  # Half of what may go wrong to each of the two kinds of attack.
  level = (1 - CONFIDENCE) / (2 * hospitals)
  trials = make_trials(subject, devices)
  found = []
  for k, epsilon in enumerate(claims):
    mechanism, delta = subject.guarantee.mechanisms[k], subject.guarantee.deltas[k]
    number = wanted_trials(epsilon, level, max_trials)
    thresholds = thresholds_of(epsilon, delta)
    noisy = single_canaries(subject, trials, k, number, noise=True)
    bounds = {"likelihood ratio of one record": best_threshold(noisy, thresholds, delta, level)}
    scores, bits = many_canaries(subject, k)
    one_run = one_run_epsilon(scores, bits, delta, 1 - level)
    bounds["many records in one run"] = one_run.epsilon_lower
    attack = max(bounds, key=lambda name: bounds[name])
    name = subject.guarantee.names[k]
    found.append(Found(name, epsilon, delta, bounds[attack], attack, number, len(bits)))
    tell(
      f"{name}: {bounds[attack]:.3f} ≤ ε ≤ {epsilon:.3f} (n {mechanism.num_units}, {number} trials)"
    )
  worst = int(np.argmax(claims))
  silent = single_canaries(subject, trials, worst, found[worst].trials, noise=False)
  delta = subject.guarantee.deltas[worst]
  power = best_threshold(silent, thresholds_of(claims[worst], delta), delta, level)
  return found, checks, power


def wanted_trials(epsilon: float, level: float, most: int) -> int:
  """Trials that refute ``epsilon`` if an attack never errs, with some to spare."""
  tests = sum(len(thresholds) for _, thresholds in ATTACKS)
  needed = math.log(2 * tests / level) * math.exp(min(epsilon, 50)) * 1.15
  return int(min(max(needed, 1000), most))


class _Setting(NamedTuple):
  """Compiled parts for records of ``pixels`` pixels.

  Attributes:
    pixels: N.
    gradient: the private gradient under audit.
    params: the network's weights, all 0.
    clip_norm: C.
  """

  pixels: int
  gradient: Callable[..., Any]
  params: Any
  clip_norm: float


def _setting(subject: Subject, pixels: int) -> _Setting:
  mechanisms = subject.guarantee.mechanisms
  # Norm of a record's gradient: scale · sqrt(N), four times what clipping lets pass.
  (clip_norm,) = {m.clip_norm for m in mechanisms}
  scale = 4 * clip_norm / math.sqrt(pixels)
  model = canary_model(scale)
  side = math.isqrt(pixels)
  params, _ = model.init(base_key(0), jnp.zeros((1, side, side, 1)))
  gradient = private_gradient(
    model,
    cross_entropy(0.0),
    clipping=subject.clipping,
    batch_cap=max(m.batch_cap for m in mechanisms),
    max_examples=max(m.num_units for m in mechanisms),
    normalisation="image",
  )
  return _Setting(pixels, gradient, params, clip_norm)


def _client(subject: Subject, k: int, noise: bool) -> Client:
  """Hospital k: its first records are the pool's first rows, all others its last, blank one."""
  mechanism = subject.guarantee.mechanisms[k]
  most = max(m.num_units for m in subject.guarantee.mechanisms)
  number = jnp.int32(mechanism.num_units)
  units = None
  if subject.guarantee.unit == "patient":
    units = Units(jnp.arange(most, dtype=jnp.int32), jnp.ones(most, jnp.int32), number)
  return Client(
    number=jnp.int32(k),
    indices=jnp.arange(most, dtype=jnp.int32),
    num_examples=number,
    weight=jnp.float32(1),
    num_steps=jnp.int32(subject.steps_a_round[k]),
    sampling_probability=jnp.float32(mechanism.sampling_probability),
    expected_batch_size=jnp.float32(mechanism.expected_batch_size),
    noise_multiplier=jnp.float32(mechanism.noise_multiplier if noise else 0.0),
    units=units,
  )


def _hyper(clip_norm: float) -> Hyper:
  return Hyper(*(jnp.float32(value) for value in (0.0, 0.0, 0.0, clip_norm, 0.0, 1.0)))


def _images(pixels: int, canaries: int) -> np.ndarray:
  """[canaries + 1, side, side, 1] uint8: each its own bright pixel; the last is blank."""
  images = np.zeros((canaries + 1, pixels), np.uint8)
  images[np.arange(canaries), np.arange(canaries)] = 255
  side = math.isqrt(pixels)
  return images.reshape(-1, side, side, 1)


def _seen(gradient: Any, client: Client, clip_norm: float) -> tuple[jax.Array, jax.Array]:
  """What a step released, in units of the clip norm on the sum.

  Returns:
    [N] what tells records apart (its part along record j is 1 where j was drawn), and [2, N] the
    two layers' sums over classes, which hold noise alone, of standard deviation σ.
  """
  factor = client.expected_batch_size / (clip_norm * math.sqrt(2))
  kernels = [gradient[name]["kernel"] * factor for name in ("first", "second")]
  apart = [kernel[:, 1] - kernel[:, 0] for kernel in kernels]
  signal = (apart[0] + apart[1]) / math.sqrt(2)
  return signal, jnp.stack([kernel.sum(1) for kernel in kernels])


def _directions(images: np.ndarray) -> np.ndarray:
  """[canaries, N] unit vectors along which the records move the sum."""
  rows = images[:-1].reshape(len(images) - 1, -1).astype(np.float64)
  rows -= rows.mean(1, keepdims=True)
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _release(
  setting: _Setting, client: Client, pool: Pool, key: jax.Array, step: Any
) -> tuple[jax.Array, jax.Array]:
  """(signal, noise) of a step, counted over all rounds; see ``_seen``."""
  round, place = step // client.num_steps, step % client.num_steps
  context = StepContext(client, pool, _hyper(setting.clip_norm), key, round, place)
  gradient, _, _ = setting.gradient(setting.params, {}, context)
  return _seen(gradient, client, setting.clip_norm)


def ratio(projection: jax.Array, probability: Any, sigma: Any) -> jax.Array:
  """Log-likelihood ratio of a step's ``projection`` for noise of standard deviation ``sigma``.

  Drawn with ``probability`` q the record adds 1: log(1 - q + q exp((y - 1/2) / σ²)).
  """
  q = jnp.minimum(jnp.float32(probability), 1 - 1e-7)
  return jnp.logaddexp(jnp.log1p(-q), jnp.log(q) + (projection - 0.5) / jnp.square(sigma))


class Trials(NamedTuple):
  """Independent runs with one planted record or none, compiled once for all hospitals.

  Attributes:
    run: (client, claimed σ, steps, numbers [T], present [T]) -> scores [T, attacks].
    devices: T is a multiple of this.
  """

  run: Callable[..., jax.Array]
  devices: int


def make_trials(subject: Subject, devices: int) -> Trials:
  """Compiles trials that are shared out over ``devices``."""
  setting = _setting(subject, 4)
  images = _images(4, 1)
  direction = jnp.asarray(_directions(images)[0], jnp.float32)
  shares = jnp.asarray([share for share, _ in ATTACKS], jnp.float32)

  def trial(client, sigma, steps, number, present):
    key = jax.random.fold_in(base_key(subject.seed), number)
    pool = Pool(jnp.asarray(images) * present.astype(jnp.uint8), jnp.zeros((2,), jnp.int32))

    def body(step, scores):
      signal, _ = _release(setting, client, pool, key, step)
      return scores + ratio(signal @ direction, client.sampling_probability, sigma * shares)

    return jax.lax.fori_loop(0, steps, body, jnp.zeros(shares.shape, jnp.float32))

  def several(client, sigma, steps, numbers, present):
    def one(each):
      return trial(client, sigma, steps, *each)

    return jax.lax.map(one, (numbers, present), batch_size=TRIALS_AT_ONCE)

  mesh = client_mesh(devices)
  if mesh is None:
    return Trials(jax.jit(several), 1)
  whole, dealt = PartitionSpec(), PartitionSpec(CLIENTS)
  specs = (whole, whole, whole, dealt, dealt)
  shared = jax.shard_map(several, mesh=mesh, in_specs=specs, out_specs=dealt, check_vma=False)
  return Trials(jax.jit(shared), devices)


def single_canaries(
  subject: Subject, trials: Trials, k: int, number: int, noise: bool
) -> dict[float, tuple[np.ndarray, np.ndarray]]:
  """Attack scores of independent runs of hospital k, all records blank but one, or that one too.

  Returns:
    share of σ -> (scores of a tenth of ``number`` with the record, of at least ``number`` without).
  """
  client = _client(subject, k, noise)
  # Row 0 of the pool is the canary; every other slot is the blank row.
  client = client._replace(indices=jnp.minimum(client.indices, 1))
  # A tenth with the record: how seldom it is missed matters less than how seldom it is imagined.
  inside = max(number // 10, 200)
  total = number + inside
  numbers = np.arange(total + -total % trials.devices, dtype=np.int32)
  sigma = jnp.float32(subject.guarantee.mechanisms[k].noise_multiplier)
  steps = jnp.int32(subject.steps[k])
  scores = np.asarray(trials.run(client, sigma, steps, numbers, numbers < inside))
  return by_attack(scores, inside)


def by_attack(scores: np.ndarray, inside: int) -> dict[float, tuple[np.ndarray, np.ndarray]]:
  """Scores [T, attacks] of trials, of which the first ``inside`` have the record, by share of σ."""
  return {share: (scores[:inside, i], scores[inside:, i]) for i, (share, _) in enumerate(ATTACKS)}


def thresholds_of(epsilon: float, delta: float) -> dict[float, tuple[float, ...]]:
  """Likelihood ratios from which the attacker says that the record was there, by share of σ.

  ATTACKS has them in standard deviations of a run without the record: under μ-Gaussian DP with
  σ times ``share`` the ratio is about normal(-m²/2, m²) there, m = μ / share.
  """
  mu = gaussian_mu(epsilon, delta)
  return {
    share: tuple(-((mu / share) ** 2) / 2 + each * mu / share if each else 0.0 for each in places)
    for share, places in ATTACKS
  }


def best_threshold(
  scores: dict[float, tuple[np.ndarray, np.ndarray]],
  thresholds: dict[float, tuple[float, ...]],
  delta: float,
  level: float,
) -> float:
  """Largest bound over thresholds fixed beforehand, each with an equal share of ``level``."""
  tests = sum(len(each) for each in thresholds.values())
  bounds = [
    threshold_epsilon(inside, outside, threshold, delta, 1 - level / tests)
    for share, (inside, outside) in scores.items()
    for threshold in thresholds[share]
  ]
  return max(0.0, *bounds)


def many_canaries(subject: Subject, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Scores and bits of one run of hospital k whose every record (up to 800) is a canary."""
  mechanism = subject.guarantee.mechanisms[k]
  canaries = min(mechanism.num_units, MAX_CANARIES)
  bits = np.random.default_rng([subject.seed, k]).integers(0, 2, canaries).astype(bool)
  setting, client, pool, directions = _many(subject, k, bits, noise=True)
  key = jax.random.fold_in(base_key(subject.seed), 2**30 + k)

  @jax.jit
  def run(client, pool):
    def body(step, scores):
      signal, _ = _release(setting, client, pool, key, step)
      return scores + ratio(
        directions @ signal, client.sampling_probability, mechanism.noise_multiplier
      )

    return jax.lax.fori_loop(0, subject.steps[k], body, jnp.zeros((canaries,), jnp.float32))

  return np.asarray(run(client, pool), np.float64), bits


def _many(
  subject: Subject, k: int, bits: np.ndarray, noise: bool
) -> tuple[_Setting, Client, Pool, jax.Array]:
  """Hospital k with canaries where ``bits`` say so; more pixels than canaries, all orthogonal."""
  canaries = len(bits)
  setting = _setting(subject, math.ceil(math.sqrt(1.25 * canaries + 2)) ** 2)
  images = _images(setting.pixels, canaries)
  directions = jnp.asarray(_directions(images), jnp.float32)
  images[:-1][~bits] = 0
  client = _client(subject, k, noise)
  client = client._replace(indices=jnp.minimum(client.indices, canaries))
  pool = Pool(jnp.asarray(images), jnp.zeros((canaries + 1,), jnp.int32))
  return setting, client, pool, directions


class _Watched(NamedTuple):
  """Steps of a hospital's first two rounds, number by number, in units of the clip norm.

  Attributes:
    drawn: [steps, canaries] how often each present canary is in the noiseless sum.
    rest: [steps] norm of what in the noiseless sum is no canary.
    noise: [steps, 2, N] noise of the two layers.
    idle: [steps, 2, N] the same where no record can be drawn.
  """

  drawn: np.ndarray
  rest: np.ndarray
  noise: np.ndarray
  idle: np.ndarray


def _watch(subject: Subject, k: int) -> _Watched:
  mechanism = subject.guarantee.mechanisms[k]
  canaries = min(mechanism.num_units, MAX_CANARIES)
  # The beginnings of two rounds: a key without the step shows in one, without the round in both.
  half, second = np.arange(WATCHED // 2), subject.steps_a_round[k]
  steps = np.unique(np.concatenate([half, second + half]))
  steps = jnp.asarray(steps[steps < subject.steps[k]], jnp.int32)
  everybody = np.ones(canaries, bool)
  setting, loud, pool, directions = _many(subject, k, everybody, noise=True)
  silent = _client(subject, k, noise=False)._replace(indices=loud.indices)
  none = jnp.int32(0)
  empty = loud._replace(
    num_examples=none, units=None if loud.units is None else loud.units._replace(number=none)
  )
  key = jax.random.fold_in(base_key(subject.seed), 2**29)

  @jax.jit
  def run(client):
    return jax.lax.map(lambda step: _release(setting, client, pool, key, step), steps)

  sums = np.asarray(run(silent)[0], np.float64)
  basis = np.asarray(directions, np.float64)
  drawn = np.linalg.solve(basis @ basis.T, basis @ sums.T).T
  rest = np.linalg.norm(sums - drawn @ basis, axis=1)
  return _Watched(drawn, rest, np.asarray(run(loud)[1]), np.asarray(run(empty)[1]))


def check_execution(subject: Subject) -> list[Check]:
  """Whether every hospital's releases are what their accounted mechanism says."""
  checks: list[tuple[str, float]] = []
  watched = [_watch(subject, k) for k in range(len(subject.steps))]
  for name, mechanism, seen in zip(
    subject.guarantee.names, subject.guarantee.mechanisms, watched, strict=True
  ):
    sigma = mechanism.noise_multiplier
    present = seen.drawn > 0.5
    exact = np.abs(seen.drawn - present).max() < 2e-3
    checks += [
      (f"{name}: no record moves the sum by more than the clip norm", seen.drawn.max() <= 1.002),
      (f"{name}: a drawn record moves the sum by the clip norm, another one not at all", exact),
      (f"{name}: nothing but records is in the sum", seen.rest.max() < 2e-2),
      (f"{name}: noise has standard deviation σC on the sum", noise_std_p_value(seen.noise, sigma)),
      (
        f"{name}: every step is noised by as much",
        _smallest([noise_std_p_value(step, sigma) for step in seen.noise]),
      ),
      (
        f"{name}: a step that draws nobody is noised by as much",
        _smallest([noise_std_p_value(step, sigma) for step in seen.idle]),
      ),
      (
        f"{name}: each step draws noise of its own",
        _smallest([uncorrelated_p_value(*pair) for pair in itertools.combinations(seen.noise, 2)]),
      ),
      (
        f"{name}: each layer draws noise of its own",
        uncorrelated_p_value(seen.noise[:, 0], seen.noise[:, 1]),
      ),
      (
        f"{name}: a record is drawn with probability q",
        inclusion_p_value(int(present.sum()), present.size, mechanism.drawn_probability),
      ),
      (f"{name}: batch sizes vary as those of a Poisson sample", _dispersion(present, mechanism)),
    ]
  for k in range(1, len(watched)):
    first, second = watched[0].noise, watched[k].noise
    steps = min(len(first), len(second))
    pixels = min(first.shape[-1], second.shape[-1])
    same = [uncorrelated_p_value(*_shared(first, second, steps, pixels))]
    names = subject.guarantee.names
    checks.append((f"{names[0]} and {names[k]} draw noise of their own", _smallest(same)))
  return [Check(name, float(p), bool(p > ALARM)) for name, p in checks]


def _shared(first, second, steps: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
  """Draws of the same places of two hospitals; the first layer begins both."""
  return first[:steps, 0, :pixels], second[:steps, 0, :pixels]


def _smallest(p_values: list[float]) -> float:
  """The smallest of several, times their number (Bonferroni); 1 if there is none."""
  return min(1.0, len(p_values) * min(p_values, default=1.0))


def _dispersion(present: np.ndarray, mechanism: PoissonGaussian) -> float:
  """p-value of the variance of batch sizes; 1 where every batch holds everybody."""
  steps, canaries = present.shape
  q = mechanism.drawn_probability
  if q >= 1:
    return 1.0
  sizes = present.sum(1)
  ratio = float(np.square(sizes - canaries * q).sum() / (canaries * q * (1 - q)))
  return float(2 * min(stats.chi2.cdf(ratio, steps), stats.chi2.sf(ratio, steps), 0.5))
