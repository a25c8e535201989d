"""The configuration of a run: typed dataclasses and their meaning.

A preset in ``configs/`` returns a ``Config``; flags such as ``--config.privacy.clip_norm=0.5``
assign to it; ``core.validation.validate`` runs once, after which a config is never changed.
"""

import dataclasses
import hashlib
import json
from typing import Any


@dataclasses.dataclass
class DataConfig:
  """Which examples exist and how they are split into train and test.

  Attributes:
    source: phantoms (embedded), folder (a folder of class folders), br35h or sars_cov2_ct
      (tensorflow-datasets builders; ``path`` is the folder with the downloaded class folders).
    path: folder for every source but phantoms.
    cache_dir: where prepared tensorflow-datasets are kept.
    image_size: side of the square images, pixels.
    min_size: images with a side under this many pixels are left out and counted.
    layout: of source=folder, where names of folders and files say what: a pattern of {class},
      {site}, {patient} and {split} (its test part is then the test set), such as
      '{site}/{class}/{patient}_*'; * is any text, ** any number of folders. auto takes the first
      level of folders as the classes, and refuses folders that do not look like it.
    positive: name of the positive class, of two; empty takes the one whose name does not sound
      negative (normal, healthy, control, benign, no_...), if the names say it.
    window: LOW,HIGH, the grey values that become black and white in all files; empty keeps pictures
      of 8 bits as they are and takes the number of bits of deeper ones from the largest value.
    strict: stop if any file is left out, instead of naming and counting it.
    split: grouped (near-duplicates and patients stay on one side, in one hospital) or
      paper (random). With {split} in data.layout the sides are given.
    test_fraction: share of examples held out, 0 to 1.
    patient_pattern: regular expression that is searched in each file name (without folders); its
      first group is the patient.
    normalisation: image (each image to mean 0 and standard deviation 1, a function of that image
      alone) or fixed (black is -1, white is 1).
    num_examples: phantoms made in all (divided over the five scanners).
    seed: seed of phantoms, split and partition.
  """

  source: str = "phantoms"
  path: str = ""
  cache_dir: str = "~/.cache/fedjax_med/tfds"
  image_size: int = 192
  min_size: int = 32
  layout: str = "auto"
  positive: str = ""
  window: str = ""
  strict: bool = False
  split: str = "grouped"
  test_fraction: float = 0.2
  patient_pattern: str = ""
  normalisation: str = "image"
  num_examples: int = 4000
  seed: int = 0


@dataclasses.dataclass
class PartitionConfig:
  """Which hospital holds which examples.

  Attributes:
    scheme: iid, dirichlet (label skew), quantity (size skew), shards (k classes a client), site;
      auto is site where the data say where each image comes from, else dirichlet.
    num_clients: hospitals K, 1 for training on pooled data; with scheme=site the sites decide and
      this must be 0 or their number.
    alpha: Dirichlet concentration of dirichlet and quantity; small is skewed.
    classes_per_client: classes a client holds under shards.
    min_client_size: training examples every client has at least.
  """

  scheme: str = "dirichlet"
  num_clients: int = 5
  alpha: float = 0.5
  classes_per_client: int = 1
  min_client_size: int = 8


@dataclasses.dataclass
class ModelConfig:
  """The network.

  Attributes:
    name: a name of the model registry.
    norm: group, batch (refused with privacy) or frozen_batch.
    dropout: rate before the head.
    width: multiplier of every layer's channels, each rounded to a multiple of 8 and at least 8
      (grouped convolutions keep their number of groups).
    dtype: float32 or bfloat16 for activations; weights, norms and noise stay float32.
    pretrained: .safetensors file with a PyTorch state dict (pretrainedmodels or timm) that initial
      weights and statistics are taken from; empty is none. Needs norm=frozen_batch.
    init_seed: seed of the initial weights; -1 takes that of the run.
  """

  name: str = "se_resnext50_32x4d"
  norm: str = "group"
  dropout: float = 0.0
  width: float = 1.0
  dtype: str = "float32"
  pretrained: str = ""
  init_seed: int = -1


@dataclasses.dataclass
class ClientConfig:
  """Local training at a hospital.

  Attributes:
    optimizer: sgd, momentum, adam or adamw (optax).
    learning_rate: peak local learning rate.
    schedule: constant, cosine or linear over all rounds, after ``warmup_rounds``.
    warmup_rounds: rounds of linear warm-up.
    momentum: of optimizer=momentum.
    weight_decay: of optimizer=adamw.
    batch_size: examples a local step; with privacy the expected size q·n of the Poisson draw.
    num_local_steps: local steps a round; 0 means ``num_local_epochs`` decides.
    num_local_epochs: passes over the hospital's data a round.
    label_smoothing: 0 to 1.
    augmentation: none, flip (left to right), shift (by up to an eighth of the side) or flip_shift,
      drawn anew for every image and step.
    synthetic: none, or gan: each hospital trains a GAN on its training images before the first
      round, and adds what it makes to them. Refused with privacy (docs/algorithms.md).
    synthetic_share: synthetic training images for each real one under synthetic=gan.
    gan_steps: training steps of each hospital's GAN.
  """

  optimizer: str = "sgd"
  learning_rate: float = 0.05
  schedule: str = "constant"
  warmup_rounds: int = 0
  momentum: float = 0.9
  weight_decay: float = 0.0
  batch_size: int = 32
  num_local_steps: int = 0
  num_local_epochs: float = 1.0
  label_smoothing: float = 0.0
  augmentation: str = "none"
  synthetic: str = "none"
  synthetic_share: float = 0.5
  gan_steps: int = 500


