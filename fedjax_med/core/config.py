"""The configuration of a run: typed dataclasses, their meaning, and the rules they obey.

A preset in ``configs/`` returns a ``Config``; flags such as ``--config.privacy.clip_norm=0.5``
assign to it; ``validate`` runs once, after which a config is never changed.
"""

import dataclasses
import hashlib
import json
from typing import Any

from fedjax_med.core.errors import require, require_choice


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
    strict: stop at the first unreadable file instead of counting it.
    split: grouped (near-duplicates and patients stay on one side, in one hospital) or
      paper (random).
    test_fraction: share of examples held out, 0 to 1.
    patient_pattern: regular expression whose first group in the file name is the patient.
    normalisation: image (each image to mean 0 and standard deviation 1, a function of that image
      alone) or fixed (0..255 to -1..1).
    num_examples: phantoms made in all (divided over the five scanners).
    seed: seed of phantoms, split and partition.
  """

  source: str = "phantoms"
  path: str = ""
  cache_dir: str = "~/.cache/fedjax_med/tfds"
  image_size: int = 192
  min_size: int = 32
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
    num_clients: hospitals K; with scheme=site the sites decide and this must be 0 or their number.
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
    dtype: float32 or bfloat16 for activations; weights, norms and noise stay float32.
    pretrained: .safetensors file with a PyTorch state dict (pretrainedmodels or timm) that initial
      weights and statistics are taken from; empty is none. Needs norm=frozen_batch.
  """

  name: str = "se_resnext50_32x4d"
  norm: str = "group"
  dropout: float = 0.0
  dtype: str = "float32"
  pretrained: str = ""


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


@dataclasses.dataclass
class ServerConfig:
  """What the server does with the clients' deltas.

  Attributes:
    algorithm: a name of the algorithm registry.
    num_rounds: communication rounds.
    optimizer: sgd (FedAvg), momentum (FedAvgM), adam (FedAdam) or yogi (FedYogi), from optax.
    learning_rate: server learning rate; 1 with sgd is plain FedAvg.
    momentum: of optimizer=momentum.
    weighting: examples or uniform.
    participation: full or poisson.
    participation_rate: probability that a client takes part in a round (poisson).
    proximal_weight: FedProx μ; 0 turns the term off.
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
  ema_decay: float = 0.0


@dataclasses.dataclass
class PrivacyConfig:
  """Record-level differential privacy of each hospital's updates (DP-SGD).

  Attributes:
    mechanism: none or dp_sgd.
    noise_multiplier: σ; noise standard deviation over clip norm. 0 with a target ε: calibrated.
    target_epsilon: with noise_multiplier=0 the ε that σ is calibrated to, per hospital; with a
      noise_multiplier the budget before which the run stops. 0 means none.
    clip_norm: C, largest l2 norm of one example's gradient.
    delta: δ; 0 means 1 / (10 n) at each hospital. It must be under 1/n.
    batch_cap: examples a truncated Poisson batch holds at most; 0 means 5 standard deviations
      above the expected size.
    clipping: auto, book_keeping (one backward pass), two_pass (two, least memory) or reference (a
      gradient per example, any model); all exact.
  """

  mechanism: str = "none"
  noise_multiplier: float = 0.0
  target_epsilon: float = 0.0
  clip_norm: float = 1.0
  delta: float = 0.0
  batch_cap: int = 0
  clipping: str = "auto"


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
  """

  every: int = 1
  batch_size: int = 64
  local_baselines: bool = False


@dataclasses.dataclass
class Config:
  """A whole run.

  Attributes:
    seed: drives initial weights, sampling, noise and participation.
  """

  seed: int = 0
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
  server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
  privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
  execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


