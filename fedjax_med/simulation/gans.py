"""The GANs of all hospitals, each trained on its hospital's images alone, in one program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.data.normalisation import normalise
from fedjax_med.models import ops
from fedjax_med.models.networks.gan import LATENT, Gan, make_gan
from fedjax_med.simulation.mesh import map_over_devices

BATCH = 16  # images of a step, drawn with replacement: a small hospital has fewer
RATE, FIRST_MOMENT, SECOND_MOMENT = 1.5e-3, 0.5, 0.99  # of Adam, as in DCGAN but faster
AVERAGE = 0.98  # decay of the generator's average over steps, which makes the images

# Uses of the keys of a hospital's GAN.
_GENERATOR, _DISCRIMINATOR, _STEP, _IMAGES = range(4)


class Learner(NamedTuple):
  """Training images of one hospital's GAN, and classes of the images to make; [K] are stacked.

  Attributes:
    number: int32, names the hospital in random keys.
    indices: [n_max] int32 rows of the training images; slots at or past ``size`` are not read.
    size: int32 number of training images.
    labels: [blocks, BATCH] int32 classes of the images to make.
  """

  number: Any
  indices: Any
  size: Any
  labels: Any


class _Setup(NamedTuple):
  """Parts that the GANs of all hospitals have in common.

  Attributes:
    gan: generator and discriminator.
    adam: optimiser of both.
    height: rows of an image.
    width: columns of an image.
    channels: of an image.
    num_classes: classes in all.
  """

  gan: Gan
  adam: optax.GradientTransformation
  height: int
  width: int
  channels: int
  num_classes: int


class _Shared(NamedTuple):
  """Arguments that the GANs of all hospitals have in common.

  Attributes:
    images: [N, H, W, C] all images.
    labels: [N] their classes.
    seed: seed of the run.
    steps: steps of a GAN.
  """

  images: Any
  labels: Any
  seed: Any
  steps: Any


class _Training(NamedTuple):
  """State of a GAN in training.

  Attributes:
    generator: its weights.
    discriminator: its weights.
    generator_state: state of the generator's optimiser.
    discriminator_state: state of the discriminator's optimiser.
    average: average of the generator over steps.
  """

  generator: Any
  discriminator: Any
  generator_state: Any
  discriminator_state: Any
  average: Any


def make_synthesis(
  height: int,
  width: int,
  num_classes: int,
  *,
  channels: int = 1,
  devices: int,
  at_once: int,
  lowering: ops.Lowering,
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
  """Compiles ``synthesise(inputs, labels, seed, steps, learners)``, on the host.

  It trains the GAN of every learner for ``steps`` steps on its rows of ``inputs`` [N, H, W, C]
  uint8 and ``labels`` [N], and returns the images [K, blocks, BATCH, H, W, C] uint8, with whether
  all of a learner's are finite, [K]. A learner's images are a function of its own rows, its number,
  the seed and the steps; ``at_once`` of them side by side change them by rounding only, which
  training makes larger.

  Training is Adam on the non-saturating loss (Goodfellow et al. 2014); the generator that makes
  images is an average over steps (Yazıcı et al. 2019).

  Args:
    height: rows of an image.
    width: columns of an image.
    num_classes: classes in all, of which a hospital may hold some.
    channels: of an image.
    devices: devices of this process that learners are dealt over.
    at_once: learners that a device works on side by side.
    lowering: lowering of the convolutions.
  """
  setup = _Setup(
    gan=make_gan(height, width, num_classes, lowering, channels),
    adam=optax.adam(RATE, b1=FIRST_MOMENT, b2=SECOND_MOMENT),
    height=height,
    width=width,
    channels=channels,
    num_classes=num_classes,
  )
  several = map_over_devices(functools.partial(_learn, setup), devices, at_once)

  def synthesise(inputs, labels, seed: int, steps: int, learners: Learner):
    # NumPy scalars: neither compiles anew.
    shared = _Shared(images=inputs, labels=labels, seed=np.int32(seed), steps=np.int32(steps))
    return several(shared, learners)

  return synthesise


def _learn(setup: _Setup, shared: _Shared, learner: Learner) -> tuple[jax.Array, jax.Array]:
  """Trains one GAN; returns the learner's images, and whether all are finite."""
  key = key_for(base_key(shared.seed), Stream.SYNTHETIC, learner.number)
  noise = jnp.zeros((1, LATENT + setup.num_classes))
  generator = setup.gan.generator.init(jax.random.fold_in(key, _GENERATOR), noise)[0]
  blank = jnp.zeros((1, setup.height, setup.width, setup.channels))
  discriminator = setup.gan.discriminator.init(jax.random.fold_in(key, _DISCRIMINATOR), blank)[0]
  start = _Training(
    generator=generator,
    discriminator=discriminator,
    generator_state=setup.adam.init(generator),
    discriminator_state=setup.adam.init(discriminator),
    average=generator,
  )
  step = functools.partial(_step, setup, shared, learner, jax.random.fold_in(key, _STEP))
  average = jax.lax.fori_loop(0, shared.steps, step, start).average

  def block(numbered):
    number, classes = numbered
    block_key = jax.random.fold_in(jax.random.fold_in(key, _IMAGES), number)
    made = _generate(setup, average, jax.random.normal(block_key, (BATCH, LATENT)), classes)
    dtype = shared.images.dtype
    pixels = jnp.round((made + 1) * (jnp.iinfo(dtype).max / 2)).astype(dtype)
    return pixels, jnp.isfinite(made).all()

  made, finite = jax.lax.map(block, (jnp.arange(learner.labels.shape[0]), learner.labels))
  return made, finite.all()


