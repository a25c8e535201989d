"""Declarations of the fields of data, partition, network, local training and server."""

import dataclasses

from fedjax_med.core import conditions as when
from fedjax_med.core.fields import above, field, least, never
from fedjax_med.core.source_facts import AUGMENTATIONS


@dataclasses.dataclass
class DataConfig:
  """Choice of the examples, and their split into train and test."""

  source: str = field(
    "phantoms",
    doc=(
      "phantoms (embedded), folder (a folder of class folders), manifest (a table that lists"
      " pictures with their labels), npz (arrays in MedMNIST's layout), br35h or sars_cov2_ct"
      " (tensorflow-datasets builders; path is the folder with the downloaded class folders),"
      " table (CSV or Parquet, with data.columns), heart_disease (UCI's four files), gdsc (drug"
      " response of cell lines), lung (lung.csv of lifelines, survival), series (recordings of"
      " people, a folder or a manifest), or a source that the preset registers."
    ),
  )
  # Where files lie and how they are read changes a run by its images and labels only, which are
  # part of the run id.
  path: str = field(
    "",
    doc="folder of the files that the source reads; of source=manifest or npz the file itself, of"
    " source=table one table or a folder of them, of source=series a folder or a manifest.",
    read=(when.FILES,),
    shapes_run=never,
  )
  cache_dir: str = field(
    "~/.cache/fedjax_med/tfds",
    doc="where prepared tensorflow-datasets are kept.",
    read=(when.BUILDERS,),
    shapes_run=never,
  )
  image_size: int = field(
    192,
    doc="side of the square images, pixels.",
    bounds=least(8, 4096, remedy="use 64 to 224; the paper uses 192"),
    read=(when.IMAGES,),
  )
  min_size: int = field(
    32,
    doc="images with a side under this many pixels are left out and counted.",
    bounds=least(1, 4096, remedy="use 32"),
    read=(when.FILES, when.IMAGES),
  )
  layout: str = field(
    "auto",
    doc=(
      "of source=folder, where names of folders and files say what: a pattern of {class},"
      " {site}, {patient} and {split} (its test part is then the test set), such as"
      " '{site}/{class}/{patient}_*'; * is any text, ** any number of folders. auto takes the"
      " first level of folders as the classes, and refuses folders that do not look like it."
    ),
    traced=True,
    read=(when.FOLDER,),
    shapes_run=never,
  )
  positive: str = field(
    "",
    doc=(
      "name of the positive class, of two; empty takes the one whose name does not sound"
      " negative (normal, healthy, control, benign, no_...), if the names say it."
    ),
    traced=True,
    read=(when.FILES, when.CLASSES),
    shapes_run=never,
  )
  window: str = field(
    "",
    doc=(
      "LOW,HIGH, the grey values that become black and white in all files; empty keeps"
      " pictures of 8 bits as they are and takes the number of bits of deeper ones from the"
      " largest value."
    ),
    traced=True,
    read=(when.FILES, when.IMAGES),
    shapes_run=never,
  )
  strict: bool = field(
    False,
    doc="stop if any file is left out, instead of naming and counting it (tables: docs/data.md).",
    read=(when.FILES,),
    shapes_run=never,
  )
  split: str = field(
    "grouped",
    doc=(
      "grouped (near-duplicates and patients stay on one side, in one hospital) or paper"
      " (random; of heart_disease FLamby's rows and split). With {split} in data.layout the sides"
      " are given. Of series recording (recordings stay on one side, people on both). Of gdsc"
      " grouped (whole cell lines), tissue (whole primary sites) or pairs (of line and drug at"
      " random, which leaks)."
    ),
    choices=("grouped", "paper", "recording", "tissue", "pairs"),
    traced=True,
    read=(when.DRAWN_SIDES, when.UNNAMED),
  )
  test_fraction: float = field(
    0.2,
    doc="share of examples held out, 0 to 1.",
    bounds=above(0, 0.9, remedy="use 0.2"),
    traced=True,
    read=(when.DRAWN_SIDES, when.OPEN_SIDES, when.UNNAMED, when.NO_FOLD),
  )
  fold: str = field(
    "",
    doc=(
      "K/F holds out the K-th of F parts: a grid over 1/5 to 5/5 is five-fold cross-validation,"
      " each example tested once. Empty holds out data.test_fraction."
    ),
    traced=True,
    read=(when.DRAWN_SIDES, when.OPEN_SIDES, when.UNNAMED, when.DEALT),
  )
  patient_pattern: str = field(
    "",
    doc=(
      "regular expression that is searched in each file name (without folders); its first"
      " group is the patient."
    ),
    traced=True,
    read=(when.FILES, when.IMAGES, when.OPEN_PATIENTS),
  )
  normalisation: str = field(
    "image",
    doc=(
      "image (each image to mean 0 and standard deviation 1, a function of that image alone)"
      " or fixed (black is -1, white is 1)."
    ),
    choices=("image", "fixed"),
    read=(when.IMAGES,),
  )
  columns: str = field(
    "",
    doc="TOML file that says what the columns of source=table are (docs/data.md).",
    read=(when.OWN_TABLE,),
    shapes_run=never,
  )
  scaling: str = field(
    "ranges",
    doc=(
      "of numbers of a table: ranges (those of data.columns become -1 to 1), federated (mean and"
      " deviation by sums of all hospitals' training records, which no ε counts) or hospital"
      " (each by its own: as a warning, scores fall)."
    ),
    choices=("ranges", "federated", "hospital"),
    traced=True,
    read=(when.TABLES,),
    shapes_run=never,
  )
  num_examples: int = field(
    4000,
    doc="phantoms made in all (divided over the five scanners).",
    bounds=least(50, 10_000_000, remedy="use 4000"),
    read=(when.PHANTOMS,),
  )
  seed: int = field(
    0,
    doc="seed of phantoms, split and partition.",
    bounds=least(0, 2**31 - 1, remedy="use 0"),
    traced=True,
    read=(when.DRAWN,),
  )
  # Fields of a manifest come last. What they change are images, labels and who holds them.
  path_column: str = field(
    "path",
    doc="of source=manifest or series, column of the paths of the files, relative to the manifest.",
    traced=True,
    read=(when.LISTED,),
    shapes_run=never,
  )
  label_column: str = field(
    "label",
    doc="of source=manifest or series, column of the classes.",
    traced=True,
    read=(when.LISTED,),
    shapes_run=never,
  )
  patient_column: str = field(
    "patient",
    doc="of source=manifest or series, column of the patients, if it has one.",
    traced=True,
    read=(when.LISTED,),
    shapes_run=never,
  )
  site_column: str = field(
    "site",
    doc="of source=manifest or series, column of the hospitals or scanners, if it has one.",
    traced=True,
    read=(when.LISTED,),
    shapes_run=never,
  )
  split_column: str = field(
    "split",
    doc="of source=manifest or series, column of the sides, train or test, if it has one.",
    traced=True,
    read=(when.LISTED,),
    shapes_run=never,
  )
  target_columns: str = field(
    "",
    doc=(
      "of source=manifest, columns that are predicted in place of the label, with commas between"
      " them: several of 1 and 0 are labels (an image may have none or more), others numbers."
      " Empty cells are unknown."
    ),
    traced=True,
    read=(when.MANIFEST,),
    shapes_run=never,
  )
  group_columns: str = field(
    "",
    doc=(
      "of source=manifest or series, further columns, with commas between them: rows of equal"
      " values stay on one side, in one hospital."
    ),
    traced=True,
    read=(when.LISTED,),
    shapes_run=never,
  )
  given_split: bool = field(
    True,
    doc="keep the train and test sides that the data give; False splits anew.",
    traced=True,
    read=(when.GIVES_SIDES,),
    shapes_run=never,
  )
  slices: str = field(
    "middle",
    doc=(
      "of source=manifest, what is read of DICOM files of several frames and of NIfTI volumes:"
      " the middle slice, all, or numbers from 0 such as 10,20. Slices of a file stay together."
    ),
    traced=True,
    read=(when.MANIFEST,),
    shapes_run=never,
  )
  volume: int = field(
    -1,
    doc="of source=manifest, number of the volume that is read of 4-D NIfTI files; -1 is none.",
    bounds=least(-1, 100_000, remedy="use 0 for the first volume"),
    traced=True,
    read=(when.MANIFEST,),
    shapes_run=never,
  )
  channels: str = field(
    "auto",
    doc=(
      "1 (grey) or 3 (red, green, blue) for all pictures, whatever channels their files have; auto"
      " is 1 for folders, and 3 for a manifest or .npz all of whose pictures have colours."
    ),
    choices=("auto", "1", "3"),
    read=(when.HAS_COLOURS,),
    shapes_run=never,
  )
  # Fields of a series. Windows and their sides follow from all of them but the ranges.
  rate: float = field(
    50.0,
    doc="samples a second of a series, as the network sees it.",
    bounds=above(0, 1e6, remedy="use 20 to 100 for movements"),
    traced=True,
    read=(when.SERIES,),
    shapes_run=never,
  )
  recorded_rate: float = field(
    0.0,
    doc="samples a second of the files of a series, resampled to data.rate; 0 is data.rate.",
    bounds=least(0, 1e6, remedy="use 0 if files have data.rate"),
    traced=True,
    read=(when.SERIES,),
    shapes_run=never,
  )
  time_column: str = field(
    "",
    doc="column of the files of a series with the time of each sample in seconds; empty without.",
    traced=True,
    read=(when.SERIES,),
    shapes_run=never,
  )
  signals: str = field(
    "",
    doc="columns of the files of a series that are channels, with commas between them; empty is"
    " all but the time.",
    traced=True,
    read=(when.SERIES,),
    shapes_run=never,
  )
  window_seconds: float = field(
    4.0,
    doc="length of the windows that a series is cut into.",
    bounds=above(0, 1e6, remedy="use 2 to 10 for movements"),
    traced=True,
    read=(when.SERIES,),
    shapes_run=never,
  )
  hop_seconds: float = field(
    2.0,
    doc="from the start of a window of a series to the start of the next one.",
    bounds=above(0, 1e6, remedy="use half of data.window_seconds"),
    traced=True,
    read=(when.SERIES,),
    shapes_run=never,
  )
  ranges: str = field(
    "",
    doc="LOW,HIGH of the channels of a series, or one such pair for each with semicolons between,"
    " which become -1 to 1; empty gives each channel of each window mean 0 and deviation 1.",
    read=(when.SERIES,),
  )
  test_persons: str = field(
    "",
    doc="people of a series who are the test set, with + between their names; empty draws them.",
    traced=True,
    read=(when.SERIES,),
    shapes_run=never,
  )
  # What survival is learnt by changes the targets, which are part of the run id.
  survival: str = field(
    "cox",
    doc=(
      "of a table whose manifest names time and event: cox (partial likelihood over a hospital's"
      " batch) or hazards (of intervals of time, the one for DP-SGD)."
    ),
    choices=("cox", "hazards"),
    read=(when.TIMES,),
    shapes_run=never,
  )
  intervals: int = field(
    10,
    doc="intervals of time under survival=hazards, each with an output of the network.",
    bounds=least(2, 1000, remedy="use 5 to 20"),
    read=(when.TIMES, when.HAZARDS),
    shapes_run=never,
  )
  interval_bounds: str = field(
    "equal",
    doc=(
      "equal (widths up to the horizon of the manifest) or quantiles (of the events of all"
      " hospitals' training records, which no ε counts)."
    ),
    choices=("equal", "quantiles"),
    read=(when.TIMES, when.HAZARDS),
    shapes_run=never,
  )


