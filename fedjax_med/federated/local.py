"""Local training at one client: draw a batch, take a (private) gradient, step the optimiser."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.keys import Stream, key_for
from fedjax_med.data.augmentation import Changes, change, draw_changes
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
from fedjax_med.federated.losses import Loss, class_logits, with_penalties
from fedjax_med.federated.optimizers import descend
from fedjax_med.models.model import Model
from fedjax_med.privacy.banded import banded_batch, correlated_mean
from fedjax_med.privacy.clipping import clipped_sum
from fedjax_med.privacy.noise import private_mean
from fedjax_med.privacy.sampling import epoch_batch, poisson_batch


class StepContext(NamedTuple):
  """What a gradient may depend on besides the weights: the client, the data, where we are."""

  client: Client
  pool: Pool
  hyper: Hyper
  key: jax.Array  # base key of the run
  round: jax.Array
  step: jax.Array


# (params, state, memory, context) -> (gradient, new state, new memory, RoundMetrics of this step)
Gradient = Callable[[Tree, Tree, Tree, StepContext], tuple[Tree, Tree, Tree, RoundMetrics]]


class _Drawn(NamedTuple):
  """What a step drew, slot by slot.

  Attributes:
    slots: [S] int32 slots of the client's table of examples or units.
    mask: [S] bool, slots that count.
    turn: [S] float32 in 0 .. 1, where in a unit of many rows to begin.
    changes: how each of the slot's images is changed, [S, images]; None if it is not.
  """

  slots: jax.Array
  mask: jax.Array
  turn: jax.Array
  changes: Changes | None


def _rows(client: Client, drawn: _Drawn, rows_per_unit: int) -> tuple[jax.Array, jax.Array]:
  """Rows of the pool and which of them count, both [S, rows_per_unit]."""
  if client.units is None:
    return client.indices[drawn.slots][:, None], drawn.mask[:, None]
  starts, sizes = client.units.starts[drawn.slots], client.units.sizes[drawn.slots]
  # A stretch that begins anywhere and goes round: every row of a large unit has its turn.
  first = jnp.floor(drawn.turn * sizes.astype(jnp.float32)).astype(jnp.int32)
  first = jnp.where(sizes > rows_per_unit, first, 0)
  turn = jnp.arange(rows_per_unit)
  places = starts[:, None] + (first[:, None] + turn[None]) % sizes[:, None]
  return client.indices[places], drawn.mask[:, None] & (turn[None] < sizes[:, None])


def _images(pool: Pool, rows: jax.Array, changes: Changes | None, how: str) -> jax.Array:
  """Normalised images of the pool's ``rows`` [B]."""
  images = pool.inputs[rows]
  return normalise(images if changes is None else change(images, changes), how)


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, values.astype(jnp.float32), 0).sum()


def plain_gradient(
  model: Model,
  loss: Loss,
  *,
  batch_size: int,
  max_examples: int,
  normalisation: str,
  augmentation: str = "none",
  microbatch: int = 0,
) -> Gradient:
  """Gradient of the mean loss over the next batch of a client's shuffled epoch.

  ``loss`` is of the class logits; what the network adds to it comes on top (``with_penalties``).

  Epochs run on across rounds (global step = round · steps a round + step), so a round shorter
  than an epoch still visits every example (of the rounds that the client takes part in). The last
  batch of an epoch may be partial. ``microbatch`` examples are in memory at once (0: the batch);
  batch norm sees, and averages over, one microbatch after the other.
  """
  whole_loss = with_penalties(loss, model.penalties)

  def gradient(params, state, memory, context):
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
    where = (client.number, context.round, context.step)
    key = key_for(context.key, Stream.DROPOUT, *where)
    changes = None
    if augmentation != "none":
      changes = draw_changes(
        key_for(context.key, Stream.AUGMENT, *where), (batch_size,), augmentation
      )
    drawn = _Drawn(slots, mask, jnp.zeros((batch_size,), jnp.float32), changes)
    count = jnp.maximum(mask.sum(dtype=jnp.float32), 1)

    def part(state, drawn, key):
      rows, mask = client.indices[drawn.slots], drawn.mask
      inputs = _images(context.pool, rows, drawn.changes, normalisation)
      labels = context.pool.labels[rows]

      def mean_loss(params):
        outputs, new_state = model.apply(params, state, inputs, key=key, train=True)
        losses = whole_loss(outputs, labels)
        total = _masked_sum(losses, mask)
        return total / count, (total, class_logits(outputs, model.penalties), new_state)

      grad, (total, logits, new_state) = jax.grad(mean_loss, has_aux=True)(params)
      metrics = no_metrics()._replace(
        loss=total,
        correct=_masked_sum(logits.argmax(-1) == labels, mask),
        examples=mask.sum(dtype=jnp.float32),
      )
      return grad, new_state, metrics

    grad, state, metrics = _in_parts(part, microbatch, params, state, drawn, key)
    return grad, state, memory, metrics._replace(steps=jnp.ones((), jnp.int32))

  return gradient


