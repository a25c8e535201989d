"""Local training in PyTorch, plain and with Opacus, and the check that its gradients are right."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import specs
from benchmarks.peers import networks

# Float64 shows whether the arithmetic is right: batch and loop agree to 3e-15 in SE-ResNeXt-50.
TOLERANCE = 1e-9
# Float32 is what is timed, and may take other code paths (memory formats). Where rounding flips a
# relu or a pool of an example, its gradient jumps by 0.1% (2 of 8 examples in SE-ResNeXt-50, the
# others agree to 1e-6), so pairs of examples are tried: a wrong rule or layout fails with every
# pair, a flip with some. The smallest error must be below this.
FLOAT32_TOLERANCE = 1e-5
# Clip coefficients carry the rounding of torch's own float32 norm: over the millions of elements of
# a kernel of SE-ResNeXt-50 it is off by 3.5e-5 even for gradients that are exact but for rounding.
# The smallest fault that this was tried on is 2.3e-2.
FLOAT32_NORM_TOLERANCE = 1e-4

Update = Callable[[torch.Tensor, torch.Tensor], None]


def normalise(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
  """uint8 pixels to -1..1, batch by batch, as every system here does."""
  return images.to(dtype).mul_(1 / 127.5).sub_(1)


def contiguous(images: torch.Tensor) -> torch.Tensor:
  """A copy with the strides of contiguous NCHW.

  ``.contiguous()`` keeps the strides of a permuted tensor of one channel, convolutions then take
  it for channels_last, and Opacus' conv gradients are silently wrong (by 19% in W3).
  """
  return torch.empty(images.shape, dtype=images.dtype).copy_(images)


def use_accelerator() -> bool:
  """Makes a GPU the device of all that follows, where there is one."""
  if torch.cuda.is_available():
    torch.set_default_device("cuda")
    torch.backends.cudnn.benchmark = True  # as XLA tries algorithms out
  return torch.cuda.is_available()


def allow_tf32(allowed: bool) -> None:
  """Products of float32 in TF32, as jax has them by default; gradients are checked without."""
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def placed(values: torch.Tensor) -> torch.Tensor:
  """The tensor on the device in use; ``from_numpy`` leaves it on the CPU."""
  return values.to(torch.get_default_device())


class Pool:
  """Every client's images, NCHW uint8, and labels; client k is block k."""

  def __init__(self, workload: specs.Workload):
    images, labels = specs.make_pool(workload)
    shape = (workload.num_clients, workload.examples, *workload.shape)
    self.images = contiguous(torch.from_numpy(images).reshape(shape).permute(0, 1, 4, 2, 3))
    self.labels = placed(torch.from_numpy(labels).long().reshape(shape[:2]))


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
    self.dtype = next(network.parameters()).dtype
    self.optimizer = torch.optim.SGD(network.parameters(), lr=workload.learning_rate)

  def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One SGD step on uint8 images."""
    inputs = normalise(images, self.dtype)
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
    self.dtype = next(network.parameters()).dtype
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

  def make_checkable(self, clip_norm: float, batch: int) -> None:
    """Another clip norm and denominator, and no noise."""
    self.optimizer.max_grad_norm = clip_norm
    self.optimizer.expected_batch_size = batch
    self.optimizer.noise_multiplier = 0.0
    if self.mode == "ghost":
      self.network.max_grad_norm = clip_norm

  def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One noisy step on uint8 images."""
    self.optimizer.zero_grad()
    loss = self.criterion(self.network(normalise(images, self.dtype)), labels)
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


MakeStep = Callable[[nn.Module, float, int], Update]


