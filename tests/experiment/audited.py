"""What is audited, made from a guarantee alone: the arrays that a run of it should have."""

import numpy as np

from fedjax_med.core.keys import base_key
from fedjax_med.experiment.canaries import Subject
from fedjax_med.federated.algorithm import Client, Units
from fedjax_med.privacy.guarantees import SEVERAL_IMAGES, Guarantee
from tests.federated.toy import make_hyper


def subject_of(
  guarantee: Guarantee,
  steps: tuple[int, ...],
  steps_a_round: tuple[int, ...],
  clipping: str = "book_keeping",
) -> Subject:
  """A subject whose arrays are those of its guarantee."""
  mechanisms = guarantee.mechanisms
  parties, slots = len(mechanisms), max(m.num_units for m in mechanisms)
  numbers = np.array([m.num_units for m in mechanisms], np.int32)
  rows = np.broadcast_to(np.arange(slots, dtype=np.int32), (parties, slots))

  def each(values):
    return np.array(list(values), np.float32)

  correlated = any(m.bands > 1 for m in mechanisms)
  clients = Client(
    number=np.arange(parties, dtype=np.int32),
    indices=rows,
    num_examples=numbers,
    weight=np.full(parties, 1 / parties, np.float32),
    num_steps=np.array(steps_a_round, np.int32),
    sampling_probability=each(m.sampling_probability for m in mechanisms),
    expected_batch_size=each(m.expected_batch_size for m in mechanisms),
    noise_multiplier=each(m.noise_multiplier for m in mechanisms),
    units=Units(rows, np.ones_like(rows), numbers) if guarantee.unit in SEVERAL_IMAGES else None,
    coefficients=each(m.coefficients for m in mechanisms) if correlated else None,
    batch_cap=np.array([m.batch_cap for m in mechanisms], np.int32),
  )
  (clip_norm,) = {m.clip_norm for m in mechanisms}
  return Subject(
    guarantee=guarantee,
    steps=steps,
    clients=clients,
    hyper=make_hyper(clip_norm=clip_norm),
    key=base_key(0),
    clipping=clipping,
  )
