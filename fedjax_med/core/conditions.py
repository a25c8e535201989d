"""When each field of a configuration is read: a setting without effect is refused."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fedjax_med.core.config import Config, flat, get_field, set_field, to_dict
from fedjax_med.core.errors import UserError


class Condition(NamedTuple):
  """A rule that has to hold for a field to be read.

  Attributes:
    text: the rule for people, such as ``client.optimizer=adamw``.
    holds: whether a config keeps it.
    fields: fields that it looks at.
    remedy: how to keep it, an imperative without its object.
  """

  text: str
  holds: Callable[[Config], bool]
  fields: tuple[str, ...]
  remedy: str


def _one_of(path: str, *values: Any) -> Condition:
  *most, last = (str(value) for value in values)
  text = f"{', '.join(most)} or {last}" if most else last
  remedy = f"use one of those with --config.{path}" if most else f"use --config.{path}={last}"
  return Condition(f"{path}={text}", lambda c: get_field(c, path) in values, (path,), remedy)


def _other_than(path: str, value: Any) -> Condition:
  return Condition(
    f"{path} other than {value}", lambda c: get_field(c, path) != value, (path,), "use another"
  )


def _by_site(config: Config) -> bool:
  scheme, data = config.partition.scheme, config.data
  # 'auto' is 'site' where the data say where each image comes from, as phantoms do.
  known = data.source == "phantoms" or "{site}" in data.layout
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
  return Condition(f"{path} other than {result}", holds, (path,), "use another")


def _without(part: str) -> Condition:
  return Condition(
    f"a data.layout without {part}",
    lambda config: part not in config.data.layout,
    ("data.layout",),
    f"use * in place of {part}",
  )


PICTURES = _one_of("data.source", "folder", "br35h", "sars_cov2_ct")
FOLDER = _one_of("data.source", "folder")
DRAWN_SIDES, OPEN_PATIENTS = _without("{split}"), _without("{patient}")
DRAWN = Condition(
  "a split or a partition that is drawn",
  lambda config: "{split}" not in config.data.layout or not _by_site(config),
  ("data.layout", "partition.scheme"),
  "use * in place of {split}, or another partition.scheme",
)
PHANTOMS = _one_of("data.source", "phantoms")
BUILDERS = _one_of("data.source", "br35h", "sars_cov2_ct")
SHARES = Condition(
  "partition.scheme=dirichlet or quantity",
  _drawn_shares,
  ("partition.scheme", "data.source", "data.layout"),
  "use one of those",
)
SHARDS = _one_of("partition.scheme", "shards")
SEVERAL = Condition(
  "several hospitals", _several_hospitals, ("partition.num_clients",), "use at least two"
)
MOMENTUM = _one_of("client.optimizer", "momentum")
ADAMW = _one_of("client.optimizer", "adamw")
EPOCHS = _one_of("client.num_local_steps", 0)
GAN = _one_of("client.synthetic", "gan")
SERVER_MOMENTUM = _one_of("server.optimizer", "momentum", "adam", "yogi")
COHORTS = _one_of("server.participation", "poisson")
NAMES_LAYERS = _one_of("server.algorithm", "fedper", "finetune")
DITTO = _one_of("server.algorithm", "ditto")
DP_SGD = _one_of("privacy.mechanism", "dp_sgd")
PATIENTS = _one_of("privacy.unit", "patient", "group")
CALIBRATED = _one_of("privacy.noise_multiplier", 0)
FINDS_NOISE = _one_of("privacy.solve_for", "noise")
FINDS_CLIP_NORM = _one_of("privacy.solve_for", "clip_norm")
DP_FEDAVG = _one_of("client_privacy.mechanism", "dp_fedavg")
ADAPTIVE = _one_of("client_privacy.clipping", "adaptive")
CHUNKS = _one_of("execution.layout", "chunk")
LAYOUT_OPEN = _one_of("execution.layout", "auto")

# Field: what has to hold for it to be read, outermost first; () is always read. Read means that a
# program looks at it, and not that numbers are bound to differ: a schedule is read in a run of one
# round. ``models.registry`` knows which settings of ``model`` a network has.
READ: dict[str, tuple[Condition, ...]] = {
  "seed": (),
  "data.source": (),
  "data.path": (PICTURES,),
  "data.cache_dir": (BUILDERS,),
  "data.image_size": (),
  "data.min_size": (PICTURES,),
  "data.strict": (PICTURES,),
  "data.layout": (FOLDER,),
  "data.positive": (PICTURES,),
  "data.window": (PICTURES,),
  "data.split": (DRAWN_SIDES,),
  "data.test_fraction": (DRAWN_SIDES,),
  "data.patient_pattern": (PICTURES, OPEN_PATIENTS),
  "data.normalisation": (),
  "data.num_examples": (PHANTOMS,),
  "data.seed": (DRAWN,),
  "partition.scheme": (),
  "partition.num_clients": (),
  "partition.alpha": (SHARES, SEVERAL),
  "partition.classes_per_client": (SHARDS,),
  "partition.min_client_size": (),
  "model.name": (),
  "model.norm": (),
  "model.dropout": (),
  "model.width": (),
  "model.dtype": (),
  "model.pretrained": (),
  "model.init_seed": (),
  "client.optimizer": (),
  "client.learning_rate": (),
  "client.schedule": (),
  "client.warmup_rounds": (),
  "client.momentum": (MOMENTUM,),
  "client.weight_decay": (ADAMW,),
  "client.batch_size": (_not_solved("batch_size"),),
  "client.num_local_steps": (),
  "client.num_local_epochs": (EPOCHS,),
  "client.label_smoothing": (),
  "client.augmentation": (),
  "client.synthetic": (),
  "client.synthetic_share": (GAN,),
  "client.gan_steps": (GAN,),
  "server.algorithm": (),
  "server.num_rounds": (_not_solved("rounds"),),
  "server.optimizer": (),
  "server.learning_rate": (),
  "server.momentum": (SERVER_MOMENTUM,),
  "server.weighting": (SEVERAL,),
  "server.participation": (),
  "server.participation_rate": (COHORTS,),
  "server.proximal_weight": (),
  "server.personal_layers": (NAMES_LAYERS,),
  "server.personal_weight": (DITTO,),
  "server.ema_decay": (),
  "privacy.mechanism": (),
  "privacy.unit": (DP_SGD,),
  "privacy.rows_per_unit": (DP_SGD, PATIENTS),
  "privacy.augmentation_multiplicity": (DP_SGD,),
  "privacy.noise_multiplier": (DP_SGD,),
  "privacy.target_epsilon": (DP_SGD,),
  "privacy.solve_for": (DP_SGD,),
  "privacy.same_noise": (DP_SGD, CALIBRATED, FINDS_NOISE),
  "privacy.noise_stddev": (DP_SGD, FINDS_CLIP_NORM),
  "privacy.clip_norm": (DP_SGD, _not_solved("clip_norm")),
  "privacy.delta": (DP_SGD,),
  "privacy.batch_cap": (DP_SGD,),
  "privacy.bands": (DP_SGD,),
  "privacy.clipping": (DP_SGD,),
  "privacy.adjacency": (DP_SGD,),
  "privacy.sampling": (DP_SGD,),
  "client_privacy.mechanism": (),
  "client_privacy.noise_multiplier": (DP_FEDAVG,),
  "client_privacy.target_epsilon": (DP_FEDAVG,),
  "client_privacy.clip_norm": (DP_FEDAVG,),
  "client_privacy.delta": (DP_FEDAVG,),
  "client_privacy.clipping": (DP_FEDAVG,),
  "client_privacy.quantile": (DP_FEDAVG, ADAPTIVE),
  "client_privacy.clip_learning_rate": (DP_FEDAVG, ADAPTIVE),
  "client_privacy.count_noise": (DP_FEDAVG, ADAPTIVE),
  "execution.layout": (),
  "execution.chunk_size": (CHUNKS,),
  "execution.devices": (),
  "execution.lowering": (),
  "execution.microbatch": (),
  "execution.memory_gib": (),
  "execution.remat": (),
  "execution.probe": (LAYOUT_OPEN,),
  "execution.compilation_cache": (),
  "eval.every": (),
  "eval.batch_size": (),
  "eval.local_baselines": (),
  "eval.tracker": (),
}

DEFAULTS = flat(to_dict(Config()))


def unmet(config: Config, path: str) -> Condition | None:
  """The first condition of a field that does not hold; None where the field is read."""
  return next((rule for rule in READ[path] if not rule.holds(config)), None)


def changed(config: Config) -> list[str]:
  """Fields with another value than the dataclass default."""
  return [path for path, default in DEFAULTS.items() if get_field(config, path) != default]


def drop_unread(config: Config, fields: Iterable[str]) -> list[str]:
  """Sets those of ``fields`` that are not read back to their defaults; returns those it changed."""
  dropped = [path for path in changed(config) if path in set(fields) and unmet(config, path)]
  for path in dropped:
    set_field(config, path, DEFAULTS[path])
  return dropped


def require_read(config: Config) -> None:
  """Raises UserError where a field has another value than its default and is not read.

  The sentence names every field that is not read for the same reason.
  """
  found = {path: rule for path in changed(config) if (rule := unmet(config, path)) is not None}
  if not found:
    return
  rule = next(iter(found.values()))
  paths = [path for path, other in found.items() if other is rule]
  values = _listed([f"{path}={shown(get_field(config, path))}" for path in paths])
  defaults = _listed([f"{path} at {shown(DEFAULTS[path])}" for path in paths])
  verb = "is" if len(paths) == 1 else "are"
  raise UserError(
    f"{values} {verb} read with {rule.text} only, and {state(config, rule, short=True)};"
    f" {rule.remedy}, or leave {defaults}"
  )


def state(config: Config, rule: Condition, *, short: bool = False) -> str:
  """The fields that a rule looks at with their values; ``short`` calls a single one 'it'."""
  values = [(path, shown(get_field(config, path))) for path in rule.fields]
  if short and len(values) == 1 and values[0][0] in rule.text:
    return f"it is {values[0][1]}"
  return _listed([f"{path} is {value}" for path, value in values])


def shown(value: Any) -> str:
  """A value for people: text in quotes, numbers short."""
  return f"{value:g}" if isinstance(value, float) else repr(value)


def _listed(parts: list[str]) -> str:
  *most, last = parts
  return f"{', '.join(most)} and {last}" if most else last
