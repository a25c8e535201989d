"""Noise that hospitals add themselves: its ε, its grid, what is sent, and what is refused."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import Config, set_field
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import Stream, key_for
from fedjax_med.core.rounding import NORM_SLACK
from fedjax_med.core.validation import validate
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.registry import make_exchange, shared_exchange
from fedjax_med.exchange.transform import Receiver, Sender
from fedjax_med.federated.algorithm import ClientDelta
from fedjax_med.privacy import claims, ledger
from fedjax_med.privacy.accounting import SHARED_ORDERS, epsilon
from fedjax_med.privacy.calibration import affordable_steps, calibrate_shares
from fedjax_med.privacy.client_level import ClientLevel
from fedjax_med.privacy.distributed import (
  DistributedGaussian,
  coarsest,
  largest_scale,
  make_shares,
  on_grid,
)
from fedjax_med.privacy.guarantees import Guarantee, describe
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.privacy.statement import mechanism_of, tuning_costs
from tests.federated.toy import KEY, make_clients, make_hyper
from tests.privacy.test_ledger import RAN

FIVE = DistributedGaussian(
  num_units=5,
  colluders=1,
  noise_multiplier=2.0,
  clip_norm=1.0,
  scale=2.0**25,
  num_parameters=75_000,
)


def config_of(**changes):
  config = Config()
  config.client_privacy.mechanism, config.client_privacy.noise = "dp_fedavg", "distributed"
  config.client_privacy.noise_multiplier = 2.0
  config.server.weighting, config.secure.protocol = "uniform", "masking"
  for path, value in changes.items():
    set_field(config, path.replace("__", "."), value)
  return config


# ε


def renyi(mechanism, releases, delta):
  """ε of releases, from the numbers of the mechanism alone."""
  z, bound, scale = mechanism.noise_multiplier, mechanism.clip_norm, mechanism.scale
  honest, size = mechanism.num_units - mechanism.colluders, mechanism.num_parameters
  most = bound * scale * (1 + NORM_SLACK) + math.sqrt(size)  # of a hospital, in whole numbers
  share = z * bound * scale / math.sqrt(honest)
  tau = sum(10 * math.exp(-2 * math.pi**2 * share**2 * k / (k + 1)) for k in range(1, honest))
  values = []
  for order in SHARED_ORDERS:
    moment = releases * (order * most**2 / (2 * honest * share**2) + tau * size)
    values.append(moment + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
  return min(values)


@pytest.mark.parametrize(("releases", "delta"), [(1, 1e-2), (20, 1e-5), (100, 1e-8)])
@pytest.mark.parametrize(
  "mechanism",
  [
    FIVE,
    dataclasses.replace(FIVE, scale=2.0**8, num_parameters=4096),  # rounding counts for much
    DistributedGaussian(3, 0, 4.1, 0.25, 2.0**6, 100),  # the sum is not quite Gaussian
  ],
)
def test_the_second_bound_is_an_independent_sum_of_renyi_divergences(mechanism, releases, delta):
  wanted = renyi(mechanism, releases, delta)
  assert epsilon(mechanism, releases, delta, "rdp") == pytest.approx(wanted, rel=1e-6)
  assert epsilon(mechanism, releases, delta) < wanted


def exact_delta(sigma, shift, releases, value):
  """δ(ε) of a discrete Gaussian in one dimension and its shift, each seen so often."""
  reach = 40 * round(sigma)
  law = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
  # Sums are sufficient: that of all releases, with a shift so many times as large.
  together = functools.reduce(np.convolve, [law / law.sum()] * releases)
  middle, moved = len(together) // 2, shift * releases
  z = np.arange(middle - 6 * reach // 10, middle + 6 * reach // 10)
  return np.maximum(together[z] - math.exp(value) * together[z + moved], 0).sum()


@pytest.mark.parametrize(("share", "honest", "shift"), [(4.0, 4, 4), (16.0, 4, 24), (4.5, 2, 3)])
def test_epsilon_is_above_the_exact_one_of_a_single_number_and_near_it(share, honest, shift):
  sigma, slack = share * math.sqrt(honest), 1 + NORM_SLACK
  # A record whose sensitivity is the shift, its one number's rounding included.
  scale = (shift - 1) / slack
  mechanism = DistributedGaussian(honest, 0, sigma / scale, 1.0, scale, 1)
  assert mechanism.share == pytest.approx(share)
  assert mechanism.sensitivity * scale == pytest.approx(shift)
  for delta in (1e-2, 1e-4):
    found = epsilon(mechanism, 1, delta)
    assert exact_delta(sigma, shift, 1, found) <= delta
    narrower = math.sqrt(1 - 4 / sigma**2)  # what r = 2 takes of the noise
    assert exact_delta(sigma, shift, 1, 0.97 * narrower**2 * found) > delta


@pytest.mark.parametrize(("z", "rounds"), [(1.0, 10), (2.0, 20), (8.0, 100)])
@pytest.mark.parametrize("delta", [2e-2, 1e-5])
def test_distributed_noise_costs_under_one_percent_of_epsilon_on_the_coarsest_grid(
  z, rounds, delta
):
  size = 75_000
  scale = 256 * math.sqrt(size)
  mechanism = dataclasses.replace(FIVE, noise_multiplier=z, scale=scale, num_parameters=size)
  server = epsilon(PoissonGaussian(5, 1.0, 5, z, 1.0), rounds, delta)
  assert server < epsilon(mechanism, rounds, delta) <= 1.01 * server
  fine = dataclasses.replace(mechanism, scale=2.0**25)
  assert epsilon(fine, rounds, delta) <= 1.0002 * server
  by_zcdp = epsilon(mechanism, rounds, delta, "rdp")
  assert by_zcdp <= (1.09 if delta == 1e-5 else 1.25) * server


def test_colluders_rounding_and_the_size_of_an_update_enter_epsilon():
  assert FIVE.share == pytest.approx(2.0 * 2**25 / 2)  # four honest hospitals
  assert dataclasses.replace(FIVE, colluders=0).share < FIVE.share
  coarse = dataclasses.replace(FIVE, scale=2.0**8)
  assert coarse.sensitivity == pytest.approx(1.001 + math.sqrt(75_000) / 256)
  assert epsilon(coarse, 5, 1e-2) > 2 * epsilon(FIVE, 5, 1e-2)
  small = DistributedGaussian(3, 0, 7.0, 1.0, 1.0, 1)
  assert 0 < small.xi < 1e-50


def test_a_target_and_a_budget_are_met_and_never_crossed():
  for target, bits, size in ((3.0, 32, 75_000), (0.5, 32, 2**24), (12.0, 16, 9)):
    template = coarsest(5, 1, 1.0, size)
    found = calibrate_shares(template, bits, 0.0, 20, 1e-2, target)
    assert 0.995 * target <= epsilon(found, 20, 1e-2) <= target
    assert found.scale <= largest_scale(bits, 1.0, 5, 1, found.noise_multiplier)
    assert found.scale >= 256 * math.sqrt(size)
  steps = affordable_steps(FIVE, 1e-2, 4.0)
  assert epsilon(FIVE, steps, 1e-2) <= 4.0 < epsilon(FIVE, steps + 1, 1e-2)


def test_the_best_of_many_runs_costs_more_at_the_same_delta():
  guarantee = describe(guarantee_of(FIVE), [20])
  costs = tuning_costs(guarantee)
  assert all(cost["epsilon"] > guarantee["epsilon_max"] for cost in costs)
  assert {cost["delta"] for cost in costs} == {1e-2}
  (party,) = guarantee["parties"]
  assert mechanism_of(party) == FIVE


# Whom it holds against, and the ledger


def guarantee_of(mechanism):
  return Guarantee("client", ("all hospitals",), (mechanism,), (1e-2,))


@pytest.mark.parametrize(
  ("colluders", "holds", "not_against"),
  [
    (0, "the server, which sees sums over all hospitals only", "any other hospital, which sees"),
    (1, "only, together with any one other hospital", "2 or more other hospitals that tell"),
    (3, "only, together with any 3 other hospitals", "4 or more other hospitals that tell"),
  ],
)
def test_the_guarantee_names_the_server_and_the_hospitals_that_may_collude(
  colluders, holds, not_against
):
  found = describe(guarantee_of(dataclasses.replace(FIVE, colluders=colluders)), [3])
  assert any(holds in reader for reader in found["holds_against"])
  (weak,) = found["not_against"]
  assert not_against in weak
  assert f"the noise of {5 - colluders} of the 5 hospitals" in found["mechanism"]
  (party,) = found["parties"]
  assert party["rho"] == pytest.approx(party["sensitivity"] ** 2 / 8)


def written(folder):
  book = ledger.start(folder, "abc", [guarantee_of(FIVE)])
  book = ledger.record(folder, book, 2, [[2]], RAN)
  (folder / claims.FILE).write_text(json.dumps(claims.record_of(book, folder)))
  return book


def resigned(folder, change):
  """Alters the ledger's first line, and computes all digests again."""
  path, previous, texts = folder / ledger.FILE, "", []
  for number, text in enumerate(path.read_text().splitlines()):
    line = json.loads(text)
    del line["digest"]
    if number == 0:
      change(line["guarantees"][0]["parties"][0])
    previous = ledger._digest(previous, line)
    texts.append(json.dumps({**line, "digest": previous}))
  path.write_text("\n".join(texts) + "\n")


