"""Compression: what each kind promises, its bytes, its memories, and what it is refused with."""

import functools
import json
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import Config, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.core.exchange_sections import CompressionConfig
from fedjax_med.core.keys import base_key
from fedjax_med.core.validation import validate
from fedjax_med.exchange.compression.compressor import BLOCK
from fedjax_med.exchange.compression.feedback import compressed, sketched
from fedjax_med.exchange.compression.packing import Field, pack, unpack
from fedjax_med.exchange.compression.quantise import quantise
from fedjax_med.exchange.compression.randk import randk
from fedjax_med.exchange.compression.registry import (
  KINDS,
  compression_notes,
  compression_words,
  require_size,
)
from fedjax_med.exchange.compression.sign import sign
from fedjax_med.exchange.compression.sketch import median, places, sketch
from fedjax_med.exchange.compression.topk import topk
from fedjax_med.exchange.compression.way_down import differences
from fedjax_med.exchange.registry import make_exchange
from fedjax_med.exchange.transform import Receiver, Sender, Wire
from fedjax_med.federated.algorithm import ClientDelta, plain_hyper
from tests.exchange import parts  # noqa: F401  (registers the aggregator)
from tests.exchange.make_fedjax_golden import BITS, GOLDEN, golden_vector
from tests.federated.test_conformance import rounds
from tests.federated.toy import make_clients, make_federation, make_hyper, make_pool
from tests.privacy.test_client_level import level
from tests.running import run

KEY = base_key(3)
UNBIASED = {"int 2": quantise(2), "int 3": quantise(3), "int 8": quantise(8), "randk": randk(0.25)}
CONTRACTIONS = {
  "int 2": quantise(2, nearest=True),
  "int 8": quantise(8, nearest=True),
  "sign": sign(),
  "topk 32": topk(0.1, 32),
  "topk 16": topk(0.1, 16),
}


def make_config(**changes):
  config = Config()
  for path, value in changes.items():
    set_field(config, path.replace("__", "."), value)
  return config


def vectors(count, size, seed=0):
  """Normal vectors whose numbers have unlike sizes."""
  random = np.random.default_rng(seed)
  values = random.normal(size=(count, size)) * np.exp(random.normal(size=(count, size)))
  return values.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def through(compressor, vector, key):
  return compressor.decode(compressor.encode(vector, key), vector.shape[0], key)


@functools.cache
def drawn(name, count, size, draws):
  """[count, draws, size] decoded vectors of an unbiased kind."""
  keys = jax.random.split(KEY, draws)
  each = jax.vmap(functools.partial(through, UNBIASED[name]), (None, 0))
  found = jax.jit(lambda stack: jax.lax.map(lambda vector: each(vector, keys), stack))
  return np.asarray(found(jnp.asarray(vectors(count, size))))


def variance_of(name, vector):
  """Variance of each decoded number, from the definition of the kind."""
  if name == "randk":
    return np.square(vector, dtype=np.float64) * (1 / 0.25 - 1)
  step = np.abs(vector).max() / (2 ** (int(name.split()[1]) - 1) - 1)
  rest = np.abs(vector.astype(np.float64)) / step % 1
  return step**2 * rest * (1 - rest)


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_of_4096_draws_is_the_vector_to_four_standard_errors(name):
  assert UNBIASED[name].unbiased
  found = drawn(name, 100, 12, 4096).mean(1, dtype=np.float64)
  for vector, mean in zip(vectors(100, 12), found, strict=True):
    allowed = 4 * np.sqrt(variance_of(name, vector) / 4096) + 1e-5 * np.abs(vector).max()
    assert (np.abs(mean - vector) <= allowed).all()


@pytest.mark.parametrize("name", UNBIASED)
def test_the_variance_is_within_the_published_bound(name):
  size, draws = 700, 64  # a block and a part
  found = drawn(name, 8, size, draws)
  for vector, decoded in zip(vectors(8, size), found, strict=True):
    errors = np.square(decoded - vector, dtype=np.float64).sum(1)
    norm = np.square(vector, dtype=np.float64).sum()
    if name == "randk":  # Its variance is the bound.
      bound = (1 / 0.25 - 1) * norm + 4 * errors.std() / np.sqrt(draws)
    else:
      levels = 2 ** (int(name.split()[1]) - 1) - 1
      bound = min(size / levels**2, np.sqrt(size) / levels) * norm
    assert 0 < errors.mean() <= bound


