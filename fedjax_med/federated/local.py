"""Local training at one client: draw a batch, take a (private) gradient, step the optimiser."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedjax_med.core.keys import Stream, key_for
from fedjax_med.data.modality import PICTURES, Modality
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
from fedjax_med.federated.vector import (
  ARRAYS,
  Holding,
  NetworkSpec,
  joined,
  pieces_of,
  ravel,
  unravel,
)
from fedjax_med.models.model import Model
from fedjax_med.privacy.banded import banded_batch, correlated_mean, empty_memory
from fedjax_med.privacy.clipping import Rows, clipped_sum
from fedjax_med.privacy.noise import private_mean
from fedjax_med.privacy.sampling import epoch_batch, poisson_batch
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.tasks.task import Task


class StepContext(NamedTuple):
  """Inputs of a local step besides the weights.

  Attributes:
    client: the client.
    pool: all examples.
    hyper: traced hyperparameters.
    key: base key of the run.
    round: [] int32.
    step: [] int32, of the round.
  """

  client: Client
  pool: Pool
  hyper: Hyper
  key: jax.Array
  round: jax.Array
  step: jax.Array


# (params, state, memory, context) -> (gradient, new state, new memory, RoundMetrics of this step).
# params and state are the network's trees. The gradient is a tree too; that of a private step, a
# release, is a vector.
Gradient = Callable[[Tree, Tree, Tree, StepContext], tuple[Tree, Tree, Tree, RoundMetrics]]


class BatchShape(NamedTuple):
  """Sizes of a local step's batch, and the preparation and task of its examples.

  Attributes:
    slots: places for examples or units; of a private step the cap of the Poisson batch.
    max_examples: slots of a client's index row.
    normalisation: value of data.normalisation, or of the field that the modality is scaled by.
    augmentation: value of client.augmentation.
    microbatch: slots in memory at once; 0 takes all.
    rows_per_unit: rows of a unit that a private step looks at.
    copies: random changes of each example in a private step (augmentation multiplicity).
    modality: kind of the examples.
    task: kind of prediction.
  """

  slots: int
  max_examples: int
  normalisation: str
  augmentation: str = "none"
  microbatch: int = 0
  rows_per_unit: int = 1
  copies: int = 1
  modality: Modality = PICTURES
  task: Task = CLASSIFICATION


class _Drawn(NamedTuple):
  """Slots that a step drew, with the random changes of their examples.

  Attributes:
    slots: [S] int32 slots of the client's table of examples or units.
    mask: [S] bool, slots that count.
    turn: [S] float32 in 0 .. 1, place in a unit of many rows at which the step begins.
    changes: random changes of the slot's examples, [S, examples]; None without any.
  """

  slots: jax.Array
  mask: jax.Array
  turn: jax.Array
  changes: Tree


def _rows(client: Client, drawn: _Drawn, rows_per_unit: int) -> tuple[jax.Array, jax.Array]:
  """Rows of the pool, and the mask of those that count, both [S, rows_per_unit]."""
  if client.units is None:
    return client.indices[drawn.slots][:, None], drawn.mask[:, None]
  starts, sizes = client.units.starts[drawn.slots], client.units.sizes[drawn.slots]
  # A stretch that begins anywhere and goes round: every row of a large unit has its turn.
  first = jnp.floor(drawn.turn * sizes.astype(jnp.float32)).astype(jnp.int32)
  first = jnp.where(sizes > rows_per_unit, first, 0)
  turn = jnp.arange(rows_per_unit)
  places = starts[:, None] + (first[:, None] + turn[None]) % sizes[:, None]
  return client.indices[places], drawn.mask[:, None] & (turn[None] < sizes[:, None])


def _inputs(pool: Pool, rows: jax.Array, changes: Tree, shape: BatchShape) -> jax.Array:
  """Network inputs of the pool's ``rows`` [B]."""
  raw = jax.tree.map(lambda leaf: leaf[rows], pool.inputs)
  vary = shape.modality.vary
  if changes is not None and vary is not None:
    raw = vary.apply(raw, changes)
  return shape.modality.prepare(raw, shape.normalisation)


def _targets(pool: Pool, rows: jax.Array) -> Tree:
  """Targets of the pool's ``rows`` [B]."""
  return jax.tree.map(lambda leaf: leaf[rows], pool.labels)


def _nan_outside(mask: jax.Array, values: jax.Array) -> jax.Array:
  """Numbers [B, ...] that are nan where ``mask`` [B] is False."""
  present = mask.reshape(-1, *[1] * (values.ndim - 1))
  return jnp.where(present, values, jnp.nan)


