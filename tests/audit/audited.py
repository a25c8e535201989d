"""An audited run made from a guarantee alone: the arrays that a run of it should have."""

import jax.numpy as jnp

from fedjax_med.audit.planted_records import AuditedRun
from fedjax_med.core.keys import base_key
from fedjax_med.federated.algorithm import Client, Units
from fedjax_med.privacy.guarantees import SEVERAL_IMAGES, Guarantee
from tests.federated.toy import make_hyper


def audited_run(
  guarantee: Guarantee,
  steps: tuple[int, ...],
  steps_a_round: tuple[int, ...],
  clipping: str = "book_keeping",
) -> AuditedRun:
  """An audited run whose arrays are those of its guarantee."""
  mechanisms = guarantee.mechanisms
  parties, slots = len(mechanisms), max(m.num_units for m in mechanisms)
  numbers = jnp.asarray([m.num_units for m in mechanisms], jnp.int32)
  rows = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (parties, slots))

  def each(values):
    return jnp.asarray(list(values), jnp.float32)

  correlated = any(m.bands > 1 for m in mechanisms)
  clients = Client(
    number=jnp.arange(parties, dtype=jnp.int32),
    indices=rows,
    num_examples=numbers,
    weight=jnp.full(parties, 1 / parties, jnp.float32),
    num_steps=jnp.asarray(steps_a_round, jnp.int32),
    sampling_probability=each(m.sampling_probability for m in mechanisms),
    expected_batch_size=each(m.expected_batch_size for m in mechanisms),
    noise_multiplier=each(m.noise_multiplier for m in mechanisms),
    units=Units(rows, jnp.ones_like(rows), numbers) if guarantee.unit in SEVERAL_IMAGES else None,
    coefficients=each(m.coefficients for m in mechanisms) if correlated else None,
    batch_cap=jnp.asarray([m.batch_cap for m in mechanisms], jnp.int32),
  )
  (clip_norm,) = {m.clip_norm for m in mechanisms}
  return AuditedRun(
    guarantee=guarantee,
    steps=steps,
    clients=clients,
    hyper=make_hyper(clip_norm=clip_norm),
    key=base_key(0),
    clipping=clipping,
  )