@pytest.mark.parametrize("bits", BITS)
def test_whole_numbers_are_those_of_fedjax_for_the_same_draws(bits):
  expected = np.asarray(json.loads(GOLDEN.read_text())[f"uniform_stochastic_quantize.{bits}"])
  vector, key = golden_vector(), jax.random.key(bits, impl="threefry2x32")
  found = np.asarray(through(quantise(bits), jnp.asarray(vector), key))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(vector).max())


def test_signs_are_those_of_fedjax_drive_and_the_scales_multiply_to_the_mean_square():
  expected = np.asarray(json.loads(GOLDEN.read_text())["drive"])
  vector = golden_vector()
  found = np.asarray(through(sign(), jnp.asarray(vector), KEY))
  np.testing.assert_array_equal(np.sign(found), np.sign(expected))
  np.testing.assert_allclose(found * expected, np.square(vector).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.parametrize("size", [1, 40, BLOCK + 88])
def test_a_contraction_takes_off_its_part_of_any_vector(name, size):
  compressor = CONTRACTIONS[name] if size > 1 or "topk" not in name else topk(1.0, int(name[5:]))
  assert compressor.contraction
  share = max(1, int(0.1 * size)) / size if "topk" in name else 1 / size
  decode = functools.partial(through, compressor)
  one = np.zeros((1, size), np.float32)
  one[0, -1] = -3.0
  for vector in (*vectors(5, size), *one, np.ones(size, np.float32)):
    error = np.square(np.asarray(decode(vector, KEY)) - vector, dtype=np.float64).sum()
    norm = np.square(vector, dtype=np.float64).sum()
    assert error <= ((1 - share) + 1e-6) * norm


def test_unscaled_randk_contracts_in_the_mean_over_draws():
  compressor, vector = randk(0.25, unscaled=True), vectors(1, 40)[0]
  assert compressor.contraction
  decode = jax.jit(jax.vmap(functools.partial(through, compressor), (None, 0)))
  found = np.asarray(decode(vector, jax.random.split(KEY, 4096)))
  assert ((found != 0).sum(1) == 10).all()
  errors = np.square(found - vector, dtype=np.float64).sum(1)
  norm = np.square(vector, dtype=np.float64).sum()
  assert abs(errors.mean() - 0.75 * norm) <= 4 * errors.std() / np.sqrt(4096)


@pytest.mark.parametrize("bits", [16, 32])
def test_topk_keeps_exactly_k_of_ties_the_first_as_a_stable_sort_does(bits):
  random = np.random.default_rng(1)
  encode = jax.jit(topk(0.2, bits).encode)
  for trial in range(20):
    vector = random.integers(-3, 4, 50).astype(np.float32)
    vector[trial] = 0
    values, indices, *_ = encode(jnp.asarray(vector), KEY)
    expected = np.argsort(-np.abs(vector), kind="stable")[:10]
    assert sorted(np.asarray(indices).tolist()) == sorted(expected.tolist())
    assert len(values) == 10
  zeros = np.asarray(encode(jnp.zeros(50), KEY)[1])
  assert sorted(zeros.tolist()) == list(range(10))


def test_small_and_large_updates_survive_sixteen_bits():
  for size in (1e-20, 1e-9, 1e9, 1e30):
    vector = jnp.asarray(vectors(1, 40)[0] * np.float32(size))
    found, exact = (through(topk(0.5, bits), vector, KEY) for bits in (16, 32))
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-6 * float(jnp.abs(exact).max()))


def kind_for(name, size, **changes):
  share = {1: 1.0, 7: 0.3}.get(size, 0.01)
  rows, columns = {1: (1, 1), 7: (1, 5)}.get(size, (5, 400))
  section = CompressionConfig(kind=name, share=share, rows=rows, columns=columns, **changes)
  return KINDS[name](section, False)


PACKED = [
  ("int", {"bits": 2}),
  ("int", {"bits": 5}),
  ("int", {"bits": 8}),
  ("int", {"bits": 16}),
  ("sign", {}),
  ("topk", {"value_bits": 16}),
  ("topk", {"value_bits": 32}),
  ("randk", {}),
  ("sketch", {}),
]


