"""Conditions under which fields of a configuration are read, or are part of the run id."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedjax_med.core.fields import Condition, one_of
from fedjax_med.core.source_facts import (
  AUGMENTATIONS,
  DRAWN_SPLITS,
  SOURCE_FACTS,
  SourceFacts,
)

if TYPE_CHECKING:
  from fedjax_med.core.config import Config


def _facts(config: Config) -> SourceFacts:
  # ``validate`` refuses an unknown source; conditions are also asked before that.
  return SOURCE_FACTS.get(config.data.source, SourceFacts())


def _by_site(config: Config) -> bool:
  scheme, data = config.partition.scheme, config.data
  # 'auto' is 'site' where the data say where each image comes from, as phantoms do.
  known = _facts(config).has_sites or "{site}" in data.layout
  return scheme == "site" or (scheme == "auto" and known)


def _drawn_shares(config: Config) -> bool:
  drawn = config.partition.scheme in ("dirichlet", "quantity", "auto")
  return drawn and not _by_site(config)


def _several_hospitals(config: Config) -> bool:
  return config.partition.num_clients != 1 or config.partition.scheme == "site"


def _not_solved(result: str) -> Condition:
  def holds(config: Config) -> bool:
    privacy = config.privacy
    return privacy.mechanism == "none" or privacy.solve_for != result

  path = "privacy.solve_for"
  return Condition(
    wording=f"{path} other than {result}", holds=holds, fields=(path,), remedy="use another"
  )


def _without(part: str) -> Condition:
  return Condition(
    wording=f"a data.layout without {part}",
    holds=lambda config: part not in config.data.layout,
    fields=("data.layout",),
    remedy=f"use * in place of {part}",
  )


def _modality(name: str) -> Callable[[Config], bool]:
  return lambda config: _facts(config).modality == name


def _compresses(*kinds: str) -> Condition:
  """The condition that updates or the model are compressed by one of these kinds."""
  names = " or ".join(kinds)
  return Condition(
    wording=f"compression.kind or compression.download={names}",
    holds=lambda config: config.compression.kind in kinds or config.compression.download in kinds,
    fields=("compression.kind", "compression.download"),
    remedy="use one of those" if len(kinds) > 1 else f"use --config.compression.kind={names}",
  )


def _drawn_side(config: Config) -> bool:
  return not (_facts(config).own_split and config.data.split == "paper")


FILES = Condition(
  wording="a data.source that reads files",
  holds=lambda config: _facts(config).reads_files,
  fields=("data.source",),
  remedy="use --config.data.source=folder",
)
IMAGES = Condition(
  wording="a data.source of pictures",
  holds=_modality("pictures"),
  fields=("data.source",),
  remedy="use --config.data.source=folder",
)
TABLES = Condition(
  wording="a data.source of tables",
  holds=_modality("table"),
  fields=("data.source",),
  remedy="use --config.data.source=table",
)
CLASSES = Condition(
  wording="a data.source of classes",
  holds=lambda config: _facts(config).task == "classification",
  fields=("data.source",),
  remedy="use another source",
)
SERIES = Condition(
  wording="a data.source of series",
  holds=_modality("series"),
  fields=("data.source",),
  remedy="use --config.data.source=series",
)
VARIED = Condition(
  wording="a data.source of pictures or series",
  holds=lambda config: _facts(config).modality in AUGMENTATIONS,
  fields=("data.source",),
  remedy="use --config.data.source=folder",
)
OWN_TABLE = one_of("data.source", "table")
TIMES, HAZARDS = one_of("data.source", "table", "lung"), one_of("data.survival", "hazards")
OPEN_SIDES = Condition(
  wording="a split whose sides are not published with the data",
  holds=_drawn_side,
  fields=("data.source", "data.split"),
  remedy="use --config.data.split=grouped",
)
UNNAMED = Condition(
  wording="an empty data.test_persons",
  holds=lambda config: config.data.test_persons == "",
  fields=("data.test_persons",),
  remedy="use an empty data.test_persons",
)
FOLDER = one_of("data.source", "folder")
MANIFEST = one_of("data.source", "manifest")
LISTED = one_of("data.source", "manifest", "series")
GIVES_SIDES = one_of("data.source", "manifest", "npz", "series")
HAS_COLOURS = one_of("data.source", "folder", "manifest", "npz")
DEALT = one_of("data.split", *DRAWN_SPLITS)
NO_FOLD = Condition(
  wording="an empty data.fold",
  holds=lambda config: config.data.fold == "",
  fields=("data.fold",),
  remedy="use an empty data.fold",
)
DRAWN_SIDES, OPEN_PATIENTS = _without("{split}"), _without("{patient}")
DRAWN = Condition(
  wording="a split or a partition that is drawn",
  holds=lambda config: (
    ("{split}" not in config.data.layout and _drawn_side(config) and UNNAMED.holds(config))
    or not _by_site(config)
  ),
  fields=("data.layout", "data.split", "data.test_persons", "partition.scheme"),
  remedy="use * in place of {split}, data.split=grouped, no data.test_persons, or another"
  " partition.scheme",
)
PHANTOMS = one_of("data.source", "phantoms")
BUILDERS = one_of("data.source", "br35h", "sars_cov2_ct")
SHARES = Condition(
  wording="partition.scheme=dirichlet or quantity",
  holds=_drawn_shares,
  fields=("partition.scheme", "data.source", "data.layout"),
  remedy="use one of those",
)
SHARDS = one_of("partition.scheme", "shards")
SEVERAL = Condition(
  wording="several hospitals",
  holds=_several_hospitals,
  fields=("partition.num_clients",),
  remedy="use at least two",
)
MLP = one_of("model.name", "mlp")
MOMENTUM = one_of("client.optimizer", "momentum")
ADAMW = one_of("client.optimizer", "adamw")
EPOCHS = one_of("client.num_local_steps", 0)
GAN = one_of("client.synthetic", "gan")
SERVER_MOMENTUM = one_of("server.optimizer", "momentum", "adam", "yogi")
COHORTS = one_of("server.participation", "poisson")
NAMES_LAYERS = one_of("server.algorithm", "fedper", "finetune")
DITTO = one_of("server.algorithm", "ditto")
DP_SGD = one_of("privacy.mechanism", "dp_sgd")
PATIENTS = one_of("privacy.unit", "patient", "group")
CALIBRATED = one_of("privacy.noise_multiplier", 0)
FINDS_NOISE = one_of("privacy.solve_for", "noise")
FINDS_CLIP_NORM = one_of("privacy.solve_for", "clip_norm")
GIVEN_ROUNDS, GIVEN_BATCH_SIZE = _not_solved("rounds"), _not_solved("batch_size")
GIVEN_CLIP_NORM = _not_solved("clip_norm")
DP_FEDAVG = one_of("client_privacy.mechanism", "dp_fedavg")
SHARED_NOISE = one_of("client_privacy.noise", "distributed")
ADAPTIVE = one_of("client_privacy.clipping", "adaptive")
WHOLE_NUMBERS, SPARSE = _compresses("int"), _compresses("topk", "randk", "sketch")
TOPK, SKETCH = _compresses("topk"), one_of("compression.kind", "sketch")
COMPRESSED = one_of("compression.kind", "int", "sign", "topk", "randk", "sketch")
OWN_RANGE = Condition(
  wording="noise that hospitals do not add themselves, whose clip norm is the range",
  holds=lambda config: not (DP_FEDAVG.holds(config) and SHARED_NOISE.holds(config)),
  fields=("client_privacy.mechanism", "client_privacy.noise"),
  remedy="use client_privacy.noise=server",
)
ON_GRID = one_of("secure.protocol", "grid", "masking", "ckks")
LINKS = Condition(
  wording="links between hospitals and server",
  holds=lambda config: config.cost.uplink_mbps != "",
  fields=("cost.uplink_mbps",),
  remedy="use --config.cost.uplink_mbps=50",
)
DEADLINE = Condition(
  wording="a deadline of rounds",
  holds=lambda config: config.cost.deadline_s > 0 and config.cost.uplink_mbps != "",
  fields=("cost.deadline_s", "cost.uplink_mbps"),
  remedy="use --config.cost.deadline_s=600",
)
MASKING = one_of("secure.protocol", "masking")
MAY_MISS = Condition(
  wording="messages that may be missing (secure.dropout above 0, server.participation=poisson or"
  " cost.deadline_s)",
  holds=lambda config: (
    config.secure.dropout > 0 or config.server.participation == "poisson" or DEADLINE.holds(config)
  ),
  fields=("secure.dropout", "server.participation", "cost.deadline_s"),
  remedy="use secure.dropout=0.1",
)
# An algorithm that a user registers may send more.
SENDS_MORE = Condition(
  wording="a server.algorithm that sends more than weights, such as scaffold or fednova",
  holds=lambda config: (
    config.server.algorithm not in ("fedavg", "fedbn", "fedper", "finetune", "ditto")
  ),
  fields=("server.algorithm",),
  remedy="use one of those",
)
ENCRYPTED = one_of("secure.protocol", "ckks")
ENCRYPTS = one_of("secure.he", "run")
# Names of exchange/robust/rules.py, which lies above.
ROBUST_RULES = (
  "median",
  "trimmed_mean",
  "geometric_median",
  "krum",
  "multi_krum",
  "centered_clipping",
  "meamed",
)
COUNTS_HOSTILE = Condition(
  wording="server.aggregator=trimmed_mean, krum, multi_krum or meamed, or robust.pre=nnm or arc",
  holds=lambda config: (
    config.server.aggregator in ("trimmed_mean", "krum", "multi_krum", "meamed")
    or config.robust.pre in ("nnm", "arc")
  ),
  fields=("server.aggregator", "robust.pre"),
  remedy="use one of those",
)
WEISZFELD = one_of("server.aggregator", "geometric_median")
CENTERED_CLIPPING = one_of("server.aggregator", "centered_clipping")
BUCKETS = one_of("robust.pre", "bucketing")
STATIC_CLIPPING = one_of("robust.pre", "clipping")
ATTACKED = Condition(
  wording="an attack.kind other than none",
  holds=lambda config: config.attack.kind != "none",
  fields=("attack.kind",),
  remedy="use another",
)
HOSTILE_UNNAMED = Condition(
  wording="an empty attack.hospitals",
  holds=lambda config: config.attack.hospitals == "",
  fields=("attack.hospitals",),
  remedy="use an empty attack.hospitals",
)
BACKDOOR = one_of("attack.kind", "backdoor")
STRONG = one_of("attack.kind", "ipm", "alie", "gaussian")
CHUNKS = one_of("execution.layout", "chunk")
CHUNK_OPEN = one_of("execution.layout", "auto")


def _calibrated(section: str) -> Callable[[Config], bool]:
  """A function that tells whether a config's σ of this section follows from its target ε.

  A target beside a given σ is a budget: it ends a run, and does not change it.
  """
  privacy_of = operator.attrgetter(section)

  def holds(config: Config) -> bool:
    privacy = privacy_of(config)
    return privacy.target_epsilon > 0 and privacy.noise_multiplier == 0

  return holds


RECORDS_CALIBRATED, CLIENTS_CALIBRATED = _calibrated("privacy"), _calibrated("client_privacy")


def rounds_shape_run(config: Config) -> bool:
  """Whether each round depends on the number of rounds; else 5 rounds and 5 more equal 10."""
  independent = config.privacy.bands == 1  # else the noise's correlation is made for the rounds
  fixed = config.client.schedule == "constant" and independent
  return not fixed or RECORDS_CALIBRATED(config) or CLIENTS_CALIBRATED(config)
