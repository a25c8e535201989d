"""A toy federation small enough to compile in a second: which half of a 4x4 image is brighter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config, ModelConfig, algorithm_options
from fedjax_med.core.keys import base_key
from fedjax_med.data.dataset import client_table
from fedjax_med.exchange.registry import Exchange, plain_exchange, private_exchange
from fedjax_med.federated.algorithm import Client, Hyper, Pool
from fedjax_med.federated.local import BatchShape, local_training, plain_gradient, private_gradient
from fedjax_med.federated.optimizers import client_optimizer, schedule, server_optimizer
from fedjax_med.federated.registry import ALGORITHMS, create_algorithm
from fedjax_med.federated.vector import ARRAYS, PIECES, network_spec, ravel
from fedjax_med.models.registry import create_model
from fedjax_med.simulation.mesh import client_mesh
from fedjax_med.simulation.rounds import init_state, jit_block, make_block, make_round
from fedjax_med.tasks.classification import cross_entropy

COUNTS = (12, 8, 5)
BATCH = 4
# Networks with the layers that an algorithm treats apart; the rest learn on a linear one.
MODELS = {"fedbn": "cnn_small", "fedper": "mlp", "finetune": "mlp"}
KEY = base_key(7)


def make_pool(seed: int = 0) -> Pool:
  """25 images of 4x4 pixels; class 1 is brighter on the right."""
  random = np.random.default_rng(seed)
  labels = np.arange(sum(COUNTS)) % 2
  images = random.integers(60, 120, (sum(COUNTS), 4, 4, 1))
  for image, label in zip(images, labels, strict=True):
    image[:, 2 * label : 2 * label + 2] += 80
  return Pool(jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32))


def make_clients(steps: tuple[int, ...] = (2, 2, 2), sigma: float = 0.5) -> Client:
  """Three clients of 12, 8 and 5 examples, weighted by them."""
  ends = np.cumsum(COUNTS)
  table = client_table([np.arange(end - n, end) for n, end in zip(COUNTS, ends, strict=True)])
  counts = np.array(COUNTS, np.float32)
  q = np.minimum(1, BATCH / counts)
  return Client(
    number=jnp.arange(3),
    indices=jnp.asarray(table.indices),
    num_examples=jnp.asarray(table.counts),
    weight=jnp.asarray(counts / counts.sum(), jnp.float32),
    num_steps=jnp.asarray(steps, jnp.int32),
    sampling_probability=jnp.asarray(q, jnp.float32),
    expected_batch_size=jnp.asarray(q * counts, jnp.float32),
    noise_multiplier=jnp.full((3,), sigma, jnp.float32),
  )


def make_hyper(**changes: float) -> Hyper:
  """Learning rate 0.5 at clients, 1 at the server, no proximal term, C=1, full participation.

  The traced options of all algorithms have their defaults.
  """
  values = {
    "client_learning_rate": 0.5,
    "server_learning_rate": 1.0,
    "proximal_weight": 0.0,
    "clip_norm": 1.0,
    "ema_decay": 0.0,
    "participation_rate": 1.0,
  }
  options, config = {}, Config()
  for config.server.algorithm in ALGORITHMS:
    options |= algorithm_options(config, traced=True)
  traced = {n: jnp.float32(value) for n, value in {**values, **options, **changes}.items()}
  algorithm = {name: traced.pop(name) for name in options}
  return Hyper(**traced, algorithm=algorithm)


@functools.cache  # tests share compiled programs
def make_federation(
  name: str = "fedavg",
  *,
  private: bool = False,
  chunk: int = 3,
  cohort_cap: int | None = None,
  shared_steps: int | None = None,
  model_name: str | None = None,
  batch: int = BATCH,
  optimizer: str = "sgd",
  server: str = "sgd",
  average: bool = False,
  rate_schedule: str = "constant",
  devices: int = 1,
  num_clients: int = 3,
  client_level: bool = False,
  exchange: Exchange | None = None,
):
  """(initial state maker, block, run_round) of the toy federation."""
  model = create_model(ModelConfig(name=model_name or MODELS.get(name, "linear")), 2, "matmul")
  loss = cross_entropy(0.0)
  shape = BatchShape(
    slots=10 if private else batch, max_examples=max(COUNTS), normalisation="fixed"
  )
  if private:
    gradient = private_gradient(model, loss, "two_pass", shape)
  else:
    gradient = plain_gradient(model, loss, shape)
  local = local_training(
    gradient,
    client_optimizer(optimizer, 0.9, 0.01),
    schedule(rate_schedule, 10, 0),
    shared_steps,
    network_spec(*jax.eval_shape(model.init, base_key(1), jnp.zeros((1, 4, 4, 1)))),
    holding=PIECES if private else ARRAYS,
  )
  algorithm = create_algorithm(
    name,
    local,
    server_optimizer(server, 0.9),
    average=average,
    records=private,
    clients=client_level,
  )
  if exchange is None:
    exchange = private_exchange(1.0) if client_level else plain_exchange()
  mesh = client_mesh(devices)
  run_round = make_round(
    algorithm,
    num_clients=num_clients,
    cohort_cap=cohort_cap,
    chunk=chunk,
    mesh=mesh,
    exchange=exchange,
  )

  def initial():
    params, state = model.init(base_key(1), jnp.zeros((1, 4, 4, 1)))
    return init_state(algorithm, ravel(params), ravel(state), num_clients, exchange)

  return initial, jit_block(make_block(run_round, num_clients, client_level), mesh), run_round
