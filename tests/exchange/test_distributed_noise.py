"""Noise that hospitals add themselves keeps the promises of every exchange, round by round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.exchange.registry import make_exchange
from fedjax_med.exchange.transform import Wire
from fedjax_med.federated.algorithm import ClientDelta
from fedjax_med.privacy.distributed import DistributedGaussian
from tests.exchange.test_conformance import check_layouts, check_learning, check_resumed_rounds
from tests.federated.test_conformance import rounds
from tests.federated.toy import make_federation
from tests.privacy.test_distributed import config_of, hyper_of

EXCHANGE = make_exchange(config_of(client_privacy__clip_norm=4.0), 3)
LITTLE = DistributedGaussian(3, 1, 0.02, 4.0, 2.0**20, 34)


def test_rounds_go_on_as_if_there_had_been_no_break():
  check_resumed_rounds(EXCHANGE, hyper_of(LITTLE))


@pytest.mark.slow
def test_layouts_and_devices_agree_and_share_the_noise():
  check_layouts(EXCHANGE, hyper_of(LITTLE))


def test_little_noise_leaves_the_task_to_be_learned():
  check_learning(EXCHANGE, hyper_of(LITTLE))


def test_noise_and_scale_are_data_of_one_program():
  federation = make_federation(exchange=EXCHANGE)
  _, block, _ = federation
  ends = []
  for mechanism in (LITTLE, DistributedGaussian(3, 1, 2.0, 4.0, 2.0**24, 34)):
    after, _ = rounds(federation, 1, hyper=hyper_of(mechanism))
    ends.append(np.asarray(after.server.params))
  assert block._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
  assert np.linalg.norm(ends[0] - ends[1]) > 1


def test_a_message_is_as_long_as_its_whole_numbers():
  for bits, size in ((32, 28), (16, 14)):
    wire = make_exchange(config_of(secure__bits=bits), 3).transform.wire(Wire(dense=7, sent=7))
    assert wire.size == size + wire.beside  # keys and shares of the masks stand beside
  blank = ClientDelta(params=jnp.zeros(7), state=jnp.zeros(0))
  assert jax.tree.leaves(EXCHANGE.transform.init_server(blank)) == []