def _step(
  setup: _Setup, shared: _Shared, learner: Learner, key: jax.Array, step, training: _Training
) -> _Training:
  """One step of the discriminator, and one of the generator."""
  keys = jax.random.split(jax.random.fold_in(key, step), 2)
  drawn = jax.random.randint(keys[0], (BATCH,), 0, jnp.maximum(learner.size, 1))
  rows = learner.indices[drawn]
  # A learner without images must not look at row 0, which is of another hospital.
  real = jnp.where(learner.size > 0, normalise(shared.images[rows], "fixed"), 0)
  classes = shared.labels[rows]
  noise = jax.random.normal(keys[1], (BATCH, LATENT))
  fake, back = jax.vjp(lambda params: _generate(setup, params, noise, classes), training.generator)

  def discriminator_loss(params):
    both = jnp.concatenate([real, fake]), jnp.concatenate([classes, classes])
    scores = _scores(setup, params, *both)
    return jax.nn.softplus(-scores[:BATCH]).mean() + jax.nn.softplus(scores[BATCH:]).mean()

  gradient = jax.grad(discriminator_loss)(training.discriminator)
  discriminator, discriminator_state = _descend(
    setup, gradient, training.discriminator, training.discriminator_state
  )

  def generator_loss(fake):
    return jax.nn.softplus(-_scores(setup, discriminator, fake, classes)).mean()

  generator, generator_state = _descend(
    setup, back(jax.grad(generator_loss)(fake))[0], training.generator, training.generator_state
  )
  done = step.astype(jnp.float32)
  decay = jnp.minimum(AVERAGE, (1 + done) / (10 + done))  # the first weights are soon forgotten
  return _Training(
    generator=generator,
    discriminator=discriminator,
    generator_state=generator_state,
    discriminator_state=discriminator_state,
    average=jax.tree.map(
      lambda old, new: decay * old + (1 - decay) * new, training.average, generator
    ),
  )


def _generate(setup: _Setup, params: Any, noise: jax.Array, labels: jax.Array) -> jax.Array:
  """Images of these classes."""
  classes = jax.nn.one_hot(labels, setup.num_classes, dtype=noise.dtype)
  return setup.gan.generator.apply(params, {}, jnp.concatenate([noise, classes], axis=1))[0]


def _scores(setup: _Setup, params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
  """The discriminator's score of each image as one of its class."""
  scores = setup.gan.discriminator.apply(params, {}, images)[0]
  return jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]


def _descend(setup: _Setup, gradient: Any, params: Any, state: Any) -> tuple[Any, Any]:
  """Returns (params, state of the optimiser) after a step of Adam."""
  with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes int32 counts and floats
    move, state = setup.adam.update(gradient, state)
  return optax.apply_updates(params, move), state
