"""The GANs of all hospitals, each trained on its hospital's images alone, in one program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_med.core.keys import Stream, base_key, key_for
from fedjax_med.data.normalisation import normalise
from fedjax_med.models import ops
from fedjax_med.models.networks.gan import LATENT, make_gan
from fedjax_med.simulation.mesh import map_over_devices

BATCH = 16  # images of a step, drawn with replacement: a small hospital has fewer
RATE, FIRST_MOMENT, SECOND_MOMENT = 1.5e-3, 0.5, 0.99  # of Adam, as in DCGAN but faster
AVERAGE = 0.98  # decay of the generator's average over steps, which makes the images

# What the keys of a hospital's GAN are for.
_GENERATOR, _DISCRIMINATOR, _STEP, _IMAGES = range(4)


class Learner(NamedTuple):
  """What one hospital's GAN learns from and is to make; [K] of them are stacked.

  Attributes:
    number: int32, names the hospital in random keys.
    indices: [n_max] int32 rows of the images that it learns from; at or past ``size`` unread.
    size: int32 images it learns from.
    labels: [blocks, BATCH] int32 classes of the images to make.
  """

  number: Any
  indices: Any
  size: Any
  labels: Any


def make_synthesis(
  height: int,
  width: int,
  num_classes: int,
  *,
  devices: int,
  at_once: int,
  lowering: ops.Lowering,
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
  """Compiles ``synthesise(inputs, labels, seed, steps, learners)``, on the host.

  It trains the GAN of every learner for ``steps`` steps on its rows of ``inputs`` [N, H, W, 1]
  uint8 and ``labels`` [N], and returns the images [K, blocks, BATCH, H, W, 1] uint8, with whether
  all of a learner's are finite, [K]. A learner's images are a function of its own rows, its number,
  the seed and the steps; ``at_once`` of them side by side change them by rounding only, which
  training makes larger.

  Training is Adam on the non-saturating loss (Goodfellow et al. 2014); the generator that makes
  images is an average over steps (Yazıcı et al. 2019).

  Args:
    height: rows of an image.
    width: columns of an image.
    num_classes: classes in all, of which a hospital may hold some.
    devices: of this process, that learners are dealt over.
    at_once: learners that a device works on side by side.
    lowering: of the convolutions.
  """
  gan = make_gan(height, width, num_classes, lowering)
  adam = optax.adam(RATE, b1=FIRST_MOMENT, b2=SECOND_MOMENT)

  def inputs_of(noise, labels):
    return jnp.concatenate([noise, jax.nn.one_hot(labels, num_classes, dtype=noise.dtype)], axis=1)

  def generate(params, noise, labels):
    return gan.generator.apply(params, {}, inputs_of(noise, labels))[0]

  def scores(params, images, labels):
    found = gan.discriminator.apply(params, {}, images)[0]
    return jnp.take_along_axis(found, labels[:, None], axis=1)[:, 0]

  def step_of(gradient, params, state):
    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes int32 counts and floats
      move, state = adam.update(gradient, state)
    return optax.apply_updates(params, move), state

  def one(shared, learner: Learner):
    images, labels, seed, steps = shared
    key = key_for(base_key(seed), Stream.SYNTHETIC, learner.number)
    noise = jnp.zeros((1, LATENT + num_classes))
    maker = gan.generator.init(jax.random.fold_in(key, _GENERATOR), noise)[0]
    blank = jnp.zeros((1, height, width, 1))
    judge = gan.discriminator.init(jax.random.fold_in(key, _DISCRIMINATOR), blank)[0]

    def body(step, carry):
      maker, judge, maker_state, judge_state, average = carry
      keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, _STEP), step), 2)
      drawn = jax.random.randint(keys[0], (BATCH,), 0, jnp.maximum(learner.size, 1))
      rows = learner.indices[drawn]
      # One that learns from nothing must not look at row 0, which is another's.
      real = jnp.where(learner.size > 0, normalise(images[rows], "fixed"), 0)
      classes = labels[rows]
      noise = jax.random.normal(keys[1], (BATCH, LATENT))
      fake, back = jax.vjp(lambda params: generate(params, noise, classes), maker)

      def judge_loss(params):
        found = scores(params, jnp.concatenate([real, fake]), jnp.concatenate([classes, classes]))
        return jax.nn.softplus(-found[:BATCH]).mean() + jax.nn.softplus(found[BATCH:]).mean()

      judge, judge_state = step_of(jax.grad(judge_loss)(judge), judge, judge_state)

      def maker_loss(fake):
        return jax.nn.softplus(-scores(judge, fake, classes)).mean()

      maker, maker_state = step_of(back(jax.grad(maker_loss)(fake))[0], maker, maker_state)
      done = step.astype(jnp.float32)
      decay = jnp.minimum(AVERAGE, (1 + done) / (10 + done))  # the first weights are soon forgotten
      average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, maker)
      return maker, judge, maker_state, judge_state, average

    carry = (maker, judge, adam.init(maker), adam.init(judge), maker)
    average = jax.lax.fori_loop(0, steps, body, carry)[-1]

    def block(numbered):
      number, classes = numbered
      own = jax.random.fold_in(jax.random.fold_in(key, _IMAGES), number)
      made = generate(average, jax.random.normal(own, (BATCH, LATENT)), classes)
      pixels = jnp.round((made + 1) * (jnp.iinfo(images.dtype).max / 2)).astype(images.dtype)
      return pixels, jnp.isfinite(made).all()

    made, finite = jax.lax.map(block, (jnp.arange(learner.labels.shape[0]), learner.labels))
    return made, finite.all()

  several = map_over_devices(one, devices, at_once)

  def synthesise(inputs, labels, seed: int, steps: int, learners: Learner):
    # NumPy scalars: neither compiles anew.
    return several((inputs, labels, np.int32(seed), np.int32(steps)), learners)

  return synthesise
