"""Evaluation and normalisation against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.keys import base_key
from fedjax_med.data.normalisation import normalise
from fedjax_med.federated.vector import network_spec, ravel
from fedjax_med.models.registry import create_model
from fedjax_med.simulation.evaluation import (
  EvaluatedModel,
  make_classify,
  make_evaluate,
  make_predict,
)
from tests.federated.toy import make_pool


@pytest.mark.parametrize("rows", [[0], [3, 1, 4, 1, 5], list(range(25))])
def test_probabilities_are_those_of_each_row_whatever_the_batch(rows):
  model = create_model(ModelConfig(name="linear"), 2)
  params, state = model.init(base_key(2), jnp.zeros((1, 4, 4, 1)))
  pool = make_pool()
  spec = network_spec(params, state)
  prepare = functools.partial(normalise, how="fixed")
  predict, _ = make_predict(
    make_evaluate(make_classify(model, prepare, jax.nn.softmax), spec), batch_size=4
  )
  leaves = {leaf.ndim: np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)}
  images = np.asarray(pool.inputs, np.float64)[rows].reshape(len(rows), 16) / 127.5 - 1
  logits = images @ leaves[2] + leaves[1]
  expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  found = predict(EvaluatedModel(ravel(params), ravel(state)), pool, [np.array(rows, np.int32)])
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_image_is_normalised_by_itself():
  images = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 1)).astype(np.uint8)
  found = np.asarray(normalise(jnp.asarray(images), "image"))
  for image, result in zip(images.astype(np.float64), found, strict=True):
    np.testing.assert_allclose(result, (image - image.mean()) / image.std(), rtol=1e-4, atol=1e-5)
  changed = images.copy()
  changed[1] = 7
  again = np.asarray(normalise(jnp.asarray(changed), "image"))
  np.testing.assert_array_equal(again[[0, 2]], found[[0, 2]])
  assert np.abs(again[1]).max() < 1e-5, "a blank image becomes 0, not amplified noise"


def test_fixed_normalisation_maps_black_and_white_to_minus_one_and_one():
  ends = normalise(jnp.asarray([[[[0]]], [[[255]]]], jnp.uint8), "fixed")
  np.testing.assert_allclose(np.asarray(ends).ravel(), [-1, 1])
