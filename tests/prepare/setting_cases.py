"""A case for each field of the configuration: where it is read, where not, and what then moves."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fedjax_med.core.config import Config, set_field
from tests.data import series_cases, survival_cases, table_cases
from tests.data.lines import make_gdsc
from tests.exchange import parts  # noqa: F401  (registers the transform and the aggregator below)

Changes = dict[str, Any]
FILES = "FILES"  # stands for the folder of pictures, with numbers for other ones
TABLE, COLUMNS, HEART = "A TABLE", "ITS COLUMNS", "HEART"  # stand for files of tables
LINES = "CELL LINES"  # stands for the folder of gdsc
SERIES = "A SERIES"  # stands for a folder of recordings
TIMES, TIME_COLUMNS = "TIMES", "THEIR COLUMNS"  # stand for survival tables and their manifest


class Case(NamedTuple):
  """How a field shows that it is read.

  Attributes:
    value: another value than that of ``reads``.
    moves: function of ``setting_moves`` that tells the two configurations apart.
    reads: changes of ``base`` under which the field is read.
    without: changes under which it is not, at least one for each of its conditions.
    besides: changes that go with ``value``.
    why: reason where neither weights, metrics, ε nor results on disk can move.
  """

  value: Any
  moves: str
  reads: Changes = {}  # noqa: RUF012
  without: tuple[Changes, ...] = ()
  besides: Changes = {}  # noqa: RUF012
  why: str = ""


def base() -> Config:
  """Logistic regression on a few phantoms of 8 pixels at three hospitals, without privacy."""
  config = Config()
  for path, value in {
    "data.image_size": 8,
    "data.num_examples": 120,
    "partition.num_clients": 3,
    "partition.min_client_size": 16,
    "model.name": "linear",
    "client.batch_size": 8,
    "client.num_local_steps": 2,
    "server.num_rounds": 2,
    "execution.devices": 1,
    "execution.compilation_cache": "",
  }.items():
    set_field(config, path, value)
  return config


def changed(changes: Changes, files: pathlib.Path) -> Config:
  """``base`` with these changes; FILES becomes a folder that holds pictures."""
  config = base()
  for path, value in changes.items():
    if isinstance(value, str) and value.startswith(FILES):
      number, _, inside = value.removeprefix(FILES).partition("/")
      value = str(pathlib.Path(make_files(files, int(number or 0)), inside))
    elif isinstance(value, str) and value.startswith((TABLE, COLUMNS, HEART)):
      value = make_table(files, value)
    elif value == TIMES:
      value = str(survival_cases.survival_folder(files / "times"))
    elif value == TIME_COLUMNS:
      value = table_cases.columns_file(files, survival_cases.SURVIVAL, "times.toml")
    elif value == LINES:
      value = str(make_gdsc(files / "lines"))
    elif value == SERIES:
      value = str(series_cases.series_folder(files / "series") / "people")
    set_field(config, path, value)
  return config


def make_files(folder: pathlib.Path, seed: int) -> str:
  """A folder of two classes of pictures: seven patients, two small files and one broken."""
  root = folder / f"pictures{seed}"
  if root.is_dir():
    return str(root)
  rng = np.random.default_rng(seed)
  for name in ("no", "yes"):
    (root / name).mkdir(parents=True)
    for number in range(40):
      side = 20 if number == 0 else 40
      pixels = rng.integers(0, 256, (side, side)).astype(np.uint8)
      side = "train" if number % 4 else "test"
      Image.fromarray(pixels).save(root / name / f"P{number % 7}_{side}_{number}.png")
  pictures = sorted(root.rglob("*.png"))
  table = ["path,label,reversed,other,who,ward,wing,part"]
  for number, (place, last) in enumerate(zip(pictures, pictures[::-1], strict=True)):
    paths = [each.relative_to(root).as_posix() for each in (place, last)]
    name, other = place.parent.name, "yes" if number % 3 else "no"
    people = f"{number % 9},{number % 3},{number // 7 % 3}"
    table.append(f"{paths[0]},{name},{paths[1]},{other},{people},{place.stem.split('_')[1]}")
  (root / "list.csv").write_text("\n".join(table), encoding="utf-8")
  (root / "no" / "broken.png").write_bytes(b"none")
  return str(root)


def make_table(folder: pathlib.Path, which: str) -> str:
  """A table of 120 records, its manifest (two ranges), or made-up files with UCI's names."""
  if which == TABLE:
    return str(table_cases.table_file(folder / "table.csv", 120))
  if which == HEART:
    return str(table_cases.heart_folder(folder / "heart"))
  wide = table_cases.MANIFEST.replace("high = 80,", "high = 100,")
  return table_cases.columns_file(
    folder, table_cases.MANIFEST if which == COLUMNS else wide, f"{which}.toml"
  )


