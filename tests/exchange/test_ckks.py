"""CKKS carries whole numbers: sums are those of the grid bit for bit, and bytes are those it sends.

Tests of the scheme itself need the extra he; those of rules and counts do not.
"""

import importlib.util
import io
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from fedjax_med.core.config import Config, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.exchange import ckks
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.fixed_point import modular_sum
from fedjax_med.exchange.registry import make_exchange
from fedjax_med.exchange.transform import SUM, Wire
from fedjax_med.federated.algorithm import ClientDelta
from fedjax_med.prepare.case import with_plain_server
from fedjax_med.run import console as terminal
from fedjax_med.run.statement import _exchange_sentences
from fedjax_med.sweep.points import configure
from tests.exchange.test_conformance import EXCHANGES
from tests.federated.test_conformance import rounds
from tests.federated.toy import KEY, make_clients, make_federation, make_hyper, make_pool
from tests.privacy.test_client_level import level
from tests.running import run

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "ckks-cpu.json"
WHY = "needs the extra: pip install -e '.[he]'"
encrypts = pytest.mark.skipif(importlib.util.find_spec("tenseal") is None, reason=WHY)
presets = pytest.mark.parametrize("name", ckks.PRESETS)


def config_of(**changes) -> Config:
  """A config with ``secure.protocol=ckks``, changed as by ``secure__he="model"``."""
  config = Config()
  for path, value in {"secure__protocol": "ckks", **changes}.items():
    set_field(config, path.replace("__", "."), value)
  return config


def sum_of(aggregator, messages, weights):
  """What the server makes of messages [n, ...] in the first round."""
  joint = Joint(key=KEY, last=jnp.zeros((), jnp.int32))
  joined = jax.jit(lambda m, w: aggregator.combine(m, w, joint))(messages, jnp.asarray(weights))
  return aggregator.finish(joined, jnp.sum(jnp.asarray(weights)))


def whole_numbers(numbers, hospitals=3, seed=0):
  """Messages whose largest sums just fit into 32 bits."""
  most, random = 2**31 // hospitals - 1, np.random.default_rng(seed)
  values = random.integers(-most, most + 1, (hospitals, numbers))
  values[:, :2] = [most, -most]
  return ClientDelta(
    params=jnp.asarray(values, jnp.int32),
    state=jnp.asarray(values[:, :3], jnp.int32),
    extra=jnp.asarray(values[:, 0], jnp.int32),
  )


@encrypts
@presets
def test_the_encrypted_sum_is_the_sum_of_whole_numbers_and_its_error_under_a_quarter_step(name):
  preset, before = ckks.PRESETS[name], len(ckks.measured())
  messages, weights = whole_numbers(preset.slots + 5), [0.2, 0.5, 0.3]
  found = sum_of(ckks.encrypted_sum(preset, 32), messages, weights)
  expected = jax.tree.map(lambda leaf: np.asarray(leaf, np.int64).sum(0), messages)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  (record,) = ckks.measured()[before:]
  assert (record.messages, record.numbers) == (3, preset.slots + 9)
  assert 0 < record.rms < record.error < ckks.MOST_ERROR / 10
  # Parameters and state and extra share ciphertexts: two a hospital.
  assert record.bytes / 3 == pytest.approx(ckks.message_size(preset, record.numbers), rel=0.02)


@encrypts
@presets
def test_bytes_a_parameter_are_those_of_the_library(name):
  preset, numbers = ckks.PRESETS[name], 75_000
  keys, slots = ckks.make_keys(preset), preset.slots
  _, record = ckks.add_encrypted([[np.arange(slots, dtype=np.int32)]], keys, 2.0**-19)
  assert record.bytes == pytest.approx(preset.ciphertext_bytes, rel=0.02)
  low, high = {"sum": (30, 31), "nvflare": (59, 60)}[name]
  assert low < ckks.message_size(preset, numbers) / numbers < high


