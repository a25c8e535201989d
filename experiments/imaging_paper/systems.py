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
  "smoke": Scale(
    image_size=16,
    width=0.125,
    rounds=1,
    batch_size=8,
    seeds=2,
    num_phantoms=240,
    gan_steps=20,
    unlike_network=("se_resnext_tiny", 1.0),
  ),
  "cpu": Scale(
    image_size=32,
    width=0.25,
    rounds=8,
    batch_size=16,
    seeds=3,
    num_phantoms=2000,
    gan_steps=300,
    unlike_network=("se_resnext_tiny", 1.0),
  ),
  "gpu": Scale(
    image_size=192,
    width=1.0,
    rounds=60,
    batch_size=32,
    seeds=3,
    num_phantoms=4000,
    gan_steps=2000,
    unlike_network=("se_resnext50_32x4d", 1.0),
  ),
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
    label="FL-SE-ResNeXt-50",
    what="SE-ResNeXt-50 (32x4d), FedAvg",
    places=(*_FIGURES, *_ABLATION, *_COMPARISON),
    changes={},
    published={"br35h": 0.988, "sars_cov2_ct": 0.993},
  ),
  "vgg16": System(label="VGG16", what="FedAvg", places=_FIGURES, changes={"model.name": "vgg16"}),
  "googlenet": System(
    label="GoogLeNet", what="FedAvg", places=_FIGURES, changes={"model.name": "googlenet"}
  ),
  "efficientnet_b0": System(
    label="EfficientNet-B0",
    what="FedAvg",
    places=_FIGURES,
    changes={"model.name": "efficientnet_b0"},
  ),
  "densenet121": System(
    label="DenseNet121", what="FedAvg", places=_FIGURES, changes={"model.name": "densenet121"}
  ),
  "mobilenet_v2": System(
    label="MobileNetV2", what="FedAvg", places=_FIGURES, changes={"model.name": "mobilenet_v2"}
  ),
  "resnet50": System(
    label="ResNet-50", what="FedAvg", places=_FIGURES, changes={"model.name": "resnet50"}
  ),
  "resnext50_central": System(
    label="ResNeXt-50 central",
    what="one hospital holds everything",
    places=_ABLATION,
    changes={
      "model.name": "resnext50_32x4d",
      "partition.num_clients": 1,
      "partition.scheme": "iid",
    },
  ),
  "fl_alone": System(
    label="FL alone", what="the small CNN, FedAvg", places=_ABLATION, changes=_SMALL
  ),
  "fl_resnext50": System(
    label="FL + ResNeXt-50",
    what="without gates, FedAvg",
    places=_ABLATION,
    changes={"model.name": "resnext50_32x4d"},
  ),
  "fedxnet": System(
    label="FedXNet",
    what="windowed attention, three loss terms, performance-weighted fusion",
    places=_COMPARISON,
    changes={"model.name": "fedxnet", "server.algorithm": "performance"},
  ),
  "texture": System(
    label="CNN + GLCM + LBP + EfficientNet",
    what="EfficientNet-B0 with texture features, FedAvg",
    places=_COMPARISON,
    changes={"model.name": "efficientnet_b0_texture"},
  ),
  "fl_resnet50": System(
    label="FL-ResNet-50",
    what="four clients",
    places=_COMPARISON,
    changes={"model.name": "resnet50", "partition.num_clients": 4},
  ),
  "cnn_fedavg_iid": System(
    label="CNN-FedAvg, IID",
    what="the small CNN",
    places=_COMPARISON,
    changes=_SMALL | {"partition.scheme": "iid"},
  ),
  "cnn_fl_non_iid": System(
    label="CNN-FL, non-IID",
    what="the small CNN, Dirichlet 0.1",
    places=_COMPARISON,
    changes=_SMALL | {"partition.alpha": 0.1},
  ),
  "fed_cnn_gan": System(
    label="FED-CNN-GAN",
    what="a GAN at each client, half as many synthetic images, DenseNet121",
    places=_COMPARISON,
    changes={"model.name": "densenet121", "client.synthetic": "gan", "client.synthetic_share": 0.5},
  ),
  "fedavg": System(label="FedAvg", what="what the others are held to", places=_UNLIKE, changes={}),
  "fedprox": System(
    label="FedProx", what="μ = 0.01", places=_UNLIKE, changes={"server.proximal_weight": 0.01}
  ),
  "scaffold": System(
    label="SCAFFOLD",
    what="local SGD",
    places=_UNLIKE,
    changes={
      "server.algorithm": "scaffold",
      "client.optimizer": "sgd",
      "client.learning_rate": 0.05,
    },
  ),
  "fednova": System(
    label="FedNova",
    what="local SGD with momentum",
    places=_UNLIKE,
    changes={
      "server.algorithm": "fednova",
      "client.optimizer": "momentum",
      "client.learning_rate": 0.02,
    },
  ),
  "fedadam": System(
    label="FedAdam",
    what="server Adam",
    places=_UNLIKE,
    changes={"server.optimizer": "adam", "server.learning_rate": 0.01},
  ),
  "fedyogi": System(
    label="FedYogi",
    what="server Yogi",
    places=_UNLIKE,
    changes={"server.optimizer": "yogi", "server.learning_rate": 0.01},
  ),
  "fedbn": System(
    label="FedBN", what="norms stay at home", places=_UNLIKE, changes={"server.algorithm": "fedbn"}
  ),
  "ditto": System(
    label="Ditto", what="λ = 0.1", places=_UNLIKE, changes={"server.algorithm": "ditto"}
  ),
  "finetune": System(
    label="Fine-tuned heads",
    what="each hospital its own",
    places=_UNLIKE,
    changes={"server.algorithm": "finetune"},
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
        found.append(
          Row(
            system=name, split=split, seed=seed, point={**values, "data.split": split, "seed": seed}
          )
        )
  return found