def _changes(
  context: StepContext, leading: tuple[int, ...], shape: BatchShape, *counters: int
) -> Tree:
  """Random changes of the step's examples in a leading shape; None where nothing is changed.

  ``counters`` end the name of the random key.
  """
  vary = shape.modality.vary
  if shape.augmentation == "none" or vary is None:
    return None
  where = (context.client.number, context.round, context.step, *counters)
  return vary.draw(key_for(context.key, Stream.AUGMENT, *where), leading, shape.augmentation)


def _masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
  return jnp.where(mask, values.astype(jnp.float32), 0).sum()


def plain_gradient(model: Model, loss: Loss, shape: BatchShape) -> Gradient:
  """Gradient of the mean loss over the next batch of a client's shuffled epoch.

  ``loss`` is of the class logits; penalties of the network are added to it (``with_penalties``).

  Epochs run on across rounds (global step = round · steps a round + step), so a round shorter
  than an epoch still visits every example (of the rounds that the client takes part in). The last
  batch of an epoch may be partial. Batch norm sees, and averages over, one microbatch after the
  other.
  """
  whole_loss = with_penalties(loss, model.penalties)

  def gradient(params, state, memory, context):
    client = context.client
    drawn = _next_batch(context, shape)
    count = jnp.maximum(drawn.mask.sum(dtype=jnp.float32), 1)

    def part(state, drawn, key):
      rows, mask = client.indices[drawn.slots], drawn.mask
      inputs = _inputs(context.pool, rows, drawn.changes, shape)
      labels = _targets(context.pool, rows)
      if shape.task.joint:  # padding repeats examples, which others' losses must not see twice
        labels = jax.tree.map(lambda leaf: _nan_outside(mask, leaf), labels)

      def mean_loss(params):
        outputs, new_state = model.apply(params, state, inputs, key=key, train=True)
        losses = whole_loss(outputs, labels)
        total = _masked_sum(losses, mask)
        return total / count, (total, class_logits(outputs, model.penalties), new_state)

      grad, (total, logits, new_state) = jax.grad(mean_loss, has_aux=True)(params)
      metrics = no_metrics()._replace(
        loss=total,
        tally=_masked_sum(shape.task.tally(logits, labels), mask),
        examples=mask.sum(dtype=jnp.float32),
      )
      return grad, new_state, metrics

    key = key_for(context.key, Stream.DROPOUT, client.number, context.round, context.step)
    nothing = jax.tree.map(jnp.zeros_like, params)
    grad, state, metrics = _in_parts(part, shape, nothing, state, drawn, key)
    return grad, state, memory, metrics._replace(steps=jnp.ones((), jnp.int32))

  return gradient


def _next_batch(context: StepContext, shape: BatchShape) -> _Drawn:
  """The next batch of a client's shuffled epoch."""
  client, size = context.client, shape.slots
  slots, mask = epoch_batch(
    key_for(context.key, Stream.SHUFFLE, client.number),
    context.round * client.num_steps + context.step,
    client.num_examples,
    batch_size=size,
    max_examples=shape.max_examples,
  )
  # Padding repeats the batch's own examples: it counts in no loss, but batch norm looks at it.
  slots = slots[jnp.arange(size) % jnp.maximum(mask.sum(), 1)]
  changes = _changes(context, (size,), shape)
  return _Drawn(slots=slots, mask=mask, turn=jnp.zeros((size,), jnp.float32), changes=changes)