@dataclasses.dataclass
class ServerConfig:
  """What the server does with the clients' deltas.

  Attributes:
    algorithm: fedavg, scaffold, fednova, performance, fedbn, fedper, finetune or ditto;
      FedProx is proximal_weight, FedAvgM, FedAdam and FedYogi are ``optimizer``
      (docs/algorithms.md).
    num_rounds: communication rounds.
    optimizer: sgd (FedAvg), momentum (FedAvgM), adam (FedAdam) or yogi (FedYogi), from optax.
    learning_rate: server learning rate; 1 with sgd is plain FedAvg.
    momentum: of optimizer=momentum; β1 of adam and yogi.
    weighting: examples (real training images; patients or groups where they are the unit) or
      uniform.
    participation: full or poisson.
    participation_rate: probability that a client takes part in a round (poisson).
    proximal_weight: FedProx μ; 0 turns the term off.
    personal_layers: layers that are each hospital's own under algorithm=fedper or finetune: a
      regular expression that their path begins with, such as head, or stage4_block1|head.
    personal_weight: Ditto's λ, the pull of a hospital's own model to the global one.
    ema_decay: evaluate an exponential moving average over rounds with this decay; 0 is off.
  """

  algorithm: str = "fedavg"
  num_rounds: int = 10
  optimizer: str = "sgd"
  learning_rate: float = 1.0
  momentum: float = 0.9
  weighting: str = "examples"
  participation: str = "full"
  participation_rate: float = 1.0
  proximal_weight: float = 0.0
  personal_layers: str = "head"
  personal_weight: float = 0.1
  ema_decay: float = 0.0


@dataclasses.dataclass
class PrivacyConfig:
  """Differential privacy of each hospital's records or patients (DP-SGD in its local steps).

  Attributes:
    mechanism: none or dp_sgd.
    unit: record (one image), patient (all images of a patient; every name has to say whose it
      is) or group (all near-duplicates of an image, where patients are not known).
      data.split=grouped keeps both in one hospital; whole hospitals: ``client_privacy``.
    rows_per_unit: images of a patient or group that a step looks at, at most; 0 means 8.
    augmentation_multiplicity: random changes of each image in a step, whose mean gradient is
      clipped once; needs client.augmentation.
    noise_multiplier: σ; noise standard deviation over clip norm. 0 with a target ε: calibrated.
    target_epsilon: with noise_multiplier=0 the ε that σ is calibrated to, per hospital; with a
      noise_multiplier the budget before which the run stops. 0 means none.
    solve_for: what target_epsilon decides: noise (or the budget, see above), rounds, batch_size
      (each the most that the target allows at the given noise_multiplier) or clip_norm (the largest
      that the given noise_stddev allows).
    same_noise: calibrate one σ for all hospitals, the largest that any of them needs.
    noise_stddev: standard deviation of the noise on the sum, σ·C, for solve_for=clip_norm.
    clip_norm: C, largest l2 norm of one example's gradient.
    delta: δ; 0 means 1 / (10 n) at each hospital. It must be under 1/n.
    batch_cap: examples a truncated Poisson batch holds at most; 0 means 5 standard deviations
      above the expected size.
    bands: local steps that noise is correlated over (banded matrix factorisation): each takes back
      part of the noise of those before. 1 is independent noise. 4 or 8 help where ε is large and
      batches are a small share of a hospital, more do harm; docs/privacy.md has numbers.
    clipping: auto, book_keeping (one backward pass), reference (a gradient per example, any model)
      or two_pass (two backward passes, least memory; its rounding has no bound, so auto never
      takes it).
    adjacency: zero_out (a unit replaced by nothing; the number of units is public).
    sampling: poisson (each unit by itself, with one probability).
  """

  mechanism: str = "none"
  unit: str = "record"
  rows_per_unit: int = 0
  augmentation_multiplicity: int = 1
  noise_multiplier: float = 0.0
  target_epsilon: float = 0.0
  solve_for: str = "noise"
  same_noise: bool = False
  noise_stddev: float = 0.0
  clip_norm: float = 1.0
  delta: float = 0.0
  batch_cap: int = 0
  bands: int = 1
  clipping: str = "auto"
  adjacency: str = "zero_out"
  sampling: str = "poisson"