CHOICES = {
  "data.source": ("phantoms", "folder", "br35h", "sars_cov2_ct"),
  "data.split": ("grouped", "paper"),
  "data.normalisation": ("image", "fixed"),
  "partition.scheme": ("auto", "iid", "dirichlet", "quantity", "shards", "site"),
  "model.norm": ("group", "batch", "frozen_batch"),
  "model.dtype": ("float32", "bfloat16"),
  "client.optimizer": ("sgd", "momentum", "adam", "adamw"),
  "client.schedule": ("constant", "cosine", "linear"),
  "server.optimizer": ("sgd", "momentum", "adam", "yogi"),
  "server.weighting": ("examples", "uniform"),
  "server.participation": ("full", "poisson"),
  "privacy.mechanism": ("none", "dp_sgd"),
  "privacy.clipping": ("auto", "book_keeping", "two_pass", "reference"),
  "execution.layout": ("auto", "vmap", "chunk", "scan"),
  "execution.lowering": ("auto", "matmul", "native"),
  "execution.remat": ("auto", "off", "blocks"),
  "execution.probe": ("auto", "on", "off"),
}

# field: (lowest, highest, lowest itself allowed, remedy)
RANGES: dict[str, tuple[float, float, bool, str]] = {
  "data.image_size": (8, 4096, True, "use 64 to 224; the paper uses 192"),
  "seed": (0, 2**31 - 1, True, "use 0"),
  "data.seed": (0, 2**31 - 1, True, "use 0"),
  "data.min_size": (1, 4096, True, "use 32"),
  "data.test_fraction": (0, 0.9, False, "use 0.2"),
  "data.num_examples": (50, 10_000_000, True, "use 4000"),
  "partition.num_clients": (0, 100_000, True, "use 5"),
  "partition.alpha": (0, float("inf"), False, "0.1 is strong skew, 100 is nearly IID"),
  "partition.classes_per_client": (1, 100_000, True, "use 1 or more"),
  "partition.min_client_size": (1, 10_000_000, True, "use 8"),
  "model.dropout": (0, 0.95, True, "use 0 to 0.5"),
  "client.learning_rate": (0, float("inf"), False, "use 0.01 to 0.1 with sgd"),
  "client.warmup_rounds": (0, 1_000_000, True, "use 0"),
  "client.momentum": (0, 0.9999, True, "use 0.9"),
  "client.weight_decay": (0, 10, True, "use 0"),
  "client.batch_size": (1, 1_000_000, True, "use 32"),
  "client.num_local_steps": (0, 1_000_000, True, "use 0 to let num_local_epochs decide"),
  "client.num_local_epochs": (0, 10_000, False, "use 1"),
  "client.label_smoothing": (0, 0.9, True, "use 0"),
  "server.num_rounds": (1, 10_000_000, True, "use 10"),
  "server.learning_rate": (0, float("inf"), False, "use 1 with sgd"),
  "server.momentum": (0, 0.9999, True, "use 0.9"),
  "server.participation_rate": (0, 1, False, "use 1 for every client in every round"),
  "server.proximal_weight": (0, float("inf"), True, "use 0 for plain FedAvg, 0.01 for FedProx"),
  "server.ema_decay": (0, 0.9999, True, "use 0 or 0.9"),
  "privacy.noise_multiplier": (0, 1e6, True, "use 1"),
  "privacy.target_epsilon": (0, 1e6, True, "use 8, or 0 for none"),
  "privacy.clip_norm": (0, 1e6, False, "use 1"),
  "privacy.delta": (0, 1, True, "use 0 for 1/(10 n)"),
  "privacy.batch_cap": (0, 1_000_000, True, "use 0 to let it be chosen"),
  "execution.chunk_size": (0, 100_000, True, "use 0 unless layout=chunk"),
  "execution.devices": (0, 100_000, True, "use 0 to let them be chosen"),
  "execution.microbatch": (0, 1_000_000, True, "use 0 to let it be chosen"),
  "execution.memory_gib": (0, 1_000_000, True, "use 0 for a share of what the device has"),
  "eval.every": (1, 1_000_000, True, "use 1"),
  "eval.batch_size": (1, 1_000_000, True, "use 64"),
}