def private_gradient(
  model: Model,
  loss: Loss,
  *,
  clipping: str,
  batch_cap: int,
  max_examples: int,
  normalisation: str,
  augmentation: str = "none",
  rows_per_unit: int = 1,
  copies: int = 1,
  microbatch: int = 0,
) -> Gradient:
  """DP-SGD gradient (Abadi et al. 2016) of a truncated Poisson batch of privacy units.

  Sum of clipped gradients, one of each unit, plus noise of standard deviation σC on the sum,
  divided by the fixed expected batch size q·n. ``loss`` as in ``plain_gradient``. Batch
  and noise are functions of (client, round, step) alone: a replayed step is the same release.
  ``microbatch`` units are clipped at once (0: the cap), and no more microbatches run than hold a
  unit that was drawn.

  A unit is one example, or where ``client.units`` says so a patient: of those with more than
  ``rows_per_unit`` rows a step looks at that many. Each row is seen in ``copies`` random changes
  (augmentation multiplicity, De et al. 2022, arXiv 2204.13650); the loss of a unit is the mean over
  all of that, so that its gradient is clipped once.

  Where ``client.coefficients`` says so, noise is correlated over steps and ``memory`` is a
  ``banded.Memory``.
  """
  images = rows_per_unit * copies
  whole_loss = with_penalties(loss, model.penalties)

  def gradient(params, state, memory, context):
    client, hyper = context.client, context.hyper
    where = (client.number, context.round, context.step)
    units, bands = client.units, client.coefficients
    sampler = poisson_batch
    # ε of one kind of noise must not stand beside releases with the other.
    kept = 0 if memory == () else len(jax.tree.leaves(memory.noise)[0]) + 1
    if kept != (0 if bands is None else len(bands)):
      raise ValueError(f"coefficients {bands} do not go with a memory of {kept} bands")
    if bands is not None:
      sampler = functools.partial(banded_batch, step=memory.step, bands=bands.shape[0])
    slots, mask = sampler(
      key_for(context.key, Stream.SAMPLE, *where),
      client.num_examples if units is None else units.number,
      client.sampling_probability,
      max_examples=max_examples if units is None else units.starts.shape[0],
      batch_cap=batch_cap,
      limit=client.batch_cap,
    )
    turn, changes = jnp.zeros((batch_cap,), jnp.float32), None
    if units is not None:
      turn = jax.random.uniform(key_for(context.key, Stream.AUGMENT, *where, 0), (batch_cap,))
    if augmentation != "none":
      changes = draw_changes(
        key_for(context.key, Stream.AUGMENT, *where, 1), (batch_cap, images), augmentation
      )

    def part(state, drawn, key):
      rows, mask = (
        jnp.repeat(each, copies, axis=1).reshape(-1) for each in _rows(client, drawn, rows_per_unit)
      )
      changes = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), drawn.changes)
      inputs = _images(context.pool, rows, changes, normalisation)
      labels = context.pool.labels[rows]
      # Norms and sums must round alike: TF32 products would not hold the bound C.
      with jax.default_matmul_precision("highest"):
        total, clip = clipped_sum(
          clipping,
          model,
          whole_loss,
          params,
          state,
          inputs,
          labels,
          mask,
          hyper.clip_norm,
          key,
          rows_per_unit=images,
        )
      present, logits = drawn.mask, class_logits(clip.outputs, model.penalties)
      metrics = no_metrics()._replace(
        loss=_masked_sum(clip.loss, mask),
        correct=_masked_sum(logits.argmax(-1) == labels, mask),
        norm=_masked_sum(clip.norm, present),
        clipped=_masked_sum(clip.norm > hyper.clip_norm, present),
        examples=mask.sum(dtype=jnp.float32),
        units=present.sum(dtype=jnp.float32),
      )
      return total, state, metrics

    key = key_for(context.key, Stream.DROPOUT, *where)
    drawn = _Drawn(slots, mask, turn, changes)
    total, state, metrics = _in_parts(part, microbatch, params, state, drawn, key)
    release = (
      total,
      key_for(context.key, Stream.NOISE, *where),
      client.noise_multiplier,
      hyper.clip_norm,
      client.expected_batch_size,
    )
    if bands is None:
      grad = private_mean(*release)
    else:
      grad, memory = correlated_mean(*release, bands, memory)
    return grad, state, memory, metrics._replace(steps=jnp.ones((), jnp.int32))

  return gradient


def slots_at_once(microbatch: int, slots: int) -> int:
  """Slots of a batch that ``part`` of a gradient gets; the last part is padded to as many."""
  return microbatch if 0 < microbatch < slots else slots