LAYOUT = "execution.* lays the same arithmetic out otherwise: results are equal but for rounding"
SAME_BITS = "decrypted sums are rounded to the whole numbers of the grid: only costs differ"
ONE_VALUE = "a declaration with one value; every other one is refused with the reason"
FOLDER = {"data.source": "folder", "data.path": FILES, "data.num_examples": 4000}
GIVEN = {**FOLDER, "data.layout": "{class}/{site}_{split}_*"}
TABLES = {
  "data.source": "table",
  "data.path": TABLE,
  "data.columns": COLUMNS,
  "data.image_size": 192,
  "data.num_examples": 4000,
}
SURVIVAL = {**TABLES, "data.path": TIMES, "data.columns": TIME_COLUMNS}
HAZARDS = {**SURVIVAL, "data.survival": "hazards"}
DRUGS = {
  "data.source": "gdsc",
  "data.path": LINES,
  "data.image_size": 192,
  "data.num_examples": 4000,
}
WINDOWS = {
  "data.source": "series",
  "data.path": SERIES,
  "data.image_size": 192,
  "data.num_examples": 4000,
  "data.rate": series_cases.RATE,
  "data.window_seconds": 2.0,
  "data.hop_seconds": 1.0,
  "partition.min_client_size": 1,
}
NAMED = {**WINDOWS, "data.test_persons": "p2", "partition.scheme": "site"}
PAIRS = {**DRUGS, "data.split": "pairs"}
MANIFEST = {**FOLDER, "data.source": "manifest", "data.path": f"{FILES}/list.csv"}
ELSEWHERE = ({}, FOLDER)
SITES = {"partition.scheme": "site", "partition.num_clients": 7, "partition.min_client_size": 1}
GAN = {"client.synthetic": "gan"}
PAPER = {
  **TABLES,
  "data.source": "heart_disease",
  "data.path": HEART,
  "data.columns": "",
  "data.split": "paper",
  "partition.scheme": "site",
  "partition.num_clients": 4,
}
SIGMA = "privacy.noise_multiplier"
PRIVATE = {"privacy.mechanism": "dp_sgd", SIGMA: 1.0}
TARGET = {"privacy.mechanism": "dp_sgd", "privacy.target_epsilon": 8.0}
SOLVED = {**TARGET, "privacy.solve_for": "clip_norm", "privacy.noise_stddev": 0.5}
ROUNDS = {**PRIVATE, **TARGET, "privacy.solve_for": "rounds", "server.num_rounds": 10}
BATCHES = {**PRIVATE, **TARGET, "privacy.solve_for": "batch_size", "client.batch_size": 32}
PATIENTS = {**PRIVATE, "privacy.unit": "group"}
UNIFORM = {"client_privacy.mechanism": "dp_fedavg", "server.weighting": "uniform"}
CENTRAL = {**UNIFORM, "client_privacy.noise_multiplier": 1.0}
GRID = {"secure.protocol": "grid"}
LINKED = {"cost.uplink_mbps": "10", "cost.step_seconds": 0.5}
ADAPTIVE = {**CENTRAL, "client_privacy.clipping": "adaptive"}
TRIMMED = {"server.aggregator": "trimmed_mean"}
MEDIAN = {"server.aggregator": "geometric_median"}
ATTACK = {"attack.kind": "ipm"}
SHARED = {**CENTRAL, "client_privacy.noise": "distributed", "secure.protocol": "masking"}
ONE = {"partition.num_clients": 1}
FIVE = {"partition.num_clients": 5, "partition.min_client_size": 8}
CNN = {"model.name": "cnn_small"}
GRID, MASKED = {"secure.protocol": "grid"}, {"secure.protocol": "masking"}
TOPK = {"compression.kind": "topk"}
SKETCH = {"compression.kind": "sketch", "compression.columns": 10}
MLP = {"model.name": "mlp"}

