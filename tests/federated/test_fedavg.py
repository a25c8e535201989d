"""FedAvg, its server optimisers and its options against derivations in NumPy and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedjax_med.federated.optimizers import schedule
from tests.federated.test_conformance import POOL, rounds
from tests.federated.toy import COUNTS, make_clients, make_federation, make_hyper

FULL = max(COUNTS)  # a batch that holds every client's data: local steps are deterministic


def weights_of(params) -> np.ndarray:
  """[17, 2] kernel over bias of the linear model, whose vector has the bias first."""
  vector = np.asarray(params, np.float64)
  return np.concatenate([vector[2:].reshape(16, 2), vector[None, :2]])


def derivation(weights, num_steps, rate, mu=0.0):
  """One FedAvg round of softmax regression by hand: mean over clients of local SGD."""
  images = np.asarray(POOL.inputs, np.float64).reshape(25, 16) / 127.5 - 1
  features = np.concatenate([images, np.ones((25, 1))], 1)
  targets = np.eye(2)[np.asarray(POOL.labels)]
  total = np.zeros_like(weights)
  start = 0
  for n in COUNTS:
    rows = slice(start, start + n)
    start += n
    local = weights.copy()
    for _ in range(num_steps):
      logits = features[rows] @ local
      p = np.exp(logits - logits.max(1, keepdims=True))
      p /= p.sum(1, keepdims=True)
      local -= rate * (features[rows].T @ (p - targets[rows]) / n + mu * (local - weights))
    total += n / sum(COUNTS) * local
  return total


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_round_equals_the_numpy_derivation_with_and_without_fedprox(mu):
  federation = make_federation(batch=FULL)
  start = weights_of(federation[0]().server.params)
  state, _ = rounds(
    federation, 2, clients=make_clients((3, 3, 3)), hyper=make_hyper(proximal_weight=mu)
  )
  expected = derivation(derivation(start, 3, 0.5, mu), 3, 0.5, mu)
  np.testing.assert_allclose(weights_of(state.server.params), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("server", "optimizer"),
  [
    ("momentum", optax.sgd(0.3, momentum=0.9)),
    ("adam", optax.adam(0.3, b1=0.9, b2=0.99, eps=1e-3)),
    ("yogi", optax.yogi(0.3, b1=0.9, b2=0.99, eps=1e-3)),
  ],
)
def test_server_optimisers_step_along_the_negative_mean_delta(server, optimizer):
  federation = make_federation(batch=FULL, server=server)
  weights = weights_of(federation[0]().server.params)
  with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes int32 counts and floats
    state, _ = rounds(
      federation, 3, clients=make_clients((1, 1, 1)), hyper=make_hyper(server_learning_rate=0.3)
    )
    opt_state = optimizer.init(jnp.asarray(weights, jnp.float32))
    for _ in range(3):
      pseudo_gradient = jnp.asarray(weights - derivation(weights, 1, 0.5), jnp.float32)
      updates, opt_state = optimizer.update(pseudo_gradient, opt_state)
      weights = weights + np.asarray(updates, np.float64)
  np.testing.assert_allclose(weights_of(state.server.params), weights, rtol=1e-4, atol=1e-5)


def test_average_over_rounds_is_evaluated_apart_from_the_weights():
  federation = make_federation(batch=FULL, average=True)
  state, _ = rounds(federation, 3, hyper=make_hyper(ema_decay=0.9))
  average = weights_of(federation[0]().server.params)
  for done in range(1, 4):
    step, _ = rounds(federation, done, hyper=make_hyper(ema_decay=0.9))
    decay = min(0.9, (1 + done) / (10 + done))
    average = decay * average + (1 - decay) * weights_of(step.server.params)
  np.testing.assert_allclose(weights_of(state.server.average), average, rtol=1e-5, atol=1e-6)


def test_epochs_run_on_across_rounds_so_short_rounds_visit_every_example():
  # 12 examples in batches of 4 at one step a round: three rounds see each example once.
  federation = make_federation()
  _, metrics = rounds(federation, 3, clients=make_clients((1, 1, 1)))
  assert float(metrics.clients.examples[0]) == 12
  # 5 examples in batches of 4: 4, then 1, then 4 of the next epoch.
  assert float(metrics.clients.examples[2]) == 9


def test_schedules_start_at_one_and_decay_to_a_hundredth():
  for name in ("cosine", "linear"):
    factor = schedule(name, 20, 0)
    assert float(factor(jnp.asarray(0))) == pytest.approx(1)
    assert float(factor(jnp.asarray(20))) == pytest.approx(0.01)
    assert float(factor(jnp.asarray(10))) == pytest.approx(0.505, abs=1e-3)
  assert float(schedule("constant", 20, 0)(jnp.asarray(13))) == 1


def test_warm_up_climbs_to_the_full_rate_and_never_wastes_a_round():
  factor = schedule("constant", 20, 4)
  values = [float(factor(jnp.asarray(r))) for r in range(6)]
  np.testing.assert_allclose(values, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rtol=1e-6)