@dataclasses.dataclass
class PartitionConfig:
  """Distribution of the examples over the hospitals."""

  scheme: str = field(
    "dirichlet",
    doc=(
      "iid, dirichlet (label skew), quantity (size skew), shards (k classes a client), site;"
      " auto is site where the data say where each image comes from, else dirichlet."
    ),
    choices=("auto", "iid", "dirichlet", "quantity", "shards", "site"),
    traced=True,
  )
  num_clients: int = field(
    5,
    doc=(
      "hospitals K, 1 for training on pooled data; with scheme=site the sites decide and this"
      " must be 0 or their number."
    ),
    bounds=least(0, 100_000, remedy="use 5"),
    traced=True,  # the number of hospitals itself is among the shapes of a program
  )
  alpha: float = field(
    0.5,
    doc="Dirichlet concentration of dirichlet and quantity; small is skewed.",
    bounds=above(0, remedy="0.1 is strong skew, 100 is nearly IID"),
    traced=True,
    read=(when.SHARES, when.SEVERAL),
  )
  classes_per_client: int = field(
    1,
    doc="classes a client holds under shards.",
    bounds=least(1, 100_000, remedy="use 1 or more"),
    traced=True,
    read=(when.SHARDS,),
  )
  min_client_size: int = field(
    8,
    doc="training examples every client has at least.",
    bounds=least(1, 10_000_000, remedy="use 8"),
    traced=True,
  )