@encrypts
def test_a_sum_that_would_round_to_another_one_ends_the_program():
  cramped = ckks.PRESETS["sum"]._replace(room=2.0**-12)
  with pytest.raises(RuntimeError, match="steps of the grid off the true one"):
    jax.block_until_ready(
      sum_of(ckks.encrypted_sum(cramped, 32), whole_numbers(9), [0.2, 0.5, 0.3])
    )


@encrypts
def test_an_absent_hospital_is_not_encrypted_and_counts_nothing():
  aggregator, messages = ckks.encrypted_sum(ckks.PRESETS["sum"], 32), whole_numbers(7)
  before = len(ckks.measured())
  found = sum_of(aggregator, messages, [0.4, 0.0, 0.6])
  np.testing.assert_array_equal(found.params, messages.params[0] + messages.params[2])
  assert [one.messages for one in ckks.measured()[before:]] == [2]
  nobody = sum_of(aggregator, messages, [0.0, 0.0, 0.0])
  assert not np.any(nobody.params)
  assert len(ckks.measured()) == before + 1


def test_neither_server_nor_hospitals_can_open_a_ciphertext_and_equal_messages_look_unlike():
  tenseal = pytest.importorskip("tenseal", reason=WHY)
  keys = ckks.make_keys(ckks.PRESETS["sum"])
  sealed = [tenseal.ckks_vector(keys.public, np.ones(4)).serialize() for _ in range(2)]
  assert sealed[0] != sealed[1]
  assert not keys.public.is_private()
  received = tenseal.ckks_vector_from(keys.public, sealed[0])
  with pytest.raises(ValueError, match="secret_key"):
    received.decrypt()
  np.testing.assert_allclose(received.decrypt(keys.secret), 1, atol=1e-6)
  other = ckks.make_keys(ckks.PRESETS["sum"])
  assert np.abs(np.subtract(received.decrypt(other.secret), 1)).min() > 1e-3


def trained(exchange, number, **settings):
  """Weights after some rounds of the toy federation."""
  hyper = make_hyper(participation_rate=0.5) if "cohort_cap" in settings else None
  state, _ = rounds(make_federation(exchange=exchange, **settings), number, hyper=hyper)
  return np.asarray(state.server.params)


@encrypts
def test_an_encrypted_training_is_that_on_the_grid_bit_for_bit():
  expected = trained(EXCHANGES["grid"], 3)
  np.testing.assert_array_equal(trained(EXCHANGES["ckks"], 3), expected)


@encrypts
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"secure__encrypt_every": 2, "secure__bits": 16}])
def test_an_encrypted_training_of_drawn_cohorts_is_that_on_the_grid_bit_for_bit(changes):
  settings = {"cohort_cap": 3, "chunk": 1}
  bits = {name: value for name, value in changes.items() if name == "secure__bits"}
  plain = make_exchange(config_of(secure__protocol="grid", **bits), 3)
  found = trained(make_exchange(config_of(**changes), 3), 6, **settings)
  np.testing.assert_array_equal(found, trained(plain, 6, **settings))


@pytest.mark.slow
@encrypts
def test_the_devices_of_a_mesh_share_one_encryption_a_round():
  before = len(ckks.measured())
  trained(EXCHANGES["ckks"], 3, chunk=2, devices=2)
  assert [one.messages for one in ckks.measured()[before:]] == [3, 3, 3]


@encrypts
def test_between_encrypted_rounds_nothing_is_encrypted_also_after_a_resume():
  exchange = make_exchange(config_of(secure__encrypt_every=3), 3)
  federation, before = make_federation(exchange=exchange), len(ckks.measured())
  half = jax.block_until_ready(rounds(federation, 2)[0])
  assert len(ckks.measured()) == before + 1  # round 0
  whole, _ = rounds(federation, 3, state=half)
  np.testing.assert_array_equal(whole.server.params, trained(EXCHANGES["grid"], 5))
  assert len(ckks.measured()) == before + 2  # of rounds 2, 3 and 4 the second