def private_gradient(model: Model, loss: Loss, clipping: str, shape: BatchShape) -> Gradient:
  """DP-SGD gradient (Abadi et al. 2016) of a truncated Poisson batch of privacy units, as a vector.

  Sum of clipped gradients, one of each unit, plus noise of standard deviation σC on the sum,
  divided by the fixed expected batch size q·n. ``loss`` as in ``plain_gradient``. Batch
  and noise are functions of (client, round, step) alone: a replayed step is the same release.
  One microbatch is clipped at once, and no more of them run than hold a unit that was drawn.

  A unit is one example, or where ``client.units`` says so a patient: of those with more than
  ``shape.rows_per_unit`` rows a step looks at that many. Each row is seen in ``shape.copies``
  random changes (augmentation multiplicity, De et al. 2022, arXiv 2204.13650); the loss of a unit
  is the mean over all of that, so that its gradient is clipped once.

  Where ``client.coefficients`` says so, noise is correlated over steps and ``memory`` is a
  ``banded.Memory``.
  """
  whole_loss = with_penalties(loss, model.penalties)

  def gradient(params, state, memory, context):
    hyper, bands = context.hyper, context.client.coefficients
    # ε of one kind of noise must not stand beside releases with the other.
    remembered = 0 if memory == () else memory.noise.shape[0] + 1
    if remembered != (0 if bands is None else len(bands)):
      raise ValueError(f"coefficients {bands} do not go with a memory of {remembered} bands")

    def part(state, drawn, key):
      rows, mask = (
        jnp.repeat(slot, shape.copies, axis=1).reshape(-1)
        for slot in _rows(context.client, drawn, shape.rows_per_unit)
      )
      changes = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), drawn.changes)
      inputs = _inputs(context.pool, rows, changes, shape)
      labels = _targets(context.pool, rows)
      units = shape.rows_per_unit * shape.copies
      batch = Rows(inputs=inputs, labels=labels, mask=mask, per_unit=units)
      # Norms and sums must round alike: TF32 products would not hold the bound C.
      with jax.default_matmul_precision("highest"):
        total, clip = clipped_sum(
          clipping, model, whole_loss, params, state, batch, hyper.clip_norm, key
        )
      present, logits = drawn.mask, class_logits(clip.outputs, model.penalties)
      metrics = no_metrics()._replace(
        loss=_masked_sum(clip.loss, mask),
        tally=_masked_sum(shape.task.tally(logits, labels), mask),
        norm=_masked_sum(clip.norm, present),
        clipped=_masked_sum(clip.norm > hyper.clip_norm, present),
        examples=mask.sum(dtype=jnp.float32),
        units=present.sum(dtype=jnp.float32),
      )
      return pieces_of(total), state, metrics

    where = (context.client.number, context.round, context.step)
    drawn = _poisson_batch(context, memory, shape)
    key = key_for(context.key, Stream.DROPOUT, *where)
    nothing = pieces_of(jax.tree.map(jnp.zeros_like, params))
    total, state, metrics = _in_parts(part, shape, nothing, state, drawn, key)
    release = (
      joined(total),
      key_for(context.key, Stream.NOISE, *where),
      context.client.noise_multiplier,
      hyper.clip_norm,
      context.client.expected_batch_size,
    )
    if bands is None:
      grad = private_mean(*release)
    else:
      grad, memory = correlated_mean(*release, bands, memory)
    return grad, state, memory, metrics._replace(steps=jnp.ones((), jnp.int32))

  return gradient


def _poisson_batch(context: StepContext, memory: Tree, shape: BatchShape) -> _Drawn:
  """The truncated Poisson batch of a private step."""
  client, slots = context.client, shape.slots
  where, units = (client.number, context.round, context.step), client.units
  sampler = poisson_batch
  if client.coefficients is not None:
    bands = client.coefficients.shape[0]
    sampler = functools.partial(banded_batch, step=memory.step, bands=bands)
  numbers, mask = sampler(
    key_for(context.key, Stream.SAMPLE, *where),
    client.num_examples if units is None else units.number,
    client.sampling_probability,
    max_examples=shape.max_examples if units is None else units.starts.shape[0],
    batch_cap=slots,
    limit=client.batch_cap,
  )
  turn = jnp.zeros((slots,), jnp.float32)
  if units is not None:
    turn = jax.random.uniform(key_for(context.key, Stream.AUGMENT, *where, 0), (slots,))
  changes = _changes(context, (slots, shape.rows_per_unit * shape.copies), shape, 1)
  return _Drawn(slots=numbers, mask=mask, turn=turn, changes=changes)


def slots_at_once(microbatch: int, slots: int) -> int:
  """Slots of a batch that ``part`` of a gradient gets; the last part is padded to as many."""
  return microbatch if 0 < microbatch < slots else slots


def _in_parts(part, shape: BatchShape, zeros: Tree, state: Tree, drawn: _Drawn, key: jax.Array):
  """Sums ``part(state, drawn, key) -> (gradient, state, metrics)`` over microbatches of slots.

  Drawn slots come first, so the loop ends where they do: a batch's padding costs less than a
  microbatch, and an empty batch nothing. ``zeros`` is a gradient of nothing.
  """
  size, microbatch = shape.slots, shape.microbatch
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
  return jax.lax.fori_loop(0, parts, body, (zeros, state, no_metrics()))