@dataclasses.dataclass
class ModelConfig:
  """The network."""

  name: str = field("se_resnext50_32x4d", doc="a name of the model registry.")
  norm: str = field(
    "group",
    doc="group, batch (refused with privacy) or frozen_batch.",
    choices=("group", "batch", "frozen_batch"),
  )
  dropout: float = field(
    0.0, doc="rate before the head.", bounds=least(0, 0.95, remedy="use 0 to 0.5")
  )
  width: float = field(
    1.0,
    doc=(
      "multiplier of every layer's channels, each rounded to a multiple of 8 and at least 8"
      " (grouped convolutions keep their number of groups)."
    ),
    bounds=above(0, 16, remedy="use 1 for the published network, 0.25 for a small computer"),
  )
  hidden: int = field(
    32,
    doc="size of the hidden layer.",
    bounds=least(1, 65_536, remedy="use 32"),
    read=(when.MLP,),
  )
  dtype: str = field(
    "float32",
    doc="float32 or bfloat16 for activations; weights, norms and noise stay float32.",
    choices=("float32", "bfloat16"),
  )
  pretrained: str = field(
    "",
    doc=(
      ".safetensors file with a PyTorch state dict (pretrainedmodels or timm) that initial"
      " weights and statistics are taken from; empty is none. Needs norm=frozen_batch."
    ),
    shapes_run=never,  # its content is part of the run id, not its name
  )
  init_seed: int = field(
    -1,
    doc="seed of the initial weights; -1 takes that of the run.",
    bounds=least(-1, 2**31 - 1, remedy="use -1 for the seed of the run"),
    traced=True,
  )