@encrypts
@pytest.mark.slow
def test_under_client_level_privacy_the_encrypted_mean_is_that_on_the_grid():
  found, hyper = [], make_hyper()._replace(client_level=level())
  for protocol in ("grid", "ckks"):
    config = config_of(secure__protocol=protocol, client_privacy__mechanism="dp_fedavg")
    initial, block, _ = make_federation(client_level=True, exchange=make_exchange(config, 3))
    state, _ = block(initial(), make_clients(), make_pool(), hyper, KEY, jnp.asarray(2))
    found.append(np.asarray(state.server.params))
  np.testing.assert_array_equal(*found)


def test_a_modelled_sum_is_that_of_the_grid_and_says_what_it_would_send():
  modelled = make_exchange(config_of(secure__he="model"), 3)
  messages, weights = whole_numbers(9), [0.2, 0.5, 0.3]
  chex.assert_trees_all_equal(
    sum_of(modelled.aggregator, messages, weights), sum_of(modular_sum(32), messages, weights)
  )
  assert modelled.transform.trust == SUM
  assert modelled.transform.wire(Wire(dense=4097, sent=4097)).size == 3 * 61_741
  sparse = Wire(dense=4097, sent=5, index_bits=13)
  assert modelled.transform.wire(sparse).size == 3 * 61_741  # every number is in its place
  large = make_exchange(config_of(secure__he="model", secure__he_preset="nvflare"), 3)
  assert large.transform.wire(Wire(dense=4097, sent=4097)).size == 2 * 235_078


def test_without_the_extra_a_run_that_encrypts_is_refused_by_its_name(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"needs the package tenseal; run .* -e '\.\[he\]', or set"):
    make_exchange(config_of(), 3)
  assert make_exchange(config_of(secure__he="model"), 3).aggregator.linear


def test_sweeps_several_processes_single_hospitals_and_too_many_are_refused(monkeypatch):
  with pytest.raises(UserError, match=r"secure.he='run' in a sweep: .*; use secure.he=model"):
    configure(config_of(), {"seed": 1}, ["sampling"])
  assert configure(config_of(secure__he="model"), {"seed": 1}, ["sampling"]).seed == 1
  with pytest.raises(UserError, match=r"with 1 hospital: the sum would be its update; use at leas"):
    make_exchange(config_of(secure__he="model"), 1)
  with pytest.raises(UserError, match=r"2000 ciphertexts add up .* at most 1\d\d\d hospitals; use"):
    make_exchange(config_of(secure__he="model"), 2000)
  make_exchange(config_of(secure__he="model", secure__he_preset="nvflare"), 2000)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=r"secure.he='run' in 2 processes: .*; use one process, or"):
    make_exchange(config_of(), 3)
  assert with_plain_server(config_of()).secure.protocol == "none"  # baselines encrypt nothing


def test_a_rule_that_needs_every_update_does_not_go_with_ciphertexts():
  with pytest.raises(UserError, match=r"a rule that looks at single updates needs what the prot"):
    make_exchange(config_of(server__aggregator="middle"), 3)


@presets
def test_constants_are_those_of_the_committed_measurement(name):
  found = json.loads(RESULTS.read_text(encoding="utf-8"))
  case, preset = found["cases"][f"{name} public"], ckks.PRESETS[name]
  assert preset.ciphertext_bytes == case["ciphertext_bytes"]
  assert case["max_error_steps"] < ckks.MOST_ERROR
  measured = {
    "deviation": "deviation",
    "seal_seconds": "seal_s_per_million",
    "add_seconds": "add_s_per_million",
    "open_seconds": "open_s_per_million",
  }
  for field, column in measured.items():
    assert getattr(preset, field) == float(f"{case[column]:.2g}"), field


@presets
def test_the_largest_sum_of_any_grid_stays_under_half_the_modulus(name):
  preset = ckks.PRESETS[name]
  for bits in (8, 16, 32):
    largest = 2 ** (bits - 1) * ckks.gain_of(preset, bits) * ckks.SCALE
    # The last prime is for keys; a prime of b bits is above 2^(b - 1).
    assert largest < 2 ** (sum(bits - 1 for bits in preset.primes[:-1]) - 1) * 1.01


