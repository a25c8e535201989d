"""PyTorch twins of the networks: the same layers, sizes, groups and names as the Flax ones."""

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-5


def num_norm_groups(channels: int) -> int:
  """The rule of fedjax_med.models.networks.norms, which this interpreter may not have.

  That of maps with pixels, or layers with channels, enough for any group, as the workloads have.
  """
  most = max(1, min(32, channels // 2))
  return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def group_norm(channels: int) -> nn.GroupNorm:
  """GroupNorm with as many groups as the Flax network has."""
  return nn.GroupNorm(num_norm_groups(channels), channels, eps=EPSILON)


class CifarCNN(nn.Module):
  """conv32, conv64, max pool, dropout, dense 128, dropout, dense 10: pfl-research's benchmark."""

  flattened: ClassVar[dict[str, tuple[int, int, int]]] = {
    "hidden": (64, 14, 14)
  }  # channels, height, width where maps become a vector

  def __init__(self, channels: int = 3, num_classes: int = 10):
    super().__init__()
    self.conv1 = nn.Conv2d(channels, 32, 3)
    self.conv2 = nn.Conv2d(32, 64, 3)
    self.hidden = nn.Linear(64 * 14 * 14, 128)
    self.head = nn.Linear(128, num_classes)

  def forward(self, x):
    x = F.relu(self.conv2(F.relu(self.conv1(x))))
    x = F.dropout(F.max_pool2d(x, 2), 0.25, self.training)
    x = F.relu(self.hidden(x.flatten(1)))
    return self.head(F.dropout(x, 0.5, self.training))


class MnistCNN(nn.Module):
  """conv16 and conv32, 3x3 and padded, each with relu and a 2x2 max pool, then dense 10."""

  flattened: ClassVar[dict[str, tuple[int, int, int]]] = {"head": (32, 7, 7)}

  def __init__(self, channels: int = 1, num_classes: int = 10):
    super().__init__()
    self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
    self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
    self.head = nn.Linear(32 * 7 * 7, num_classes)

  def forward(self, x):
    x = F.max_pool2d(F.relu(self.conv1(x)), 2)
    x = F.max_pool2d(F.relu(self.conv2(x)), 2)
    return self.head(x.flatten(1))


class SqueezeExcite(nn.Module):
  """Scales channels by gates computed from their spatial means."""

  def __init__(self, channels: int, reduction: int = 16):
    super().__init__()
    self.squeeze = nn.Linear(channels, channels // reduction)
    self.excite = nn.Linear(channels // reduction, channels)

  def forward(self, x):
    gates = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
    return x * gates[:, :, None, None]


class Bottleneck(nn.Module):
  """1x1, grouped 3x3 with the stride, 1x1, squeeze-excite, residual."""

  def __init__(self, channels: int, width: int, features: int, stride: int, groups: int = 32):
    super().__init__()
    self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
    self.norm1 = group_norm(width)
    self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
    self.norm2 = group_norm(width)
    self.conv3 = nn.Conv2d(width, features, 1, bias=False)
    self.norm3 = group_norm(features)
    self.se = SqueezeExcite(features)
    self.projects = stride != 1 or channels != features
    if self.projects:
      self.downsample = nn.Conv2d(channels, features, 1, stride, bias=False)
      self.downsample_norm = group_norm(features)

  def forward(self, x):
    y = F.relu(self.norm1(self.conv1(x)))
    y = F.relu(self.norm2(self.conv2(y)))
    y = self.se(self.norm3(self.conv3(y)))
    if self.projects:
      x = self.downsample_norm(self.downsample(x))
    return F.relu(x + y)


class SEResNeXt50(nn.Module):
  """SE-ResNeXt-50 32x4d with GroupNorm."""

  flattened: ClassVar[dict[str, tuple[int, int, int]]] = {}

  def __init__(self, channels: int = 3, num_classes: int = 1000):
    super().__init__()
    self.stem = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    self.stem_norm = group_norm(64)
    inputs, self.blocks = 64, []
    stages = zip((3, 4, 6, 3), (128, 256, 512, 1024), (256, 512, 1024, 2048), strict=True)
    for stage, (blocks, width, features) in enumerate(stages, start=1):
      for index in range(1, blocks + 1):
        name = f"stage{stage}_block{index}"
        stride = 2 if index == 1 and stage > 1 else 1
        self.add_module(name, Bottleneck(inputs, width, features, stride))
        self.blocks.append(name)
        inputs = features
    self.head = nn.Linear(inputs, num_classes)

  def forward(self, x):
    x = F.relu(self.stem_norm(self.stem(x)))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    for name in self.blocks:
      x = getattr(self, name)(x)
    return self.head(x.mean((2, 3)))


NETWORKS = {
  "cifar_cnn": CifarCNN,
  "mnist_cnn": MnistCNN,
  "se_resnext50_32x4d": SEResNeXt50,
}

# Parameters by (channels, classes), counted in the Flax networks: a twin of another size is none.
PARAMETERS = {
  ("cifar_cnn", 3, 10): 1_626_442,
  ("mnist_cnn", 1, 10): 20_490,
  ("se_resnext50_32x4d", 1, 2): 25_508_722,
  ("se_resnext50_32x4d", 3, 2): 25_514_994,
  ("se_resnext50_32x4d", 3, 1000): 27_559_896,
}


def create(name: str, channels: int, num_classes: int, seed: int = 0) -> nn.Module:
  """A network of that name; its parameter count is the Flax network's."""
  torch.manual_seed(seed)
  network = NETWORKS[name](channels, num_classes)
  count = sum(parameter.numel() for parameter in network.parameters())
  expected = PARAMETERS[name, channels, num_classes]
  assert count == expected, f"{name} has {count:,} parameters, the Flax network {expected:,}"
  return network


def from_flax(network: nn.Module, name: str, value: np.ndarray) -> torch.Tensor:
  """A Flax parameter as the parameter of that name here is laid out.

  Args:
    network: says where feature maps are flattened: Flax flattens [H, W, C], PyTorch [C, H, W].
    name: the PyTorch name, as in ``flax_name``.
    value: the Flax array.
  """
  layer = name.rsplit(".", 1)[0]
  if value.ndim == 4:  # [kh, kw, in, out] -> [out, in, kh, kw]
    value = value.transpose(3, 2, 0, 1)
  elif value.ndim == 2:
    if layer in network.flattened:
      channels, height, width = network.flattened[layer]
      value = value.reshape(height, width, channels, -1).transpose(2, 0, 1, 3)
      value = value.reshape(channels * height * width, -1)
    value = value.T
  return torch.from_numpy(np.array(value, order="C"))


def flax_name(network: nn.Module, name: str) -> str:
  """``stage1_block1.norm1.weight`` here is ``stage1_block1/norm1/scale`` there."""
  layer, kind = name.rsplit(".", 1)
  if kind == "weight":
    kind = "scale" if isinstance(network.get_submodule(layer), nn.GroupNorm) else "kernel"
  return f"{layer.replace('.', '/')}/{kind}"
