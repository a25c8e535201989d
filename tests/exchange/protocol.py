"""Secure aggregation on the host, in NumPy, stage by stage: the oracle of the compiled masks.

Bonawitz et al. 2017, figure 4, with an honest server and without encryption of shares or
signatures. Diffie-Hellman is over a Mersenne prime, which is a toy; Shamir shares are over the same
prime; masks are words of Philox.
"""

import dataclasses
import hashlib
import secrets

import numpy as np

PRIME = 2**521 - 1  # above 256-bit secrets
GENERATOR = 3


def split(secret: int, shares: int, threshold: int) -> dict[int, int]:
  """Shamir: points 1, 2, ... of a polynomial of degree threshold - 1 that is ``secret`` at 0."""
  factors = [secret, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
  points = range(1, shares + 1)
  return {x: sum(f * pow(x, n, PRIME) for n, f in enumerate(factors)) % PRIME for x in points}


def combine(shares: dict[int, int]) -> int:
  """The value at 0 of the polynomial through these points (Lagrange)."""
  total = 0
  for x, y in shares.items():
    above = below = 1
    for other in shares:
      if other != x:
        above, below = above * other % PRIME, below * (other - x) % PRIME
    total += y * above * pow(below, -1, PRIME)
  return total % PRIME


def words(seed: int, length: int) -> np.ndarray:
  """uint32 words of Philox, of a 128-bit key that the seed is hashed to."""
  digest = hashlib.sha256(seed.to_bytes(66, "big")).digest()[:16]
  generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
  return generator.integers(0, 2**32, length, dtype=np.uint32)


@dataclasses.dataclass
class Hospital:
  """A client: its secret key, the seed of its own mask, and the shares that others gave it."""

  number: int
  secret_key: int = dataclasses.field(default_factory=lambda: secrets.randbits(256))
  own_seed: int = dataclasses.field(default_factory=lambda: secrets.randbits(256))
  held: dict[tuple[str, int], int] = dataclasses.field(default_factory=dict)

  @property
  def public_key(self) -> int:
    return pow(GENERATOR, self.secret_key, PRIME)


def pair_mask(secret_key: int, me: int, other: int, public_key: int, length: int) -> np.ndarray:
  """Words that ``me`` adds: those of the agreed seed, or their negatives if me > other."""
  agreed = words(pow(public_key, secret_key, PRIME), length)
  return agreed if me < other else (0 - agreed).astype(np.uint32)


def keys_and_shares(hospitals: int, threshold: int) -> list[Hospital]:
  """Stages 0 and 1: all have keys, and each holds a share of the secrets of everyone."""
  group = [Hospital(number) for number in range(hospitals)]
  for owner in group:
    for kind, secret in (("key", owner.secret_key), ("own", owner.own_seed)):
      for point, share in split(secret, hospitals, threshold).items():
        group[point - 1].held[kind, owner.number] = share
  return group


def masked(group: list[Hospital], me: int, update: np.ndarray, bits: int) -> np.ndarray:
  """Stage 2: the vector that a hospital sends."""
  total = update.astype(np.uint32) + words(group[me].own_seed, len(update))
  for other in group:
    if other.number != me:
      mask = pair_mask(group[me].secret_key, me, other.number, other.public_key, len(update))
      total = total + mask
  return total & np.uint32(2**bits - 1)


def unmasked_sum(
  group: list[Hospital], sent: dict[int, np.ndarray], threshold: int, bits: int
) -> np.ndarray:
  """Stage 3: survivors give a share of the own seed of each survivor, of the key of each lost one.

  Raises:
    ValueError: fewer than ``threshold`` answered.
  """
  if len(sent) < threshold:
    raise ValueError(f"{len(sent)} answers are fewer than {threshold}")
  answering = sorted(sent)[:threshold]

  def recovered(kind: str, owner: int) -> int:
    return combine({number + 1: group[number].held[kind, owner] for number in answering})

  total = np.stack(list(sent.values())).sum(0, dtype=np.uint32)
  for number in sent:
    total = total - words(recovered("own", number), len(total))
  for lost in group:
    if lost.number not in sent:
      secret_key = recovered("key", lost.number)
      for number in sent:
        # The lost one's part of each pair is the negative of what the survivor added.
        public = group[number].public_key
        total = total + pair_mask(secret_key, lost.number, number, public, len(total))
  return total & np.uint32(2**bits - 1)
