"""Batches of local steps: truncated Poisson batches, and shuffled epochs without privacy.

Both return slots of the hospital's row in the client table, with a static shape and a mask, so a
hospital of any size runs the same program.
"""

import jax
import jax.numpy as jnp

from fedjax_med.core.errors import require
from fedjax_med.core.keys import Stream, key_for, require_threefry


def poisson_batch(
  key: jax.Array,
  num_examples: jax.Array | int,
  sampling_probability: jax.Array | float,
  *,
  max_examples: int,
  batch_cap: int,
  limit: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws each of the first ``num_examples`` slots with probability q; keeps at most the cap.

  A draw over the cap is cut to a uniformly random subset (the slots of smallest u, which
  given that they are hits are exchangeable, but for ties of u at float32's 2^-23). With q = 1
  and num_examples ≤ batch_cap every slot is drawn, always. This is the sampling of
  ``TruncatedSubsampledGaussianDpEvent`` (arXiv 2508.15089).

  Args:
    key: key of this client and step.
    num_examples: [] int32, n; may be traced.
    sampling_probability: [] float32, q; may be traced.
    max_examples: n_max, slots in the client table.
    batch_cap: slots in the batch, and the cap where ``limit`` is None.
    limit: [] int32, a cap under ``batch_cap``; may be traced, so that runs of unlike caps share a
      program.

  Returns:
    slots: [batch_cap] int32 in 0 .. n - 1, no two the same; 0 where ``mask`` is False.
    mask: [batch_cap] bool, True for drawn examples (they come first).

  Raises:
    UserError: ``batch_cap`` exceeds ``max_examples``, or ``key`` is no threefry key.
  """
  require_threefry(key)
  require(
    1 <= batch_cap <= max_examples,
    f"batch_cap={batch_cap} must be at least 1 and at most max_examples={max_examples}",
    "lower it to the size of the largest hospital",
  )
  u = jax.random.uniform(key, (max_examples,), jnp.float32)
  valid = jnp.arange(max_examples, dtype=jnp.int32) < num_examples
  hit = valid & (u < jnp.asarray(sampling_probability, jnp.float32))
  score, slots = jax.lax.top_k(jnp.where(hit, -u, -2.0), batch_cap)
  mask = score > -1.5
  if limit is not None:
    mask &= jnp.arange(batch_cap, dtype=jnp.int32) < limit
  return jnp.where(mask, slots, 0), mask


def epoch_batch(
  client_key: jax.Array,
  global_step: jax.Array | int,
  num_examples: jax.Array | int,
  *,
  batch_size: int,
  max_examples: int,
) -> tuple[jax.Array, jax.Array]:
  """The batch of a step of shuffled epochs; no privacy amplification may be claimed for it.

  An epoch is ceil(n / batch_size) steps and a fresh permutation of the n slots, from a key of
  (client, epoch); its last batch holds what is left. So every slot comes once an epoch, and a
  step's batch does not depend on where a run was resumed.

  Args:
    client_key: key of this client, the same in every step.
    global_step: [] int32, local steps this client took before.
    num_examples: [] int32, n; may be traced. With n = 0 the batch is empty.
    batch_size: slots in the batch.
    max_examples: n_max, slots in the client table.

  Returns:
    slots: [batch_size] int32 in 0 .. n - 1; 0 where ``mask`` is False.
    mask: [batch_size] bool, True for examples.
  """
  n = jnp.asarray(num_examples, jnp.int32)
  step = jnp.asarray(global_step, jnp.int32)
  num_batches = jnp.maximum(1, (n + (batch_size - 1)) // batch_size)
  key = key_for(client_key, Stream.SHUFFLE, step // num_batches)
  u = jax.random.uniform(key, (max_examples,), jnp.float32)
  slot = jnp.arange(max_examples, dtype=jnp.int32)
  order = jnp.argsort(jnp.where(slot < n, u, 2.0)).astype(jnp.int32)
  positions = (step % num_batches) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
  mask = positions < n
  return jnp.where(mask, order[jnp.where(mask, positions, 0)], 0), mask