def to_dict(config: Config) -> dict[str, Any]:
  """The config as nested plain dictionaries, in declaration order."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
  """Inverse of ``to_dict``; an unknown name raises TypeError."""
  sections = {field.name: field for field in dataclasses.fields(Config)}
  parts: dict[str, Any] = {}
  for name, value in values.items():
    default = getattr(Config(), name) if name in sections else None
    parts[name] = type(default)(**value) if dataclasses.is_dataclass(default) else value
  return Config(**parts)


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


def validate(config: Config) -> None:
  """Checks every rule that needs no data; raises UserError with value, rule and remedy."""
  for path, choices in CHOICES.items():
    require_choice(path, get_field(config, path), choices)
  for path, (low, high, low_allowed, remedy) in RANGES.items():
    value = get_field(config, path)
    inside = (value >= low if low_allowed else value > low) and value <= high
    inside = inside and value != float("inf")
    rule = f"{'at least' if low_allowed else 'above'} {low:g}"
    rule += " and finite" if high == float("inf") else f" and at most {high:g}"
    require(inside, f"{path}={value} must be {rule}", remedy)

  data, partition, privacy = config.data, config.partition, config.privacy
  require(
    data.source == "phantoms" or data.path != "",
    f"data.source='{data.source}' needs data.path, which is empty",
    "point --config.data.path at the folder that holds the class folders",
  )
  require(
    partition.scheme == "site" or partition.num_clients >= 2,
    f"partition.num_clients={partition.num_clients} is under 2",
    "use at least two hospitals",
  )
  layout, chunk = config.execution.layout, config.execution.chunk_size
  require(
    (layout == "chunk") == (chunk > 0),
    f"execution.layout='{layout}' with execution.chunk_size={chunk} contradict each other",
    "set layout=chunk and chunk_size>=1 together",
  )
  require(
    config.execution.probe != "on" or layout == "auto",
    f"execution.probe='on' with execution.layout='{layout}' contradict each other",
    "use layout=auto, which the probe chooses for, or probe=auto",
  )
  require(
    config.execution.microbatch == 0 or config.model.norm != "batch",
    f"execution.microbatch={config.execution.microbatch} with model.norm='batch' would change"
    " results: statistics would be of a microbatch, not of the batch",
    "use execution.microbatch=0, or model.norm=group",
  )
  model, convertible = config.model, ("se_resnext50_32x4d", "frozen_batch")
  require(
    model.pretrained == "" or (model.name, model.norm) == convertible,
    f"model.pretrained='{model.pretrained}' holds no weights for model.name='{model.name}' with"
    f" model.norm='{model.norm}'",
    "use model.name={} with model.norm={}, or leave it empty".format(*convertible),
  )
  if privacy.mechanism == "none":
    require(
      privacy.noise_multiplier == 0 and privacy.target_epsilon == 0,
      f"privacy.mechanism='none' ignores privacy.noise_multiplier={privacy.noise_multiplier:g}"
      f" and privacy.target_epsilon={privacy.target_epsilon:g}",
      "set --config.privacy.mechanism=dp_sgd, or both of them to 0",
    )
    return
  require(
    privacy.noise_multiplier > 0 or privacy.target_epsilon > 0,
    "privacy.mechanism='dp_sgd' has neither privacy.noise_multiplier nor privacy.target_epsilon",
    "set one of them above 0",
  )
  require(
    config.model.norm != "batch",
    "model.norm='batch' mixes the examples of a batch, so clipping one example's gradient does"
    " not bound its influence",
    "use model.norm=group or model.norm=frozen_batch with privacy.mechanism=dp_sgd",
  )
  require(
    config.model.dtype == "float32" or privacy.clipping != "two_pass",
    f"privacy.clipping='two_pass' with model.dtype='{config.model.dtype}' rounds a clipped gradient"
    " to up to 1.003 C, above the sensitivity that ε is computed from",
    "use privacy.clipping=auto, or model.dtype=float32",
  )
