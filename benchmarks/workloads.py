"""This simulator's side of the three workloads, from the library's public pieces."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import specs
from fedjax_med.core.config import ModelConfig
from fedjax_med.core.keys import base_key
from fedjax_med.federated.algorithm import Client, Hyper, Pool
from fedjax_med.federated.local import BatchShape, local_training, plain_gradient, private_gradient
from fedjax_med.federated.optimizers import client_optimizer, schedule, server_optimizer
from fedjax_med.federated.registry import create_algorithm
from fedjax_med.federated.vector import network_spec, ravel
from fedjax_med.models import ops, registry
from fedjax_med.models.model import Model, from_flax
from fedjax_med.prepare.plan import (
  MICROBATCH_OVERHEAD,
  best_microbatch,
  choose_holding,
  choose_layout,
  choose_lowering,
)
from fedjax_med.privacy.clipping import Rows, clipped_sum, resolve_method, uncovered
from fedjax_med.privacy.mechanism import batch_size_bound
from fedjax_med.simulation.mesh import choose_devices, cpu_cores, replicate
from fedjax_med.simulation.rounds import init_state, jit_block, make_block, make_round
from fedjax_med.tasks.classification import cross_entropy


class CifarCNN(nn.Module):
  """conv32, conv64, max pool, dropout, dense 128, dropout, dense: pfl-research's benchmark."""

  num_classes: int

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes]."""
    x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", name="conv1")(images))
    x = nn.relu(nn.Conv(64, (3, 3), padding="VALID", name="conv2")(x))
    x = nn.Dropout(0.25, deterministic=not train)(ops.max_pool(x, (2, 2), (2, 2)))
    x = nn.relu(nn.Dense(128, name="hidden")(x.reshape(x.shape[0], -1)))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(self.num_classes, name="head")(x)


class MnistCNN(nn.Module):
  """conv16 and conv32, 3x3 and padded, each with relu and a 2x2 max pool, then dense."""

  num_classes: int

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Images [B, H, W, C] to logits [B, num_classes]."""
    x = images
    for name, features in (("conv1", 16), ("conv2", 32)):
      x = ops.max_pool(nn.relu(nn.Conv(features, (3, 3), name=name)(x)), (2, 2), (2, 2))
    return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


def _cifar_cnn(num_classes: int, **unused: Any) -> nn.Module:
  return CifarCNN(num_classes)


def _mnist_cnn(num_classes: int, **unused: Any) -> nn.Module:
  return MnistCNN(num_classes)


registry.register("cifar_cnn", _cifar_cnn)
registry.register("mnist_cnn", _mnist_cnn)


class Ours:
  """A compiled federation: ``run(rounds)`` returns the examples trained on, when all is done.

  Attributes:
    compile_s: seconds to trace and compile the block of rounds.
    settings: the plan in words.
  """

  def __init__(self, workload: specs.Workload, private: bool, layout: str = "auto", chunk: int = 1):
    program = _build(workload, private, layout, chunk)
    self._clients, self._hyper, self._pool = program.clients, program.hyper, program.pool
    self._state, self._put, self.settings = program.state, program.put, program.settings
    start = time.perf_counter()
    self._block = program.block.lower(*self._arguments(1)).compile()
    self.compile_s = time.perf_counter() - start

  def _arguments(self, rounds: int) -> tuple[Any, ...]:
    last = self._put((base_key(0), jnp.int32(rounds)))
    return (self._state, self._clients, self._pool, self._hyper, *last)

  def run(self, rounds: int) -> int:
    """Runs that many rounds in one call of one compiled program."""
    self._state, metrics = self._block(*self._arguments(rounds))
    examples = np.asarray(jax.block_until_ready(metrics.clients.examples)).sum()
    assert bool(metrics.clients.finite.all())
    return int(examples)


class _Program(NamedTuple):
  block: Any
  state: Any
  clients: Client
  hyper: Hyper
  pool: Pool
  put: Callable[[Any], Any]
  settings: dict[str, Any]