def test_the_ledger_gives_back_what_it_was_told(tmp_path):
  written(tmp_path)
  book = ledger.read(tmp_path)
  assert book.guarantees == (guarantee_of(FIVE),)
  line = json.loads((tmp_path / ledger.FILE).read_text().splitlines()[0])
  (party,) = line["guarantees"][0]["parties"]
  names = {"rho", "xi", "noise_multiplier", "scale", "sensitivity", "num_units", "colluders"}
  assert names < party.keys()
  assert "9 (exchange)" in line["guarantees"][0]["keys"]
  claims.read(tmp_path)
  claims.require_epsilons(tmp_path, book)


FIELDS = (
  "rho",
  "xi",
  "share",
  "noise_multiplier",
  "scale",
  "sensitivity",
  "num_units",
  "colluders",
)


@pytest.mark.parametrize("name", [*FIELDS, "num_parameters", "clip_norm"])
def test_an_edited_number_is_refused_though_the_digests_were_made_again(tmp_path, name):
  written(tmp_path)

  def change(party):
    party[name] = party[name] * 2 + 1

  resigned(tmp_path, change)
  with pytest.raises(UserError, match=r"is not a ledger .*restore|the ledger gives"):
    claims.read(tmp_path)


@pytest.mark.parametrize("name", [*FIELDS, "num_parameters", "epsilon"])
def test_an_edited_privacy_file_is_refused_with_the_place(tmp_path, name):
  written(tmp_path)
  path = tmp_path / claims.FILE
  record = json.loads(path.read_text())
  other = {"num_units": "n"}.get(name, name)
  party = record["guarantees"][0]["parties"][0]
  party[other] = party[other] * 0.9 if party[other] else 0.9
  path.write_text(json.dumps(record))
  with pytest.raises(UserError, match=rf"guarantees\[0\].parties\[0\].{other} is"):
    claims.read(tmp_path)


