"""CKKS: hospitals encrypt the whole numbers of their updates, and the server adds ciphertexts.

The scheme (Cheon et al. 2017) computes with approximate real numbers. A whole number n of the grid
(exchange/fixed_point.py) travels as n · gain, and the decrypted sum over gain is rounded to whole
numbers again. The gain makes the largest sum of the grid as large as the preset can hold, whatever
the scale of the grid. The error of decryption is then far below half a step: at most 0.0053 steps
of a grid of 32 bits under the preset sum, and 0.00001 under nvflare, for three hospitals of 75,000
numbers (``python -m benchmarks.ckks``). Rounding takes all of it away. The encrypted sum is the
plain one on the grid bit for bit, a resumed run repeats itself although encryption is random, and
``secure.he=model`` needs no model of the error: after rounding it is 0.

Hospitals encrypt with the public key. The server has no other key; a third party, the key holder,
decrypts the sum. The library is TenSEAL, the extra ``he``.
"""

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.exchange.aggregator import Aggregator
from fedjax_med.exchange.fixed_point import modular_sum
from fedjax_med.exchange.transform import SUM, Transform

SCALE = 2.0**40  # of CKKS: steps to 1 of its own numbers
# A sum is rounded right if its error is below half a step; half of that is left as a margin.
MOST_ERROR = 0.25
# That must lie within MOST_ERROR, times the root of K. An error is about a product of two normal
# numbers: it exceeds t deviations with a probability of exp(-√2 t), here 5e-13.
DEVIATIONS = 20.0


class Preset(NamedTuple):
  """Parameters of CKKS at 128-bit security, and their measured costs.

  Attributes:
    degree: N of the ring; a ciphertext holds N/2 numbers.
    primes: bits of the primes; the last one is for keys alone.
    room: largest absolute value of a sum of numbers in a ciphertext; 2^40 · room stays under half
      of the modulus.
    deviation: standard deviation of the error of a number that one hospital encrypted.
    ciphertext_bytes: bytes of a serialised ciphertext.
    seal_seconds: to encrypt a million numbers, to write the ciphertexts and to read them again, on
      one core.
    add_seconds: to add them at the server.
    open_seconds: to decrypt a million numbers of the sum.
  """

  degree: int
  primes: tuple[int, ...]
  room: float
  deviation: float
  ciphertext_bytes: int
  seal_seconds: float
  add_seconds: float
  open_seconds: float

  @property
  def slots(self) -> int:
    """Numbers of a ciphertext."""
    return self.degree // 2


# Measured by python -m benchmarks.ckks --out benchmarks/results/ckks-cpu.json
PRESETS = {
  "sum": Preset(
    degree=4096,
    primes=(54, 54),
    room=2.0**12,
    deviation=6.2e-10,
    ciphertext_bytes=61_741,
    seal_seconds=2.7,
    add_seconds=0.025,
    open_seconds=0.27,
  ),
  "nvflare": Preset(
    degree=8192,
    primes=(60, 40, 40),
    room=2.0**22,
    deviation=1.2e-9,
    ciphertext_bytes=235_078,
    seal_seconds=3.4,
    add_seconds=0.03,
    open_seconds=0.6,
  ),
}


class EncryptedRound(NamedTuple):
  """Measurements of one encrypted round.

  Attributes:
    messages: hospitals that took part.
    numbers: numbers of each message.
    bytes: of all their ciphertexts.
    encrypt: seconds of all hospitals together.
    serialise: seconds to write and read all ciphertexts.
    add: seconds of the server.
    decrypt: seconds of the key holder.
    error: largest distance of a decrypted sum from the true one, in steps of the grid.
    rms: root mean square of these distances.
  """

  messages: int
  numbers: int
  bytes: int
  encrypt: float
  serialise: float
  add: float
  decrypt: float
  error: float
  rms: float


class Keys(NamedTuple):
  """One key pair.

  Attributes:
    public: TenSEAL's context without the secret key, for hospitals and server.
    secret: TenSEAL's secret key, for the key holder.
    slots: numbers of a ciphertext.
  """

  public: Any
  secret: Any
  slots: int


_measured: list[EncryptedRound] = []  # of this process


def measured() -> tuple[EncryptedRound, ...]:
  """Every encrypted round of this process, in order; those of a run come after those before it."""
  return tuple(_measured)


