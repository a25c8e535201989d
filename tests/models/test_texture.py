"""Texture features against scikit-image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from fedjax_med.models.networks import texture

LEVELS = 16
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, LEVELS, (3, 12, 17))
SMOOTH = np.stack(
  [np.add.outer(np.arange(12), k * np.arange(17)) // (2 * k + 2) for k in (1, 2, 3)]
)
ANGLES = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]


@pytest.mark.parametrize("grey", [NOISE, np.minimum(SMOOTH, LEVELS - 1)], ids=["noise", "smooth"])
def test_cooccurrence_and_its_properties_are_those_of_scikit_image(grey):
  found = texture.cooccurrence(jnp.asarray(grey, jnp.int32), LEVELS)
  values = texture.properties(found)
  for image, matrices, row in zip(grey, np.asarray(found), np.asarray(values), strict=True):
    expected = graycomatrix(
      image.astype(np.uint8), [1], ANGLES, levels=LEVELS, symmetric=True, normed=True
    )
    np.testing.assert_allclose(matrices.transpose(1, 2, 0), expected[:, :, 0], rtol=1e-5, atol=1e-7)
    for k, name in enumerate(texture.PROPERTIES):
      np.testing.assert_allclose(
        row[:, k], graycoprops(expected, name)[0], rtol=2e-4, atol=1e-5, err_msg=name
      )


def test_local_binary_patterns_are_those_of_scikit_image():
  # No two pixels alike: there scikit-image's rounding would decide.
  images = RNG.permutation(4 * 15 * 11).reshape(4, 15, 11).astype(np.uint16)
  found = np.asarray(texture.local_binary_patterns(jnp.asarray(images)))
  for image, pattern in zip(images, found, strict=True):
    np.testing.assert_array_equal(pattern, local_binary_pattern(image, 8, 1, method="uniform"))


def test_a_neighbour_that_is_equal_counts_as_bright_also_between_pixels():
  grey = jnp.full((1, 3, 3), 3).at[0, 0, 0].set(2)
  assert int(texture.local_binary_patterns(jnp.full((1, 3, 3), 3))[0, 1, 1]) == 8
  assert int(texture.local_binary_patterns(grey)[0, 1, 1]) == 7


def test_flat_images_have_the_features_of_flatness():
  flat = texture.texture_features(jnp.full((1, 8, 8, 1), 7.0))
  contrast, dissimilarity, homogeneity, energy, correlation, entropy = np.asarray(flat)[0, :6]
  assert (contrast, dissimilarity, entropy) == (0, 0, 0)
  assert (homogeneity, energy, correlation) == (1, 1, 1)
  assert np.isfinite(flat).all()


def test_features_are_of_one_image_each_and_do_not_depend_on_brightness_or_contrast():
  images = jnp.asarray(RNG.normal(size=(3, 16, 16, 1)), jnp.float32)
  features = jax.jit(texture.texture_features)
  found = features(images)
  assert found.shape == (3, 2 * len(texture.PROPERTIES) + 10)
  np.testing.assert_allclose(found[1:], features(images.at[0].set(5))[1:], rtol=1e-5)
  inner = np.asarray(texture.quantise(images, LEVELS))
  np.testing.assert_array_equal(inner, texture.quantise(4 * images + 2, LEVELS))
  assert inner.min() == 0
  assert inner.max() == LEVELS - 1
