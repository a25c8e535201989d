"""What a network adds to the loss: penalties count in loss and gradient, and in nothing else."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_med.core.errors import UserError
from fedjax_med.data.normalisation import normalise
from fedjax_med.federated.local import BatchShape, StepContext, plain_gradient, private_gradient
from fedjax_med.federated.losses import class_logits, with_penalties
from fedjax_med.federated.vector import spec_of, unravel
from fedjax_med.models.model import from_flax
from fedjax_med.models.registry import require_columns
from fedjax_med.tasks.classification import cross_entropy
from tests.federated.toy import KEY, make_clients, make_hyper, make_pool
from tests.privacy.clipping_cases import quick_jit

# Has 12 examples, all that a batch here holds.
CLIENT = jax.tree.map(lambda leaf: leaf[0], make_clients(sigma=0.0))
# With labels that the images do not tell: some are classified wrongly.
POOL = make_pool()._replace(labels=jnp.arange(25) // 2 % 2)


class Taxed(nn.Module):
  """Logistic regression that also predicts the mean pixel twice, and pays for what it misses.

  Attributes:
    factor: on both penalties, so large that they are the largest columns.
  """

  factor: float
  penalties: ClassVar[int] = 2

  @nn.compact
  def __call__(self, images, train=False):
    rows = images.reshape(images.shape[0], -1)
    logits = nn.Dense(2, name="head")(rows)
    missed = nn.Dense(2, name="mean")(rows) - rows.mean(1, keepdims=True)
    penalties = self.factor * (1 + jnp.square(missed))
    return jnp.concatenate([logits, penalties], axis=1) if train else logits


class Untaxed(Taxed):
  """The same without the columns."""

  penalties: ClassVar[int] = 0

  @nn.compact
  def __call__(self, images, train=False):
    rows = images.reshape(images.shape[0], -1)
    nn.Dense(2, name="mean")(rows)
    return nn.Dense(2, name="head")(rows)


def step(module, private):
  """Weights, gradient and metrics of a client that draws all it has; no noise, no clipping."""
  model, rng = from_flax(module), np.random.default_rng(0)
  size = {"kernel": (16, 2), "bias": (2,)}
  params = {
    layer: {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in size.items()}
    for layer in ("head", "mean")
  }
  shape = BatchShape(slots=12, max_examples=12, normalisation="fixed")
  if private:
    gradient = private_gradient(model, cross_entropy(0.0), "book_keeping", shape)
  else:
    gradient = plain_gradient(model, cross_entropy(0.0), shape)

  client = CLIENT._replace(sampling_probability=jnp.float32(1))
  zero = jnp.zeros((), jnp.int32)
  context = StepContext(client, POOL, make_hyper(clip_norm=1e6), KEY, zero, zero)
  grad, _, _, metrics = quick_jit(gradient)(params, {}, (), context)
  return params, unravel(grad, spec_of(params)) if private else grad, metrics


@pytest.mark.parametrize("private", [False, True])
def test_penalties_add_their_sum_to_the_loss_and_leave_the_accuracy(private):
  params, gradient, metrics = step(Taxed(10.0), private)
  _, plain_gradients, plain = step(Untaxed(10.0), private)
  pixels = POOL.inputs[CLIENT.indices[:12]]
  rows = np.asarray(normalise(pixels, "fixed")).reshape(12, -1)
  missed = rows @ params["mean"]["kernel"] + params["mean"]["bias"]
  penalties = 10 * (1 + (missed - rows.mean(1, keepdims=True)) ** 2)
  # An argmax over all columns would never find a class.
  assert penalties.min() > (rows @ params["head"]["kernel"] + params["head"]["bias"]).max()
  np.testing.assert_allclose(metrics.loss - plain.loss, penalties.sum(), rtol=1e-5)
  assert metrics.tally == plain.tally
  assert 0 < metrics.tally < metrics.examples
  np.testing.assert_allclose(
    gradient["head"]["kernel"], plain_gradients["head"]["kernel"], rtol=1e-5, atol=1e-6
  )
  assert np.abs(gradient["mean"]["kernel"]).max() > 0.1
  assert not plain_gradients["mean"]["kernel"].any()


def test_the_columns_after_the_classes_are_added_example_by_example():
  outputs = jnp.asarray([[1.0, 2.0, 5.0, 0.5], [0.0, 3.0, 7.0, 0.25]])
  labels = jnp.asarray([0, 1])
  base = cross_entropy(0.1)
  np.testing.assert_array_equal(class_logits(outputs, 2), outputs[:, :2])
  got = with_penalties(base, 2)(outputs, labels) - base(outputs[:, :2], labels)
  np.testing.assert_allclose(got, [5.5, 7.25], rtol=1e-6)
  assert with_penalties(base, 0) is base


class Columns(nn.Module):
  """As many columns as it is told."""

  training: int
  evaluation: int
  penalties: object = 0

  @nn.compact
  def __call__(self, images, train=False):
    rows = nn.Dense(9)(images.reshape(images.shape[0], -1))
    return rows[:, : self.training if train else self.evaluation]


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (Columns(3, 2), r"\[2, 3\] for 2 images in training, where 2 classes make \[2, 2\]; return"),
    (Columns(2, 3), r"\[2, 3\] for 2 images outside training, where 2 classes"),
    (Columns(3, 2, 2), r"\[2, 3\] for 2 images in training, where 2 classes and 2 penalties make"),
    (Columns(4, 4, 2), r"\[2, 4\] for 2 images outside training"),
    (Columns(2, 2, -1), "attribute 'penalties' is -1; let it be"),
    (Columns(2, 2, "two"), "attribute 'penalties' is 'two'"),
  ],
)
def test_a_network_with_other_columns_is_refused(module, message):
  image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
  with pytest.raises(UserError, match=message):
    require_columns(from_flax(module), image, 2)
  require_columns(from_flax(Columns(4, 2, 2)), image, 2)