def totals(rounds: Sequence[EncryptedRound]) -> dict[str, Any]:
  """Sums over rounds for timing.json; {} of none. Times and random bytes are no results."""
  if not rounds:
    return {}
  sums = {
    name: round(sum(getattr(one, name) for one in rounds), 3)
    for name in ("messages", "bytes", "encrypt", "serialise", "add", "decrypt")
  }
  return {"rounds": len(rounds), **sums, "max_error": max(one.error for one in rounds)}


def require_tenseal() -> None:
  """Raises UserError where TenSEAL is not installed."""
  require(
    importlib.util.find_spec("tenseal") is not None,
    "secure.protocol='ckks' needs the package tenseal",
    "run python -m pip install -e '.[he]', or set --config.secure.he=model, which counts the bytes"
    " and takes the same sums without encrypting",
  )


def require_ckks(config: Config, num_clients: int) -> None:
  """Raises UserError where K hospitals cannot encrypt as configured."""
  secure, preset = config.secure, PRESETS[config.secure.he_preset]
  require(
    num_clients >= 2,
    f"secure.protocol='ckks' with {num_clients} hospital: the sum would be its update",
    "use at least two, or secure.protocol=none",
  )
  most = most_hospitals(preset, secure.bits)
  require(
    num_clients <= most,
    f"secure.protocol='ckks': the errors of {num_clients} ciphertexts add up to more than"
    f" {MOST_ERROR:g} steps of the grid with secure.he_preset='{secure.he_preset}', which holds for"
    f" at most {most} hospitals",
    "use secure.he_preset=nvflare, or lower secure.bits",
  )
  if secure.he == "model":
    return
  require_tenseal()
  require(
    jax.process_count() == 1,
    f"secure.he='run' in {jax.process_count()} processes: one process has to see every ciphertext",
    "use one process, or secure.he=model",
  )


def require_modelled(config: Config) -> None:
  """Raises UserError where runs that share a program would encrypt, one after another."""
  require(
    config.secure.protocol != "ckks" or config.secure.he == "model",
    "secure.he='run' in a sweep: all points would wait for the host that encrypts for one of them",
    "use secure.he=model, which gives the same results and counts the same bytes",
  )


def modelled(config: Config) -> Config:
  """The config without encryption on the host, for audits, which make thousands of sums."""
  if config.secure.protocol != "ckks":
    return config
  secure = dataclasses.replace(config.secure, he="model", encrypt_every=1)
  return dataclasses.replace(config, secure=secure)


def gain_of(preset: Preset, bits: int) -> float:
  """Number of CKKS to 1 of the grid, a power of two: sums under 2^(bits - 1) fill the room."""
  return preset.room / 2.0 ** (bits - 1)


def most_hospitals(preset: Preset, bits: int) -> int:
  """The most hospitals whose errors stay within ``MOST_ERROR``; they grow as the root of K."""
  return math.floor((MOST_ERROR * gain_of(preset, bits) / (DEVIATIONS * preset.deviation)) ** 2)


def make_keys(preset: Preset, *, symmetric: bool = False) -> Keys:
  """A new key pair.

  Args:
    preset: parameters.
    symmetric: whether hospitals encrypt with the secret key, as NVFlare's do. Its error is smaller,
      and any hospital can then open the messages of all others.
  """
  tenseal = importlib.import_module("tenseal")
  kinds = tenseal.ENCRYPTION_TYPE
  context = tenseal.context(
    tenseal.SCHEME_TYPE.CKKS,
    preset.degree,
    coeff_mod_bit_sizes=list(preset.primes),
    encryption_type=kinds.SYMMETRIC if symmetric else kinds.ASYMMETRIC,
  )
  context.global_scale = SCALE
  public = context
  if not symmetric:
    written = context.serialize(
      save_public_key=True, save_secret_key=False, save_galois_keys=False, save_relin_keys=False
    )
    public = tenseal.context_from(written)
  return Keys(public=public, secret=context.secret_key(), slots=preset.slots)


