"""Every system of the imaging paper as changes to one configuration, and the sizes it runs at."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fedjax_med.core.config import (
  ClientConfig,
  Config,
  DataConfig,
  ModelConfig,
  PartitionConfig,
  ServerConfig,
  get_field,
)
from fedjax_med.core.errors import require, require_choice

SETS = ("phantoms", "br35h", "sars_cov2_ct")  # each a data.source
SPLITS = ("paper", "grouped")


class Scale(NamedTuple):
  """A size that all systems are trained at.

  Attributes:
    image_size: pixels a side.
    width: of the large networks' layers.
    rounds: of each local epoch.
    batch_size: images a local step.
    seeds: of split, partition, initial weights and sampling, from 0.
    num_phantoms: images where the set is phantoms.
    gan_steps: of each hospital's GAN.
    unlike_network: name and width of the network that the ways to meet unlike hospitals train: a
      small one where there is no accelerator, since they are compared to each other.
  """

  image_size: int
  width: float
  rounds: int
  batch_size: int
  seeds: int
  num_phantoms: int
  gan_steps: int
  unlike_network: tuple[str, float]


SCALES = {
  "smoke": Scale(16, 0.125, 1, 8, 2, 240, 20, ("se_resnext_tiny", 1.0)),
  "cpu": Scale(32, 0.25, 8, 16, 3, 2000, 300, ("se_resnext_tiny", 1.0)),
  "gpu": Scale(192, 1.0, 60, 32, 3, 4000, 2000, ("se_resnext50_32x4d", 1.0)),
}


class System(NamedTuple):
  """A row of the comparison.

  Attributes:
    label: its name in the paper.
    what: what is trained here under that name.
    places: the figures and tables that show it.
    changes: fields that differ from ``base_config``.
    published: accuracy by set, as far as it is known to us.
  """

  label: str
  what: str
  places: tuple[str, ...]
  changes: dict[str, Any]
  published: Mapping[str, float] = MappingProxyType({})


_SMALL = {"model.name": "cnn_small", "model.width": 1.0}
_FIGURES = ("figures 3 and 4",)
_ABLATION = ("tables 1 and 2",)
_COMPARISON = ("table 3",)
_UNLIKE = ("unlike hospitals",)

PROPOSED = "fl_se_resnext50"
SYSTEMS: dict[str, System] = {
  PROPOSED: System(
    "FL-SE-ResNeXt-50",
    "SE-ResNeXt-50 (32x4d), FedAvg",
    (*_FIGURES, *_ABLATION, *_COMPARISON),
    {},
    {"br35h": 0.988, "sars_cov2_ct": 0.993},
  ),
  "vgg16": System("VGG16", "FedAvg", _FIGURES, {"model.name": "vgg16"}),
  "googlenet": System("GoogLeNet", "FedAvg", _FIGURES, {"model.name": "googlenet"}),
  "efficientnet_b0": System(
    "EfficientNet-B0", "FedAvg", _FIGURES, {"model.name": "efficientnet_b0"}
  ),
  "densenet121": System("DenseNet121", "FedAvg", _FIGURES, {"model.name": "densenet121"}),
  "mobilenet_v2": System("MobileNetV2", "FedAvg", _FIGURES, {"model.name": "mobilenet_v2"}),
  "resnet50": System("ResNet-50", "FedAvg", _FIGURES, {"model.name": "resnet50"}),
  "resnext50_central": System(
    "ResNeXt-50 central",
    "one hospital holds everything",
    _ABLATION,
    {"model.name": "resnext50_32x4d", "partition.num_clients": 1, "partition.scheme": "iid"},
  ),
  "fl_alone": System("FL alone", "the small CNN, FedAvg", _ABLATION, _SMALL),
  "fl_resnext50": System(
    "FL + ResNeXt-50", "without gates, FedAvg", _ABLATION, {"model.name": "resnext50_32x4d"}
  ),
  "fedxnet": System(
    "FedXNet",
    "windowed attention, three loss terms, performance-weighted fusion",
    _COMPARISON,
    {"model.name": "fedxnet", "server.algorithm": "performance"},
  ),
  "texture": System(
    "CNN + GLCM + LBP + EfficientNet",
    "EfficientNet-B0 with texture features, FedAvg",
    _COMPARISON,
    {"model.name": "efficientnet_b0_texture"},
  ),
  "fl_resnet50": System(
    "FL-ResNet-50",
    "four clients",
    _COMPARISON,
    {"model.name": "resnet50", "partition.num_clients": 4},
  ),
  "cnn_fedavg_iid": System(
    "CNN-FedAvg, IID", "the small CNN", _COMPARISON, _SMALL | {"partition.scheme": "iid"}
  ),
  "cnn_fl_non_iid": System(
    "CNN-FL, non-IID",
    "the small CNN, Dirichlet 0.1",
    _COMPARISON,
    _SMALL | {"partition.alpha": 0.1},
  ),
  "fed_cnn_gan": System(
    "FED-CNN-GAN",
    "a GAN at each client, half as many synthetic images, DenseNet121",
    _COMPARISON,
    {"model.name": "densenet121", "client.synthetic": "gan", "client.synthetic_share": 0.5},
  ),
  "fedavg": System("FedAvg", "what the others are held to", _UNLIKE, {}),
  "fedprox": System("FedProx", "μ = 0.01", _UNLIKE, {"server.proximal_weight": 0.01}),
  "scaffold": System(
    "SCAFFOLD",
    "local SGD",
    _UNLIKE,
    {"server.algorithm": "scaffold", "client.optimizer": "sgd", "client.learning_rate": 0.05},
  ),
  "fednova": System(
    "FedNova",
    "local SGD with momentum",
    _UNLIKE,
    {"server.algorithm": "fednova", "client.optimizer": "momentum", "client.learning_rate": 0.02},
  ),
  "fedadam": System(
    "FedAdam", "server Adam", _UNLIKE, {"server.optimizer": "adam", "server.learning_rate": 0.01}
  ),
  "fedyogi": System(
    "FedYogi", "server Yogi", _UNLIKE, {"server.optimizer": "yogi", "server.learning_rate": 0.01}
  ),
  "fedbn": System("FedBN", "norms stay at home", _UNLIKE, {"server.algorithm": "fedbn"}),
  "ditto": System("Ditto", "λ = 0.1", _UNLIKE, {"server.algorithm": "ditto"}),
  "finetune": System(
    "Fine-tuned heads", "each hospital its own", _UNLIKE, {"server.algorithm": "finetune"}
  ),
}

# Their hospitals predict with models of their own (``predicts`` in summary.json).
OWN_MODELS = ("fedbn", "ditto", "finetune")


def base_config(scale: str, dataset: str, path: str) -> Config:
  """The proposed system at a scale.

  Raises:
    UserError: an unknown scale or set, or a path that is missing or that phantoms do not read.
  """
  require_choice("--scale", scale, SCALES)
  require_choice("--set", dataset, SETS)
  require(
    bool(path) or dataset == "phantoms",
    f"--path is missing for --set={dataset}",
    "give the folder that holds its class folders",
  )
  require(
    not path or dataset != "phantoms",
    f"--path={path} is read with another --set than phantoms only",
    "leave it out, or name the set",
  )
  size = SCALES[scale]
  data = DataConfig(source=dataset, path=path, image_size=size.image_size)
  if dataset == "phantoms":
    data.num_examples = size.num_phantoms
  return Config(
    data=data,
    partition=PartitionConfig(scheme="dirichlet", num_clients=5, alpha=0.5, min_client_size=16),
    model=ModelConfig(name="se_resnext50_32x4d", width=size.width),
    client=ClientConfig(
      optimizer="adam",
      learning_rate=1e-3,
      schedule="cosine",
      batch_size=size.batch_size,
      gan_steps=size.gan_steps,
    ),
    server=ServerConfig(num_rounds=size.rounds),
  )


class Row(NamedTuple):
  """One training: a system, a split and a seed, and the fields that say so."""

  system: str
  split: str
  seed: int
  point: dict[str, Any]


def reference(system: str) -> str:
  """What a system is compared to: FedAvg of the same network, or the proposed one."""
  return "fedavg" if SYSTEMS[system].places == _UNLIKE else PROPOSED


def rows(base: Config, scale: Scale) -> list[Row]:
  """Every training of every system; each point names the same fields."""
  fields = sorted({name for system in SYSTEMS.values() for name in system.changes})
  found = []
  for name, system in SYSTEMS.items():
    values = {field: get_field(base, field) for field in fields} | system.changes
    if system.places == _UNLIKE:
      values["model.name"], values["model.width"] = scale.unlike_network
    for split in SPLITS:
      for seed in range(scale.seeds):
        found.append(Row(name, split, seed, {**values, "data.split": split, "seed": seed}))
  return found