def _in_parts(part, microbatch: int, params, state, drawn: _Drawn, key):
  """Sums ``part(state, drawn, key) -> (gradient, state, metrics)`` over microbatches of slots.

  Drawn slots come first, so the loop ends where they do: a batch's padding costs less than a
  microbatch, and an empty batch nothing.
  """
  size = drawn.slots.shape[0]
  if slots_at_once(microbatch, size) == size:
    return part(state, drawn, key)
  again = jnp.arange(size + -size % microbatch) % size
  drawn = jax.tree.map(lambda leaf: leaf[again], drawn)
  drawn = drawn._replace(mask=drawn.mask & (jnp.arange(len(again)) < size))

  def body(index, carry):
    total, state, metrics = carry

    def take(leaf):
      return jax.lax.dynamic_slice_in_dim(leaf, index * microbatch, microbatch)

    grad, state, new = part(state, jax.tree.map(take, drawn), jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, grad), state, add_metrics(metrics, new)

  parts = (drawn.mask.sum(dtype=jnp.int32) + (microbatch - 1)) // microbatch
  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.fori_loop(0, parts, body, (zeros, state, no_metrics()))


def _all_finite(leaves: list[jax.Array]) -> jax.Array:
  """Whether every number is finite; vectors are looked at as one, for fewer kernels to compile."""
  short = [jnp.isfinite(leaf).reshape(-1) for leaf in leaves if leaf.ndim < 2]
  arrays = [jnp.isfinite(leaf) for leaf in leaves if leaf.ndim >= 2]
  return jnp.stack([each.all() for each in [*arrays, jnp.concatenate(short)]]).all()


class LocalTraining(NamedTuple):
  """How a client trains in a round.

  Attributes:
    train: (params, state, memory, client, pool, hyper, key, round, *, adjust=None,
      trainable=None) -> (params, state, memory, RoundMetrics). ``memory`` is what the gradient goes
      on from: a banded.Memory, or () where there is none. ``adjust(gradient, weights)`` changes a
      step's gradient after clipping and noise, by nothing that was read from an example otherwise.
      ``trainable`` is a tree of Python booleans: weights that are False stay as they are.
    optimizer: optax direction of a step.
    rate: (hyper, round) -> local learning rate.
  """

  train: Callable[..., tuple[Tree, Tree, Tree, RoundMetrics]]
  optimizer: optax.GradientTransformation
  rate: Callable[[Hyper, jax.Array], jax.Array]


def local_training(
  gradient: Gradient,
  optimizer: optax.GradientTransformation,
  rate_factor: Callable[[jax.Array], jax.Array],
  num_local_steps: int | None,
) -> LocalTraining:
  """Builds a client's round of local steps.

  Args:
    gradient: plain_gradient or private_gradient.
    optimizer: optax direction, started afresh each round as in FedAvg.
    rate_factor: schedule factor of the round.
    num_local_steps: local steps where they are the same for every client, else None and
      ``client.num_steps`` decides (under vmap the clients that are done wait, unchanged).

  The FedProx term μ(w − w_round) is added after clipping and noise: it depends on no example.
  """

  def rate_of(hyper: Hyper, round: jax.Array) -> jax.Array:
    return hyper.client_learning_rate * rate_factor(round)

  def train(
    params,
    state,
    memory,
    client: Client,
    pool: Pool,
    hyper: Hyper,
    key,
    round,
    *,
    adjust: Callable[[Tree, Tree], Tree] | None = None,
    trainable: Tree | None = None,
  ):
    rate = rate_of(hyper, round)

    def body(step, carry):
      local, local_state, memory, opt_state, sums = carry
      grad, local_state, memory, metrics = gradient(
        local, local_state, memory, StepContext(client, pool, hyper, key, round, step)
      )
      grad = jax.tree.map(
        lambda g, w, w0: g + hyper.proximal_weight * (w - w0), grad, local, params
      )
      if adjust is not None:
        grad = adjust(grad, local)
      direction, opt_state = optimizer.update(grad, opt_state, local)
      moved = descend(local, direction, rate)
      if trainable is not None:
        moved = jax.tree.map(lambda may, new, old: new if may else old, trainable, moved, local)
      local = moved
      return local, local_state, memory, opt_state, add_metrics(sums, metrics)

    bound = client.num_steps if num_local_steps is None else num_local_steps
    carry = (params, state, memory, optimizer.init(params), no_metrics())
    local, local_state, memory, _, sums = jax.lax.fori_loop(0, bound, body, carry)
    # The loss too: private gradients stay finite whatever the model does.
    finite = _all_finite([*jax.tree.leaves(local), sums.loss])
    return local, local_state, memory, sums._replace(finite=finite)

  return LocalTraining(train, optimizer, rate_of)
