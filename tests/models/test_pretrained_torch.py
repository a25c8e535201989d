"""A PyTorch twin with random weights and statistics gives the logits of the converted network."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedjax_med.core.config import ModelConfig
from fedjax_med.models.model import from_flax
from fedjax_med.models.networks.pretrained import overlay
from fedjax_med.models.networks.se_resnext import SEResNeXt
from fedjax_med.models.registry import create_model, create_module

torch = pytest.importorskip("torch", reason="PyTorch is an extra: pip install -e '.[torch]'")
nn = torch.nn
conv = functools.partial(nn.Conv2d, bias=False)

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # planes and blocks of SE-ResNeXt-50
IMAGES = 3


class Gates(nn.Module):
  """Squeeze-and-excitation with 1x1 convolutions, as both families write it."""

  def __init__(self, channels):
    super().__init__()
    self.fc1 = nn.Conv2d(channels, channels // 16, 1)
    self.fc2 = nn.Conv2d(channels // 16, channels, 1)

  def forward(self, x):
    return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Block(nn.Module):
  """Bottleneck with 32 groups of width 4 (at 64 planes), the stride in the grouped layer."""

  def __init__(self, inputs, planes, stride, gates):
    super().__init__()
    width, outputs = 2 * planes, 4 * planes
    self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3, stride=stride, padding=1, groups=32)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
    self.add_module(gates, Gates(outputs))
    self.gates = gates
    self.downsample = nn.Sequential()
    if inputs != outputs:
      self.downsample = nn.Sequential(
        conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs)
      )

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(y)).relu()
    y = self.get_submodule(self.gates)(self.bn3(self.conv3(y)))
    return (y + self.downsample(x)).relu()


class Twin(nn.Module):
  """SE-ResNeXt-50 32x4d with the names and the max pool of one of the two families."""

  def __init__(self, family):
    super().__init__()
    cadene = family == "pretrainedmodels"
    stem, norm = conv(3, 64, 7, stride=2, padding=3), nn.BatchNorm2d(64)
    if cadene:
      self.layer0 = nn.Sequential()
      self.layer0.add_module("conv1", stem)
      self.layer0.add_module("bn1", norm)
    else:
      self.conv1, self.bn1 = stem, norm
    pool = {"ceil_mode": True} if cadene else {"padding": 1}
    body = [stem, norm, nn.ReLU(), nn.MaxPool2d(3, stride=2, **pool)]
    inputs = 64
    for stage, (planes, number) in enumerate(STAGES, start=1):
      blocks = []
      for index in range(number):
        stride = 2 if index == 0 and stage > 1 else 1
        blocks.append(Block(inputs, planes, stride, "se_module" if cadene else "se"))
        inputs = 4 * planes
      self.add_module(f"layer{stage}", nn.Sequential(*blocks))
      body += blocks
    self.add_module("last_linear" if cadene else "fc", nn.Linear(inputs, 1000))
    self.body = [body]  # in a list, so that the state dict names no layer twice

  def features(self, images):
    for layer in self.body[0]:
      images = layer(images)
    return images.mean((2, 3))


def draw(model, rng):
  """Replaces every weight and every statistic; activations neither vanish nor explode."""

  def fill(tensor, values):
    tensor.copy_(torch.from_numpy(np.asarray(values, np.float32).reshape(tensor.shape)))

  with torch.no_grad():
    for layer in model.modules():
      if isinstance(layer, nn.BatchNorm2d):
        size = layer.weight.numel()
        fill(layer.weight, rng.uniform(0.5, 1.5, size))
        fill(layer.bias, rng.normal(0, 0.2, size))
        fill(layer.running_mean, rng.normal(0, 0.3, size))
        fill(layer.running_var, rng.uniform(0.5, 2, size))
      elif isinstance(layer, nn.Conv2d | nn.Linear):
        fan_in = layer.weight[0].numel()
        fill(layer.weight, rng.normal(0, (2 / fan_in) ** 0.5, layer.weight.numel()))
        if layer.bias is not None:
          fill(layer.bias, rng.normal(0, 0.2, layer.bias.numel()))
  return model.eval()


@pytest.fixture(scope="module", params=["pretrainedmodels", "timm"])
def twin(request, tmp_path_factory):
  """The twin, and the file of its weights."""
  model = draw(Twin(request.param), np.random.default_rng(0))
  path = tmp_path_factory.mktemp(request.param) / "weights.safetensors"
  save_file({key: value.numpy() for key, value in model.state_dict().items()}, path)
  return model, str(path)


def twin_logits(model, images, head):
  """Logits [B, classes] of NHWC images, grey ones repeated; head [2048, classes] and its bias."""
  colour = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
  with torch.no_grad():
    features = model.features(torch.from_numpy(np.moveaxis(colour, 3, 1).copy()))
    kernel, bias = (torch.from_numpy(np.array(head[leaf])) for leaf in ("kernel", "bias"))
    return (features @ kernel + bias).numpy()


def compare(model, converted, side, channels, classes):
  """(largest difference of the logits, largest logit, least spread of a logit over images)."""
  network, path = converted
  rng = np.random.default_rng(side)
  images = rng.normal(size=(IMAGES, side, side, channels)).astype(np.float32)
  params, state = jax.eval_shape(network.init, jax.random.key(0), images[:1])
  found = overlay(path, params, state)
  if classes == 1000:
    last = getattr(model, "last_linear", None) or model.fc
    head = {"kernel": last.weight.detach().numpy().T, "bias": last.bias.detach().numpy()}
    assert "head" in found.params
  else:
    head = {
      "kernel": rng.normal(0, 2048**-0.5, (2048, classes)).astype(np.float32),
      "bias": rng.normal(size=classes).astype(np.float32),
    }
    assert "head" not in found.params
  ours = jax.jit(network.apply)({"head": head, **found.params}, found.state, images)[0]
  theirs = twin_logits(model, images, head)
  assert ours.shape == theirs.shape == (IMAGES, classes)
  return np.abs(ours - theirs).max(), np.abs(theirs).max(), np.ptp(theirs, axis=0).min()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("side", "channels", "classes"), [(64, 3, 1000), (96, 3, 4), (64, 1, 4), (96, 1, 1000)]
)
def test_logits_equal_those_of_the_twin(twin, side, channels, classes):
  model, path = twin
  config = ModelConfig(norm="frozen_batch", pretrained=path)
  converted = create_model(config, classes), path
  difference, largest, spread = compare(model, converted, side, channels, classes)
  assert difference < 1e-4 * largest
  assert spread > 1e-3 * largest  # the images are seen: logits do not agree by being constant


@pytest.mark.slow
def test_the_pool_of_the_other_family_would_change_the_logits(twin):
  model, path = twin
  module = create_module(ModelConfig(norm="frozen_batch", pretrained=path), 4)
  assert isinstance(module, SEResNeXt)
  other = "ceil" if module.stem_pool_padding == "around" else "around"
  network = from_flax(module.clone(stem_pool_padding=other))
  difference, largest, _ = compare(model, (network, path), 64, 1, 4)
  assert difference > 1e-2 * largest
