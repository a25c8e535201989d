"""First updates of hospitals, as the server gets them: one step of SGD from the initial weights.

Steps, clipping, noise, grid and sum are the functions that a run trains with. What is given back is
minus the update over the learning rate: the gradient that an attacker reads off it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.exchange_sections import SecureConfig
from fedjax_med.core.keys import Stream, key_for
from fedjax_med.data.dataset import client_rows
from fedjax_med.data.modality import Modality, modality_named, scaling_of
from fedjax_med.exchange.aggregator import Joint
from fedjax_med.exchange.registry import make_exchange
from fedjax_med.exchange.transform import Receiver, Sender
from fedjax_med.federated.algorithm import Client, ClientDelta, Hyper, Pool, plain_hyper
from fedjax_med.federated.local import (
  BatchShape,
  Gradient,
  StepContext,
  Weights,
  local_training,
  plain_gradient,
  private_gradient,
)
from fedjax_med.federated.losses import Loss
from fedjax_med.federated.optimizers import client_optimizer, schedule
from fedjax_med.federated.vector import ARRAYS, PIECES, NetworkSpec
from fedjax_med.models.model import Model
from fedjax_med.prepare.case import with_plain_server
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.privacy.mechanism import PoissonGaussian
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Task


class Federation(NamedTuple):
  """Everything that first updates are made of, and that the server knows but for the records.

  Attributes:
    config: the validated config.
    model: the network.
    spec: spec of its vectors.
    params: [P] initial weights.
    state: [S] initial state that is not trained.
    task: kind of prediction.
    modality: kind of example.
    loss: (outputs, labels) -> loss of each example.
    pool: all examples.
    rows: rows of the pool of each hospital's training records.
    key: of the steps' draws.
  """

  config: Config
  model: Model
  spec: NetworkSpec
  params: jax.Array
  state: jax.Array
  task: Task
  modality: Modality
  loss: Loss
  pool: Pool
  rows: list[np.ndarray]
  key: jax.Array

  def inputs(self, rows: np.ndarray) -> jax.Array:
    """Inputs of the network [n, ...] of rows of the pool, as it sees them."""
    raw = jax.tree.map(lambda leaf: leaf[rows], self.pool.inputs)
    return self.modality.prepare(raw, self.scaling)

  @property
  def scaling(self) -> str:
    """The setting by which the modality makes inputs."""
    return scaling_of(self.modality, self.config.data)


def federation_of(experiment: Experiment, key: jax.Array) -> Federation:
  """The federation of a run, at its initial weights, on one device."""
  config, dataset = experiment.config, experiment.hospitals.dataset
  from fedjax_med.models.registry import create_model

  task, modality = task_named(dataset.task), modality_named(dataset.modality)
  server = jax.device_get(experiment.program.initial().server)
  return Federation(
    config=config,
    model=create_model(config.model, task.columns(dataset), "matmul"),
    spec=experiment.program.parts.spec,
    params=jnp.asarray(server.params),
    state=jnp.asarray(server.state),
    task=task,
    modality=modality,
    loss=task.loss(config.client.label_smoothing),
    pool=jax.tree.map(jnp.asarray, jax.device_get(experiment.pool)),
    rows=client_rows(experiment.hospitals.train),
    key=key,
  )


def _shape(federation: Federation, slots: int) -> BatchShape:
  return BatchShape(
    slots=slots,
    max_examples=slots,
    normalisation=federation.scaling,
    modality=federation.modality,
    task=federation.task,
  )


def _client(rows: jax.Array) -> Client:
  """A hospital that holds the records of ``rows`` [b], and takes one step on all of them."""
  one = jnp.float32(1)
  return Client(
    number=jnp.int32(0),
    indices=rows,
    num_examples=jnp.int32(rows.shape[0]),
    weight=one,
    num_steps=jnp.int32(1),
    sampling_probability=one,
    expected_batch_size=jnp.float32(rows.shape[0]),
    noise_multiplier=jnp.float32(0),
  )


def _hyper(federation: Federation) -> Hyper:
  rate = jnp.float32(federation.config.client.learning_rate)
  return plain_hyper()._replace(client_learning_rate=rate)


def _step(
  federation: Federation, gradient: Gradient, client: Client, hyper: Hyper, key: jax.Array
) -> ClientDelta:
  """The update of one step of plain SGD."""
  private = client.batch_cap is not None
  local = local_training(
    gradient,
    client_optimizer("sgd", 0.0, 0.0),
    schedule("constant", 1, 0),
    1,
    federation.spec,
    holding=PIECES if private else ARRAYS,
  )
  zero = jnp.zeros((), jnp.int32)
  context = StepContext(
    client=client, pool=federation.pool, hyper=hyper, key=key, round=zero, step=zero
  )
  start = Weights(params=federation.params, state=federation.state)
  end, _ = local.train(start, context)
  return ClientDelta(params=end.params - start.params, state=end.state - start.state)


def plain_update(federation: Federation, rows: jax.Array, key: jax.Array) -> ClientDelta:
  """The update that records ``rows`` [b] give without any protection."""
  gradient = plain_gradient(federation.model, federation.loss, _shape(federation, rows.shape[0]))
  return _step(federation, gradient, _client(rows), _hyper(federation), key)


# (rows of a batch [b], key) -> gradient [P] that the attacker reads off the update.
Observed = Callable[[jax.Array, jax.Array], jax.Array]


def _gradient(federation: Federation, update: jax.Array) -> jax.Array:
  return -update / jnp.float32(federation.config.client.learning_rate)


def unprotected(federation: Federation) -> Observed:
  """Updates as they are: the mean gradient of the batch."""
  return lambda rows, key: _gradient(federation, plain_update(federation, rows, key).params)


def compressed(
  federation: Federation, compress: Callable[[jax.Array, jax.Array], jax.Array]
) -> Observed:
  """Updates that went through ``compress`` (update, key) and back."""

  def observed(rows, key):
    update = plain_update(federation, rows, key).params
    return _gradient(federation, compress(update, jax.random.fold_in(key, 1)))

  return observed


def private(federation: Federation, mechanism: PoissonGaussian) -> Observed:
  """Private updates of a batch into which one record alone was drawn.

  Clip norm, noise and denominator are those of the run's mechanism. An attacker who knows all other
  records of a batch can take their part off, and is left with this. The gradient is multiplied by
  the denominator: clip(g) + σ C z.
  """
  clipping = federation.config.privacy.clipping
  method = "reference" if clipping == "auto" else clipping
  gradient = private_gradient(federation.model, federation.loss, method, _shape(federation, 1))
  size = jnp.float32(mechanism.expected_batch_size)
  hyper = _hyper(federation)._replace(clip_norm=jnp.float32(mechanism.clip_norm))

  def observed(rows, key):
    client = _client(rows)._replace(
      noise_multiplier=jnp.float32(mechanism.noise_multiplier),
      expected_batch_size=size,
      batch_cap=jnp.int32(1),
    )
    return size * _gradient(federation, _step(federation, gradient, client, hyper, key).params)

  return observed


def summed(federation: Federation, hospitals: int) -> Observed:
  """The mean of all hospitals' updates, which is all that a server sees under secure aggregation.

  ``rows`` [K · b] are the batches of the K hospitals one after the other. Each counts 1/K. Masks
  cancel in the sum, whole numbers of a grid stay: the exchange is that of ``secure.protocol=grid``.
  """
  config = with_plain_server(federation.config)
  config = dataclasses.replace(config, secure=SecureConfig(protocol="grid"))
  exchange = make_exchange(config, hospitals)
  everyone, share = jnp.ones(hospitals, bool), jnp.full(hospitals, 1 / hospitals, jnp.float32)

  def observed(rows, key):
    batches = rows.reshape(hospitals, -1)
    keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(hospitals))
    zero, hyper = jnp.zeros((), jnp.int32), _hyper(federation)

    def send(batch, key, number):
      message = plain_update(federation, batch, key)
      sender = Sender(
        client=_client(batch)._replace(number=number, weight=share[0]),
        hyper=hyper,
        key=key_for(key, Stream.EXCHANGE),
        common_key=key_for(federation.key, Stream.EXCHANGE),
        seated=everyone,
        round=zero,
      )
      message, _, tally = exchange.transform.encode(
        message, exchange.transform.init_client(message), state, sender
      )
      return message, tally

    blank = ClientDelta(
      params=jnp.zeros_like(federation.params), state=jnp.zeros_like(federation.state)
    )
    state = exchange.transform.init_server(blank)
    messages, tallies = jax.vmap(send)(batches, keys, jnp.arange(hospitals))
    aggregator = exchange.aggregator
    weights = aggregator.weigh(share)
    joint = Joint(key=key, last=aggregator.init(blank))
    total = aggregator.finish(aggregator.combine(messages, weights, joint), weights.sum())
    receiver = Receiver(
      weight=weights.sum(),
      hyper=hyper,
      key=key,
      common_key=key_for(federation.key, Stream.EXCHANGE),
      seated=everyone,
      arrived=everyone,
      run_key=federation.key,
      round=zero,
    )
    tally = jax.tree.map(lambda leaf: leaf.sum(0), tallies)
    mean, _ = exchange.transform.decode(total, state, tally, receiver)
    return _gradient(federation, mean.params)

  return observed


def attacker_gradient(federation: Federation) -> Callable[[jax.Array, jax.Array], Any]:
  """(inputs [b, ...], labels [b]) -> mean gradient, as a tree: what an attacker compares with."""
  params, state = federation.spec.trees(federation.params, federation.state)
  from fedjax_med.federated.losses import with_penalties

  loss = with_penalties(federation.loss, federation.model.penalties)

  def mean_loss(params, inputs, labels):
    outputs, _ = federation.model.apply(params, state, inputs, key=federation.key, train=True)
    return loss(outputs, labels).mean()

  return lambda inputs, labels: jax.grad(mean_loss)(params, inputs, labels)