@pytest.mark.parametrize("size", [1, 7, 25_471])
@pytest.mark.parametrize(("name", "changes"), PACKED)
def test_a_packed_message_has_the_reported_bytes_and_comes_back_bit_for_bit(name, changes, size):
  compressor, vector = kind_for(name, size, **changes), jnp.asarray(vectors(1, size)[0])
  message = jax.jit(compressor.encode)(vector, KEY)
  data = pack(message, compressor.fields(size))
  assert len(data) == compressor.wire(size).size
  back = unpack(zlib.decompress(zlib.compress(data)), compressor.fields(size))
  for array, other in zip(message, back, strict=True):
    np.testing.assert_array_equal(np.asarray(array), other, strict=True)
  decode = jax.jit(lambda message: compressor.decode(message, size, KEY))
  np.testing.assert_array_equal(decode(tuple(map(jnp.asarray, back))), decode(message))


def test_eight_bits_take_at_most_1_01_bytes_a_number_and_topk_60_times_less_than_float32():
  assert quantise(8).wire(25_471).size <= 1.01 * 25_471
  for bits in (16, 32):
    assert 60 * topk(0.01, bits).wire(25_471).size <= 4 * 25_471


def test_packing_refuses_what_does_not_fit():
  fields = (Field(length=3, bits=2, dtype="uint8"),)
  with pytest.raises(UserError, match="needs more than 2 bits"):
    pack((np.array([1, 2, 4], np.uint8),), fields)
  with pytest.raises(UserError, match="2 numbers where 3 are due"):
    pack((np.array([1, 2], np.uint8),), fields)
  with pytest.raises(UserError, match="2 bytes where 1 are due"):
    unpack(b"ab", fields)
  assert pack((np.array([1, 2, 3], np.uint8),), fields) == bytes([0b01101100])


def sender(round=0):
  fold = jax.random.fold_in
  client = jax.tree.map(lambda leaf: leaf[0], make_clients())
  return Sender(
    client=client,
    hyper=plain_hyper(),
    key=fold(KEY, round),
    common_key=fold(base_key(8), round),
    seated=jnp.ones(1, bool),
    round=jnp.asarray(round),
  )


def receiver(round=0):
  key, seated = jax.random.fold_in(base_key(8), round), jnp.ones(1, bool)
  return Receiver(
    weight=jnp.ones(()),
    hyper=plain_hyper(),
    key=key,
    common_key=key,
    seated=seated,
    arrived=seated,
    run_key=key,
    round=jnp.asarray(round),
  )


def update_of(vector):
  return ClientDelta(
    params=jnp.asarray(vector), state=jnp.asarray([0.1, 0.2]), extra=jnp.asarray(17.0)
  )


def client_rounds(transform, updates):
  """What a client sent [rounds, d], and its memory after each round [rounds, d]."""
  kept, sent, memories = transform.init_client(update_of(updates[0])), [], []
  state = transform.init_server(update_of(updates[0]))
  encode = jax.jit(transform.encode)
  for round, update in enumerate(updates):
    message, kept, _ = encode(update_of(update), kept, state, sender(round))
    np.testing.assert_array_equal(message.extra, np.float32(17))
    np.testing.assert_array_equal(np.asarray(message.state), np.asarray([0.1, 0.2], np.float32))
    sent.append(np.asarray(message.params))
    memories.append(np.asarray(kept))
  return np.stack(sent), np.stack(memories)


@pytest.mark.parametrize("name", ["int 2", "sign", "topk 16", "randk"])
def test_what_was_sent_and_the_memory_make_up_all_updates_of_50_rounds(name):
  compressor = {**CONTRACTIONS, "randk": randk(0.1, unscaled=True)}[name]
  updates = vectors(50, 60)
  sent, memory = client_rounds(compressed(compressor, "ef"), updates)
  total = updates.sum(0, dtype=np.float64)
  np.testing.assert_allclose(
    sent.sum(0, dtype=np.float64) + memory[-1], total, rtol=1e-5, atol=1e-5 * np.abs(total).max()
  )
  assert np.linalg.norm(memory[-1]) < np.linalg.norm(updates, axis=1).max() * 60


def numpy_topk(vector, count):
  kept = np.zeros_like(vector)
  first = np.argsort(-np.abs(vector), kind="stable")[:count]
  kept[first] = vector[first]
  return kept


def test_ef21_sends_the_states_of_its_numpy_loop():
  updates, own = vectors(50, 60), np.zeros(60, np.float32)
  sent, memory = client_rounds(compressed(topk(0.1, 32), "ef21"), updates)
  for update, got, kept in zip(updates, sent, memory, strict=True):
    own = own + numpy_topk(update - own, 6)
    np.testing.assert_array_equal(got, own)
    np.testing.assert_array_equal(kept, own)


