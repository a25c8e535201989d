"""Checks of what a hospital sends where hospitals add the noise themselves, number by number."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.audit.execution_checks import ALARM, Check
from fedjax_med.audit.p_values import noise_std_p_value, uncorrelated_p_value
from fedjax_med.core.keys import Stream, key_for
from fedjax_med.exchange.transform import Sender, Transform
from fedjax_med.federated.algorithm import Client, ClientDelta, Hyper
from fedjax_med.privacy.distributed import DistributedGaussian

# Numbers of an update, hospitals and rounds that are looked at, at most.
MOST_NUMBERS, MOST_HOSPITALS, ROUNDS = 2**18, 3, 2


def loud_updates(mechanism: DistributedGaussian, size: int) -> np.ndarray:
  """[3, size] updates of four clip norms: of one number, of equal ones, and of all kinds.

  Of the equal ones there are as many as leaves each, clipped and scaled, half a step above a whole
  number, where rounding adds most to the norm.
  """
  bound, steps = mechanism.clip_norm, mechanism.clip_norm * mechanism.scale
  below = math.ceil(steps / math.sqrt(size) - 0.5)
  number = min(size, max(1, round((steps / (below + 0.5)) ** 2)))
  one, equal = np.zeros(size), np.zeros(size)
  one[0], equal[:number] = 1, 1
  kinds = np.stack([one, equal, np.random.default_rng(0).normal(size=size)])
  return np.asarray(4 * bound * kinds / np.linalg.norm(kinds, axis=1, keepdims=True), np.float32)


def check_shares(
  mechanism: DistributedGaussian, hyper: Hyper, transform: Transform, key: jax.Array
) -> list[Check]:
  """Checks that hospitals' whole numbers and noise are those of the accounted mechanism.

  Args:
    mechanism: what is accounted for.
    hyper: hyperparameters of the run.
    transform: the run's transforms up to the noise.
    key: key of the draws.
  """
  level = hyper.client_level
  assert level is not None
  size = min(mechanism.num_parameters, MOST_NUMBERS)
  quiet = hyper._replace(client_level=level._replace(noise_multiplier=jnp.float32(0)))

  @jax.jit
  def send(hyper, key, update, number, round):
    client = _client(number)
    message = ClientDelta(params=update, state=jnp.zeros(0))
    sender = Sender(
      client=client,
      hyper=hyper,
      key=key_for(key, Stream.EXCHANGE, 0, number, round),
      common_key=key_for(key, Stream.EXCHANGE, 2, round),
      seated=jnp.ones((mechanism.num_units,), bool),
      round=round,
    )
    kept, state = transform.init_client(message), transform.init_server(message)
    return transform.encode(message, kept, state, sender)[0].params

  def sent(hyper, update, hospital=0, round=0):
    found = send(hyper, key, jnp.asarray(update), jnp.int32(hospital), jnp.int32(round))
    return np.asarray(found).astype(np.int64)

  loud, none = loud_updates(mechanism, size), np.zeros(size, np.float32)
  whole = [sent(quiet, update) for update in loud]
  largest = max(float(np.linalg.norm(each.astype(float))) for each in whole)
  noises = {
    (hospital, round): sent(hyper, none, hospital, round)
    for hospital in range(min(mechanism.num_units, MOST_HOSPITALS))
    for round in range(ROUNDS)
  }
  after = all(
    np.array_equal((sent(hyper, update) - each - noises[0, 0]) % 2**32, np.zeros(size))
    for update, each in zip(loud, whole, strict=True)
  )
  shares = [noise / mechanism.share for noise in noises.values()]
  pairs = itertools.combinations(shares, 2) if size > 1 else ()
  alike = [uncorrelated_p_value(*pair) if all(map(np.any, pair)) else 0.0 for pair in pairs]
  checks = [
    (
      "whole numbers of an update stay within the accounted sensitivity",
      float(largest <= mechanism.sensitivity * mechanism.scale),
    ),
    ("a hospital's noise is added after clipping and rounding, whatever it sends", float(after)),
    (
      "each hospital's noise has its share of the accounted standard deviation, in every round",
      min(1.0, len(shares) * min(noise_std_p_value(each, 1.0) for each in shares)),
    ),
    (
      "hospitals and rounds draw noise of their own",
      min(1.0, len(alike) * min(alike, default=1.0)) if alike else 1.0,
    ),
  ]
  return [Check(name=name, p_value=float(p), passed=bool(p > ALARM)) for name, p in checks]


def _client(number: jax.Array) -> Client:
  one = jnp.float32(1)
  return Client(
    number=number,
    indices=jnp.zeros((1,), jnp.int32),
    num_examples=jnp.int32(1),
    weight=one,
    num_steps=jnp.int32(1),
    sampling_probability=one,
    expected_batch_size=one,
    noise_multiplier=one,
  )
