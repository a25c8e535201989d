"""Algorithms against loops over clients and steps that share no code with them.

A batch holds all of a client's examples here, so a local step is one full gradient.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import UserError
from fedjax_med.core.keys import base_key
from fedjax_med.federated.fednova import effective_steps
from fedjax_med.federated.local import (
  BatchShape,
  StepContext,
  Weights,
  local_training,
  plain_gradient,
)
from fedjax_med.federated.optimizers import client_optimizer, schedule
from fedjax_med.federated.personal import layers_named, norm_layers
from fedjax_med.federated.registry import ALGORITHMS, create_algorithm
from fedjax_med.federated.vector import ARRAYS, PIECES, network_spec, ravel, spec_of, unravel
from fedjax_med.models.registry import create_model
from fedjax_med.tasks.classification import cross_entropy
from tests.federated.toy import (
  COUNTS,
  KEY,
  MODELS,
  make_clients,
  make_federation,
  make_hyper,
  make_pool,
)

POOL = make_pool()
RATE, ROUNDS, STEPS = 0.5, 3, (1, 4, 2)
SHARES = np.array(COUNTS) / sum(COUNTS)


def run(name, **hyper):
  initial, block, _ = make_federation(name, batch=max(COUNTS))
  hyper = make_hyper(client_learning_rate=RATE, **hyper)
  return block(initial(), make_clients(STEPS), POOL, hyper, KEY, jnp.asarray(ROUNDS))[0]


@functools.cache
def gradient_of(name):
  """(initial weights, client -> weights -> gradient of the mean loss over all its examples)."""
  model = create_model(ModelConfig(name=MODELS.get(name, "linear")), 2)
  params, _ = model.init(base_key(1), jnp.zeros((1, 4, 4, 1)))
  images = (POOL.inputs.astype(jnp.float32) / 127.5 - 1, POOL.labels)
  ends = np.cumsum(COUNTS)
  parts = [
    tuple(values[end - n : end] for values in images) for n, end in zip(COUNTS, ends, strict=True)
  ]

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(client, params):
    inputs, labels = parts[client]

    def loss(params):
      logits = model.apply(params, {}, inputs)[0]
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.grad(loss)(params)

  return params, gradient


def tree(function, *trees):
  return jax.tree.map(function, *trees)


def average(trees):
  return tree(lambda *leaves: sum(p * leaf for p, leaf in zip(SHARES, leaves, strict=True)), *trees)


def descended(start, gradient, client, adjust=lambda gradient, weights: gradient):
  """Weights after the client's local steps of plain SGD."""
  weights = start
  for _ in range(STEPS[client]):
    step = adjust(gradient(client, weights), weights)
    weights = tree(lambda w, g: w - RATE * g, weights, step)
  return weights


def assert_close(found, expected):
  """Compares vectors, or a vector with the tree that it is made of."""
  expected = expected if isinstance(expected, jax.Array) else ravel(expected)
  chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-5)


def scaffold_round(params, control, own, gradient):
  """Algorithm 1 with option II: (weights, control variate, variates of the clients) after it."""

  def ended(k):
    def adjust(g, _):
      return tree(lambda g, c, c_k: g - c_k + c, g, control, own[k])

    return descended(params, gradient, k, adjust)

  def variate(k):
    def new(c_k, c, x, y):
      return c_k - c + (x - y) / (STEPS[k] * RATE)

    return tree(new, own[k], control, params, ends[k])

  ends = [ended(k) for k in range(3)]
  new = [variate(k) for k in range(3)]
  change = average([tree(jnp.subtract, new[k], own[k]) for k in range(3)])
  return average(ends), tree(jnp.add, control, change), new


def test_scaffold_is_algorithm_1_with_option_ii():
  params, gradient = gradient_of("scaffold")
  control = tree(jnp.zeros_like, params)
  own = [control] * 3
  for _ in range(ROUNDS):
    params, control, own = scaffold_round(params, control, own, gradient)
  found = run("scaffold")
  assert_close(found.server.params, params)
  assert_close(found.server.extra, control)
  assert_close(found.client_states[1], jnp.stack([ravel(weights) for weights in own]))