def test_the_estimate_is_a_hand_computation():
  config = config_of(server__num_rounds=10, secure__encrypt_every=4)
  preset = ckks.PRESETS["sum"]
  cost = ckks.estimate(config, 100 * preset.ciphertext_bytes, 3)
  millions = 100 * 2048 / 1e6
  assert cost.total == 10 * 3 * 100 * 61_741
  assert cost.hospital == pytest.approx(2.7 * millions)
  assert cost.host == pytest.approx(3 * millions * (3 * 2.725 + 0.27))  # rounds 0, 4 and 8
  config.secure.he = "model"
  assert ckks.estimate(config, 100 * preset.ciphertext_bytes, 3).host == 0


def test_the_statement_says_who_holds_the_key_and_what_publishing_would_leak():
  record = {
    "transforms": [],
    "server_sees": SUM,
    "protocol": "ckks",
    "aggregator": "mean",
    "ckks": {
      "degree": 4096,
      "primes": [54, 54],
      "executed": True,
      "may_be_one": False,
      "noise": False,
    },
  }
  text = _exchange_sentences(record, private=False)
  assert "All CKKS keys are shared" in text
  assert "the key holder, who is neither the server nor a hospital" in text
  assert "leaks noise of the key (Li and Micciancio 2021)" in text
  assert "where only one does" not in text
  assert "nothing was encrypted" not in text
  record["ckks"] |= {"executed": False, "may_be_one": True, "noise": True}
  text = _exchange_sentences(record, private=False)
  assert "has to add the noise before anybody else" in text
  assert "nothing was encrypted" in text
  assert "where only one does, the sum of the round is its update" in text


def encrypted_run(folder, num_rounds):
  """Summary of the smoke run without privacy, encrypted."""
  plain = {"privacy__mechanism": "none", "privacy__noise_multiplier": 0.0}
  return run(folder, **plain, server__num_rounds=num_rounds, secure=config_of().secure)


@pytest.mark.slow
@encrypts
def test_an_encrypted_run_writes_bytes_and_seconds_apart_and_states_who_holds_the_key(tmp_path):
  summary = encrypted_run(tmp_path, 2)
  facts = {"saturated": 0.0, "he_preset": "sum", "he": "run", "encrypt_every": 1}
  assert facts.items() <= summary["exchange"].items()
  spent = json.loads((tmp_path / "timing.json").read_text("utf-8"))["encryption"]
  assert (spent["rounds"], spent["messages"]) == (2, 6)
  assert spent["bytes"] == pytest.approx(6 * summary["bytes_up"], rel=0.02)
  assert 0 < spent["max_error"] < ckks.MOST_ERROR
  assert "one secret key opens the sum" in (tmp_path / "privacy_statement.md").read_text("utf-8")


@encrypts
@pytest.mark.slow
def test_a_resumed_encrypted_run_writes_the_summary_of_an_unbroken_one(tmp_path):
  encrypted_run(tmp_path / "resumed", 1)
  resumed = encrypted_run(tmp_path / "resumed", 2)
  assert resumed == encrypted_run(tmp_path / "whole", 2)


def test_the_console_tells_what_encryption_cost_and_nothing_without_it():
  console = Console(record=True, width=300, file=io.StringIO())
  terminal.encryption(console, ckks.totals(()))
  assert console.export_text() == ""
  record = ckks.EncryptedRound(
    messages=3, numbers=5, bytes=2_000_000, encrypt=1.0, serialise=0.5, add=0.1, decrypt=0.2,
    error=0.004, rms=0.001,
  )  # fmt: skip
  terminal.encryption(console, ckks.totals([record, record]))
  assert "6 messages in 2 rounds: 4.00 MB; encrypt 2.0 s" in console.export_text()
