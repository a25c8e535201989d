"""Local training at one client: draw a batch, take a (private) gradient, step the optimiser."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.keys import Stream, key_for
from fedjax_med.data.normalisation import normalise
from fedjax_med.federated.algorithm import (
  Client,
  Hyper,
  Pool,
  RoundMetrics,
  Tree,
  add_metrics,
  no_metrics,
)
from fedjax_med.federated.optimizers import descend
from fedjax_med.models.model import Model
from fedjax_med.privacy.clipping import clipped_sum
from fedjax_med.privacy.noise import private_mean
from fedjax_med.privacy.sampling import epoch_batch, poisson_batch

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class StepContext(NamedTuple):
  """What a gradient may depend on besides the weights: the client, the data, where we are."""

  client: Client
  pool: Pool
  hyper: Hyper
  key: jax.Array  # base key of the run
  round: jax.Array
  step: jax.Array


# (params, state, context) -> (gradient, new state, RoundMetrics of this step)
Gradient = Callable[[Tree, Tree, StepContext], tuple[Tree, Tree, RoundMetrics]]


def cross_entropy(label_smoothing: float) -> Loss:
  """Per-example softmax cross-entropy: (logits [B, classes], labels [B]) -> float32 [B]."""

  def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    targets = optax.smooth_labels(
      jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing
    )
    return optax.softmax_cross_entropy(logits, targets)

  return loss


def _take(context: StepContext, slots: jax.Array, how: str) -> tuple[jax.Array, jax.Array]:
  rows = context.client.indices[slots]
  return normalise(context.pool.inputs[rows], how), context.pool.labels[rows]


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, values.astype(jnp.float32), 0).sum()


def plain_gradient(
  model: Model,
  loss: Loss,
  *,
  batch_size: int,
  max_examples: int,
  normalisation: str,
  microbatch: int = 0,
) -> Gradient:
  """Gradient of the mean loss over the next batch of a client's shuffled epoch.

  Epochs run on across rounds (global step = round · steps a round + step), so a round shorter
  than an epoch still visits every example (of the rounds that the client takes part in). The last
  batch of an epoch may be partial. ``microbatch`` examples are in memory at once (0: the batch);
  batch norm sees, and averages over, one microbatch after the other.
  """

  def gradient(params, state, context):
    client = context.client
    slots, mask = epoch_batch(
      key_for(context.key, Stream.SHUFFLE, client.number),
      context.round * client.num_steps + context.step,
      client.num_examples,
      batch_size=batch_size,
      max_examples=max_examples,
    )
    # Padding repeats the batch's own examples: it counts in no loss, but batch norm looks at it.
    slots = slots[jnp.arange(batch_size) % jnp.maximum(mask.sum(), 1)]
    key = key_for(context.key, Stream.DROPOUT, client.number, context.round, context.step)
    count = jnp.maximum(mask.sum(dtype=jnp.float32), 1)

    def part(state, slots, mask, key):
      inputs, labels = _take(context, slots, normalisation)

      def mean_loss(params):
        logits, new_state = model.apply(params, state, inputs, key=key, train=True)
        losses = loss(logits, labels)
        total = _masked_sum(losses, mask)
        return total / count, (total, logits, new_state)

      grad, (total, logits, new_state) = jax.grad(mean_loss, has_aux=True)(params)
      metrics = no_metrics()._replace(
        loss=total,
        correct=_masked_sum(logits.argmax(-1) == labels, mask),
        examples=mask.sum(dtype=jnp.float32),
      )
      return grad, new_state, metrics

    grad, state, metrics = _in_parts(part, microbatch, params, state, slots, mask, key)
    return grad, state, metrics._replace(steps=jnp.ones((), jnp.int32))

  return gradient


def private_gradient(
  model: Model,
  loss: Loss,
  *,
  clipping: str,
  batch_cap: int,
  max_examples: int,
  normalisation: str,
  microbatch: int = 0,
) -> Gradient:
  """DP-SGD gradient (Abadi et al. 2016) of a truncated Poisson batch.

  Sum of clipped per-example gradients, plus noise of standard deviation σC on the sum, divided
  by the fixed expected batch size q·n. Batch and noise are functions of (client, round, step)
  alone: a replayed step is the same release. ``microbatch`` examples are clipped at once (0: the
  cap), and no more microbatches run than hold an example that was drawn.
  """

  def gradient(params, state, context):
    client, hyper = context.client, context.hyper
    where = (client.number, context.round, context.step)
    slots, mask = poisson_batch(
      key_for(context.key, Stream.SAMPLE, *where),
      client.num_examples,
      client.sampling_probability,
      max_examples=max_examples,
      batch_cap=batch_cap,
    )

    def part(state, slots, mask, key):
      inputs, labels = _take(context, slots, normalisation)
      # Norms and sums must round alike: TF32 products would not hold the bound C.
      with jax.default_matmul_precision("highest"):
        total, clip = clipped_sum(
          clipping, model, loss, params, state, inputs, labels, mask, hyper.clip_norm, key
        )
      metrics = no_metrics()._replace(
        loss=_masked_sum(clip.loss, mask),
        correct=_masked_sum(clip.logits.argmax(-1) == labels, mask),
        norm=_masked_sum(clip.norm, mask),
        clipped=_masked_sum(clip.norm > hyper.clip_norm, mask),
        examples=mask.sum(dtype=jnp.float32),
      )
      return total, state, metrics

    key = key_for(context.key, Stream.DROPOUT, *where)
    total, state, metrics = _in_parts(part, microbatch, params, state, slots, mask, key)
    grad = private_mean(
      total,
      key_for(context.key, Stream.NOISE, *where),
      client.noise_multiplier,
      hyper.clip_norm,
      client.expected_batch_size,
    )
    return grad, state, metrics._replace(steps=jnp.ones((), jnp.int32))

  return gradient


def _in_parts(part, microbatch: int, params, state, slots, mask, key):
  """Sums ``part(state, slots, mask, key) -> (gradient, state, metrics)`` over microbatches.

  Drawn slots come first, so the loop ends where they do: a batch's padding costs less than a
  microbatch, and an empty batch nothing.
  """
  size = slots.shape[0]
  if not 0 < microbatch < size:
    return part(state, slots, mask, key)
  padding = -size % microbatch
  slots, mask = jnp.pad(slots, (0, padding), mode="wrap"), jnp.pad(mask, (0, padding))

  def body(index, carry):
    total, state, metrics = carry

    def take(rows):
      return jax.lax.dynamic_slice_in_dim(rows, index * microbatch, microbatch)

    grad, state, new = part(state, take(slots), take(mask), jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, grad), state, add_metrics(metrics, new)

  drawn = (mask.sum(dtype=jnp.int32) + (microbatch - 1)) // microbatch
  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.fori_loop(0, drawn, body, (zeros, state, no_metrics()))


def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  """Whether every number is finite; vectors are looked at as one, for fewer kernels to compile."""
  short = [jnp.isfinite(leaf).reshape(-1) for leaf in leaves if leaf.ndim < 2]
  arrays = [jnp.isfinite(leaf) for leaf in leaves if leaf.ndim >= 2]
  return jnp.stack([each.all() for each in [*arrays, jnp.concatenate(short)]]).all()


def local_training(
  gradient: Gradient,
  optimizer: optax.GradientTransformation,
  rate_factor: Callable[[jax.Array], jax.Array],
  num_local_steps: int | None,
) -> Callable[..., tuple[Tree, Tree, RoundMetrics]]:
  """Builds ``train(params, state, client, pool, hyper, key, round)``: a round at one client.

  Args:
    gradient: plain_gradient or private_gradient.
    optimizer: optax direction, started afresh each round as in FedAvg.
    rate_factor: schedule factor of the round.
    num_local_steps: local steps where they are the same for every client, else None and
      ``client.num_steps`` decides (under vmap the clients that are done wait, unchanged).

  Returns:
    A function to (params, state, RoundMetrics). The FedProx term μ(w − w_round) is added after
    clipping and noise: it depends on no example.
  """

  def train(params, state, client: Client, pool: Pool, hyper: Hyper, key, round):
    rate = hyper.client_learning_rate * rate_factor(round)

    def body(step, carry):
      local, local_state, opt_state, sums = carry
      grad, local_state, metrics = gradient(
        local, local_state, StepContext(client, pool, hyper, key, round, step)
      )
      grad = jax.tree.map(
        lambda g, w, w0: g + hyper.proximal_weight * (w - w0), grad, local, params
      )
      direction, opt_state = optimizer.update(grad, opt_state, local)
      local = descend(local, direction, rate)
      return local, local_state, opt_state, add_metrics(sums, metrics)

    bound = client.num_steps if num_local_steps is None else num_local_steps
    carry = (params, state, optimizer.init(params), no_metrics())
    local, local_state, _, sums = jax.lax.fori_loop(0, bound, body, carry)
    # The loss too: private gradients stay finite whatever the model does.
    finite = _all_finite([*jax.tree.leaves(local), sums.loss])
    return local, local_state, sums._replace(finite=finite)

  return train