def test_without_feedback_nothing_is_kept_and_what_is_left_out_is_lost():
  transform = compressed(topk(0.1, 32), "none")
  assert transform.init_client(update_of(np.ones(60))) == ()
  updates = vectors(2, 60)
  message, _, _ = jax.jit(transform.encode)(update_of(updates[1]), (), (), sender())
  np.testing.assert_array_equal(message.params, numpy_topk(updates[1], 6))


def test_an_update_that_is_not_finite_is_sent_as_such_and_leaves_the_memory_as_it_was():
  updates = vectors(3, 60)
  updates[1, 7] = np.inf
  for compressor in (topk(0.1, 16), randk(0.1, unscaled=True), sign()):
    sent, memory = client_rounds(compressed(compressor, "ef"), updates)
    assert not np.isfinite(sent[1]).any()
    np.testing.assert_array_equal(memory[1], memory[0])
    assert np.isfinite(sent[2]).all()


def test_the_error_of_messages_is_their_mean_share_of_the_square():
  transform, updates = compressed(topk(0.1, 32), "none"), vectors(3, 60)
  state, encode = transform.init_server(update_of(updates[0])), jax.jit(transform.encode)
  for update in updates:
    _, _, tally = encode(update_of(update), (), state, sender())
    _, state = transform.decode(update_of(update), state, tally, receiver())
  shares = [np.square(u - numpy_topk(u, 6)).sum() / np.square(u).sum() for u in updates]
  assert transform.facts(state)["compression_error"] == pytest.approx(np.mean(shares), rel=1e-5)
  zero = encode(update_of(np.zeros(60, np.float32)), (), state, sender())[2]
  assert [float(value) for value in zero] == [0, 1]


def test_tables_of_a_sketch_add_up_and_their_places_are_spread():
  compressor, (one, other) = sketch(3, 11, 0.1), vectors(2, 60)
  encode = jax.jit(compressor.encode)
  tables = [encode(jnp.asarray(v), KEY)[0] for v in (one, other, one + other)]
  np.testing.assert_allclose(tables[0] + tables[1], tables[2], rtol=1e-4, atol=1e-5)
  where = places(KEY, 2, 50, 50_000)
  columns = (np.arange(50)[None, None] + np.asarray(where.starts)[..., None]) % 50
  counts = np.bincount(columns[0].reshape(-1), minlength=50)
  assert (counts == 1000).all()
  assert abs(np.asarray(where.signs).mean(axis=(1, 2))).max() < 4 / np.sqrt(50_000)
  meet = (columns[0, :-1, 0] == columns[0, 1:, 0]).mean()  # two stretches, in 1 of 50 cases
  assert abs(meet - 1 / 50) < 4 * np.sqrt(0.02 * 0.98 / 999)
  assert (where.signs[0] != where.signs[1]).any()


def test_a_sketch_finds_the_large_numbers_of_a_mean_by_the_median_of_its_rows():
  vector = vectors(1, 2000)[0] * 0.01
  large = [3, 700, 701, 1999]
  vector[large] = [5, -4, 3, -6]
  found = np.asarray(through(sketch(5, 200, 4 / 2000), jnp.asarray(vector), KEY))
  assert np.flatnonzero(found).tolist() == large
  np.testing.assert_allclose(found[large], vector[large], atol=0.5)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_the_median_of_rows_is_that_of_numpy(rows):
  values = vectors(rows, 50)
  np.testing.assert_allclose(median(jnp.asarray(values)), np.median(values, axis=0), rtol=1e-6)


def test_the_server_of_a_sketch_feeds_back_what_it_has_not_decoded():
  compressor = sketch(3, 15, 0.1)
  transform, updates = sketched(compressor, "ef"), vectors(20, 60)
  state = transform.init_server(update_of(updates[0]))
  assert transform.init_client(update_of(updates[0])) == ()
  tables, decoded = np.zeros(45), np.zeros(60, np.float32)
  encode, decode = jax.jit(transform.encode), jax.jit(transform.decode)
  for round, update in enumerate(updates):
    message, _, tally = encode(update_of(update), (), state, sender(round))
    found, state = decode(message, state, tally, receiver(round))
    tables, decoded = tables + np.asarray(message.params), decoded + np.asarray(found.params)
    assert (np.asarray(found.params) != 0).sum() == 6
  # All rounds share the places of the first.
  again = compressor.encode(jnp.asarray(decoded), receiver(0).common_key)[0]
  np.testing.assert_allclose(np.asarray(again) + np.asarray(state.missed), tables, atol=1e-3)