def test_an_edited_list_of_readers_is_refused(tmp_path):
  written(tmp_path)
  path = tmp_path / claims.FILE
  record = json.loads(path.read_text())
  record["guarantees"][0]["not_against"] = []
  path.write_text(json.dumps(record))
  with pytest.raises(UserError, match=r"not_against has 0 entries, the ledger gives 1"):
    claims.read(tmp_path)


# What is sent


def hyper_of(mechanism):
  values = (mechanism.noise_multiplier, mechanism.num_units, 0.0, 0.5, 0.0)
  level = ClientLevel(*(jnp.float32(v) for v in values), shares=make_shares(mechanism))
  return make_hyper()._replace(client_level=level)


def quiet(hyper):
  return hyper._replace(client_level=hyper.client_level._replace(noise_multiplier=jnp.float32(0)))


@functools.cache
def exchange_of(clip_norm=1.0, bits=32):
  return shared_exchange(config_of(client_privacy__clip_norm=clip_norm, secure__bits=bits))


@functools.partial(jax.jit, static_argnames=("clip_norm", "bits", "number"))
def _round(updates, hyper, round, *, clip_norm, bits, number):
  exchange = exchange_of(clip_norm, bits)
  client = jax.tree.map(lambda leaf: leaf[0], make_clients())
  common = {"hyper": hyper, "common_key": KEY, "seated": jnp.ones(number, bool), "round": round}

  def encode(update, place):
    sender = Sender(
      client=client._replace(number=place),
      key=key_for(KEY, Stream.EXCHANGE, 0, place, round),
      **common,
    )
    message = ClientDelta(params=update, state=jnp.ones(2), extra=(jnp.ones(3),))
    return exchange.transform.encode(message, ((),), ((),), sender)[0]

  messages = jax.vmap(encode)(updates, jnp.arange(number))
  weights = exchange.aggregator.weigh(jnp.full(number, 1 / number))
  total = exchange.aggregator.finish(
    exchange.aggregator.combine(messages, weights, Joint(key=KEY, last=())), weights.sum()
  )
  receiver = Receiver(
    weight=weights.sum(), key=KEY, arrived=common["seated"], run_key=KEY, **common
  )
  return messages, exchange.transform.decode(total, ((),), ((),), receiver)[0]


