"""The sum of clipped per-example gradients, exactly, with or without forming one per example."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.errors import UserError, require_choice
from fedjax_med.models.gradients import Factors, Record, sq_norms, weighted_sum
from fedjax_med.models.model import Model, Records

METHODS = ("book_keeping", "two_pass", "reference")
# Why 'auto' never takes two_pass; a run that asks for it says so beside its ε.
TWO_PASS_GAP = (
  "privacy.clipping=two_pass: rounding of its second backward pass is not bounded, so numbers"
  " chosen by an adversary can carry a contribution past the clip norm."
)

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class ClipMetrics(NamedTuple):
  """Losses and norms that clipping saw; rows and units outside the mask hold 0.

  None of it is covered by the privacy of the sum. A non-finite unit keeps its non-finite values.

  Attributes:
    loss: [B] float32, loss of each row.
    norm: [U] float32, l2 norm of each unit's gradient before clipping.
    outputs: [B, columns] float32, of the network: the logits, then penalties if it has any.
  """

  loss: jax.Array
  norm: jax.Array
  outputs: jax.Array


def resolve_method(requested: str, uncovered: dict[str, tuple[str, ...]]) -> tuple[str, str]:
  """Decides how gradients are clipped; returns (method, the reason in one phrase).

  'auto' never takes two_pass, whose rounding nothing bounds (``clipped_sum``).

  Args:
    requested: privacy.clipping: auto or one of METHODS.
    uncovered: by method but 'reference', the reasons not to trust it with this model, dtype and
      number of rows; empty if there are none.

  Raises:
    UserError: the method is unknown, or does not cover the model.
  """
  require_choice("privacy.clipping", requested, ("auto", *METHODS))
  if requested == "reference" or (requested != "auto" and not uncovered[requested]):
    return requested, "asked for"
  if requested != "auto":
    raise UserError(
      f"privacy.clipping='{requested}' does not cover this model"
      f" ({_shortened(uncovered[requested])}); set privacy.clipping=auto or reference"
    )
  if not uncovered["book_keeping"]:
    return "book_keeping", "one backward pass; every layer's record is known"
  why = _shortened(uncovered["book_keeping"])
  return "reference", f"book-keeping does not cover the model: {why}"


def uncovered(
  model: Model, params: Any, state: Any, inputs: Any, rows: int, dtype: str = "float32"
) -> dict[str, tuple[str, ...]]:
  """Reasons why methods other than 'reference' cannot be trusted with the model in this dtype.

  That holds for sums over ``rows`` rows at once, all units together, and for no other number.
  ``params``, ``state`` and ``inputs`` [any, ...] need shapes and dtypes only.
  """
  reasons = model.uncovered(params, state, inputs, rows)
  if dtype != "float32":
    rounding = f"its second backward pass rounds {dtype} activations unlike the first"
    reasons["two_pass"] = (rounding, *reasons["two_pass"])
  return reasons


def _shortened(reasons: tuple[str, ...]) -> str:
  return ", ".join(reasons[:4]) + (f" and {len(reasons) - 4} more" * (len(reasons) > 4))


class Rows(NamedTuple):
  """Examples of one step, in the order of their units.

  Attributes:
    inputs: [B, ...] float32.
    labels: targets [B, ...], an array or a tree of arrays.
    mask: [B] bool, rows that are examples.
    per_unit: rows of a unit, a divisor of B.
  """

  inputs: jax.Array
  labels: Any
  mask: jax.Array
  per_unit: int = 1


def clipped_sum(
  method: str,
  model: Model,
  loss: Loss,
  params: Any,
  state: Any,
  rows: Rows,
  clip_norm: jax.Array,  # scalar float32, C
  key: jax.Array | None,
) -> tuple[Any, ClipMetrics]:
  """Returns sum over units of gradient_u * min(1, C / |gradient_u|), and metrics.

  The unit of privacy is ``rows.per_unit`` consecutive rows (an image; the images of a patient; m
  augmentations of one image); its loss is the mean over its rows in the mask. Removing a unit moves
  the sum by at most C, up to the rounding of the norm. A row outside the mask counts exactly 0 and
  what stands in it changes no bit; an empty mask gives exactly 0; a unit whose gradient norm is not
  finite in float32 counts exactly 0. Dropout draws differ between methods: 'reference' folds the
  unit's number into ``key``.

  How far rounding carries a contribution past C, from C = 1e-12 on: about 1e-6 of it, and under
  ``core.rounding.NORM_SLACK`` (1e-3) whatever the numbers, with bfloat16 activations too, where
  norm and sum come from one backward pass ('book_keeping', 'reference'). The second backward pass
  of 'two_pass' rounds unlike the first, which no constant bounds: 3e-3 in a small CNN in bfloat16,
  and in float32 what cancels in that pass (10 C for an input of 1e10 under weights that cancel).

  Args:
    method: 'book_keeping' (one backward pass; keeps activations and their cotangents), 'two_pass'
      (two; one gradient's memory) or 'reference' (U gradients' memory, any model). The first two
      need an empty ``model.uncovered`` for B rows.
    model: the network; its state is read and not changed.
    loss: (outputs of the network [B, columns], labels [B, ...]) -> [B], row by row.
    params: trainable weights.
    state: other collections of the model.
    rows: examples.
    clip_norm: C, above 0.
    key: draws dropout; None if the model has none.

  Returns:
    (pytree like params, ClipMetrics).
  """
  require_choice("method", method, METHODS)
  mask, number = rows.mask, rows.inputs.shape[0]
  if number % rows.per_unit:
    raise ValueError(f"{number} rows are not whole units of {rows.per_unit}")
  inputs = _zero_outside(mask, rows.inputs)
  labels = jax.tree.map(lambda leaf: _zero_outside(mask, leaf), rows.labels)
  by_unit = mask.reshape(-1, rows.per_unit)
  present = by_unit.any(1)
  share = by_unit.astype(jnp.float32)
  share = share / jnp.maximum(share.sum(1, keepdims=True), 1)
  batch = _Batch(inputs=inputs, labels=labels, share=share.reshape(-1), present=present, key=key)
  run = {"book_keeping": _book_keeping, "two_pass": _two_pass, "reference": _reference}[method]
  total, (losses, norms, outputs) = run(model, loss, params, state, batch, clip_norm)
  return total, ClipMetrics(
    loss=_zero_outside(mask, losses),
    norm=_zero_outside(present, norms),
    outputs=_zero_outside(mask, outputs),
  )


class _Batch(NamedTuple):
  """Rows with zeros outside the mask, and the weight of each.

  Attributes:
    inputs: [B, ...].
    labels: targets [B, ...], an array or a tree of arrays.
    share: [B] float32, weight of a row in its unit's loss.
    present: [U] bool, units with a row in the mask.
    key: draws dropout.
  """

  inputs: jax.Array
  labels: Any
  share: jax.Array
  present: jax.Array
  key: jax.Array | None


def _book_keeping(model, loss, params, state, batch, clip_norm):
  """One backward pass leaves every layer's record; norms and the sum are made of those."""
  units = batch.present.shape[0]
  blank = model.blank_records(params, state, batch.inputs, units, key=batch.key)

  def losses(blank):
    outputs = model.recorded_apply(params, state, batch.inputs, blank, units, key=batch.key)
    values = loss(outputs, batch.labels)
    return values, (values, outputs)

  values, pull, (_, outputs) = jax.vjp(losses, blank, has_aux=True)
  (records,) = pull(batch.share.astype(values.dtype))
  records = evaluated_once(records)
  vectors, others = _vectors_apart(records)
  # Scales and biases as one array: most of a deep network's parameters, few of its numbers.
  joined: list[Record] = []
  if vectors:
    joined.append({"": jnp.concatenate(list(vectors.values()), axis=1)})
  norms = jnp.sqrt(sum(map(sq_norms, [*joined, *others.values()])))
  scale = _coefficients(norms, batch.present, clip_norm)
  total = jax.tree.map(jnp.zeros_like, params)
  for path, record in others.items():
    _set(total, path, weighted_sum(record, scale))
  for record in joined:
    ends = itertools.accumulate(vector.shape[1] for vector in vectors.values())
    parts = jnp.split(weighted_sum(record, scale)[""], list(ends)[:-1])
    for (path, name), part in zip(vectors, parts, strict=True):
      _set(total, path, {name: part})
  return total, ClipMetrics(loss=values, norm=norms, outputs=outputs)