def test_the_way_down_sends_differences_as_its_numpy_loop_does():
  down, weights = differences(topk(0.1, 32)), vectors(30, 60).cumsum(0)
  held, send = down.init(jnp.asarray(weights[0])), jax.jit(down.send)
  expected = weights[0]
  for params in weights:
    got, held = send(jnp.asarray(params), held, KEY)
    expected = expected + numpy_topk(params - expected, 6)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(held, expected)
  got = jnp.zeros(())
  for _ in range(10):  # the model stands still, and clients catch up
    got, held = send(jnp.asarray(weights[-1]), held, KEY)
  np.testing.assert_allclose(got, weights[-1], rtol=1e-5)
  assert down.wire(Wire(dense=60, sent=60)).size == topk(0.1, 32).wire(60).size


DOWN = make_exchange(make_config(compression__download="int", compression__bits=4), 3)


def test_a_compressed_way_down_is_the_same_in_layouts_and_resumed_and_learns():
  federation = make_federation(exchange=DOWN)
  whole, _ = rounds(federation, 40)
  half, _ = rounds(federation, 20)
  chex.assert_trees_all_equal(whole, rounds(federation, 20, state=half)[0])
  _, last = rounds(federation, 5, state=whole)
  assert float(last.clients.tally.sum() / last.clients.examples.sum()) > 0.9
  expected, _ = rounds(federation, 3)
  found, _ = rounds(make_federation(exchange=DOWN, chunk=1), 3)
  chex.assert_trees_all_close(jax.device_get(expected), jax.device_get(found), rtol=2e-5, atol=1e-6)
  assert not np.array_equal(found.traffic.held, found.server.params)


def test_bytes_are_those_of_the_weights_as_sent_and_of_the_rest_as_it_is():
  wire = Wire(dense=25_471 + 3, sent=25_471 + 3, apart=3)
  for changes in ({"kind": "int"}, {"kind": "topk"}, {"kind": "sketch", "columns": 300}):
    config = make_config(**{f"compression__{name}": value for name, value in changes.items()})
    own = KINDS[config.compression.kind](config.compression, False).wire(25_471)
    assert make_exchange(config, 3).transform.wire(wire).size == own.size + 12
  # In a sum that is hidden or on a grid all numbers travel, and those of a table stay as few.
  grid = make_config(compression__kind="topk", secure__protocol="grid")
  assert make_exchange(grid, 3).transform.wire(wire).size == 4 * 25_474
  set_field(grid, "compression.kind", "sketch")
  assert make_exchange(grid, 3).transform.wire(wire).size == 4 * 5003


@pytest.mark.parametrize("kind", ["topk", pytest.param("sketch", marks=pytest.mark.slow)])
def test_under_client_level_privacy_the_clip_comes_last_and_nothing_is_counted(kind):
  config = make_config(
    compression__kind=kind,
    compression__share=0.2,
    compression__rows=3,
    compression__columns=8,
    compression__error_feedback="ef",
    client_privacy__mechanism="dp_fedavg",
    client_privacy__clip_norm=1e-3,
  )
  exchange = make_exchange(config, 3)
  initial, block, _ = make_federation(client_level=True, exchange=exchange)
  start = initial()
  before = np.asarray(start.server.params)
  hyper = make_hyper()._replace(client_level=level())
  after, _ = block(start, make_clients(), make_pool(), hyper, base_key(7), jnp.asarray(1))
  moved = np.asarray(after.server.params) - before
  assert np.linalg.norm(moved) > 0
  if kind == "topk":  # the mean of three updates of norm C at most
    assert np.linalg.norm(moved) <= 1e-3 * (1 + 1e-5)
  assert exchange.transform.facts(jax.device_get(after.exchange)) == {}


