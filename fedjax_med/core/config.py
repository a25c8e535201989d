"""The configuration of a run: typed dataclasses, one declaration a field.

A preset in ``configs/`` returns a ``Config``; flags such as ``--config.privacy.clip_norm=0.5``
assign to it; ``core.validation.validate`` runs once, after which a config is never changed.
Everything else that is known of a field, from --help to the run id, follows from its line in
``core/*_sections.py``, and that of an algorithm's option from the dataclass that it registers.
"""

import dataclasses
import functools
import hashlib
import json
import operator
import types
from typing import Any

from fedjax_med.core.errors import require
from fedjax_med.core.exchange_sections import (
  AttackConfig,
  CompressionConfig,
  CostConfig,
  RobustConfig,
  SecureConfig,
)
from fedjax_med.core.execution_sections import EvalConfig, ExecutionConfig
from fedjax_med.core.fields import Field, always, field, fields_of, least, never, one_of, undeclared
from fedjax_med.core.privacy_sections import ClientPrivacyConfig, PrivacyConfig
from fedjax_med.core.training_sections import (
  ClientConfig,
  DataConfig,
  ModelConfig,
  PartitionConfig,
  ServerConfig,
)

OPTIONS: dict[str, type] = {}  # dataclasses of registered algorithms' options, by algorithm


class Options:
  """Options of registered algorithms: an instance of each dataclass, such as ``options.mine``.

  It is made at its first use, since an algorithm may be registered after the config was made.
  """

  def __getattr__(self, name: str) -> Any:
    if name not in OPTIONS:
      raise AttributeError(f"no algorithm named {name!r} with options is registered")
    value = OPTIONS[name]()
    setattr(self, name, value)
    return value

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Options):
      return NotImplemented
    names = {*OPTIONS, *vars(self), *vars(other)}
    return all(getattr(self, name, None) == getattr(other, name, None) for name in names)

  def __repr__(self) -> str:
    return f"Options({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclasses.dataclass