@dataclasses.dataclass
class ClientPrivacyConfig:
  """Differential privacy of whole hospitals, by a trusted server (DP-FedAvg).

  Attributes:
    mechanism: none or dp_fedavg; runs together with privacy.mechanism=dp_sgd, and both ε are
      reported.
    noise_multiplier: σ; noise standard deviation on the sum of updates over clip norm. 0 with a
      target ε: calibrated.
    target_epsilon: with noise_multiplier=0 what σ is calibrated to; with a noise_multiplier the
      budget before which the run stops. 0 means none.
    clip_norm: largest l2 norm of one hospital's update; with clipping=adaptive of the first round.
    delta: δ; 0 means 1 / (10 K). It must be under 1/K, K being the number of hospitals.
    clipping: fixed, or adaptive (the clip norm follows a quantile of the updates' norms, noised).
    quantile: share of updates that an adaptive clip norm lets pass unclipped.
    clip_learning_rate: geometric step of an adaptive clip norm.
    count_noise: noise on the count of unclipped updates; 0 means a twentieth of the expected
      cohort, and at least the noise multiplier. Its cost is inside σ.
  """

  mechanism: str = "none"
  noise_multiplier: float = 0.0
  target_epsilon: float = 0.0
  clip_norm: float = 1.0
  delta: float = 0.0
  clipping: str = "fixed"
  quantile: float = 0.5
  clip_learning_rate: float = 0.2
  count_noise: float = 0.0


@dataclasses.dataclass
class ExecutionConfig:
  """How the program is laid out on the machine; results do not depend on it but for rounding.

  Attributes:
    layout: auto, vmap (all clients at once), chunk (``chunk_size`` at once) or scan (one by one).
    chunk_size: clients at once on a device under layout=chunk.
    devices: devices that clients are dealt over; 0 means every accelerator (of all processes), or
      one for each core of a CPU, at most 16 and fewer where memory is short.
    lowering: auto, matmul (convolutions as sums of batched products) or native.
    microbatch: examples in memory at once in a local step; 0 lets it be chosen. Refused where
      the model has dropout, whose draws it would change.
    memory_gib: memory budget of a device, GiB, which the plan keeps to; 0 means 80% of an
      accelerator's, and half of a CPU's free memory.
    remat: auto (where memory forbids else), off or blocks (the backward pass computes each block of
      the network again).
    probe: auto (where a run is long enough to repay it), on or off: time a local step to choose
      how many clients train at once under layout=auto.
    compilation_cache: folder of XLA's persistent cache; empty turns it off.
  """

  layout: str = "auto"
  chunk_size: int = 0
  devices: int = 0
  lowering: str = "auto"
  microbatch: int = 0
  memory_gib: float = 0.0
  remat: str = "auto"
  probe: str = "auto"
  compilation_cache: str = "~/.cache/fedjax_med/xla"


@dataclasses.dataclass
class EvalConfig:
  """What is measured and when.

  Attributes:
    every: rounds between log points (metrics, checkpoint, progress).
    batch_size: test images a forward pass.
    local_baselines: also train each hospital alone and one model on pooled data.
    tracker: none, tensorboard (event files in the workdir), wandb (sends test metrics to Weights &
      Biases) or mlflow (a database in the workdir); each needs the extra of its name.
  """

  every: int = 1
  batch_size: int = 64
  local_baselines: bool = False
  tracker: str = "none"


@dataclasses.dataclass
class Config:
  """A whole run.

  Attributes:
    seed: drives initial weights (unless model.init_seed does), sampling, noise, participation and
      the GANs of client.synthetic.
  """

  seed: int = 0
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
  server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
  privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
  client_privacy: ClientPrivacyConfig = dataclasses.field(default_factory=ClientPrivacyConfig)
  execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


def to_dict(config: Config) -> dict[str, Any]:
  """The config as nested plain dictionaries, in declaration order."""
  return dataclasses.asdict(config)


def flat(values: dict[str, Any]) -> dict[str, Any]:
  """What ``to_dict`` gives by dotted field, such as ``privacy.clip_norm``."""
  fields: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, dict):
      fields |= {f"{name}.{field}": inner for field, inner in value.items()}
    else:
      fields[name] = value
  return fields


def from_dict(values: dict[str, Any]) -> Config:
  """Inverse of ``to_dict``; an unknown name raises TypeError."""
  sections = {field.name: field for field in dataclasses.fields(Config)}
  parts: dict[str, Any] = {}
  for name, value in values.items():
    default = getattr(Config(), name) if name in sections else None
    parts[name] = type(default)(**value) if dataclasses.is_dataclass(default) else value
  return Config(**parts)


def init_seed(config: Config) -> int:
  """The seed of the initial weights."""
  return config.seed if config.model.init_seed < 0 else config.model.init_seed


def fingerprint(values: dict[str, Any]) -> str:
  """First 12 hex digits of the SHA-256 of the canonical JSON of ``values``."""
  text = json.dumps(values, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def get_field(config: Config, path: str) -> Any:
  """Value at a dotted path such as ``privacy.clip_norm``."""
  value: Any = config
  for name in path.split("."):
    value = getattr(value, name)
  return value


def set_field(config: Config, path: str, value: Any) -> None:
  """Assigns to the field at a dotted path."""
  section, _, name = path.rpartition(".")
  setattr(getattr(config, section) if section else config, name, value)
