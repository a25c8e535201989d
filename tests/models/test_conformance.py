"""Every registered network keeps the same promises: examples apart, exact clipping, learning."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fedjax_med.core.config import Config, DataConfig
from fedjax_med.data.grey import EIGHT_BITS
from fedjax_med.data.modality import PICTURES
from fedjax_med.privacy.clipping import Rows, clipped_sum
from fedjax_med.run.checkpoints import open_checkpoints
from fedjax_med.tasks.classification import CLASSIFICATION
from fedjax_med.trained.exporting import PLATFORMS, export_program
from fedjax_med.trained.loading import Trained
from tests.models.networks import (
  CLASSES,
  CLIENTS,
  IMAGES,
  INPUTS,
  MASK,
  SIDE,
  TARGETS,
  every_model,
  gradients_of,
  loss,
  network,
  of_client,
)
from tests.privacy.clipping_cases import assert_close, loop, norms_of, quick_jit


@functools.cache
def forward(name: str, dtype: str = "float32") -> Any:
  """Jitted: (params, images) -> logits."""
  found = network(name, dtype=dtype)
  return quick_jit(lambda params, images: found.model.apply(params, found.state, images)[0])


def logits_of(name: str, dtype: str = "float32") -> jax.Array:
  return forward(name, dtype)(network(name).params, IMAGES)


@functools.cache
def weights_of_clients(name: str) -> Any:
  """Other weights at every client: [client, ...]."""
  trees = [of_client(name, client).params for client in range(CLIENTS)]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@functools.cache
def clipped_sums(name: str, method: str) -> Any:
  """Jitted: (params [client, ...], C) -> every client's clipped sum and metrics."""
  found = network(name)

  def run(params, inputs, labels, mask, clip_norm):
    arguments = (params, found.state, Rows(inputs, labels, mask), clip_norm, None)
    return clipped_sum(method, found.model, loss, *arguments)

  clients = jax.vmap(run, (0, 0, 0, 0, None))
  return quick_jit(lambda params, clip_norm: clients(params, INPUTS, TARGETS, MASK, clip_norm))


@every_model
def test_logits_are_finite_repeatable_and_of_one_example_each(name):
  logits = logits_of(name)
  assert logits.shape == (4, CLASSES)
  assert logits.dtype == jnp.float32
  assert np.isfinite(logits).all()
  assert np.ptp(logits, axis=0).min() > 0  # the images are seen
  np.testing.assert_array_equal(logits, logits_of(name))
  others = np.concatenate([100 * IMAGES[:1] + 7, IMAGES[1:]])
  changed = forward(name)(network(name).params, others)
  assert np.abs(changed[0] - logits[0]).max() > 1e-3
  np.testing.assert_allclose(changed[1:], logits[1:], rtol=0, atol=1e-6)


@every_model
@pytest.mark.parametrize(
  "method", ["book_keeping", pytest.param("two_pass", marks=pytest.mark.slow)]
)
def test_clipped_sums_of_clients_side_by_side_equal_vmap_of_grad_one_by_one(name, method):
  norms = [norms_of(gradients_of(name, client)) for client in range(CLIENTS)]
  clip_norm = np.median(norms)  # examples on both sides
  got, metrics = clipped_sums(name, method)(weights_of_clients(name), jnp.float32(clip_norm))
  for client in range(CLIENTS):
    want = loop(gradients_of(name, client), clip_norm)
    assert_close(jax.tree.map(lambda leaf, c=client: leaf[c], got), want, 1e-5)
    np.testing.assert_allclose(metrics.norm[client, MASK[client]], norms[client], rtol=1e-5)


@every_model
def test_a_few_steps_lower_the_loss_of_every_client(name):
  params, losses = weights_of_clients(name), []
  for _ in range(6):
    gradient, metrics = clipped_sums(name, "book_keeping")(params, jnp.float32(1e6))  # unclipped
    sizes = norms_of([jax.tree.map(lambda leaf, c=c: leaf[c], gradient) for c in range(CLIENTS)])

    def step(leaf, slope, sizes=sizes):
      sizes = sizes.reshape(-1, *[1] * (leaf.ndim - 1)).astype(np.float32)
      return leaf - 0.1 * np.asarray(slope) / sizes

    params = jax.tree.map(step, params, gradient)
    losses.append(np.asarray(metrics.loss).sum(axis=1))
  assert (losses[-1] < 0.9 * losses[0]).all(), losses


@every_model
@pytest.mark.parametrize("lowering", ["auto", "native"])  # the clipped sums are of matmul
def test_lowering_changes_gradients_by_rounding_only(name, lowering):
  found, rows = network(name, lowering=lowering), MASK[0]

  def summed(params):
    inputs = INPUTS[0, rows]
    logits, _ = found.model.apply(params, found.state, inputs, key=jax.random.key(1), train=True)
    return loss(logits, TARGETS[0, rows]).sum()

  got = quick_jit(jax.grad(summed))(found.params)
  assert_close(got, loop(gradients_of(name, 0), np.inf), 1e-5)


@every_model
def test_bfloat16_changes_logits_a_little_and_keeps_them_float32(name):
  logits, full = logits_of(name, "bfloat16"), np.asarray(logits_of(name))
  assert logits.dtype == jnp.float32
  assert (logits != full).any()
  np.testing.assert_allclose(logits, full, atol=0.05 * np.abs(full).max())


@every_model
def test_a_program_of_it_is_exported_for_any_number_of_images_and_every_platform(name):
  found = network(name, lowering="native")
  config = Config(data=DataConfig(image_size=SIDE, normalisation="fixed"))
  model = Trained(
    folder=pathlib.Path(),
    run_id="",
    config=config,
    class_names=("a", "b", "c"),
    rounds=0,
    model=found.model,
    params=found.params,
    state=found.state,
    grey=EIGHT_BITS,
    modality=PICTURES,
    task=CLASSIFICATION,
    stem_pool_padding="",
    hospital="",
  )
  program = jax.export.deserialize(bytearray(export_program(model)))
  assert program.platforms == PLATFORMS
  pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 1)).astype(np.uint8)
  for images in (pixels[:1], pixels):
    assert jax.eval_shape(program.call, images).shape == (len(images), CLASSES)
  inputs = np.concatenate([np.float32(pixels / 127.5 - 1), IMAGES[:1]])  # 4: compiled already
  logits = forward(name)(found.params, inputs)[:3]
  probabilities = quick_jit(program.call)(pixels)
  np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=2e-3, atol=1e-5)


@every_model
def test_saved_and_restored_weights_give_the_same_logits(name, tmp_path):
  params = network(name).params
  with open_checkpoints(tmp_path) as manager:
    manager.save(1, args=ocp.args.StandardSave(params))
    manager.wait_until_finished()
    restored = manager.restore(1, args=ocp.args.StandardRestore())
  assert jax.tree.structure(restored) == jax.tree.structure(params)
  np.testing.assert_array_equal(forward(name)(restored, IMAGES), logits_of(name))
