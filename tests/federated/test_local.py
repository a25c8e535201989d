"""Local training: what a step sees of its batch."""

import chex
import jax
import jax.numpy as jnp

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.keys import base_key
from fedjax_med.federated.local import StepContext, cross_entropy, plain_gradient
from fedjax_med.models.registry import create_model
from tests.federated.toy import KEY, make_clients, make_hyper, make_pool


def test_padding_of_a_partial_batch_does_not_move_batch_norm():
  model = create_model(ModelConfig(name="cnn_small", norm="batch"), 2)
  params, state = model.init(base_key(0), jnp.zeros((1, 4, 4, 1)))
  client = jax.tree.map(lambda leaf: leaf[2], make_clients())  # 5 examples
  zero = jnp.zeros((), jnp.int32)
  context = StepContext(client, make_pool(), make_hyper(), KEY, zero, zero)

  def step(batch_size):
    gradient = plain_gradient(
      model, cross_entropy(0.0), batch_size=batch_size, max_examples=12, normalisation="fixed"
    )
    return jax.jit(gradient)(params, state, context)

  exact, padded = step(5), step(10)
  chex.assert_trees_all_close(exact[:2], padded[:2], rtol=1e-4, atol=1e-6)
  assert float(padded[2].examples) == 5
