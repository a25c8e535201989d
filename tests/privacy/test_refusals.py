"""What ε would not hold with is refused or cannot occur: mixing, foreign keys, coarse noise."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs.smoke import get_config
from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.federated.local import (
  BatchShape,
  StepContext,
  Weights,
  local_training,
  private_gradient,
)
from fedjax_med.federated.optimizers import client_optimizer, schedule
from fedjax_med.federated.vector import network_spec, ravel
from fedjax_med.models.model import from_flax
from fedjax_med.models.registry import create_model
from fedjax_med.prepare.experiment import build
from fedjax_med.privacy import clipping, noise
from fedjax_med.privacy.sampling import poisson_batch
from fedjax_med.tasks.classification import cross_entropy
from tests.federated.toy import COUNTS, KEY, make_clients, make_hyper, make_pool
from tests.models.test_model import COVERED, UNCOVERED, Wrapped, coverage_of

POOL = make_pool()
ZERO = jnp.zeros((), jnp.int32)
LOSS = cross_entropy(0.0)
SHAPE = BatchShape(slots=10, max_examples=max(COUNTS), normalisation="fixed")


def flat(tree):
  return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


# Of UNCOVERED those that are refused because an example may reach another one.
MIXING = [
  name
  for name, (_, phrase) in UNCOVERED.items()
  if re.search("mix examples|custom_vjp|one by one|batch size", phrase)
]


def leak(body, batch):
  """What perturbing one example changes of others' logits, or of the way their losses go back."""
  model = from_flax(Wrapped(body))
  inputs = jnp.asarray(np.random.default_rng(3).normal(size=(batch, 4)), jnp.float32)
  params, state = model.init(base_key(0), inputs[:1])

  def logits(inputs):
    return model.apply(params, state, inputs, key=base_key(1), train=True)[0]

  @jax.jit
  def both(inputs):
    values, pull = jax.vjp(logits, inputs)
    return values, pull(jnp.zeros((batch, 2)).at[1].set(1.0))[0]

  with jax.numpy_dtype_promotion("standard"):
    (before, back), (after, _) = both(inputs), both(inputs.at[1].add(0.7))
  others = np.arange(batch) != 1
  return max(np.abs(after - before)[others].max(), np.abs(back)[others].max())


@pytest.mark.parametrize("name", sorted(COVERED))
def test_whatever_the_proof_passes_stands_the_perturbation_of_an_example(name):
  assert coverage_of(COVERED[name]) == ()
  assert max(leak(COVERED[name], batch) for batch in (2, 12)) == 0


@pytest.mark.parametrize("name", MIXING)
def test_an_operation_across_examples_moves_others_under_perturbation_and_is_refused(name):
  body, _ = UNCOVERED[name]
  assert leak(body, 12) > 1e-4
  assert coverage_of(body) != ()


