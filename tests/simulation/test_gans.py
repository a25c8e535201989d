"""GANs side by side: each a function of its own hospital's images, which it comes to resemble."""

import numpy as np
import pytest

from fedjax_med.simulation.gans import BATCH, Learner, make_synthesis

SIDE, SIZES, LARGEST = 8, (30, 9, 18), 30
STARTS = (0, 30, 39)
UNUSED = 40  # images of no learner, as those of a test set


def images_of_halves() -> tuple[np.ndarray, np.ndarray]:
  """Noisy images whose upper (class 0) or lower half (class 1) is bright, as bright as noise."""
  rng = np.random.default_rng(0)
  labels = np.arange(sum(SIZES) + UNUSED, dtype=np.int32) % 2
  images = rng.integers(0, 60, (len(labels), SIDE, SIDE, 1))
  for image, label in zip(images, labels, strict=True):
    half = slice(0, 4) if label == 0 else slice(4, 8)
    image[half] += 150
  return images.astype(np.uint8), labels


def learners(chosen=(0, 1, 2), width=LARGEST, blocks=2) -> Learner:
  indices = np.zeros((len(chosen), width), np.int32)
  for row, k in zip(indices, chosen, strict=True):
    row[: SIZES[k]] = np.arange(STARTS[k], STARTS[k] + SIZES[k])
  labels = np.broadcast_to(np.arange(BATCH, dtype=np.int32) % 2, (len(chosen), blocks, BATCH))
  sizes = np.array([SIZES[k] for k in chosen], np.int32)
  return Learner(np.array(chosen, np.int32), indices, sizes, labels)


@pytest.fixture(scope="module")
def synthesise():
  return make_synthesis(SIDE, SIDE, 2, devices=1, at_once=1, lowering="auto")


@pytest.fixture(scope="module")
def made(synthesise):
  images, finite = synthesise(*images_of_halves(), 3, 4, learners())
  assert finite.all()
  return images


@pytest.mark.slow
def test_side_by_side_on_devices_and_one_by_one_agree(made):
  several = make_synthesis(SIDE, SIDE, 2, devices=2, at_once=2, lowering="matmul")
  found, _ = several(*images_of_halves(), 3, 4, learners())
  assert np.abs(found.astype(int) - made).max() <= 1


def test_other_hospitals_change_nothing_nor_does_how_many_images_others_make(synthesise, made):
  found, _ = synthesise(*images_of_halves(), 3, 4, learners((2,), width=20, blocks=1))
  np.testing.assert_array_equal(found[0], made[2][:1])


def test_only_a_hospitals_own_training_images_are_read(synthesise, made):
  images, labels = images_of_halves()
  own = slice(STARTS[1], STARTS[1] + SIZES[1])
  poisoned, others = 255 - images, 1 - labels
  poisoned[own], others[own] = images[own], labels[own]
  found, _ = synthesise(poisoned, others, 3, 4, learners())
  np.testing.assert_array_equal(found[1], made[1])
  assert (found[0] != made[0]).any()
  assert (found[2] != made[2]).any()


def test_images_follow_from_seed_number_and_steps(synthesise, made):
  data = images_of_halves()
  np.testing.assert_array_equal(synthesise(*data, 3, 4, learners())[0], made)
  assert (synthesise(*data, 4, 4, learners())[0] != made).any()
  assert (synthesise(*data, 3, 5, learners())[0] != made).any()
  renamed = learners()._replace(number=np.array([0, 7, 2], np.int32))
  found = synthesise(*data, 3, 4, renamed)[0]
  np.testing.assert_array_equal(found[0], made[0])
  assert (found[1] != made[1]).any()


def test_images_come_to_resemble_the_class_they_are_made_for(synthesise):
  images, labels = images_of_halves()
  found, _ = synthesise(images, labels, 0, 200, learners())
  means = np.stack([images[labels == label].mean(0) for label in (0, 1)]) / 255
  for own in found:
    by_class = own.reshape(-1, 2, SIDE, SIDE, 1) / 255
    assert len(np.unique(own.reshape(-1, SIDE**2), axis=0)) == own.shape[0] * BATCH
    distance = np.abs(by_class.mean(0)[:, None] - means).mean((2, 3, 4))  # [made for, class]
    assert (np.diag(distance) < 0.12).all()
    assert (np.diag(distance) < distance[::-1].diagonal() / 2).all()