class Weights(NamedTuple):
  """Weights of a client in local training, and the memory of its gradient.

  Attributes:
    params: [P] float32 trained weights.
    state: [S] float32 non-trained state of the network, such as batch statistics; [0] for most.
    memory: memory of correlated noise, a banded.Memory; () without correlated noise.
  """

  params: jax.Array
  state: jax.Array
  memory: Tree = ()


class LocalTraining(NamedTuple):
  """Local training of a client in a round.

  Attributes:
    train: (Weights, StepContext of step 0, *, shift=None, pull=None, trainable=None) ->
      (Weights, RoundMetrics). ``shift`` [P] is added to every gradient. ``pull`` is
      (λ, anchor [P]): λ (w − anchor) is added. Both come after clipping and noise, and read no
      example. ``trainable`` is a boolean for each array of the spec: the others stay as they are.
    optimizer: optax direction of a step.
    rate: (hyper, round) -> local learning rate.
    spec: spec of the network's vectors.
    bands: steps that noise is correlated over; 1 for independent noise and without privacy.
  """

  train: Callable[..., tuple[Weights, RoundMetrics]]
  optimizer: optax.GradientTransformation
  rate: Callable[[Hyper, jax.Array], jax.Array]
  spec: NetworkSpec
  bands: int = 1

  def init_memory(self) -> Tree:
    """The memory before a client's first round; () without correlated noise."""
    return empty_memory(self.spec.params.size, self.bands) if self.bands > 1 else ()


def local_training(
  gradient: Gradient,
  optimizer: optax.GradientTransformation,
  rate_factor: Callable[[jax.Array], jax.Array],
  num_local_steps: int | None,
  spec: NetworkSpec,
  *,
  bands: int = 1,
  holding: Holding = ARRAYS,
) -> LocalTraining:
  """Builds a client's round of local steps.

  Args:
    gradient: plain_gradient or private_gradient.
    optimizer: optax direction, started afresh each round as in FedAvg.
    rate_factor: schedule factor of the round.
    num_local_steps: local steps where they are the same for every client, else None and
      ``client.num_steps`` decides (under vmap the clients that are done wait, unchanged).
    spec: spec of the network's vectors.
    bands: steps that noise is correlated over.
    holding: how weights and optimiser state are held within a round; it moves no result. What
      arrives and leaves is a vector.

  The FedProx term μ(w − w_round) is added after clipping and noise: it depends on no example.
  """

  def rate_of(hyper: Hyper, round: jax.Array) -> jax.Array:
    return hyper.client_learning_rate * rate_factor(round)

  def train(start: Weights, context: StepContext, *, shift=None, pull=None, trainable=None):
    hyper, rate = context.hyper, rate_of(context.hyper, context.round)
    first = holding.cut(start.params, spec.params)
    strength, anchor = (hyper.proximal_weight, start.params) if pull is None else pull

    def direction_of(local, grad, step):
      # Read out of their vectors in every step: once for all they would be arrays in memory.
      fixed, _ = jax.lax.optimization_barrier(((anchor, shift), step))
      to, add = jax.tree.map(lambda vector: holding.cut(vector, spec.params), fixed)
      grad = jax.tree.map(lambda g, w, w0: g + strength * (w - w0), grad, local, to)
      return grad if shift is None else jax.tree.map(jnp.add, grad, add)

    def body(step, carry):
      local, state, memory, opt_state, sums = carry
      params = holding.opened(local, spec.params)
      grad, state, memory, metrics = gradient(params, state, memory, context._replace(step=step))
      vector = isinstance(grad, jax.Array)
      grad = holding.cut(grad, spec.params) if vector else holding.of_tree(grad)
      direction, opt_state = optimizer.update(direction_of(local, grad, step), opt_state, local)
      moved = descend(local, direction, rate)
      if trainable is not None:
        moved = holding.chosen(moved, local, spec.params, trainable)
      return moved, state, memory, opt_state, add_metrics(sums, metrics)

    bound = context.client.num_steps if num_local_steps is None else num_local_steps
    state = unravel(start.state, spec.state)
    carry = (first, state, start.memory, optimizer.init(first), no_metrics())
    local, state, memory, _, sums = jax.lax.fori_loop(0, bound, body, carry)
    params = holding.joined(local)
    # The loss too: private gradients stay finite whatever the model does.
    finite = jnp.isfinite(params).all() & jnp.isfinite(sums.loss)
    end = Weights(params=params, state=ravel(state), memory=memory)
    return end, sums._replace(finite=finite)

  return LocalTraining(train=train, optimizer=optimizer, rate=rate_of, spec=spec, bands=bands)