def check(
  make_step: MakeStep, network: nn.Module, workload: specs.Workload, private: bool, path: str | None
) -> dict[str, float]:
  """Relative l2 errors of a peer's gradient, in float64 and in the float32 that is timed.

  The truth is a float64 loop of autograd over one example at a time: nothing that it could share
  with a peer's batched rules. Dropout is off. Copies of the network are used.

  Args:
    make_step: (network, clip norm, batch) -> a function that takes an SGD step of rate 1 without
      noise on images and labels, its sum of clipped gradients divided by ``batch``.
    network: not wrapped by anyone yet.
    workload: whose data is used.
    private: whether gradients are clipped (to their median norm, so that half of them are).
    path: npz of weights, batch and gradients as the JAX side has them, in float64.

  Raises:
    AssertionError: an error is too large: such a peer must not be timed.
  """
  file = dict(np.load(path)) if path else {}
  truth = copy.deepcopy(network).double()
  names = [name for name, _ in truth.named_parameters()]

  def theirs(prefix: str, name: str) -> torch.Tensor:
    return networks.from_flax(truth, name, file[prefix + networks.flax_name(truth, name)])

  if file:
    images, labels = file["images"], file["labels"]
    with torch.no_grad():
      for name, parameter in truth.named_parameters():
        parameter.copy_(theirs("params/", name))
  else:
    images, labels = (array[: workload.batch] for array in specs.make_pool(workload))
  images = contiguous(torch.from_numpy(images).permute(0, 3, 1, 2))
  labels = placed(torch.from_numpy(labels).long())
  truth.eval()
  rows = []
  for i in range(len(labels)):
    loss = F.cross_entropy(truth(normalise(images[i : i + 1], torch.float64)), labels[i : i + 1])
    grads = torch.autograd.grad(loss, list(truth.parameters()))
    rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
  rows = torch.stack(rows)
  norms = rows.norm(dim=1)
  clip_norm = float(file["clip_norm"]) if "clip_norm" in file else float(norms.median())

  def expected(chosen: slice, bound: float) -> torch.Tensor:
    scale = (bound / norms).clamp(max=1.0) if private else torch.ones_like(norms)
    return (scale[:, None] * rows)[chosen].mean(0)

  def error(dtype: torch.dtype, chosen: slice, bound: float) -> float:
    peer = copy.deepcopy(truth).to(dtype).train(private)
    before = _vector(peer)
    make_step(peer, bound, len(labels[chosen]))(images[chosen], labels[chosen])
    return _distance((before - _vector(peer)).double(), expected(chosen, bound))

  errors = {"float64": error(torch.float64, slice(None), clip_norm)}
  # Under a bound that clips every example: of one that is not clipped a wrong norm would not show.
  low = float(norms.min()) / 2
  pairs = [error(torch.float32, slice(i, i + 2), low) for i in range(min(len(labels), 8) - 1)]
  errors |= {"float32_smallest": min(pairs), "float32_largest": max(pairs)}
  if file:
    key = "clipped/" if private else "mean/"
    other = placed(torch.cat([theirs(key, name).reshape(-1) for name in names]))
    errors["jax_side"] = _distance(
      other / (len(labels) if private else 1), expected(slice(None), clip_norm)
    )
  # Opacus adds 1e-6 to the norms it divides by.
  slack = 1e-6 / low if private else 0.0
  exact = max(errors["float64"], errors.get("jax_side", 0.0))
  single = FLOAT32_NORM_TOLERANCE if private else FLOAT32_TOLERANCE
  good = exact < TOLERANCE + slack and errors["float32_smallest"] < single + slack
  assert good, f"wrong gradient, relative errors {errors}"
  return errors


def check_trainer(
  network: nn.Module, workload: specs.Workload, mode: str, path: str | None
) -> dict[str, float]:
  """``check`` of what ``create_trainer`` makes."""

  def make_step(peer: nn.Module, clip_norm: float, batch: int) -> Update:
    trainer = create_trainer(peer, workload, mode)
    trainer.optimizer.param_groups[0]["lr"] = 1.0
    if isinstance(trainer, PrivateTrainer):
      trainer.make_checkable(clip_norm, batch)
    return trainer.step

  return check(make_step, network, workload, not mode.startswith("plain"), path)


def _vector(network: nn.Module) -> torch.Tensor:
  return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
  return float((actual - expected).norm() / expected.norm())