def send(mechanism, updates, *, noise=True, bits=32, round=0):
  """Messages of all hospitals, and the update that the server makes of them."""
  hyper = hyper_of(mechanism)
  hyper = hyper if noise else quiet(hyper)
  return _round(
    jnp.asarray(updates, jnp.float32),
    hyper,
    jnp.int32(round),
    clip_norm=mechanism.clip_norm,
    bits=bits,
    number=mechanism.num_units,
  )


def test_without_noise_the_server_gets_the_mean_of_clipped_updates_to_a_step():
  updates = 3 * np.random.default_rng(0).normal(size=(5, 40))
  updates[1] *= 1e-2
  messages, found = send(FIVE, updates, noise=False)
  clipped = updates / np.maximum(np.linalg.norm(updates, axis=1, keepdims=True), 1)
  np.testing.assert_allclose(found.params, clipped.mean(0), atol=1 / FIVE.scale + 1e-7)
  assert messages.params.dtype == jnp.int32
  assert not np.asarray(messages.state).any()  # what nothing protects does not leave a hospital
  assert messages.extra == ()
  assert not np.asarray(found.state).any()


def test_whole_numbers_stay_within_the_sensitivity_whatever_is_sent():
  random = np.random.default_rng(1)
  for power in (4, 8, 12):
    mechanism = dataclasses.replace(FIVE, scale=2.0**power, num_parameters=4096)
    updates = random.normal(size=(5, 4096)) * 10.0 ** random.uniform(-3, 3, (5, 1))
    updates[0] = (0.5 + 1e-3) / mechanism.scale  # rounding up half of them
    updates[1] = np.nan
    messages, _ = send(mechanism, updates, noise=False)
    norms = np.linalg.norm(np.asarray(messages.params, float), axis=1)
    assert norms.max() <= mechanism.sensitivity * mechanism.scale
    assert norms[1] == 0
  one = dataclasses.replace(FIVE, scale=2.0**8, num_parameters=4096)
  equal = np.full((5, 4096), 1.0)  # each is 4 steps long after the clip: nothing is rounded
  messages, _ = send(one, equal, noise=False)
  assert np.linalg.norm(np.asarray(messages.params[0], float)) == pytest.approx(256, rel=1e-2)


@pytest.mark.parametrize("colluders", [0, 2])
def test_the_decoded_noise_has_the_accounted_standard_deviation(colluders):
  mechanism = dataclasses.replace(FIVE, colluders=colluders, clip_norm=0.5)
  zeros = np.zeros((5, 250_000))
  messages, found = send(mechanism, zeros)
  honest = np.asarray(messages.params[: 5 - colluders], float).sum(0) / mechanism.scale
  assert honest.std() == pytest.approx(2.0 * 0.5, rel=0.01)
  whole = 5 * np.asarray(found.params, float)
  assert whole.std() == pytest.approx(2.0 * 0.5 * math.sqrt(5 / (5 - colluders)), rel=0.01)
  assert abs(np.corrcoef(messages.params[0], messages.params[1])[0, 1]) < 5 / math.sqrt(250_000)
  again, _ = send(mechanism, zeros, round=1)
  assert abs(np.corrcoef(messages.params[0], again.params[0])[0, 1]) < 5 / math.sqrt(250_000)