@dataclasses.dataclass
class ClientConfig:
  """Local training at a hospital."""

  optimizer: str = field(
    "sgd", doc="sgd, momentum, adam or adamw (optax).", choices=("sgd", "momentum", "adam", "adamw")
  )
  learning_rate: float = field(
    0.05,
    doc="peak local learning rate.",
    bounds=above(0, remedy="use 0.01 to 0.1 with sgd"),
    traced=True,
  )
  schedule: str = field(
    "constant",
    doc="constant, cosine or linear over all rounds, after warmup_rounds.",
    choices=("constant", "cosine", "linear"),
  )
  warmup_rounds: int = field(
    0, doc="rounds of linear warm-up.", bounds=least(0, 1_000_000, remedy="use 0")
  )
  momentum: float = field(
    0.9,
    doc="of optimizer=momentum.",
    bounds=least(0, 0.9999, remedy="use 0.9"),
    read=(when.MOMENTUM,),
  )
  weight_decay: float = field(
    0.0, doc="of optimizer=adamw.", bounds=least(0, 10, remedy="use 0"), read=(when.ADAMW,)
  )
  batch_size: int = field(
    32,
    doc="examples a local step; with privacy the expected size q·n of the Poisson draw.",
    bounds=least(1, 1_000_000, remedy="use 32"),
    read=(when.GIVEN_BATCH_SIZE,),
  )
  num_local_steps: int = field(
    0,
    doc="local steps a round; 0 means num_local_epochs decides.",
    bounds=least(0, 1_000_000, remedy="use 0 to let num_local_epochs decide"),
  )
  num_local_epochs: float = field(
    1.0,
    doc="passes over the hospital's data a round.",
    bounds=above(0, 10_000, remedy="use 1"),
    traced=True,
    read=(when.EPOCHS,),
  )
  label_smoothing: float = field(
    0.0, doc="0 to 1.", bounds=least(0, 0.9, remedy="use 0"), read=(when.CLASSES,)
  )
  augmentation: str = field(
    "none",
    doc=(
      "none, flip (left to right), shift (by up to an eighth of the side) or flip_shift,"
      " drawn anew for every image and step; of windows of a series jitter (noise of 5% of a"
      " channel's deviation), scale (a factor of each channel, deviation 0.1; with data.ranges),"
      " time_shift (by up to an eighth) or jitter_scale_shift."
    ),
    choices=tuple(dict.fromkeys(kind for kinds in AUGMENTATIONS.values() for kind in kinds)),
    read=(when.VARIED,),
  )
  synthetic: str = field(
    "none",
    doc=(
      "none, or gan: each hospital trains a GAN on its training images before the first"
      " round, and adds what it makes to them. Refused with privacy (docs/algorithms.md)."
    ),
    choices=("none", "gan"),
    traced=True,  # more images, and pools are filled up to the largest
    read=(when.IMAGES,),
    shapes_run=when.GAN.holds,
  )
  synthetic_share: float = field(
    0.5,
    doc="synthetic training images for each real one under synthetic=gan.",
    bounds=above(0, 100, remedy="use 0.5, or client.synthetic=none for none"),
    traced=True,
    read=(when.GAN,),
    shapes_run=when.GAN.holds,
  )
  gan_steps: int = field(
    500,
    doc="training steps of each hospital's GAN.",
    bounds=least(1, 10_000_000, remedy="use 500"),
    traced=True,
    read=(when.GAN,),
    shapes_run=when.GAN.holds,
  )