class Clock:
  """Seconds by kind of work."""

  def __init__(self) -> None:
    self.seconds = {"encrypt": 0.0, "serialise": 0.0, "add": 0.0, "decrypt": 0.0}

  def time(self, name: str, work: Callable[[], Any]) -> Any:
    """Result of ``work``, whose seconds count as ``name``."""
    begun = time.perf_counter()
    result = work()
    self.seconds[name] += time.perf_counter() - begun
    return result


def add_encrypted(
  messages: Sequence[Sequence[np.ndarray]], keys: Keys, gain: float
) -> tuple[np.ndarray, EncryptedRound]:
  """The sum of whole numbers by way of ciphertexts, of which two are in memory at a time.

  Args:
    messages: of each hospital int32 vectors, which travel one after another.
    keys: the key pair.
    gain: number of CKKS to 1 of the grid.

  Returns:
    int64 sums [D], and measurements.

  Raises:
    RuntimeError: a decrypted sum is not the sum, which no input can bring about that keeps to the
      grid.
  """
  tenseal = importlib.import_module("tenseal")
  numbers = sum(leaf.size for leaf in messages[0])
  sums, clock, size = np.empty(numbers, np.int64), Clock(), 0
  error = squares = 0.0
  for start in range(0, numbers, keys.slots):
    part = slice(start, min(start + keys.slots, numbers))
    total, truth = None, np.zeros(part.stop - part.start, np.int64)
    for message in messages:
      whole = _piece(message, part)
      truth += whole
      values = whole * gain
      sealed = clock.time("encrypt", functools.partial(tenseal.ckks_vector, keys.public, values))
      sent = clock.time("serialise", sealed.serialize)
      size += len(sent)
      # The server's copy, made of bytes alone.
      arrived = clock.time(
        "serialise", functools.partial(tenseal.ckks_vector_from, keys.public, sent)
      )
      if total is None:
        total = arrived
      else:
        clock.time("add", functools.partial(total.add_, arrived))
    assert total is not None
    opened = clock.time("decrypt", functools.partial(total.decrypt, keys.secret))
    found = np.asarray(opened) / gain
    off = np.abs(found - truth)
    error, squares = max(error, float(off.max())), squares + float((off**2).sum())
    sums[part] = np.rint(found).astype(np.int64)
  if not error < 0.5:
    raise RuntimeError(f"CKKS: a decrypted sum is {error:g} steps of the grid off the true one")
  record = EncryptedRound(
    messages=len(messages),
    numbers=numbers,
    bytes=size,
    error=error,
    rms=math.sqrt(squares / numbers),
    **clock.seconds,
  )
  return sums, record


def _piece(vectors: Sequence[np.ndarray], part: slice) -> np.ndarray:
  """Numbers of a part of the vectors as one, without copying the rest."""
  pieces, begin = [], 0
  for vector in vectors:
    low, high = max(part.start - begin, 0), min(part.stop - begin, vector.size)
    if low < high:
      pieces.append(vector[low:high])
    begin += vector.size
  return np.concatenate(pieces)


def encrypted_sum(preset: Preset, bits: int, *, every: int = 1, equal: bool = False) -> Aggregator:
  """The sum of ``modular_sum``, made by encrypting each message on the host.

  Keys are made at the first call, and are those of this aggregator. Its memory counts rounds.

  Args:
    preset: parameters.
    bits: of the modulus of the grid.
    every: rounds from one that encrypts to the next.
    equal: as that of ``modular_sum``.
  """
  plain, gain = modular_sum(bits, equal=equal), gain_of(preset, bits)
  keys = functools.cache(lambda: make_keys(preset))

  @last_answer
  def add(count, weights, *leaves):
    present = np.flatnonzero(weights > 0)
    rows = [leaf.reshape(len(weights), -1) for leaf in leaves]
    if not present.size:
      return np.zeros(sum(row.shape[1] for row in rows), np.uint32)
    sums, record = add_encrypted([[row[k] for row in rows] for k in present], keys(), gain)
    _measured.append(record)
    return sums.astype(np.uint32)  # modulo 2^32

  def combine(messages, weights, joint):
    leaves, structure = jax.tree.flatten(messages)
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]

    def encrypted():
      total = on_host(add, sum(sizes), joint.last, weights, *leaves)
      parts = jnp.split(total, np.cumsum(sizes)[:-1])
      return structure.unflatten(
        [part.reshape(leaf.shape[1:]) for part, leaf in zip(parts, leaves, strict=True)]
      )

    if every == 1:
      return encrypted()
    due = joint.last % every == 0
    return jax.lax.cond(due, encrypted, lambda: plain.combine(messages, weights, joint))

  return plain._replace(
    combine=combine,
    linear=False,
    init=lambda blank: jnp.zeros((), jnp.int32),
    remember=lambda aggregate, last: last + 1,
  )


