"""The rules that a configuration obeys, as far as they need no data."""

import re

from fedjax_med.core.config import Config, declared, get_field
from fedjax_med.core.errors import UserError, require, require_choice
from fedjax_med.core.fields import Bounds
from fedjax_med.core.source_facts import AUGMENTATIONS, SOURCE_FACTS
from fedjax_med.core.unread import require_read

MIN_TARGET = 1e-6  # ε

# Values that people ask for and that ε would not hold with: why, and what to do instead.
REFUSED = {
  ("data.split", "drug"): (
    "a drug that nobody trained on has no output, since no network here reads what a drug is",
    "use data.split=grouped, which holds out cell lines",
  ),
  ("privacy.unit", "client"): (
    "whole hospitals are protected by the server's noise, not by that of local steps",
    "set --config.client_privacy.mechanism=dp_fedavg",
  ),
  ("privacy.adjacency", "add_remove"): (
    "the sampling probability batch_size/n and the denominator q·n make the number of records n"
    " public, and adding or removing a record would change them",
    "use privacy.adjacency=zero_out, which replaces a record by nothing",
  ),
  ("privacy.adjacency", "replace_one"): (
    "replacing a record by another one has twice the sensitivity that the noise is made for",
    "use privacy.adjacency=zero_out, and twice the noise for the same ε",
  ),
  ("privacy.sampling", "shuffle"): (
    "no ε is known for batches of a shuffled epoch that comes near that of Poisson sampling",
    "use privacy.sampling=poisson, or privacy.mechanism=none, which shuffles",
  ),
  ("privacy.sampling", "class_balanced"): (
    "the probability of a record would depend on the labels of the others",
    "use privacy.sampling=poisson",
  ),
}


