"""Noise correlated over the steps of one hospital by a banded matrix, and the event it accounts to.

Banded matrix factorisation (Choquette-Choo et al., arXiv 2306.08153; DP-FTRL), with a Toeplitz
strategy (McKenna, arXiv 2405.15913). Let G_t be the clipped sum of step t, c_0 .. c_{b-1} the
coefficients, ``C[t, s] = c_{t-s}``, z_t independent standard normals and σ in units of the clip
norm. A step adds σ x_t to G_t, where x = C⁻¹ z; that is the release C G + σ z, multiplied by C⁻¹.
Noise of later steps takes back part of the earlier, so the sum of the steps, which is where SGD
goes, has less noise than independent draws leave in it.

Why ``ceil(T / b)`` subsampled Gaussians bound T steps:

1. A record in slot s is drawn only in steps t with t mod b = s mod b. Its share of G_t enters rows
   t .. t+b-1 of C G, multiplied by c_0 .. c_{b-1}; its next possible step is t+b. So these blocks
   of rows do not overlap: the record's columns of C are orthogonal, of norm ‖c‖ (less at the end).
2. Fix what came before a block and what the other subsets draw; neither depends on whether the
   record is drawn at t. Every other term of the block's rows follows from the outputs before it, so
   subtracting those terms is a bijection, and what is left is c ⊗ G_t + σ z: by its projection on
   c, one Gaussian of noise σ / ‖c‖ on the truncated Poisson batch of step t. Gradients may depend
   on all earlier outputs, within the block too.
3. The blocks compose adaptively: ``ceil((T - r) / b)`` for subset r, most for subset 0.
4. Subsets have ceil(n/b) or floor(n/b) records. All are sampled as ceil(n/b) places; the one that a
   short subset lacks is a blank place, drawn and cut like the others, which adds nothing. A
   blank is what zero-out adjacency puts in place of a record, so a short subset is a data set of
   ceil(n/b) records and one event holds for all. Neighbours keep their slots, and so their subsets.

Nothing here depends on T: a run may go on beyond the steps its strategy is best for, with the same
coefficients. It may not change them, nor lose its buffer of earlier noise, between two steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.privacy.noise import gaussian_noise_like, key_after, noised_mean, whole_grains
from fedjax_med.privacy.sampling import poisson_batch


def banded_batch(
  key: jax.Array,
  num_units: jax.Array | int,
  sampling_probability: jax.Array | float,
  *,
  step: jax.Array | int,
  bands: int,
  max_examples: int,
  batch_cap: int,
  limit: jax.Array | int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The truncated Poisson batch of a step, from subset ``step mod bands`` of the slots.

  Slot s belongs to subset s mod bands, always. With one band this is poisson_batch, draw for draw.

  Args:
    key: key of this client and step.
    num_units: [] int32, n; may be traced.
    sampling_probability: [] float32, q; may be traced.
    step: [] int32, private steps this client took before: no other count keeps a record's steps
      ``bands`` apart.
    bands: b, at most n.
    max_examples: n_max, slots in the client table.
    batch_cap: slots in the batch.
    limit: a cap under it, as in ``poisson_batch``.

  Returns:
    slots: [batch_cap] int32 in 0 .. n - 1, no two the same; 0 where ``mask`` is False.
    mask: [batch_cap] bool, True for drawn examples (they come first).

  Raises:
    UserError: ``batch_cap`` exceeds the largest subset.
  """
  n = jnp.asarray(num_units, jnp.int32)
  places, drawn = poisson_batch(
    key,
    (n + (bands - 1)) // bands,
    sampling_probability,
    max_examples=-(-max_examples // bands),
    batch_cap=batch_cap,
    limit=limit,
  )
  slots = places * bands + jnp.asarray(step, jnp.int32) % bands
  mask = drawn & (slots < n)
  # A blank place that was drawn took its place in the batch; now it goes to the end.
  order = jnp.argsort(~mask, stable=True)
  mask = mask[order]
  return jnp.where(mask, slots[order], 0), mask


class Memory(NamedTuple):
  """State of a hospital's correlated noise between steps. Its loss would break the promise of ε.

  Attributes:
    step: [] int32 private steps taken so far.
    noise: [b - 1, P] float32, the x of the steps before, newest first.
  """

  step: jax.Array
  noise: jax.Array


def empty_memory(size: int, bands: int) -> Memory:
  """Memory before the first step, for weights of ``size`` numbers."""
  return Memory(step=jnp.zeros((), jnp.int32), noise=jnp.zeros((bands - 1, size), jnp.float32))


def correlated_mean(
  clipped_sum: jax.Array,
  key: jax.Array,
  noise_multiplier: jax.Array | float,
  clip_norm: jax.Array | float,
  expected_batch_size: jax.Array | float,
  coefficients: jax.Array,
  memory: Memory,
) -> tuple[jax.Array, Memory]:
  """(clipped_sum + σ·C·x) / (q·n/b): ``noise.private_mean`` with x = C⁻¹ z in the place of z.

  Returns:
    float32 in the shape of ``clipped_sum``, and the memory of the next step.
  """
  settings = (noise_multiplier, clip_norm, expected_batch_size)
  grains = whole_grains(clipped_sum, key, *settings)
  fresh = gaussian_noise_like(key_after(key, grains), grains, 1.0)
  noise, last = correlated_noise(memory.noise, fresh, coefficients)
  mean = noised_mean(grains, noise, *settings)
  return mean, Memory(memory.step + 1, last)


def correlated_noise(
  previous: jax.Array, fresh: jax.Array, coefficients: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Row t of C⁻¹ z: x_t = (z_t - Σ_{j=1}^{b-1} c_j x_{t-j}) / c_0, x before step 0 being 0.

  Depends on no data, so it may be multiplied by σ·C afterwards. One band gives ``fresh`` itself.

  Args:
    previous: [b - 1, ...] float32, the x of the steps before, newest first.
    fresh: [...] float32 standard normals z_t of this step.
    coefficients: [b] float32; may be traced, and must be the same in every step of a run.

  Returns:
    noise: x_t, float32 in the shape of ``fresh``.
    buffer: ``previous`` of the next step.
  """
  c = jnp.asarray(coefficients, jnp.float32)

  # No matrix product: TF32 would leave x off by a thousandth.
  weights = c[1:].reshape((-1,) + (1,) * fresh.ndim)
  noise = (fresh - (weights * previous).sum(0)) / c[0]
  return noise, jnp.concatenate([noise[None], previous])[: previous.shape[0]]