def last_answer(work: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
  """``work`` that keeps its last answer: the devices of a mesh all ask for the same sum.

  The first of them works while the others wait. An answer is found by the digest of all arguments.
  """
  lock, kept = threading.Lock(), {}

  def answer(*arrays: np.ndarray) -> np.ndarray:
    digest = hashlib.sha256()
    for array in arrays:
      digest.update(np.ascontiguousarray(array).data)
    key = digest.digest()
    with lock:
      if key not in kept:
        found = work(*arrays)
        kept.clear()
        kept[key] = found
      return kept[key]

  return answer


def on_host(work: Callable[..., np.ndarray], size: int, *arrays: jax.Array) -> jax.Array:
  """uint32 [size] that ``work``, a pure function on NumPy arrays, makes of arrays of the program.

  It may be called more often than once: by each device of a mesh, and run by run under vmap.
  """
  shape = jax.ShapeDtypeStruct((size,), jnp.uint32)
  if jax.default_backend() != "cpu":
    return jax.pure_callback(
      lambda *given: work(*map(np.asarray, given)), shape, *arrays, vmap_method="sequential"
    )

  # pure_callback copies its arguments with the threads of the program, which waits for it: on one
  # core, messages of 16 M numbers never arrived. This one reads them where they lie.
  def fill(context, result, *given):
    np.asarray(result)[...] = work(*map(np.asarray, given))

  from jax.experimental.buffer_callback import buffer_callback  # may move: needed for CKKS alone

  return buffer_callback(fill, shape, vmap_method="sequential")(*arrays)


def ciphertexts(name: str, config: Config) -> Transform:
  """Counts bytes of ciphertexts, and says that the server sees sums only; numbers stay as they are.

  Args:
    name: of the preset.
    config: validated config.
  """
  secure = config.secure

  def facts(state):
    return {
      "he_preset": name,
      "he": secure.he,
      **({"encrypt_every": secure.encrypt_every} if secure.he == "run" else {}),
    }

  def wire(message):
    # Sums need every number in its place: a message that names some of them is whole again.
    numbers = message.dense if message.index_bits else message.sent
    size = message_size(PRESETS[name], numbers)
    # In a ciphertext no number has bits of its own.
    return message._replace(sent=numbers, value_bits=0, index_bits=0, beside=message.beside + size)

  return Transform(
    encode=lambda message, kept, state, sender: (message, kept, ()),
    decode=lambda aggregate, state, tally, receiver: (aggregate, state),
    wire=wire,
    trust=SUM,
    facts=facts,
    clients=True,
  )


def message_size(preset: Preset, numbers: int) -> int:
  """Bytes of a message of so many numbers, to 1 in 1,000: serialised ciphertexts are compressed."""
  return -(-numbers // preset.slots) * preset.ciphertext_bytes


class Cost(NamedTuple):
  """Estimated cost of a run's encryption.

  Attributes:
    message: bytes a hospital and round.
    total: bytes of all hospitals and rounds.
    hospital: seconds of a hospital a round, to encrypt.
    host: seconds of the simulation, which does the work of all.
  """

  message: int
  total: int
  hospital: float
  host: float


def estimate(config: Config, message: int, senders: float) -> Cost:
  """Estimates a run's encryption from the measured constants of its preset.

  Args:
    config: validated config.
    message: bytes of a message.
    senders: expected hospitals of a round.
  """
  secure, preset = config.secure, PRESETS[config.secure.he_preset]
  rounds = config.server.num_rounds
  millions = message / preset.ciphertext_bytes * preset.slots / 1e6
  executed = math.ceil(rounds / secure.encrypt_every) if secure.he == "run" else 0
  a_round = millions * (senders * (preset.seal_seconds + preset.add_seconds) + preset.open_seconds)
  return Cost(
    message=message,
    total=round(message * senders * rounds),
    hospital=millions * preset.seal_seconds,
    host=a_round * executed,
  )
