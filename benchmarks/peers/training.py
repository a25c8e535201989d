"""Local training in PyTorch, plain and with Opacus, and the check that its gradients are right."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import specs
from benchmarks.peers import networks

# How far a peer's clipped sum may be from the independent loop: float32, other summation orders.
TOLERANCE = 1e-3

Update = Callable[[torch.Tensor, torch.Tensor], None]


def normalise(images: torch.Tensor) -> torch.Tensor:
  """uint8 pixels to float32 in -1..1, batch by batch, as every system here does."""
  return images.float().mul_(1 / 127.5).sub_(1)


def contiguous(images: torch.Tensor) -> torch.Tensor:
  """A copy with the strides of contiguous NCHW.

  ``.contiguous()`` keeps the strides of a permuted tensor of one channel, convolutions then take
  it for channels_last, and Opacus' conv gradients are silently wrong (by 19% in W3).
  """
  return torch.empty(images.shape, dtype=images.dtype).copy_(images)


class Pool:
  """Every client's images, NCHW uint8, and labels; client k is block k."""

  def __init__(self, workload: specs.Workload):
    images, labels = specs.make_pool(workload)
    shape = (workload.num_clients, workload.examples, *workload.shape)
    self.images = contiguous(torch.from_numpy(images).reshape(shape).permute(0, 1, 4, 2, 3))
    self.labels = torch.from_numpy(labels).long().reshape(shape[:2])


def create(workload: specs.Workload) -> nn.Module:
  """The workload's network in training mode, NCHW."""
  return networks.create(workload.network, workload.shape[2], workload.num_classes).train()


class Flat:
  """All parameters of a network as views of one vector: to reset a client is one copy."""

  def __init__(self, network: nn.Module):
    parameters = list(network.parameters())
    self.vector = torch.cat([p.detach().reshape(-1) for p in parameters])
    offset = 0
    for parameter in parameters:
      size = parameter.numel()
      parameter.data = self.vector[offset : offset + size].view_as(parameter)
      offset += size