SKETCH = {"compression__kind": "sketch", "compression__columns": 8}
REFUSED = [
  ({"compression__kind": "int", "compression__bits": 1}, r"bits=1 must be at least 2 and at most"),
  ({"compression__kind": "int", "compression__bits": 17}, r"bits=17 must be at least 2"),
  ({"compression__kind": "topk", "compression__share": 0.0}, r"share=0.0 must be above 0"),
  ({"compression__kind": "topk", "compression__share": 1.1}, r"share=1.1 must be above 0"),
  ({"compression__kind": "topk", "compression__value_bits": 20}, r"value_bits=20 is .*; use 16 or"),
  ({"compression__kind": "zip"}, r"compression.kind='zip' is unknown"),
  ({"compression__bits": 4}, r"read with compression.kind or compression.download=int only"),
  ({"compression__error_feedback": "ef"}, r"error_feedback='ef' is read with compression.kind="),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_bad_values_are_refused_before_anything_is_made(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    validate(make_config(**changes))


TOGETHER = [
  ({**SKETCH, "compression__error_feedback": "ef21"}, r"'ef21' with compression.kind='sketch'"),
  ({"compression__kind": "topk", "secure__protocol": "masking"}, r"cannot be hidden in a sum"),
  ({"compression__kind": "int", "secure__protocol": "ckks"}, r"cannot be hidden in a sum"),
  (
    {
      "compression__kind": "topk",
      "compression__error_feedback": "ef",
      "secure__protocol": "masking",
    },
    r"nor any error be left to feed back; use",
  ),
  ({**SKETCH, "server__aggregator": "middle"}, r"'middle' with compression.kind='sketch'"),
  (
    {"compression__download": "int", "server__participation": "poisson"},
    r"a hospital that was absent lacks the differences",
  ),
  ({"compression__download": "topk", "server__algorithm": "fedper"}, r"only a part of the weights"),
]


@pytest.mark.parametrize(("changes", "sentence"), TOGETHER)
def test_parts_that_do_not_go_together_are_refused(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    make_exchange(make_config(**changes), 3)


def test_rules_that_look_at_each_update_see_the_decoded_ones():
  changes = {"compression__kind": "topk", "server__aggregator": "middle"}
  assert not make_exchange(make_config(**changes), 3).aggregator.linear


def test_sizes_that_make_no_message_are_refused():
  with pytest.raises(UserError, match=r"share=0.01 of 34 numbers is 0; use 0.029 to 1"):
    require_size(CompressionConfig(kind="topk"), 34)
  with pytest.raises(UserError, match=r"share=0.01 of 34 numbers is 0"):
    require_size(CompressionConfig(download="randk"), 34)
  with pytest.raises(UserError, match=r"a sketch of 5000 numbers, for 4000 weights; use fewer"):
    require_size(CompressionConfig(kind="sketch"), 4000)
  require_size(CompressionConfig(kind="sketch"), 25_471)


def test_signs_without_feedback_and_the_variants_that_feedback_takes_are_said():
  plain = compression_notes(CompressionConfig(kind="sign"))
  assert len(plain) == 1
  assert "without error feedback" in plain[0]
  assert compression_notes(CompressionConfig(kind="sign", error_feedback="ef")) == []
  (note,) = compression_notes(CompressionConfig(kind="randk", error_feedback="ef"))
  assert "unscaled" in note
  assert compression_words(CompressionConfig()) == {}
  words = compression_words(CompressionConfig(kind="int", error_feedback="ef21", download="sign"))
  assert "rounded to the nearest level" in words["up"]
  assert "signs" in words["down"]


@pytest.mark.slow
def test_a_run_writes_its_bytes_its_error_what_was_done_and_the_warning(tmp_path):
  section = CompressionConfig(kind="sign", download="int")
  summary = run(tmp_path, compression=section, server__num_rounds=2, execution__devices=1)
  size = summary["num_parameters"]
  assert summary["bytes_up"] == sign().wire(size).size
  assert summary["bytes_down"] == quantise(8).wire(size).size
  both = summary["bytes_up"] + summary["bytes_down"]
  assert summary["megabytes"] == pytest.approx(2 * 3 * both / 1e6, abs=1e-6)
  assert 0 < summary["exchange"]["compression_error"] < 1
  config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
  assert config["exchange"]["compression"] == compression_words(section)
  assert compression_notes(section)[0] in config["notes"]
  statement = (tmp_path / "privacy_statement.md").read_text(encoding="utf-8")
  for sentence in (
    "Updates are compressed by sending signs, times the mean absolute value of each block. ",
    "Hospitals get the model as differences to what hospitals hold: whole numbers of 8 bits",
    "ε is the same as without compression",
  ):
    assert sentence in statement