MODELLED = {"secure.protocol": "ckks", "secure.he": "model"}

CASES: dict[str, Case] = {
  "seed": Case(1, "weights"),
  "data.source": Case("folder", "holders", besides=FOLDER),
  "data.path": Case(f"{FILES}1", "holders", FOLDER, ({},)),
  "data.cache_dir": Case(
    f"{FILES}1", "cache", {**FOLDER, "data.source": "br35h"}, ({}, FOLDER), why="where files lie"
  ),
  "data.image_size": Case(9, "holders", without=(TABLES,)),
  "data.min_size": Case(10, "holders", FOLDER, ({}, TABLES)),
  "data.strict": Case(True, "refusal", FOLDER, ({},)),
  "data.layout": Case("{class}/{patient}_*", "holders", FOLDER, ({},)),
  "data.positive": Case("no", "holders", FOLDER, ({}, DRUGS)),
  "data.window": Case("50,200", "holders", FOLDER, ({}, TABLES)),
  "data.split": Case("paper", "holders", without=(GIVEN, NAMED)),
  "data.test_fraction": Case(0.4, "holders", without=(GIVEN, PAPER, NAMED, {"data.fold": "1/5"})),
  "data.fold": Case("1/5", "holders", without=(GIVEN, PAPER, NAMED, PAIRS)),
  "data.target_columns": Case("who", "holders", MANIFEST, ELSEWHERE),
  "data.patient_pattern": Case(
    "(P[0-9]+)_", "holders", FOLDER, ({}, TABLES, {**FOLDER, "data.layout": "{class}/{patient}_*"})
  ),
  "data.normalisation": Case("fixed", "program", without=(TABLES,)),
  "data.columns": Case(f"{COLUMNS} 2", "holders", TABLES, ({},)),
  "data.scaling": Case("federated", "holders", TABLES, ({},)),
  "data.num_examples": Case(130, "holders", without=(FOLDER,)),
  "data.seed": Case(1, "holders", without=({**GIVEN, **SITES}, PAPER, NAMED)),
  "data.path_column": Case("reversed", "holders", MANIFEST, ELSEWHERE),
  "data.label_column": Case("other", "holders", MANIFEST, ELSEWHERE),
  "data.patient_column": Case("who", "holders", MANIFEST, ELSEWHERE),
  "data.site_column": Case(
    "wing",
    "holders",
    {
      **MANIFEST,
      "data.site_column": "ward",
      "partition.scheme": "site",
      "partition.min_client_size": 1,
    },
    ELSEWHERE,
  ),
  "data.split_column": Case("part", "holders", MANIFEST, ELSEWHERE),
  "data.group_columns": Case("who", "holders", MANIFEST, ELSEWHERE),
  "data.given_split": Case(False, "holders", {**MANIFEST, "data.split_column": "part"}, ELSEWHERE),
  "data.slices": Case("all", "files", MANIFEST, ELSEWHERE),
  "data.volume": Case(0, "files", MANIFEST, ELSEWHERE),
  "data.channels": Case("3", "holders", MANIFEST, ({},)),
  "data.rate": Case(5.0, "holders", WINDOWS, ({}, TABLES)),
  "data.recorded_rate": Case(8.0, "holders", WINDOWS, ({},)),
  "data.time_column": Case("t", "holders", WINDOWS, ({},)),
  "data.signals": Case("ax", "holders", WINDOWS, ({},)),
  "data.window_seconds": Case(3.0, "holders", WINDOWS, ({},)),
  "data.hop_seconds": Case(0.5, "holders", WINDOWS, ({},)),
  "data.ranges": Case("-2,8", "program", WINDOWS, ({},)),
  "data.test_persons": Case("p2", "holders", WINDOWS, ({},)),
  "data.survival": Case("hazards", "holders", SURVIVAL, ({},)),
  "data.intervals": Case(4, "holders", HAZARDS, ({}, SURVIVAL)),
  "data.interval_bounds": Case("quantiles", "holders", HAZARDS, ({}, SURVIVAL)),
  "partition.scheme": Case("iid", "holders"),
  "partition.num_clients": Case(4, "holders"),
  "partition.alpha": Case(
    0.2,
    "holders",
    without=(
      {"partition.scheme": "iid"},
      {"partition.scheme": "auto", **FIVE},
      {**GIVEN, **SITES, "partition.scheme": "auto"},
      ONE,
    ),
  ),
  "partition.classes_per_client": Case(2, "holders", {"partition.scheme": "shards"}, ({},)),
  "partition.min_client_size": Case(24, "holders", {"partition.alpha": 0.1}),
  "model.name": Case("mlp", "program"),
  "model.norm": Case("batch", "program", CNN, ({}, MLP)),
  "model.dropout": Case(0.5, "program"),
  "model.width": Case(0.5, "program", MLP, ({},)),
  "model.hidden": Case(8, "program", MLP, ({},)),
  "model.dtype": Case("bfloat16", "program"),
  "model.pretrained": Case("weights", "pretrained"),
  "model.init_seed": Case(1, "weights"),
  "client.optimizer": Case("adam", "program"),
  "client.learning_rate": Case(0.1, "weights"),
  "client.schedule": Case("cosine", "program"),
  "client.warmup_rounds": Case(2, "program"),
  "client.momentum": Case(0.5, "program", {"client.optimizer": "momentum"}, ({},)),
  "client.weight_decay": Case(0.1, "program", {"client.optimizer": "adamw"}, ({},)),
  "client.batch_size": Case(4, "program", without=(BATCHES,)),
  "client.num_local_steps": Case(3, "plan"),
  "client.num_local_epochs": Case(2.0, "plan", {"client.num_local_steps": 0}, ({},)),
  "client.label_smoothing": Case(0.1, "program", without=(DRUGS,)),
  "client.augmentation": Case("flip", "program", without=(TABLES,)),
  "client.synthetic": Case("gan", "holders", without=(TABLES,)),
  "client.synthetic_share": Case(1.0, "holders", GAN, ({},)),
  "client.gan_steps": Case(2, "images", {**GAN, "client.gan_steps": 1}, ({},)),
  "server.algorithm": Case("scaffold", "program"),
  "server.num_rounds": Case(4, "plan", TARGET, (ROUNDS,)),
  "secure.he_preset": Case("nvflare", "encryption", MODELLED, ({},), why=SAME_BITS),
  "secure.he": Case("model", "encryption", {"secure.protocol": "ckks"}, ({},), why=SAME_BITS),
  "secure.encrypt_every": Case(
    2, "encryption", {"secure.protocol": "ckks"}, ({}, MODELLED), why=SAME_BITS
  ),
  "server.aggregator": Case("middle", "program"),
  "server.transforms": Case("halved", "program"),
  "server.optimizer": Case("adam", "program"),
  "server.learning_rate": Case(0.5, "weights"),
  "server.momentum": Case(0.5, "program", {"server.optimizer": "momentum"}, ({},)),
  "server.weighting": Case("uniform", "weights", without=(ONE,)),
  "server.participation": Case("poisson", "program", besides={"server.participation_rate": 0.5}),
  "server.participation_rate": Case(0.5, "traced", {"server.participation": "poisson"}, ({},)),
  "server.proximal_weight": Case(0.5, "weights"),
  "server.personal_layers": Case(
    "hidden1", "program", {**MLP, "server.algorithm": "fedper"}, ({}, {"server.algorithm": "ditto"})
  ),
  "server.personal_weight": Case(1.0, "traced", {"server.algorithm": "ditto"}, ({},)),
  "server.ema_decay": Case(0.9, "program"),
  "privacy.mechanism": Case("dp_sgd", "plan", besides={SIGMA: 1.0}),
  "privacy.unit": Case("patient", "plan", PRIVATE, ({},)),
  "privacy.rows_per_unit": Case(1, "plan", PATIENTS, ({}, PRIVATE)),
  "privacy.augmentation_multiplicity": Case(
    2, "program", {**PRIVATE, "client.augmentation": "flip"}, ({"client.augmentation": "flip"},)
  ),
  SIGMA: Case(2.0, "plan", PRIVATE, ({},)),
  "privacy.target_epsilon": Case(4.0, "plan", TARGET, ({},)),
  "privacy.solve_for": Case(
    "rounds", "plan", {**PRIVATE, **TARGET, "server.num_rounds": 10}, ({},)
  ),
  "privacy.same_noise": Case(True, "plan", TARGET, ({}, PRIVATE, SOLVED)),
  "privacy.noise_stddev": Case(1.0, "plan", SOLVED, ({}, PRIVATE)),
  "privacy.clip_norm": Case(0.1, "plan", PRIVATE, ({}, SOLVED)),
  "privacy.delta": Case(1e-3, "plan", PRIVATE, ({},)),
  "privacy.batch_cap": Case(15, "plan", PRIVATE, ({},)),
  "privacy.bands": Case(2, "plan", PRIVATE, ({},)),
  "privacy.clipping": Case("reference", "layout", PRIVATE, ({},), why=LAYOUT),
  "privacy.adjacency": Case("zero_out", "nothing", PRIVATE, ({},), why=ONE_VALUE),
  "privacy.sampling": Case("poisson", "nothing", PRIVATE, ({},), why=ONE_VALUE),
  "client_privacy.mechanism": Case("dp_fedavg", "plan", besides=CENTRAL),
  "client_privacy.noise": Case(
    "distributed", "plan", {**CENTRAL, "secure.protocol": "masking"}, ({},)
  ),
  "client_privacy.colluders": Case(0, "plan", SHARED, ({}, CENTRAL)),
  "client_privacy.noise_multiplier": Case(2.0, "plan", CENTRAL, ({},)),
  "client_privacy.target_epsilon": Case(
    4.0, "plan", {**UNIFORM, "client_privacy.target_epsilon": 8.0}, ({},)
  ),
  "client_privacy.clip_norm": Case(0.1, "plan", CENTRAL, ({},)),
  "client_privacy.delta": Case(0.01, "plan", CENTRAL, ({},)),
  "client_privacy.clipping": Case("adaptive", "plan", CENTRAL, ({},)),
  "client_privacy.quantile": Case(0.3, "traced", ADAPTIVE, ({}, CENTRAL)),
  "client_privacy.clip_learning_rate": Case(0.5, "traced", ADAPTIVE, ({}, CENTRAL)),
  "client_privacy.count_noise": Case(4.0, "plan", ADAPTIVE, ({}, CENTRAL)),
  "secure.protocol": Case("grid", "program"),
  "secure.range": Case(1.0, "program", GRID, ({}, SHARED)),
  "secure.extra_range": Case(
    16.0,
    "program",
    {**GRID, "server.algorithm": "scaffold"},
    ({}, GRID),
  ),
  "secure.scale": Case(1024.0, "program", GRID, ({},)),
  "secure.bits": Case(16, "program", GRID, ({},)),
  "secure.masks": Case(
    "executed", "masked", MASKED, ({}, GRID), why="masks cancel: results are equal bit for bit"
  ),
  "secure.dropout": Case(0.5, "program", MASKED, ({},)),
  "secure.threshold": Case(3, "program", {**MASKED, "secure.dropout": 0.3}, ({}, MASKED)),
  "cost.uplink_mbps": Case("20", "deployment", LINKED),
  "cost.downlink_mbps": Case("20", "deployment", LINKED, ({},)),
  "cost.latency_ms": Case(100.0, "deployment", LINKED, ({},)),
  "cost.client_speed": Case("2", "deployment", LINKED, ({},)),
  "cost.step_seconds": Case(0.7, "deployment", LINKED, ({},)),
  "cost.price_gb": Case(0.1, "deployment", LINKED, ({},)),
  "cost.deadline_s": Case(1.5, "program", {**LINKED, "cost.client_speed": "1,1,0.5"}, ({},)),
  "compression.kind": Case("int", "program"),
  "compression.bits": Case(4, "program", {"compression.kind": "int"}, ({},)),
  "compression.share": Case(0.1, "program", TOPK, ({},)),
  "compression.value_bits": Case(32, "program", {**TOPK, "compression.share": 0.1}, ({},)),
  "compression.rows": Case(3, "program", SKETCH, ({}, TOPK)),
  "compression.columns": Case(12, "program", SKETCH, ({}, TOPK)),
  "compression.error_feedback": Case("ef", "program", TOPK, ({},)),
  "compression.download": Case("int", "program"),
  "robust.pre": Case("nnm", "program"),
  "robust.assumed_byzantine": Case(1, "program", TRIMMED, ({}, MEDIAN)),
  "robust.bucket_size": Case(3, "program", {"robust.pre": "bucketing"}, ({},)),
  "robust.max_norm": Case(1e-3, "program", {"robust.pre": "clipping"}, ({},)),
  "robust.weiszfeld": Case("byzfl", "program", MEDIAN, ({},)),
  "robust.smoothing": Case(0.5, "program", MEDIAN, ({},)),
  "robust.weiszfeld_steps": Case(4, "program", MEDIAN, ({},)),
  "robust.radius": Case(0.1, "program", {"server.aggregator": "centered_clipping"}, ({},)),
  "attack.kind": Case("ipm", "program"),
  "attack.hospitals": Case("hospital 2", "hostile", ATTACK, ({},)),
  "attack.number": Case(2, "hostile", ATTACK, ({}, {**ATTACK, "attack.hospitals": "hospital 1"})),
  "attack.share": Case(
    0.25, "holders", {"attack.kind": "backdoor"}, ({}, {"attack.kind": "label_flip"})
  ),
  "attack.strength": Case(3.0, "traced", ATTACK, ({}, {"attack.kind": "mimic"})),
  "execution.layout": Case("vmap", "layout", why=LAYOUT),
  "execution.chunk_size": Case(
    2, "layout", {"execution.layout": "chunk", "execution.chunk_size": 1}, ({},), why=LAYOUT
  ),
  "execution.devices": Case(2, "layout", why=LAYOUT),
  "execution.lowering": Case("native", "layout", why=LAYOUT),
  "execution.microbatch": Case(4, "layout", why=LAYOUT),
  "execution.memory_gib": Case(2.0, "layout", why=LAYOUT),
  "execution.remat": Case("blocks", "layout", {"model.name": "se_resnext_micro"}, why=LAYOUT),
  "execution.probe": Case("on", "probe", {}, ({"execution.layout": "scan"},), why=LAYOUT),
  "execution.compilation_cache": Case(f"{FILES}2", "compiled", why="where programs are kept"),
  "eval.every": Case(2, "log_points"),
  "eval.batch_size": Case(
    16, "prediction", why="images of a forward pass: the shape of a program and nothing else"
  ),
  "eval.local_baselines": Case(True, "runs"),
  "eval.tracker": Case("tensorboard", "tracked"),
}