class MixesExamples(nn.Module):
  """A user's network that looks across the batch, by an operation and by batch norm."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4)(x.reshape(x.shape[0], -1))
    x = nn.BatchNorm(use_running_average=not train)(x) - 0.5 * x.mean(0, keepdims=True)
    return nn.Dense(2)(nn.relu(x))


MIXER = from_flax(MixesExamples())
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 1)), jnp.float32)
PARAMS, STATE = MIXER.init(base_key(0), INPUTS[:1])


def test_a_network_that_mixes_examples_runs_where_no_example_moves_anothers_contribution():
  uncovered = clipping.uncovered(MIXER, PARAMS, STATE, INPUTS, len(INPUTS))
  method, reason = clipping.resolve_method("auto", uncovered)
  assert method == "reference"
  assert "mix examples" in reason
  for asked in ("book_keeping", "two_pass"):
    with pytest.raises(UserError, match=r"does not cover this model .*; set privacy.clipping=auto"):
      clipping.resolve_method(asked, uncovered)

  @jax.jit
  def total(inputs):
    rows = clipping.Rows(inputs, jnp.zeros(5, jnp.int32), jnp.ones(5, bool))
    batch = (rows, jnp.float32(0.1), None)
    return flat(clipping.clipped_sum(method, MIXER, LOSS, PARAMS, STATE, *batch)[0])

  # Whatever the last example is, the others' sum is the same: the differences are its own alone.
  others = INPUTS.at[:4].set(3 * INPUTS[:4] + 1)
  moved = [total(x.at[4].set(-2 * INPUTS[4])) - total(x) for x in (INPUTS, others)]
  np.testing.assert_allclose(moved[0], moved[1], rtol=1e-4, atol=1e-6)
  assert float(jnp.linalg.norm(moved[0])) <= 0.2 * (1 + 1e-5)


def test_private_training_leaves_stored_statistics_as_they_were():
  gradient = private_gradient(MIXER, LOSS, "reference", SHAPE)
  method, rate, spec = (
    client_optimizer("sgd", 0, 0),
    schedule("constant", 1, 0),
    network_spec(PARAMS, STATE),
  )
  local = local_training(gradient, method, rate, 3, spec)
  client = jax.tree.map(lambda leaf: leaf[0], make_clients())
  context = StepContext(client, POOL, make_hyper(), KEY, round=ZERO, step=ZERO)
  after, metrics = jax.jit(local.train)(Weights(ravel(PARAMS), ravel(STATE)), context)
  assert float(metrics.units) > 0
  assert np.abs(after.params - ravel(PARAMS)).max() > 0
  assert sorted(STATE["batch_stats"]["BatchNorm_0"]) == ["mean", "var"]
  np.testing.assert_array_equal(after.state, ravel(STATE))


def releases(model, clients, steps, seed=0):
  """[steps, clients] gradients of batches that draw nobody: noise alone."""
  params, state = jax.jit(model.init)(base_key(1), jnp.zeros((1, 4, 4, 1)))
  gradient = private_gradient(model, LOSS, "book_keeping", SHAPE)
  clients = clients._replace(num_examples=jnp.zeros(3, jnp.int32))

  def one(step, client):
    context = StepContext(client, POOL, make_hyper(), base_key(seed), ZERO, step)
    return gradient(params, state, (), context)[0]

  by_client = jax.vmap(one, (None, 0))
  return jax.jit(jax.vmap(by_client, (0, None)))(jnp.arange(steps), clients)


def test_bfloat16_activations_leave_the_noise_in_float32_bit_for_bit():
  models = [create_model(ModelConfig("mlp", dtype=each), 2) for each in ("bfloat16", "float32")]
  with jax.numpy_dtype_promotion("standard"):  # flax's own layers need it
    found = [releases(model, make_clients(), 1) for model in models]
  jax.tree.map(np.testing.assert_array_equal, *found)
  assert {leaf.dtype for leaf in jax.tree.leaves(found[0])} == {jnp.dtype(jnp.float32)}
  values = flat(found[0])
  assert len(np.unique(values)) > 0.99 * values.size  # bfloat16 has 128 normals


def test_noise_of_clients_layers_steps_and_seeds_does_not_correlate():
  steps = 2000
  clients = make_clients(sigma=1.0)
  scale = np.asarray(clients.expected_batch_size)[:, None]
  linear = create_model(ModelConfig("linear"), 2)
  seeds = []
  for seed in (0, 1):
    leaves = jax.tree.leaves(releases(linear, clients, steps, seed))
    rows = [np.asarray(leaf, np.float64).reshape(steps, 3, -1) for leaf in leaves]
    seeds.append((np.concatenate(rows, axis=2) * scale).reshape(steps, -1))
  first, second = seeds
  width = first.shape[1]
  assert width == 3 * 34
  assert stats.kstest(first.ravel(), "norm").pvalue > 1e-4
  # Each pair's sum of products over √steps is about N(0, 1); pairs do not correlate either.
  within = (first.T @ first)[np.triu_indices(width, 1)]  # layers, and clients
  products = {"step": first[1:].T @ first[:-1], "seed": first.T @ second, "within": within}
  for name, each in products.items():
    statistic = float(np.square(each).sum() / steps)
    p_value = 2 * min(stats.chi2.sf(statistic, each.size), stats.chi2.cdf(statistic, each.size))
    assert p_value > 1e-4, name
    assert np.abs(each).max() < 5.5 * np.sqrt(steps), name


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_are_threefry_whatever_jax_is_set_to_and_others_are_refused(impl):
  zeros = jnp.zeros(4)
  expected = noise.gaussian_noise_like(key_for(base_key(3), Stream.NOISE, 1, 2), zeros, 1.0)
  with jax.default_prng_impl(impl):
    found = noise.gaussian_noise_like(key_for(base_key(3), Stream.NOISE, 1, 2), zeros, 1.0)
    np.testing.assert_array_equal(found, expected)
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
      for call in (
        lambda key: noise.gaussian_noise_like(key, zeros, 1.0),
        lambda key: poisson_batch(key, 4, 0.5, max_examples=4, batch_cap=4),
        lambda key: key_for(key, Stream.NOISE, 1),
      ):
        with pytest.raises(UserError, match=rf"generator '{impl}'.*; make it by core.keys.base_"):
          call(key)


@pytest.mark.parametrize("section", ["privacy", "client_privacy"])
def test_an_algorithm_that_is_not_declared_private_is_refused_before_anything_compiles(
  section, monkeypatch
):
  config = get_config()
  config.server.algorithm, config.server.weighting = "ditto", "uniform"
  if section == "client_privacy":
    config.privacy.mechanism, config.privacy.noise_multiplier = "none", 0.0
    config.client_privacy.mechanism, config.client_privacy.noise_multiplier = "dp_fedavg", 1.0
  hospitals = load_hospitals(config)

  def compiled(*_):
    raise AssertionError("something was compiled")

  monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
  with pytest.raises(UserError) as caught:
    build(config, hospitals)
  sentence = str(caught.value)
  assert sentence.startswith("server.algorithm='ditto' is not declared private for ")
  others = " or fedbn or fednova or fedper or scaffold" if section == "privacy" else ""
  assert f"; use server.algorithm=fedavg{others}, or privacy.mechanism=none and" in sentence
