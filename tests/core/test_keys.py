"""Random keys depend on names and counters alone."""

import itertools

import jax
import numpy as np

from fedjax_med.core.keys import Stream, base_key, key_for


def bits(key) -> tuple[int, ...]:
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_every_stream_client_round_and_step_has_a_key_of_its_own():
  base = base_key(0)
  counters = itertools.product(Stream, range(3), range(3), range(3))
  keys = [bits(key_for(base, stream, *rest)) for stream, *rest in counters]
  assert len(set(keys)) == len(keys)
  assert len({bits(base_key(seed)) for seed in range(20)}) == 20


def test_draws_are_those_of_jax_threefry_bit_for_bit_vmapped_or_not():
  ours, stock = base_key(3), jax.random.key(3, impl="threefry2x32")

  def draws(key):
    many = jax.random.split(key, 3)
    return {
      "bits": jax.random.bits(key, (5, 7)),
      "bytes": jax.random.bits(key, (5,), "uint8"),
      "normal": jax.random.normal(jax.random.fold_in(key, 2), (3, 4)),
      "bernoulli": jax.random.bernoulli(many[1], 0.3, (9,)),
      "scalar": jax.random.uniform(key),
      "vmapped": jax.vmap(lambda k: jax.random.uniform(k, (4,)))(many),
    }

  jax.tree.map(np.testing.assert_array_equal, jax.jit(draws)(ours), jax.jit(draws)(stock))


def test_keys_are_the_same_traced_vmapped_or_not():
  base = base_key(3)
  plain = [bits(key_for(base, Stream.NOISE, client, 7)) for client in range(4)]
  vmapped = jax.vmap(lambda client: key_for(base, Stream.NOISE, client, 7))(np.arange(4))
  assert [bits(key) for key in vmapped] == plain


def test_stream_numbers_never_change():
  assert [(s.name, int(s)) for s in Stream] == [
    ("INIT", 0),
    ("SAMPLE", 1),
    ("NOISE", 2),
    ("PARTICIPATION", 3),
    ("DROPOUT", 4),
    ("SHUFFLE", 5),
    ("CLIENT_NOISE", 6),
    ("AUGMENT", 7),
    ("SYNTHETIC", 8),
    ("EXCHANGE", 9),
  ]