def test_the_sum_of_four_shares_is_the_discrete_gaussian_of_eight_steps():
  mechanism = DistributedGaussian(4, 0, 0.125, 1.0, 64.0, 250_000)
  assert mechanism.share == 4
  _, found = send(mechanism, np.zeros((4, 250_000)))
  values = np.round(np.asarray(found.params, float) * 4 * 64).astype(int)
  law = np.exp(-(np.arange(-60, 61.0) ** 2) / 128)
  counts = np.bincount(values + 60, minlength=121)
  distance = np.abs(np.cumsum(counts / len(values)) - np.cumsum(law / law.sum())).max()
  assert distance < 1.63 / math.sqrt(len(values))
  assert values.std() == pytest.approx(8.0, rel=0.01)


@pytest.mark.parametrize(("number", "bits"), [(3, 16), (64, 32)])
def test_the_largest_scale_leaves_room_for_everybody_and_noise_and_twice_it_does_not(number, bits):
  z, half = 1.5, 2.0 ** (bits - 1)
  scale = largest_scale(bits, 1.0, number, 1, z)
  most = number + 8 * z * math.sqrt(number / (number - 1))  # of a sum, in clip norms
  assert most * scale + number < half <= most * 2 * scale + number
  mechanism = DistributedGaussian(number, 1, z, 1.0, scale, 4)
  updates = np.zeros((number, 4))
  updates[:, 1] = -1
  _, found = send(mechanism, updates, bits=bits)
  assert abs(float(found.params[1]) + 1) < 6 * z * math.sqrt(2) / number
  wrapping = dataclasses.replace(mechanism, scale=2 * half / number)
  _, found = send(wrapping, updates, bits=bits, noise=False)
  assert abs(float(found.params[1]) + 1) > 0.5


# Refusals


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"secure__protocol": "none"}, r"secure.protocol='none': the server would see each update"),
    ({"server__participation": "poisson"}, r"server.participation='poisson': who is absent"),
    ({"client_privacy__clipping": "adaptive"}, r"client_privacy.clipping='adaptive': the noised"),
    ({"client_privacy__colluders": 4}, r"colluders=4 of 5 hospitals .*; use at most 3"),
    ({"server__aggregator": "middle"}, r"server.aggregator='middle'"),
    ({"compression__kind": "sketch"}, r"compression.kind='sketch': a table may hold more"),
    ({"secure__dropout": 0.1}, r"secure.dropout=0.1: the share of a hospital whose message"),
    ({"cost__deadline_s": 5.0}, r"cost.deadline_s=5: the share of a hospital whose message"),
  ],
)
def test_what_does_not_go_with_noise_of_hospitals_is_refused(changes, message):
  make_exchange(config_of(), 5)
  with pytest.raises(UserError, match=message):
    make_exchange(config_of(**changes), 5)


def test_two_hospitals_are_too_few():
  with pytest.raises(UserError, match=r"colluders=1 of 2 hospitals .*client_privacy.noise=server"):
    make_exchange(config_of(), 2)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"client_privacy__noise": "server", "client_privacy__colluders": 2}, "noise=distributed only"),
    ({"client_privacy__mechanism": "none"}, "with client_privacy.mechanism=dp_fedavg only"),
    ({"secure__range": 2.0}, "noise that hospitals do not add themselves"),
    ({"client_privacy__noise": "both"}, "client_privacy.noise='both'"),
    ({"client_privacy__colluders": -1}, "client_privacy.colluders=-1"),
  ],
)
def test_settings_that_nothing_reads_or_no_choice_allows_are_refused(changes, message):
  validate(config_of())
  with pytest.raises(UserError, match=message):
    validate(config_of(**changes))


def test_a_grid_that_could_wrap_or_is_too_coarse_is_refused_with_the_remedy():
  template = coarsest(5, 1, 1.0, 75_000)
  with pytest.raises(
    UserError, match=r"secure.scale=1.34218e\+08: .*wrap modulo 2\^32 above .*0 or"
  ):
    on_grid(template, 2.0, 32, 2.0**27)
  with pytest.raises(UserError, match=r"secure.bits=16: .*1024 steps.* 256 sqrt\(P\) .*bits=32"):
    on_grid(template, 2.0, 16, 0.0)
  with pytest.raises(UserError, match=r"0.00224 steps of the grid, under 4"):
    DistributedGaussian(5, 0, 5e-6, 1.0, 1000.0, 1)