def test_scaffold_keeps_its_control_the_mean_of_all_variates_when_clients_are_absent():
  initial, block, _ = make_federation("scaffold", cohort_cap=2, chunk=2)
  hyper = make_hyper(participation_rate=0.5)
  state, _ = block(initial(), make_clients(STEPS), POOL, hyper, KEY, jnp.asarray(6))
  assert len({int(count) for count in state.steps // np.array(STEPS)}) > 1  # some were absent
  mean = tree(
    lambda leaf: jnp.tensordot(jnp.asarray(SHARES, jnp.float32), leaf, 1), state.client_states[1]
  )
  assert_close(state.server.extra, mean)


def test_fednova_takes_the_mean_step_of_every_client_the_mean_number_of_times():
  params, gradient = gradient_of("fednova")
  for _ in range(ROUNDS):
    steps = [
      tree(lambda y, x, k=k: (y - x) / STEPS[k], descended(params, gradient, k), params)
      for k in range(3)
    ]
    mean = average(steps)
    params = tree(lambda x, d: x + float(SHARES @ np.array(STEPS)) * d, params, mean)
  assert_close(run("fednova").server.params, params)


def test_performance_weights_are_shares_times_accuracies():
  params, gradient = gradient_of("performance")
  model = create_model(ModelConfig(name="linear"), 2)
  images = POOL.inputs.astype(jnp.float32) / 127.5 - 1
  right = functools.partial(rightly, model.apply, images)
  ends, uneven = np.cumsum(COUNTS), []
  for _ in range(ROUNDS):
    trained, weights = [], []
    for k, (end, n) in enumerate(zip(ends, COUNTS, strict=True)):
      local, seen = params, []
      for _ in range(STEPS[k]):
        seen.append(right(local, slice(end - n, end)))
        local = tree(lambda w, g: w - RATE * g, local, gradient(k, local))
      trained.append(local)
      weights.append(SHARES[k] * np.mean(seen))
    shares = np.array(weights) / sum(weights)
    uneven.append(np.ptp(shares / SHARES))
    params = tree(
      lambda *leaves: sum(p * leaf for p, leaf in zip(shares, leaves, strict=True)),  # noqa: B023
      *trained,
    )
  assert max(uneven) > 0.05  # the weights are not those of FedAvg
  assert_close(run("performance").server.params, params)


def rightly(apply, images, params, rows):
  """Share of these rows that the model classifies rightly."""
  logits = apply(params, {}, images[rows])[0]
  return float((logits.argmax(-1) == POOL.labels[rows]).mean())


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_effective_steps_of_momentum_are_those_of_the_paper(rho):
  for steps in (0, 1, 2, 7):
    expected = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    found = effective_steps(optax.trace(decay=rho), jnp.int32(steps))
    assert float(found) == pytest.approx(expected, rel=1e-5)
  assert float(effective_steps(optax.identity(), jnp.int32(5))) == 5


def test_fednova_with_momentum_and_equal_steps_is_fedavg():
  states = []
  for name in ("fednova", "fedavg"):
    initial, block, _ = make_federation(name, optimizer="momentum")
    hyper = make_hyper(client_learning_rate=0.1)
    states.append(block(initial(), make_clients(), POOL, hyper, KEY, jnp.asarray(3))[0])
  assert_close(states[0].server.params, states[1].server.params)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_ditto_trains_fedavg_and_a_model_of_its_own_that_is_pulled_to_it(weight):
  params, gradient = gradient_of("ditto")
  own = [params] * 3
  for _ in range(ROUNDS):

    def pull(g, v, w=params):
      return tree(lambda g, v, w: g + weight * (v - w), g, v, w)

    own = [descended(own[k], gradient, k, pull) for k in range(3)]
    params = average([descended(params, gradient, k) for k in range(3)])
  found = run("ditto", personal_weight=weight)
  assert_close(found.server.params, params)
  assert_close(found.client_states[1], jnp.stack([ravel(weights) for weights in own]))


def test_fedper_averages_the_body_and_leaves_every_head_where_it_was_trained():
  start, gradient = gradient_of("fedper")
  body, heads = start["hidden1"], [start["head"]] * 3
  for _ in range(ROUNDS):
    ends = [descended({"hidden1": body, "head": heads[k]}, gradient, k) for k in range(3)]
    body, heads = average([end["hidden1"] for end in ends]), [end["head"] for end in ends]
  found = run("fedper")
  assert_close(found.server.params, {"hidden1": body, "head": start["head"]})
  personal = create_algorithm("fedper", training("mlp"), optax.identity(), average=False).personal
  assert personal is not None
  for k in range(3):
    client_state = tree(lambda leaf, k=k: leaf[k], found.client_states)
    own, _ = personal(found.server.params, found.server.state, client_state)
    assert_close(own, {"hidden1": body, "head": heads[k]})


def test_finetune_is_fedavg_with_heads_tuned_on_the_body_as_received():
  params, gradient = gradient_of("finetune")
  heads = [params["head"]] * 3
  for _ in range(ROUNDS):

    def head_only(g, weights):
      return {"hidden1": tree(jnp.zeros_like, g["hidden1"]), "head": g["head"]}

    starts = [{"hidden1": params["hidden1"], "head": head} for head in heads]
    heads = [descended(starts[k], gradient, k, head_only)["head"] for k in range(3)]
    params = average([descended(params, gradient, k) for k in range(3)])
  found = run("finetune")
  assert_close(found.server.params, params)
  assert_close(found.client_states[1], jnp.stack([ravel(head) for head in heads]))


def training(name, optimizer="sgd", holding=ARRAYS):
  """Plain local training of three steps of a network, and its first weights as an attribute."""
  model = create_model(ModelConfig(name=name), 2)
  shape = BatchShape(slots=4, max_examples=12, normalisation="fixed")
  return local_training(
    plain_gradient(model, cross_entropy(0.0), shape),
    client_optimizer(optimizer, 0.9, 0.1),
    schedule("constant", 1, 0),
    3,
    network_spec(*jax.eval_shape(model.init, base_key(1), jnp.zeros((1, 4, 4, 1)))),
    holding=holding,
  )


@pytest.mark.parametrize("holding", [ARRAYS, PIECES])
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_weights_that_are_not_trainable_stay_whatever_the_optimiser_does(optimizer, holding):
  local = training("mlp", optimizer, holding)
  params, _ = create_model(ModelConfig(name="mlp"), 2).init(base_key(1), jnp.zeros((1, 4, 4, 1)))
  client = jax.tree.map(lambda leaf: leaf[0], make_clients())
  marks = layers_named("head")(local.spec.params)
  zero = jnp.int32(0)
  context = StepContext(client, POOL, make_hyper(), KEY, round=zero, step=zero)
  with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes int32 counts and floats
    train = jax.jit(functools.partial(local.train, trainable=marks))
    after = unravel(
      train(Weights(ravel(params), jnp.zeros(0)), context)[0].params, local.spec.params
    )
  chex.assert_trees_all_equal(after["hidden1"], params["hidden1"])
  assert float(jnp.abs(after["head"]["kernel"] - params["head"]["kernel"]).max()) > 0


@pytest.mark.slow
def test_fedbn_sends_no_norm_and_averages_the_rest():
  initial, block, _ = make_federation("fedbn")
  state, _ = block(initial(), make_clients(), POOL, make_hyper(), KEY, jnp.asarray(2))
  spec = network_spec(
    *jax.eval_shape(
      create_model(ModelConfig(name="cnn_small"), 2).init, base_key(1), jnp.zeros((1, 4, 4, 1))
    )
  ).params
  before, after = (unravel(s.server.params, spec) for s in (initial(), state))
  for layer in ("norm1", "norm2"):
    chex.assert_trees_all_equal(after[layer], before[layer])
  assert float(jnp.abs(after["conv1"]["kernel"] - before["conv1"]["kernel"]).max()) > 0
  own = state.client_states[1]
  assert own.shape == (
    3,
    sum(leaf.size for name in ("norm1", "norm2") for leaf in before[name].values()),
  )
  assert float(jnp.ptp(own, axis=0).min()) > 0  # hospitals differ in every number


def test_norm_layers_are_those_with_a_scale():
  one = jnp.zeros(1)
  params = {"a": {"kernel": one, "bias": one}, "b": {"GroupNorm_0": {"scale": one, "bias": one}}}
  spec = spec_of(params)
  assert dict(zip(spec.names, norm_layers(spec), strict=True)) == {
    "a/bias": False,
    "a/kernel": False,
    "b/GroupNorm_0/bias": True,
    "b/GroupNorm_0/scale": True,
  }
  with pytest.raises(UserError, match="the model has none; use another model"):
    norm_layers(spec_of({"a": params["a"]}))


@pytest.mark.parametrize(
  ("pattern", "sentence"),
  [("heads", "'heads' matches no layer .* has head, hidden1; name"), (".*", "matches every layer")],
)
def test_layers_that_are_not_there_or_all_of_them_are_refused(pattern, sentence):
  one = jnp.zeros(1)
  with pytest.raises(UserError, match=sentence):
    layers_named(pattern)(spec_of({"head": {"kernel": one}, "hidden1": {"kernel": one}}))
  marks = layers_named("hidden")(spec_of({"head": one, "hidden": {"kernel": one}}))
  assert marks == (False, True)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_not_declared_private_is_refused_with_what_is(name):
  entry = ALGORITHMS[name]
  for level, covered in (("private", entry.records), ("client_level", entry.clients)):
    if covered:
      make_federation.__wrapped__(name, **{level: True})
      continue
    with pytest.raises(UserError, match=rf"'{name}' is not declared private .*; use .*fedavg"):
      make_federation.__wrapped__(name, **{level: True})