class Config:
  """A whole run.

  >>> config = Config(seed=3)
  >>> config.server.num_rounds = 5
  >>> config.seed, config.server.num_rounds, config.privacy.mechanism
  (3, 5, 'none')
  """

  seed: int = field(
    0,
    doc=(
      "drives initial weights (unless model.init_seed does), sampling, noise, participation and"
      " the GANs of client.synthetic."
    ),
    bounds=least(0, 2**31 - 1, remedy="use 0"),
    traced=True,
  )
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  partition: PartitionConfig = dataclasses.field(default_factory=PartitionConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
  server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
  privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
  client_privacy: ClientPrivacyConfig = dataclasses.field(default_factory=ClientPrivacyConfig)
  compression: CompressionConfig = dataclasses.field(default_factory=CompressionConfig)
  secure: SecureConfig = dataclasses.field(default_factory=SecureConfig)
  robust: RobustConfig = dataclasses.field(default_factory=RobustConfig)
  attack: AttackConfig = dataclasses.field(default_factory=AttackConfig)
  cost: CostConfig = dataclasses.field(default_factory=CostConfig)
  execution: ExecutionConfig = dataclasses.field(default_factory=ExecutionConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  options: Options = dataclasses.field(default_factory=Options)


# Neither the layout nor what is measured changes the trajectory.
OUTSIDE_RUN = ("execution", "eval")


def sections() -> dict[str, type]:
  """The dataclass of every section by its dotted name; "" is ``Config`` itself."""
  records: dict[str, type] = {"": Config}
  for part in dataclasses.fields(Config):
    if dataclasses.is_dataclass(part.type):
      records[part.name] = part.type  # pyright: ignore[reportArgumentType]
  return records | {f"options.{name}": record for name, record in OPTIONS.items()}


def declared() -> dict[str, Field]:
  """Every field of the configuration by its dotted path, in declaration order; options last."""
  return {
    one.path: one for section, record in sections().items() for one in _declared(section, record)
  }


@functools.cache
def _declared(section: str, record: type) -> tuple[Field, ...]:
  area, _, algorithm = section.partition(".")
  read = (one_of("server.algorithm", algorithm),) if algorithm else ()
  fields = fields_of(record, section, read)
  return tuple(one._replace(shapes_run=never) if area in OUTSIDE_RUN else one for one in fields)


def add_options(algorithm: str, record: type) -> None:
  """Adds the fields ``options.ALGORITHM.*``, which are read with that server.algorithm only.

  A dataclass that was read from its file once more, with the same declarations, changes nothing.

  Args:
    algorithm: name of an algorithm that is being registered.
    record: dataclass whose fields are all made by ``core.fields.field``.

  Raises:
    UserError: the name cannot be part of a flag, a field lacks its declaration, or other options
      are registered for that algorithm.
  """
  where = f"options of server.algorithm='{algorithm}'"
  require(
    algorithm.isidentifier(),
    f"{where}: the name cannot stand in --config.options.NAME",
    "name the algorithm with letters, digits and _",
  )
  require(
    isinstance(record, type) and dataclasses.is_dataclass(record),
    f"{where} are {record!r}",
    "give a dataclass",
  )
  bare = undeclared(record)
  require(
    not bare,
    f"{where}: {', '.join(bare)} has no declaration",
    "write NAME: float = core.fields.field(0.1, doc=...)",
  )
  types_of = {part.name: part.type for part in dataclasses.fields(record)}
  for one in fields_of(record):
    require(
      one.kind in (str, int, float, bool) and types_of[one.name] is one.kind,
      f"{where}: {one.name}: {types_of[one.name]!r} = {one.default!r}",
      "let type and default be str, int, float or bool, and import no annotations of __future__",
    )
    require(
      one.kind is float or not one.traced,
      f"{where}: {one.name} is traced and {one.kind.__name__}",
      "leave out traced=True, or make it a float",
    )
  known = OPTIONS.get(algorithm, record)
  require(
    known is record or _lines(known) == _lines(record),
    f"{where} are registered already",
    "choose another name",
  )
  OPTIONS.setdefault(algorithm, record)


def _lines(record: type) -> list[Field]:
  """Declarations without their functions. Functions are new objects whenever a file is read."""
  return [
    one._replace(read=tuple(rule._replace(holds=always) for rule in one.read), shapes_run=always)
    for one in fields_of(record)
  ]


def algorithm_options(config: Config, *, traced: bool) -> dict[str, Any]:
  """Options that the algorithm in use reads, by name: fields read with that server.algorithm only.

  Args:
    config: names the algorithm.
    traced: True for options that a program takes as data, False for the others.
  """
  return {
    one.name: get_field(config, path)
    for path, one in declared().items()
    if one.traced == traced
    and path.startswith(("server.", "options."))
    and any("server.algorithm" in rule.fields and rule.holds(config) for rule in one.read)
  }


def to_dict(config: Config) -> dict[str, Any]:
  """The config as nested plain dictionaries, in declaration order.

  Of ``options`` it holds those of the algorithm in use. The others are at their defaults.
  """
  values = dataclasses.asdict(config)
  del values["options"]
  name = config.server.algorithm
  if name in OPTIONS or name in vars(config.options):
    values["options"] = {name: dict(vars(getattr(config.options, name)))}
  return values


def flat(values: dict[str, Any]) -> dict[str, Any]:
  """Values of ``to_dict`` by dotted field, such as ``privacy.clip_norm``."""
  fields: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, dict):
      fields |= {f"{name}.{path}": inner for path, inner in flat(value).items()}
    else:
      fields[name] = value
  return fields


def nested(fields: dict[str, Any]) -> dict[str, Any]:
  """Inverse of ``flat``."""
  values: dict[str, Any] = {}
  for path, value in fields.items():
    *outer, name = path.split(".")
    part = values
    for section in outer:
      part = part.setdefault(section, {})
    part[name] = value
  return values


def from_dict(values: dict[str, Any]) -> Config:
  """Inverse of ``to_dict``; an unknown name raises TypeError.

  Options of an algorithm that is not registered here are kept as they are.
  """
  parts: dict[str, Any] = {}
  known = sections()
  for name, value in values.items():
    if name == "options":
      parts[name] = Options()
      for algorithm, given in value.items():
        make = OPTIONS.get(algorithm, types.SimpleNamespace)
        setattr(parts[name], algorithm, make(**given))
    else:
      parts[name] = known[name](**value) if name in known else value
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
  return operator.attrgetter(path)(config)


def set_field(config: Config, path: str, value: Any) -> None:
  """Assigns to the field at a dotted path."""
  section, _, name = path.rpartition(".")
  setattr(get_field(config, section) if section else config, name, value)