def _vectors_apart(records: Records) -> tuple[dict[tuple[Any, str], jax.Array], Records]:
  """Parts of records on parameters with one axis, by path and name, and the other parts."""
  vectors, others = {}, {}
  for path, record in records.items():
    for name, entry in record.items():
      if isinstance(entry, Factors) or entry.ndim != 2:
        others.setdefault(path, {})[name] = entry
      else:
        vectors[path, name] = entry
  return vectors, others


def _set(tree, path, values):
  """Puts a layer's gradients into the nested dictionary of all, in place."""
  for name in path:
    tree = tree[name]
  for name, value in values.items():
    if value.shape != tree[name].shape:
      raise ValueError(f"the record of {'/'.join((*path, name))} has shape {value.shape}")
    tree[name] = value.astype(tree[name].dtype)


def _two_pass(model, loss, params, state, batch, clip_norm):
  """Pulls back ones for the norms, then the clip coefficients for the sum (design: norm taps)."""

  def losses(params, taps):
    outputs = model.tapped_apply(params, state, batch.inputs, taps, key=batch.key)
    values = loss(outputs, batch.labels)
    return values, (values, outputs)

  units = batch.present.shape[0]
  taps = jnp.zeros(units, jax.tree.leaves(params)[0].dtype)
  values, pull, (_, outputs) = jax.vjp(losses, params, taps, has_aux=True)
  share = batch.share.astype(values.dtype)
  _, squares = pull(share)
  norms = jnp.sqrt(squares)
  scale = _coefficients(norms, batch.present, clip_norm).astype(values.dtype)
  total, _ = pull(share * jnp.repeat(scale, share.shape[0] // units))
  return total, ClipMetrics(loss=values, norm=norms, outputs=outputs)


def _reference(model, loss, params, state, batch, clip_norm):
  """One gradient per unit, each from a batch of its own (vmap of grad)."""
  units = batch.present.shape[0]

  def one(inputs, labels, share, unit):
    def value(params):
      unit_key = None if batch.key is None else jax.random.fold_in(batch.key, unit)
      outputs, _ = model.apply(params, state, inputs, key=unit_key, train=True)
      values = loss(outputs, labels)
      # A row outside the mask counts 0 even if its loss is not finite.
      weighted = jnp.where(share > 0, values * share.astype(values.dtype), jnp.zeros_like(values))
      return weighted.sum(), (values, outputs)

    return jax.grad(value, has_aux=True)(params)

  inputs, labels, share = jax.tree.map(
    lambda leaf: leaf.reshape(units, -1, *leaf.shape[1:]),
    (batch.inputs, batch.labels, batch.share),
  )
  gradients, (values, outputs) = jax.vmap(one)(inputs, labels, share, jnp.arange(units))
  gradients = evaluated_once(gradients)
  leaves = jax.tree.leaves(gradients)
  norms = jnp.sqrt(sum(jnp.square(x).sum(tuple(range(1, x.ndim))) for x in leaves))
  scale = _coefficients(norms, batch.present, clip_norm)

  def weighted(x):
    weight = scale.reshape((-1,) + (1,) * (x.ndim - 1)).astype(x.dtype)
    # A coefficient of 0 alone does not do: 0 * inf = NaN.
    return jnp.where(weight > 0, x * weight, jnp.zeros_like(x)).sum(0)

  metrics = ClipMetrics(
    loss=values.reshape(-1), norm=norms, outputs=outputs.reshape(-1, *outputs.shape[2:])
  )
  return jax.tree.map(weighted, gradients), metrics


def evaluated_once(gradients: Any) -> Any:
  """The same arrays, for a norm and a sum that read the same bits.

  A compiler may compute an array again for each kernel that reads it, and sum it in another order;
  the array in the sum could then exceed the one that was measured.
  """
  return jax.lax.optimization_barrier(gradients)


def _coefficients(norms: jax.Array, present: jax.Array, clip_norm: jax.Array) -> jax.Array:
  """min(1, C / norm) of the units; 0 where there is none and where the norm is not finite."""
  clip_norm = jnp.asarray(clip_norm, norms.dtype)
  inside = norms <= clip_norm  # no division there, so a zero gradient is safe
  scale = jnp.where(inside, jnp.ones_like(norms), clip_norm / jnp.where(inside, clip_norm, norms))
  return jnp.where(present & jnp.isfinite(norms), scale, jnp.zeros_like(norms))


def _zero_outside(mask: jax.Array, values: jax.Array) -> jax.Array:
  rows = mask.reshape((-1,) + (1,) * (values.ndim - 1))
  return jnp.where(rows, values, jnp.zeros_like(values))
