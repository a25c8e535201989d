"""Local training: what a step sees of its batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.keys import base_key
from fedjax_med.federated.local import BatchShape, StepContext, plain_gradient, private_gradient
from fedjax_med.models.registry import create_model
from fedjax_med.tasks.classification import CLASSIFICATION, cross_entropy
from tests.federated.toy import KEY, make_clients, make_hyper, make_pool


def test_padding_of_a_partial_batch_does_not_move_batch_norm():
  model = create_model(ModelConfig(name="cnn_small", norm="batch"), 2)
  params, state = model.init(base_key(0), jnp.zeros((1, 4, 4, 1)))
  client = jax.tree.map(lambda leaf: leaf[2], make_clients())  # 5 examples
  zero = jnp.zeros((), jnp.int32)
  context = StepContext(client, make_pool(), make_hyper(), KEY, zero, zero)

  def step(batch_size):
    shape = BatchShape(slots=batch_size, max_examples=12, normalisation="fixed")
    gradient = plain_gradient(model, cross_entropy(0.0), shape)
    return jax.jit(gradient)(params, state, (), context)

  exact, padded = step(5), step(10)
  chex.assert_trees_all_close(exact[:2], padded[:2], rtol=1e-4, atol=1e-6)
  assert float(padded[3].examples) == 5


def test_a_loss_of_whole_batches_sees_nan_in_the_places_of_padding():
  model = create_model(ModelConfig(name="linear"), 2)
  params, state = model.init(base_key(0), jnp.zeros((1, 4, 4, 1)))
  task = CLASSIFICATION._replace(
    joint="it counts the batch", tally=lambda outputs, targets: jnp.zeros(len(targets))
  )
  shape = BatchShape(slots=10, max_examples=12, normalisation="fixed", task=task)

  def count(outputs, targets):
    return 0 * outputs[:, 0] + (~jnp.isnan(targets)).sum(dtype=jnp.float32)

  pool = make_pool()
  pool = pool._replace(labels=pool.labels.astype(jnp.float32))
  client = jax.tree.map(lambda leaf: leaf[2], make_clients())  # 5 examples
  zero = jnp.zeros((), jnp.int32)
  context = StepContext(client, pool, make_hyper(), KEY, zero, zero)
  *_, metrics = jax.jit(plain_gradient(model, count, shape))(params, state, (), context)
  assert float(metrics.loss) == 5 * 5


@functools.cache
def gradients_of(microbatch, private):
  """Gradient and metrics of the three clients at once, whose draws differ; no noise."""
  model = create_model(ModelConfig(name="cnn_small"), 2)
  params, state = model.init(base_key(0), jnp.zeros((1, 4, 4, 1)))
  shape = BatchShape(slots=10, max_examples=12, normalisation="fixed", microbatch=microbatch)
  loss = cross_entropy(0.0)
  if private:
    gradient = private_gradient(model, loss, "book_keeping", shape)
  else:
    gradient = plain_gradient(model, loss, shape)
  zero = jnp.zeros((), jnp.int32)

  def one(client):
    context = StepContext(client, make_pool(), make_hyper(clip_norm=0.1), KEY, zero, zero)
    grad, _, _, metrics = gradient(params, state, (), context)
    return grad, metrics

  return jax.jit(jax.vmap(one))(make_clients(sigma=0.0))


@pytest.mark.parametrize("microbatch", [1, 3, 5, 7, 10, 20])
@pytest.mark.parametrize("private", [False, True])
def test_microbatches_add_up_to_the_whole_batch_for_clients_of_unlike_draws(microbatch, private):
  whole, parts = gradients_of(0, private), gradients_of(microbatch, private)
  assert len(set(whole[1].examples.tolist())) > 1
  chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("microbatch", [0, 3])
def test_an_empty_private_batch_has_a_sum_of_exactly_zero(microbatch):
  model = create_model(ModelConfig(name="linear"), 2)
  params, state = model.init(base_key(0), jnp.zeros((1, 4, 4, 1)))
  shape = BatchShape(slots=10, max_examples=12, normalisation="fixed", microbatch=microbatch)
  gradient = private_gradient(model, cross_entropy(0.0), "two_pass", shape)
  client = jax.tree.map(lambda leaf: leaf[0], make_clients(sigma=0.0))
  client = client._replace(sampling_probability=jnp.float32(0))
  zero = jnp.zeros((), jnp.int32)
  context = StepContext(client, make_pool(), make_hyper(), KEY, zero, zero)
  grad, _, _, metrics = jax.jit(gradient)(params, state, (), context)
  assert float(metrics.examples) == 0
  assert all(not leaf.any() for leaf in jax.tree.leaves(grad))
