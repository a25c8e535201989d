"""The three workloads in numbers, and their data: all that every system must have in common."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
  """A federated training task whose every number is fixed.

  Attributes:
    name: W1, W2 or W3.
    network: cifar_cnn, se_resnext50_32x4d or mnist_cnn.
    num_clients: clients.
    cohort: clients that train in a round.
    examples: images a client holds.
    shape: height, width, channels.
    num_classes: logits.
    batch: images a local step, the expected number where batches are Poisson draws.
    steps: local steps a client takes in a round.
    learning_rate: rate of the clients; the server takes the mean of the deltas as it is.
    private: whether there is a DP-SGD variant.
  """

  name: str
  network: str
  num_clients: int
  cohort: int
  examples: int
  shape: tuple[int, int, int]
  num_classes: int
  batch: int
  steps: int
  learning_rate: float
  private: bool

  @property
  def examples_per_round(self) -> int:
    """Images that a round trains on, counted with repetition."""
    return self.cohort * self.steps * self.batch


WORKLOADS = {
  workload.name: workload
  for workload in (
    # One epoch of 50 images in batches of 10, as in the CIFAR10 benchmark of pfl-research.
    Workload(
      name="W1",
      network="cifar_cnn",
      num_clients=1000,
      cohort=50,
      examples=50,
      shape=(32, 32, 3),
      num_classes=10,
      batch=10,
      steps=5,
      learning_rate=0.1,
      private=False,
    ),
    Workload(
      name="W2",
      network="se_resnext50_32x4d",
      num_clients=4,
      cohort=4,
      examples=64,
      shape=(64, 64, 3),
      num_classes=2,
      batch=8,
      steps=2,
      learning_rate=0.01,
      private=True,
    ),
    Workload(
      name="W3",
      network="mnist_cnn",
      num_clients=20,
      cohort=20,
      examples=200,
      shape=(28, 28, 1),
      num_classes=10,
      batch=20,
      steps=10,
      learning_rate=0.1,
      private=True,
    ),
  )
}

CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0


def make_pool(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
  """Seeded images [clients · examples, H, W, C] uint8 and labels int32; client k owns block k."""
  random = np.random.default_rng(0)
  count = workload.num_clients * workload.examples
  images = random.integers(0, 256, (count, *workload.shape), np.uint8)
  return images, random.integers(0, workload.num_classes, count).astype(np.int32)