class PlainTrainer:
  """Local SGD on shuffled batches."""

  def __init__(self, network: nn.Module, workload: specs.Workload, channels_last: bool = False):
    self.network, self.workload, self.channels_last = network, workload, channels_last
    self.optimizer = torch.optim.SGD(network.parameters(), lr=workload.learning_rate)

  def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One SGD step on uint8 images."""
    inputs = normalise(images)
    if self.channels_last:
      inputs = inputs.contiguous(memory_format=torch.channels_last)
    loss = F.cross_entropy(self.network(inputs), labels)
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()

  def train(self, images: torch.Tensor, labels: torch.Tensor) -> int:
    """A round at one client; returns the examples seen."""
    batch, steps = self.workload.batch, self.workload.steps
    order = torch.randperm(len(labels))
    for step in range(steps):
      rows = order[step * batch : (step + 1) * batch]
      self.step(images[rows], labels[rows])
    return steps * batch


class PrivateTrainer:
  """DP-SGD with Opacus on Poisson batches.

  mode: hooks (per-example gradients from Opacus' own rules, its default), ghost (two backward
  passes; Opacus has ghost norms for linear and embedding layers, and instantiates the others) or
  ew (PyTorch's expanded weights).
  """

  def __init__(self, network: nn.Module, workload: specs.Workload, mode: str):
    from opacus.grad_sample import (
      GradSampleModule,
      GradSampleModuleExpandedWeights,
      GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    self.workload, self.mode = workload, mode
    self.probability = workload.batch / workload.examples
    sgd = torch.optim.SGD(network.parameters(), lr=workload.learning_rate)
    how: dict[str, Any] = {
      "noise_multiplier": specs.NOISE_MULTIPLIER,
      "max_grad_norm": specs.CLIP_NORM,
      "expected_batch_size": workload.batch,
    }
    self.criterion: Any = nn.CrossEntropyLoss()
    if mode == "ghost":
      self.network = GradSampleModuleFastGradientClipping(network, max_grad_norm=specs.CLIP_NORM)
      self.optimizer = DPOptimizerFastGradientClipping(sgd, **how)
      self.criterion = DPLossFastGradientClipping(self.network, self.optimizer, self.criterion)
    else:
      wrap = {"hooks": GradSampleModule, "ew": GradSampleModuleExpandedWeights}[mode]
      self.network = wrap(network)
      self.optimizer = DPOptimizer(sgd, **how)

  def set_clip_norm(self, clip_norm: float) -> None:
    """For the check only."""
    self.optimizer.max_grad_norm = clip_norm
    if self.mode == "ghost":
      self.network.max_grad_norm = clip_norm

  def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One noisy step on uint8 images."""
    self.optimizer.zero_grad()
    loss = self.criterion(self.network(normalise(images)), labels)
    loss.backward()
    self.optimizer.step()

  def train(self, images: torch.Tensor, labels: torch.Tensor) -> int:
    """A round at one client; returns the examples seen."""
    seen = 0
    for _ in range(self.workload.steps):
      rows = torch.nonzero(torch.rand(len(labels)) < self.probability)[:, 0]
      if len(rows):  # an empty draw, 2 in 10,000 at most here, is noise only
        self.step(images[rows], labels[rows])
      seen += len(rows)
    return seen


def create_trainer(
  network: nn.Module, workload: specs.Workload, mode: str
) -> "PlainTrainer | PrivateTrainer":
  """The trainer of that mode: plain, plain_channels_last, or one of Opacus'."""
  if mode.startswith("plain"):
    channels_last = mode == "plain_channels_last"
    if channels_last:
      network.to(memory_format=torch.channels_last)
    return PlainTrainer(network, workload, channels_last)
  return PrivateTrainer(network, workload, mode)


class Reference:
  """A batch with its gradients as an independent loop and, from a file, the JAX side have them.

  The loop takes one example at a time through autograd: nothing that it could share with a peer's
  batched rules. Dropout is off.
  """

  def __init__(self, network: nn.Module, workload: specs.Workload, path: str | None):
    self.names = [name for name, _ in network.named_parameters()]
    self.file = dict(np.load(path)) if path else {}
    if self.file:
      with torch.no_grad():
        for name, parameter in network.named_parameters():
          parameter.copy_(self._converted(network, name, "params/"))
      images, labels = self.file["images"], self.file["labels"]
    else:
      pool = specs.make_pool(workload)
      images, labels = pool[0][: workload.batch], pool[1][: workload.batch]
    self.images = contiguous(torch.from_numpy(images).permute(0, 3, 1, 2))
    self.labels = torch.from_numpy(labels).long()
    with _evaluating(network):
      rows = [
        self._gradient(network, self.images[i : i + 1], self.labels[i : i + 1])
        for i in range(len(self.labels))
      ]
    self.norms = torch.stack([row.norm() for row in rows])
    self.clip_norm = float(self.file.get("clip_norm", self.norms.median()))
    self.mean = torch.stack(rows).mean(0)
    self.clipped = sum(
      row * min(1.0, self.clip_norm / float(norm))
      for row, norm in zip(rows, self.norms, strict=True)
    )
    self.theirs = {
      key: torch.cat([self._converted(network, name, f"{key}/").reshape(-1) for name in self.names])
      for key in ("mean", "clipped")
      if self.file
    }

  def _converted(self, network: nn.Module, name: str, prefix: str) -> torch.Tensor:
    value = self.file[prefix + networks.flax_name(network, name)]
    return networks.from_flax(network, name, value)

  def _gradient(self, network, images, labels) -> torch.Tensor:
    loss = F.cross_entropy(network(normalise(images)), labels)
    grads = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([grad.reshape(-1) for grad in grads])

  def errors(self, step: Update, network: nn.Module, private: bool) -> dict[str, float]:
    """Relative l2 errors of ``step``'s gradient, its SGD step having had rate 1 and no noise.

    Raises:
      AssertionError: an error is above TOLERANCE: such a peer must not be timed.
    """
    before = _vector(network)
    with _evaluating(network) if not private else contextlib.nullcontext():
      step(self.images, self.labels)
    gradient = before - _vector(network)
    _restore(network, before)
    truth = self.clipped / len(self.labels) if private else self.mean
    errors = {"independent_loop": _distance(gradient, truth)}
    if self.theirs:
      key = "clipped" if private else "mean"
      scale = 1 / len(self.labels) if private else 1.0
      errors["jax_side"] = _distance(gradient, self.theirs[key] * scale)
    assert max(errors.values()) < TOLERANCE, f"wrong gradient, relative errors {errors}"
    return errors


def check(
  trainer: "PlainTrainer | PrivateTrainer", network: nn.Module, reference: Reference
) -> dict[str, float]:
  """Gradient errors of a trainer of ``network``; see Reference.errors."""
  private = isinstance(trainer, PrivateTrainer)
  groups = trainer.optimizer.param_groups
  rate, groups[0]["lr"] = groups[0]["lr"], 1.0
  if private:
    trainer.set_clip_norm(reference.clip_norm)
    trainer.optimizer.noise_multiplier = 0.0
    trainer.optimizer.expected_batch_size = len(reference.labels)
  errors = reference.errors(trainer.step, network, private)
  groups[0]["lr"] = rate
  if private:
    trainer.set_clip_norm(specs.CLIP_NORM)
    trainer.optimizer.noise_multiplier = specs.NOISE_MULTIPLIER
    trainer.optimizer.expected_batch_size = trainer.workload.batch
  return errors


@contextlib.contextmanager
def _evaluating(network: nn.Module):
  network.eval()
  yield
  network.train()


def _vector(network: nn.Module) -> torch.Tensor:
  return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def _restore(network: nn.Module, vector: torch.Tensor) -> None:
  offset = 0
  with torch.no_grad():
    for parameter in network.parameters():
      parameter.copy_(vector[offset : offset + parameter.numel()].view_as(parameter))
      offset += parameter.numel()


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
  return float((actual - expected).norm() / expected.norm())