@dataclasses.dataclass
class ServerConfig:
  """The server's step along the clients' deltas."""

  algorithm: str = field(
    "fedavg",
    doc=(
      "fedavg, scaffold, fednova, performance, fedbn, fedper, finetune or ditto; FedProx is"
      " proximal_weight, FedAvgM, FedAdam and FedYogi are optimizer (docs/algorithms.md)."
    ),
  )
  num_rounds: int = field(
    10,
    doc="communication rounds.",
    bounds=least(1, 10_000_000, remedy="use 10"),
    read=(when.GIVEN_ROUNDS,),
    shapes_run=when.rounds_shape_run,
  )
  aggregator: str = field(
    "mean",
    doc=(
      "how clients' updates become one: mean, or a robust rule, which ignores server.weighting:"
      " median, trimmed_mean, geometric_median (to be preferred, docs/exchange.md), krum,"
      " multi_krum, centered_clipping or meamed; or a registered aggregator (docs/extending.md)."
    ),
  )
  transforms: str = field(
    "",
    doc=(
      "registered transforms of an update on its way to the server, in the order in which a client"
      " applies them, with commas between; empty is none (docs/extending.md)."
    ),
  )
  optimizer: str = field(
    "sgd",
    doc="sgd (FedAvg), momentum (FedAvgM), adam (FedAdam) or yogi (FedYogi), from optax.",
    choices=("sgd", "momentum", "adam", "yogi"),
  )
  learning_rate: float = field(
    1.0,
    doc="server learning rate; 1 with sgd is plain FedAvg.",
    bounds=above(0, remedy="use 1 with sgd"),
    traced=True,
  )
  momentum: float = field(
    0.9,
    doc="of optimizer=momentum; β1 of adam and yogi.",
    bounds=least(0, 0.9999, remedy="use 0.9"),
    read=(when.SERVER_MOMENTUM,),
  )
  weighting: str = field(
    "examples",
    doc=("examples (real training images; patients or groups where they are the unit) or uniform."),
    choices=("examples", "uniform"),
    traced=True,
    read=(when.SEVERAL,),
  )
  participation: str = field("full", doc="full or poisson.", choices=("full", "poisson"))
  participation_rate: float = field(
    1.0,
    doc="probability that a client takes part in a round (poisson).",
    bounds=above(0, 1, remedy="use 1 for every client in every round"),
    traced=True,
    read=(when.COHORTS,),
  )
  proximal_weight: float = field(
    0.0,
    doc="FedProx μ; 0 turns the term off.",
    bounds=least(0, remedy="use 0 for plain FedAvg, 0.01 for FedProx"),
    traced=True,
  )
  personal_layers: str = field(
    "head",
    doc=(
      "layers that are each hospital's own under algorithm=fedper or finetune: a regular"
      " expression that their path begins with, such as head, or stage4_block1|head."
    ),
    read=(when.NAMES_LAYERS,),
  )
  personal_weight: float = field(
    0.1,
    doc="Ditto's λ, the pull of a hospital's own model to the global one.",
    bounds=least(0, remedy="use 0.1 to 1 for Ditto"),
    traced=True,
    read=(when.DITTO,),
  )
  ema_decay: float = field(
    0.0,
    doc="evaluate an exponential moving average over rounds with this decay; 0 is off.",
    bounds=least(0, 0.9999, remedy="use 0 or 0.9"),
    traced=True,
  )
