"""Networks by name, and the way from a model config to a network."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_med.core.config import ModelConfig
from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.registered import add_name
from fedjax_med.core.sources import read_again, source_digest
from fedjax_med.models import ops
from fedjax_med.models.model import Model, from_flax
from fedjax_med.models.networks import (
  cnn,
  cnn1d,
  densenet,
  fedxnet,
  googlenet,
  mobile,
  pretrained,
  se_resnext,
  vgg,
)
from fedjax_med.models.networks.norms import NORMS

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Settings that a network may have or not, each with a value unlike the default.
SETTINGS = {"norm": "batch", "dropout": 0.5, "width": 0.5, "dtype": "bfloat16"}

# name: constructor(num_classes, *, norm, dropout, dtype[, width])
MODELS: dict[str, Callable[..., nn.Module]] = {
  "se_resnext50_32x4d": se_resnext.se_resnext50_32x4d,
  "se_resnext_tiny": se_resnext.se_resnext_tiny,
  "se_resnext_micro": se_resnext.se_resnext_micro,
  "resnet50": se_resnext.resnet50,
  "resnext50_32x4d": se_resnext.resnext50_32x4d,
  "vgg16": vgg.vgg16,
  "googlenet": googlenet.googlenet,
  "densenet121": densenet.densenet121,
  "mobilenet_v2": mobile.mobilenet_v2,
  "efficientnet_b0": mobile.efficientnet_b0,
  "efficientnet_b0_texture": mobile.efficientnet_b0_texture,
  "fedxnet": fedxnet.fedxnet,
  "cnn_small": cnn.cnn_small,
  "mlp": cnn.mlp,
  "linear": cnn.linear,
  "cnn1d": cnn1d.cnn1d,
}


ROWS = ("linear", "mlp")  # networks of this package that take rows of numbers
SERIES = ("cnn1d",)  # that take series, [T, 1, C]


def require_inputs(name: str, shape: tuple[int, ...], nouns: str) -> None:
  """Raises UserError where a network of this package reads pictures or series, and inputs are none.

  Args:
    name: of the network.
    shape: of one input; that of a picture is [H, W, C], that of a series [T, 1, C].
    nouns: examples, for people.
  """
  if name in ROWS or code_of(name):
    return
  series = len(shape) == 3 and shape[1] == 1
  fitting = (*ROWS, *(SERIES if series else ()))
  kind = "series" if name in SERIES else "pictures"
  require(
    series if kind == "series" else len(shape) == 3 and not series,
    f"model.name='{name}' is a network for {kind}, and {nouns} of shape {list(shape)} are none",
    f"use --config.model.name={' or '.join(fitting)}"
    if series or len(shape) != 3
    else "use --config.model.name=cnn_small, or another network for pictures",
  )


def register(name: str, constructor: Callable[..., nn.Module]) -> None:
  """Adds a network that configs can name; UserError if the name is taken by another one.

  ``constructor(num_classes, norm=..., dropout=..., dtype=...)`` returns a Linen module that maps
  inputs [B, ...] to logits [B, num_classes], in training with penalties if an attribute of that
  name says so (``require_columns``); an argument ``width`` receives ``model.width``. A function
  that was read from its file once more replaces itself: config files are read twice.
  """
  known = MODELS.get(name, constructor)
  require(
    known is constructor or read_again(known, constructor),
    f"a model named '{name}' is registered already",
    "choose another name",
  )
  MODELS[name] = constructor
  add_name("model.name", name)


def code_of(name: str) -> str:
  """Digest of the source of a network that was registered; empty for this package's own.

  Two networks of one name are two trainings: with the same random keys the difference of their
  releases would have no noise.
  """
  require_choice("model.name", name, MODELS)
  return source_digest(MODELS[name], f"model '{name}'")


def create_module(config: ModelConfig, num_classes: int) -> nn.Module:
  """The Linen module a config names, its stem pool that of the weights it is to start from.

  UserError with the nearest name if there is none, if it has no width to change, or if the weights
  cannot be read.
  """
  require_choice("model.name", config.name, MODELS)
  require_choice("model.norm", config.norm, NORMS)
  require_choice("model.dtype", config.dtype, DTYPES)
  constructor = MODELS[config.name]
  arguments = {"norm": config.norm, "dropout": config.dropout, "dtype": DTYPES[config.dtype]}
  if config.width != 1:
    require(
      "width" in inspect.signature(constructor).parameters,
      f"model.width={config.width:g} needs a network that can be made wider, which '{config.name}'"
      " cannot",
      "use model.width=1, or give its constructor an argument named width",
    )
    arguments["width"] = config.width
  if config.name == "mlp":
    arguments["hidden"] = config.hidden
  module = constructor(num_classes, **arguments)
  if config.pretrained:
    file = pretrained.load_safetensors(config.pretrained)
    naming = pretrained.naming_of(file.arrays, file.path)
    module = module.clone(stem_pool_padding=naming.stem_pool_padding)
  return module


def unread(config: ModelConfig) -> tuple[str, ...]:
  """Names of ``SETTINGS`` that the network lacks: any value of them makes an equal module."""
  require_choice("model.name", config.name, MODELS)
  return _unread(MODELS[config.name])


@functools.cache
def _unread(constructor: Callable[..., nn.Module]) -> tuple[str, ...]:
  default = {"norm": "group", "dropout": 0.0, "dtype": jnp.float32}
  has_width = "width" in inspect.signature(constructor).parameters

  def has(setting: str, value: Any) -> bool:
    if setting == "width" and not has_width:
      return False
    value = DTYPES[value] if setting == "dtype" else value
    return constructor(2, **{**default, setting: value}) != constructor(2, **default)

  return tuple(setting for setting, value in SETTINGS.items() if not has(setting, value))


def require_read(config: ModelConfig) -> None:
  """Raises UserError where a setting differs from its default and the network has none such."""
  default = ModelConfig()
  names = [name for name in unread(config) if getattr(config, name) != getattr(default, name)]
  settings = " and ".join(f"model.{name}={getattr(config, name)!r}" for name in names)
  require(
    not names,
    f"{settings} {'is' if len(names) == 1 else 'are'} not read by model.name='{config.name}'",
    "use another network, or leave "
    + " and ".join(f"model.{name} at {getattr(default, name)!r}" for name in names),
  )


def network_record(config: ModelConfig, num_classes: int) -> dict[str, str]:
  """Facts about the network that its config leaves to other files, for config.json.

  ``source_sha256`` is ``code_of`` the network; ``stem_pool_padding`` was read from the pretrained
  weights and is absent where there were none.
  """
  record = {"source_sha256": code_of(config.name)}
  if config.pretrained:
    module: Any = create_module(config, num_classes)
    record["stem_pool_padding"] = module.stem_pool_padding
  return record


def recreate_module(config: ModelConfig, num_classes: int, record: dict[str, str]) -> nn.Module:
  """The network of a run that has ended, by its ``network_record``; needs no pretrained weights.

  Raises:
    UserError: the network is not registered, or its source is not the one that was trained.
  """
  require(
    config.name in MODELS,
    f"the run's network '{config.name}' is not part of this package",
    "give --network=FILE.py, the file that registers it (usually the --config of the run)",
  )
  trained, present = record.get("source_sha256"), code_of(config.name)
  require(
    trained in (None, present),
    f"the source of the run's network '{config.name}' has changed since it was trained",
    "give the file as it was then",
  )
  module: Any = create_module(dataclasses.replace(config, pretrained=""), num_classes)
  if "stem_pool_padding" in record:
    module = module.clone(stem_pool_padding=record["stem_pool_padding"])
  return module


def create_model(
  config: ModelConfig, num_classes: int, lowering: ops.Lowering = "matmul", *, remat: bool = False
) -> Model:
  """The network a config names as plain functions, its layers lowered as ``lowering`` says.

  ``remat`` computes each block again in the backward pass; UserError if the network has none.
  """
  module = create_module(config, num_classes)
  if remat:
    require(
      has_remat(config, num_classes),
      f"execution.remat='blocks' needs a network with blocks, which '{config.name}' has not",
      "use execution.remat=auto, or execution.microbatch to save memory",
    )
    module = module.clone(remat=True)
  return from_flax(module, lowering=lowering)


def require_columns(model: Model, image: Any, num_classes: int) -> None:
  """UserError unless the network returns the columns it is trained and read by; compiles nothing.

  Those are one for each class, and in training one more for each of ``model.penalties``. ``image``
  [1, ...] needs a shape and a dtype only.
  """
  penalties = model.penalties
  require(
    isinstance(penalties, int) and penalties >= 0,
    f"the network's attribute 'penalties' is {penalties!r}",
    "let it be the number of columns after the classes in training, or name it otherwise",
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  images = jax.ShapeDtypeStruct((2, *image.shape[1:]), image.dtype)
  params, state = jax.eval_shape(model.init, key, image)
  for train, more in ((True, penalties), (False, 0)):

    def outputs(key, params, state, images, train=train):
      return model.apply(params, state, images, key=key, train=train)[0]

    shape = jax.eval_shape(outputs, key, params, state, images).shape
    due = f"{num_classes} classes" + f" and {more} penalties" * bool(more)
    require(
      shape == (2, num_classes + more),
      f"the network returns outputs of shape {list(shape)} for 2 images"
      f" {'in' if train else 'outside'} training, where {due} make [2, {num_classes + more}]",
      "return a column for each class, and in training as many more as its attribute 'penalties'"
      " says",
    )


def has_remat(config: ModelConfig, num_classes: int) -> bool:
  """Whether the network has blocks to compute again: a boolean attribute ``remat`` says so."""
  return isinstance(getattr(create_module(config, num_classes), "remat", None), bool)