def make_model(
  workload: specs.Workload, devices: int = 1, lowering: str = "auto"
) -> tuple[Model, str]:
  """The workload's network, and how its convolutions are lowered, in words."""
  chosen, reason = choose_lowering(lowering, cpu_cores() // devices)
  config = ModelConfig(name=workload.network)
  return registry.create_model(config, workload.num_classes, chosen), reason


def _build(workload: specs.Workload, private: bool, layout: str, chunk: int) -> _Program:
  rate = workload.cohort / workload.num_clients
  # A cohort is a Poisson draw here: the examples really seen are what times are divided by.
  cohort_cap = None if rate == 1 else batch_size_bound(workload.num_clients, rate, 5)
  devices = choose_devices(0, cohort_cap or workload.num_clients)
  model, lowering_reason = make_model(workload, devices.number)
  loss = cross_entropy(0.0)
  image = jnp.zeros((1, *workload.shape), jnp.float32)
  params, state = jax.jit(model.init)(base_key(1), image)
  vectors = network_spec(params, state)
  shape = BatchShape(slots=workload.batch, max_examples=workload.examples, normalisation="fixed")
  probability = workload.batch / workload.examples
  _, chunk, layout_reason = choose_layout(
    layout, chunk, cohort_cap or workload.num_clients, devices=devices.number
  )
  settings: dict[str, Any] = {
    "devices": devices.reason,
    "lowering": lowering_reason,
    "layout": layout_reason,
  }
  if private:
    batch_cap = min(workload.examples, batch_size_bound(workload.examples, probability, 5))
    # As the plan of a run has it: one client at a time ends where its drawn examples do.
    microbatch = batch_cap
    if chunk == 1:
      microbatch = best_microbatch(
        [workload.examples], [probability], batch_cap, MICROBATCH_OVERHEAD
      )
    problems = uncovered(model, params, state, image, microbatch)
    clipping, reason = resolve_method("auto", problems)
    settings |= {"clipping": f"{clipping}: {reason}", "batch_cap": batch_cap}
    settings["microbatch"] = microbatch
    shape = shape._replace(slots=batch_cap, microbatch=microbatch)
    gradient = private_gradient(model, loss, clipping, shape)
  else:
    gradient = plain_gradient(model, loss, shape)
  train = local_training(
    gradient,
    client_optimizer("sgd", 0.0, 0.0),
    schedule("constant", 1, 0),
    # With a Poisson cohort the absent slots of a chunk must be able to do nothing.
    None if cohort_cap else workload.steps,
    vectors,
    holding=choose_holding(private),
  )
  algorithm = create_algorithm(
    "fedavg", train, server_optimizer("sgd", 0.0), average=False, records=private
  )
  run_round = make_round(
    algorithm,
    num_clients=workload.num_clients,
    cohort_cap=cohort_cap,
    chunk=chunk,
    mesh=devices.mesh,
  )
  images, labels = specs.make_pool(workload)
  put = functools.partial(replicate, mesh=devices.mesh)
  return _Program(
    block=jit_block(make_block(run_round, workload.num_clients), devices.mesh),
    state=put(init_state(algorithm, ravel(params), ravel(state), workload.num_clients)),
    clients=put(_clients(workload, probability)),
    hyper=put(_hyper(workload, rate)),
    pool=put(Pool(jnp.asarray(images), jnp.asarray(labels))),
    put=put,
    settings=settings,
  )


def _clients(workload: specs.Workload, probability: float) -> Client:
  count, examples = workload.num_clients, workload.examples

  def each(value: float, dtype: Any) -> jax.Array:
    return jnp.full((count,), value, dtype)

  return Client(
    number=jnp.arange(count, dtype=jnp.int32),
    indices=jnp.arange(count * examples, dtype=jnp.int32).reshape(count, examples),
    num_examples=each(examples, jnp.int32),
    weight=each(1 / count, jnp.float32),
    num_steps=each(workload.steps, jnp.int32),
    sampling_probability=each(probability, jnp.float32),
    expected_batch_size=each(workload.batch, jnp.float32),
    noise_multiplier=each(specs.NOISE_MULTIPLIER, jnp.float32),
  )


def _hyper(workload: specs.Workload, participation_rate: float) -> Hyper:
  values = {
    "client_learning_rate": workload.learning_rate,
    "server_learning_rate": 1.0,
    "proximal_weight": 0.0,
    "clip_norm": specs.CLIP_NORM,
    "ema_decay": 0.0,
    "participation_rate": participation_rate,
  }
  traced = {name: jnp.float32(value) for name, value in values.items()}
  return Hyper(**traced, algorithm={})


def write_reference(workload: specs.Workload, path: str) -> None:
  """Writes weights, a batch and this side's gradients of it, for the peers to be compared with.

  All in float64, where no rounding hides a difference between two networks; dropout is off. Arrays
  are named ``params/conv1/kernel``; ``mean`` is the gradient of the mean loss and ``clipped`` the
  sum of per-example gradients clipped to ``clip_norm``, the median norm.
  """
  with jax.enable_x64(True):
    np.savez(path, **_reference(workload))


def _reference(workload: specs.Workload) -> dict[str, Any]:
  module = registry.MODELS[workload.network](
    workload.num_classes, norm="group", dropout=0.0, dtype=jnp.float64
  )
  model, loss = from_flax(module, "matmul"), cross_entropy(0.0)
  params, state = model.init(base_key(1), jnp.zeros((1, *workload.shape), jnp.float64))
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
  images, labels = (array[: workload.batch] for array in specs.make_pool(workload))
  inputs = jnp.asarray(images, jnp.float64) / 127.5 - 1

  def mean_loss(params):
    return loss(model.apply(params, state, inputs)[0], jnp.asarray(labels)).mean()

  arrays: dict[str, Any] = {"images": images, "labels": labels}
  trees = {"params": params, "mean": jax.jit(jax.grad(mean_loss))(params)}
  if workload.private:
    mask = jnp.ones(len(labels), bool)

    def clipped(params, clip_norm):
      problems = uncovered(model, params, state, inputs, len(labels))
      how = (resolve_method("auto", problems)[0], model, loss, params, state)
      return clipped_sum(
        *how, Rows(inputs=inputs, labels=jnp.asarray(labels), mask=mask), clip_norm, base_key(2)
      )

    clipped = jax.jit(clipped)
    norms = clipped(params, jnp.float64(1))[1].norm
    arrays["clip_norm"] = np.float64(np.median(norms))
    trees["clipped"] = clipped(params, jnp.float64(arrays["clip_norm"]))[0]
  for name, tree in trees.items():
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
      arrays["/".join([name, *(key.key for key in keys)])] = np.asarray(leaf)
  return arrays
