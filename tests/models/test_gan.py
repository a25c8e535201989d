"""The networks of the GAN: images of any size, scores of each class, no image depends on others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.keys import base_key
from fedjax_med.models.networks.gan import BASE, LATENT, levels, make_gan


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 8), (28, 28), (33, 20), (192, 192)])
def test_images_of_any_size_are_made_and_scored(size):
  gan, classes = make_gan(*size, num_classes=3), 3
  assert max(size) <= BASE << levels(*size)

  def both(key):
    inputs, images = jnp.zeros((2, LATENT + classes)), jnp.zeros((2, *size, 1))
    maker, state = gan.generator.init(key, inputs)
    judge, other = gan.discriminator.init(key, images)
    assert state == other == {}
    made = gan.generator.apply(maker, {}, inputs)[0]
    return made, gan.discriminator.apply(judge, {}, made)[0]

  made, scores = jax.eval_shape(both, base_key(0))
  assert made.shape == (2, *size, 1)
  assert scores.shape == (2, classes)


def test_images_stay_in_range_and_depend_on_their_own_numbers_only():
  gan = make_gan(8, 8, 2)
  inputs = 5 * jax.random.normal(base_key(1), (4, LATENT + 2))
  params, _ = gan.generator.init(base_key(0), inputs)
  images = np.asarray(gan.generator.apply(params, {}, inputs)[0])
  assert np.abs(images).max() <= 1
  changed = np.asarray(gan.generator.apply(params, {}, inputs.at[1:].set(0.0))[0])
  np.testing.assert_allclose(changed[0], images[0], atol=1e-6)
  assert np.abs(changed[1] - images[1]).max() > 1e-3