def validate(config: Config) -> None:
  """Checks every rule that needs no data; raises UserError with value, rule and remedy."""
  require_choice("data.source", config.data.source, SOURCE_FACTS)
  _refuse(config)
  for path, field in declared().items():
    value = get_field(config, path)
    if field.choices:
      require_choice(path, value, field.choices)
    if field.bounds is not None:
      _require_inside(path, value, field.bounds)

  for path in ("privacy.target_epsilon", "client_privacy.target_epsilon"):
    target = get_field(config, path)
    require(
      target == 0 or target >= MIN_TARGET,
      f"{path}={target:g} is under {MIN_TARGET:g}, below what can be computed",
      "use 0.1 or more, or 0 for none",
    )

  parse_fold(config.data.fold)
  data, partition = config.data, config.partition
  require(
    not SOURCE_FACTS[data.source].reads_files or data.path != "",
    f"data.source='{data.source}' needs data.path, which is empty",
    "point --config.data.path at the folder that holds the class folders"
    if SOURCE_FACTS[data.source].modality == "pictures"
    else "point --config.data.path at the table, or at the folder that holds the tables"
    if SOURCE_FACTS[data.source].modality == "table"
    else "point --config.data.path at the folder of the recordings, or at the manifest",
  )
  _validate_augmentation(config)
  require(
    partition.scheme == "site" or partition.num_clients >= 1,
    f"partition.num_clients={partition.num_clients} is under 1",
    "use at least two hospitals, or 1 for training on pooled data",
  )
  _validate_split(config)
  _validate_scaling(config)
  _validate_central(config)
  _validate_layers(config)
  layout, chunk = config.execution.layout, config.execution.chunk_size
  require(
    layout != "chunk" or chunk > 0,
    f"execution.layout='chunk' with execution.chunk_size={chunk} says not how many at once",
    "set --config.execution.chunk_size=4, or use layout=auto",
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
  require(
    model.pretrained == "" or model.width == 1,
    f"model.width={model.width:g} with model.pretrained='{model.pretrained}', whose weights have"
    " the published width",
    "use model.width=1, or leave model.pretrained empty",
  )
  value_bits = config.compression.value_bits
  require(
    value_bits in (16, 32),
    f"compression.value_bits={value_bits} is the width of no floating-point number here",
    "use 16 or 32",
  )
  _validate_synthetic(config)
  _validate_privacy(config)
  _validate_client_privacy(config)
  require_read(config)


def parse_fold(text: str) -> tuple[int, int]:
  """(K, F) of ``data.fold``, (0, 0) if it is empty; UserError unless it is K/F with 1 ≤ K ≤ F."""
  found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
  part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
  require(
    text == "" or (parts >= 2 and 1 <= part <= parts),
    f"data.fold='{text}' is not K/F, part K of F from 1/F to F/F",
    "use 1/5 to 5/5 for five-fold cross-validation, or leave it empty",
  )
  return part, parts


def _require_inside(path: str, value: float, bounds: Bounds) -> None:
  """Raises UserError for a number outside its range, and for one that is not finite."""
  low, high = bounds.low, bounds.high
  inside = (value >= low if bounds.low_allowed else value > low) and value <= high
  rule = f"{'at least' if bounds.low_allowed else 'above'} {low:g}"
  rule += " and finite" if high == float("inf") else f" and at most {high:g}"
  require(inside and value != float("inf"), f"{path}={value} must be {rule}", bounds.remedy)


def _refuse(config: Config) -> None:
  for (path, value), (why, remedy) in REFUSED.items():
    require(get_field(config, path) != value, f"{path}='{value}' is refused: {why}", remedy)


def _validate_scaling(config: Config) -> None:
  scaling, mechanism = config.data.scaling, config.privacy.mechanism
  require(
    scaling != "hospital" or mechanism == "none",
    f"data.scaling='hospital' with privacy.mechanism='{mechanism}': every input of a hospital"
    " follows from all of its records, so that clipping the gradient of one does not bound its"
    " influence",
    "use data.scaling=ranges",
  )


def _validate_split(config: Config) -> None:
  data, splits = config.data, SOURCE_FACTS[config.data.source].splits
  require(
    data.split in splits,
    f"data.split='{data.split}' is no split of data.source='{data.source}'",
    f"use data.split={' or '.join(splits)}",
  )
  require(
    data.split != "tissue" or config.partition.scheme not in ("site", "auto"),
    f"data.split='tissue' with partition.scheme='{config.partition.scheme}' holds out whole"
    " primary sites, which as hospitals would have no training record",
    "use partition.scheme=iid, which deals the other lines to partition.num_clients hospitals",
  )


def _validate_augmentation(config: Config) -> None:
  """Refuses changes of examples that those of the source cannot have, or that do nothing."""
  data, asked = config.data, config.client.augmentation
  kinds = AUGMENTATIONS.get(SOURCE_FACTS[data.source].modality, ())
  require(
    asked in kinds or not kinds,  # ``require_read`` refuses it where nothing can be changed
    f"client.augmentation='{asked}' is none of data.source='{data.source}'",
    f"choose one of {', '.join(kinds)}",
  )
  require(
    "scale" not in asked or data.ranges != "",
    f"client.augmentation='{asked}' with data.ranges='': each window is scaled by its own"
    " deviation, which takes the factor off again",
    "declare data.ranges, or use jitter or time_shift",
  )


def _validate_central(config: Config) -> None:
  """Refuses privacy and baselines with one hospital, which has nobody to hide images from."""
  if config.partition.num_clients != 1 or config.partition.scheme == "site":
    return
  private = [
    name for name in ("privacy", "client_privacy") if getattr(config, name).mechanism != "none"
  ]
  require(
    not private,
    f"partition.num_clients=1 with {' and '.join(private)}.mechanism: training on pooled data shows"
    " them to whoever pools them",
    "use at least two hospitals, or no privacy",
  )
  require(
    not config.eval.local_baselines,
    "partition.num_clients=1 with eval.local_baselines: the hospital alone and the pooled data are"
    " this run itself",
    "use at least two hospitals, or leave out the baselines",
  )


def _validate_layers(config: Config) -> None:
  server = config.server
  try:
    re.compile(server.personal_layers)
  except re.error as error:
    raise UserError(
      f"server.personal_layers='{server.personal_layers}' is no regular expression: {error};"
      " name a layer, such as head"
    ) from None


def _validate_synthetic(config: Config) -> None:
  for path in ("privacy.mechanism", "client_privacy.mechanism"):
    mechanism = get_field(config, path)
    require(
      config.client.synthetic == "none" or mechanism == "none",
      f"client.synthetic='{config.client.synthetic}' with {path}='{mechanism}': GANs read the"
      " images without noise, and what they make is seen, which ε would not count",
      f"use client.synthetic=none, or {path}=none",
    )


def _validate_privacy(config: Config) -> None:
  privacy = config.privacy
  copies = privacy.augmentation_multiplicity
  if privacy.mechanism == "none":
    return
  require(
    privacy.noise_multiplier > 0 or privacy.target_epsilon > 0,
    "privacy.mechanism='dp_sgd' has neither privacy.noise_multiplier nor privacy.target_epsilon",
    "set one of them above 0",
  )
  _validate_solve_for(config)
  require(
    privacy.bands == 1 or privacy.solve_for not in ("rounds", "batch_size"),
    f"privacy.bands={privacy.bands} is made for a number of rounds and a batch size, which"
    f" privacy.solve_for='{privacy.solve_for}' leaves open",
    "use privacy.bands=1, or give them and use privacy.solve_for=noise",
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
  require(
    privacy.unit == "record" or config.data.split == "grouped",
    f"privacy.unit='{privacy.unit}' with data.split='{config.data.split}' would leave the images of"
    f" one {privacy.unit} in several hospitals",
    "use data.split=grouped, which keeps patients and near-duplicates together",
  )
  require(
    copies == 1 or config.client.augmentation != "none",
    f"privacy.augmentation_multiplicity={copies} with client.augmentation='none' would take the"
    " same image several times",
    "set --config.client.augmentation=flip_shift, or leave it at 1",
  )


def _validate_solve_for(config: Config) -> None:
  privacy = config.privacy
  solve, sigma, stddev = privacy.solve_for, privacy.noise_multiplier, privacy.noise_stddev
  given = {
    "noise": True,
    "rounds": sigma > 0 and privacy.target_epsilon > 0,
    "batch_size": sigma > 0 and privacy.target_epsilon > 0,
    "clip_norm": sigma == 0 and stddev > 0 and privacy.target_epsilon > 0,
  }
  require(
    given[solve],
    f"privacy.solve_for='{solve}' does not go with privacy.noise_multiplier={sigma:g},"
    f" privacy.noise_stddev={stddev:g} and privacy.target_epsilon={privacy.target_epsilon:g}",
    "rounds and batch_size take a noise_multiplier and a target_epsilon; clip_norm takes a"
    " noise_stddev and a target_epsilon",
  )


def _validate_client_privacy(config: Config) -> None:
  client = config.client_privacy
  if client.mechanism == "none":
    return
  require(
    client.noise_multiplier > 0 or client.target_epsilon > 0,
    "client_privacy.mechanism='dp_fedavg' has neither client_privacy.noise_multiplier nor"
    " client_privacy.target_epsilon",
    "set one of them above 0",
  )
  require(
    config.server.weighting == "uniform",
    f"server.weighting='{config.server.weighting}' with client-level privacy would let a large"
    " hospital move the sum by more than the clip norm",
    "use server.weighting=uniform with client_privacy.mechanism=dp_fedavg",
  )
  require(
    config.model.norm != "batch",
    "model.norm='batch' sends statistics of a hospital's images, which are neither clipped nor"
    " noised",
    "use model.norm=group or model.norm=frozen_batch with client_privacy.mechanism=dp_fedavg",
  )
