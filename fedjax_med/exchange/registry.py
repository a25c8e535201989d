"""Transforms and aggregators by name: a new one is a file and a line here, or registers itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedjax_med.core.conditions import DEADLINE
from fedjax_med.core.config import Config
from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.registered import add_name
from fedjax_med.core.sources import read_again, source_digest
from fedjax_med.exchange.aggregator import Aggregator, equal_sum, mean
from fedjax_med.exchange.attack import Attack
from fedjax_med.exchange.attacks.registry import ATTACKS, attack_strength, forges_updates
from fedjax_med.exchange.ckks import PRESETS, ciphertexts, encrypted_sum, require_ckks
from fedjax_med.exchange.clip_and_noise import clip_and_noise
from fedjax_med.exchange.compression.registry import (
  compression_parts,
  download_of,
  require_compression,
)
from fedjax_med.exchange.distributed_noise import (
  distributed_noise,
  is_distributed,
  require_distributed,
)
from fedjax_med.exchange.download import Download
from fedjax_med.exchange.fixed_point import choose_grid, fixed_point, modular_sum
from fedjax_med.exchange.masks import (
  expected_clients,
  fewest_answers,
  masks,
  may_miss,
  require_masking,
)
from fedjax_med.exchange.robust.rules import RULES, is_robust, require_robust, robust_aggregator
from fedjax_med.exchange.transform import SUM, Transform, chain
from fedjax_med.privacy.distributed import require_honest

TRANSFORMS: dict[str, Callable[[], Transform]] = {"identity": chain}
AGGREGATORS: dict[str, Callable[[], Aggregator]] = {"mean": mean}  # besides RULES


class Exchange(NamedTuple):
  """The way of an update from clients to the server, and of the model to clients.

  Attributes:
    transform: chain of all transforms.
    aggregator: rule that makes one update of those of all clients.
    attack: what hostile clients do with their messages; None if nobody is hostile.
    download: how the model travels to clients; None if it does as it is.
    loss: probability that a message is lost after its client has made it.
    deadline: whether the server goes on without the clients that are late (``Client.late``).
    least: messages that a round needs to change anything; 0 if one is enough.
    clip_place: place in the chain of the transform whose state is DP-FedAvg's clip norm.
  """

  transform: Transform
  aggregator: Aggregator
  attack: Attack | None = None
  download: Download | None = None
  loss: float = 0.0
  deadline: bool = False
  least: int = 0
  clip_place: int = -1

  @property
  def may_lose(self) -> bool:
    """Whether a message may not arrive."""
    return self.loss > 0 or self.deadline

  @property
  def gathers(self) -> bool:
    """Whether all messages of a round are in memory at once."""
    return not self.aggregator.linear or self.attack is not None

  @property
  def goes_on(self) -> bool:
    """Whether a message that is not finite is left out, and the run goes on."""
    return self.aggregator.tolerant or self.attack is not None


def register_transform(name: str, make: Callable[[], Transform]) -> None:
  """Adds a transform that configs can name; UserError if the name is taken by another one."""
  require("," not in name, f"transform '{name}' has a comma", "choose another name")
  _require_free("transform", name, TRANSFORMS.get(name, make), make)
  TRANSFORMS[name] = make
  add_name("server.transforms", name)


def register_aggregator(name: str, make: Callable[[], Aggregator]) -> None:
  """Adds an aggregator that configs can name; UserError if the name is taken by another one."""
  _require_free("aggregator", name, (RULES | AGGREGATORS).get(name, make), make)
  AGGREGATORS[name] = make
  add_name("server.aggregator", name)


def _require_free(kind: str, name: str, known: Any, make: Any) -> None:
  require(
    read_again(known, make), f"the {kind} '{name}' is registered already", "choose another name"
  )


def transform_names(config: Config) -> list[str]:
  """Names of the run's transforms, in the order in which a client applies them."""
  return [name.strip() for name in config.server.transforms.split(",") if name.strip()]


def exchange_code(config: Config) -> list[str]:
  """Digests of the sources of registered transforms and aggregators; "" for this package's own."""
  parts: list[tuple[str, Any]] = [
    (f"transform '{name}'", TRANSFORMS[name]) for name in transform_names(config)
  ]
  name = config.server.aggregator
  parts.append((f"aggregator '{name}'", (RULES | AGGREGATORS)[name]))
  return [source_digest(make, what) for what, make in parts]


def require_parts(config: Config) -> None:
  """Raises UserError where a name is unknown, or parts go together with no hospitals."""
  for name in transform_names(config):
    require_choice("server.transforms", name, TRANSFORMS)
  require_choice("server.aggregator", config.server.aggregator, AGGREGATORS | RULES)
  require(
    config.robust.pre == "none" or config.server.aggregator in (*RULES, "mean"),
    f"robust.pre='{config.robust.pre}' with server.aggregator='{config.server.aggregator}', which"
    " is a registered one",
    "let the aggregator do it, or use robust.pre=none",
  )
  if config.attack.kind != "none":
    _require_attack(config)
  if config.client_privacy.mechanism != "none":
    _require_private(config)
  if is_distributed(config):
    require_distributed(config)
  if config.secure.protocol != "none":
    _require_sums(config)
  require(
    config.privacy.bands == 1 or config.cost.deadline_s == 0,
    f"cost.deadline_s={config.cost.deadline_s:g} with privacy.bands={config.privacy.bands}: noise"
    " that later steps take back may have been on an update that did not arrive",
    "use privacy.bands=1, or cost.deadline_s=0",
  )
  require_compression(config)


def make_exchange(config: Config, num_clients: int) -> Exchange:
  """The exchange of a run of K clients.

  Raises:
    UserError: a name is unknown, or the parts do not go together.
  """
  require_parts(config)
  private, grid = config.client_privacy.mechanism != "none", None
  if is_distributed(config):
    require_honest(config.client_privacy.colluders, num_clients)
    return _under_masks(shared_exchange(config), config, num_clients)
  if config.secure.protocol != "none":
    grid = choose_grid(config, num_clients)
  parts = [TRANSFORMS[name]() for name in transform_names(config)]
  parts += compression_parts(config.compression, counted=not private)
  if is_robust(config):
    require_robust(config, num_clients)
  rule = robust_aggregator(config) if is_robust(config) else AGGREGATORS[config.server.aggregator]()
  aggregator = rule
  if private:
    step = 1 / grid.scale if grid else 0.0
    clip = clip_and_noise(config.client_privacy.clip_norm, step)
    parts, aggregator = [*map(_without_side_channels, parts), clip], equal_sum()
  clip_place = len(parts) - 1
  if grid is not None:
    parts.append(fixed_point(grid, weighted=not private, counted=not private))
    aggregator = modular_sum(grid.bits, equal=private)
  masked = config.secure.protocol == "masking"
  if masked:
    parts.append(_masks(config, num_clients))
  if config.secure.protocol == "ckks":
    require_ckks(config, num_clients)
    parts.append(ciphertexts(config.secure.he_preset, config))
    aggregator = _ckks_sum(config, aggregator, private)
  transform = chain(*parts)
  # The rule that is asked for: the host that encrypts needs every message, and its server none.
  require(
    rule.linear or transform.trust != SUM,
    f"server.aggregator='{config.server.aggregator}' needs every update, and with"
    f" server.transforms='{config.server.transforms}' the server sees sums only",
    "use server.aggregator=mean, or leave out the transform that hides single updates",
  )
  require(
    rule.linear or config.compression.kind != "sketch",
    f"server.aggregator='{config.server.aggregator}' with compression.kind='sketch': the server"
    " gets tables, which stand for updates in their sum only",
    "use server.aggregator=mean, or another compression.kind",
  )
  attack = ATTACKS[config.attack.kind]() if forges_updates(config) else None
  return Exchange(
    transform=transform,
    aggregator=aggregator,
    attack=attack,
    download=download_of(config.compression),
    loss=config.secure.dropout if masked else 0.0,
    deadline=DEADLINE.holds(config),
    least=least_messages(config, num_clients),
    clip_place=clip_place,
  )


def _masks(config: Config, num_clients: int) -> Transform:
  """The masks of a run; UserError where they would hide nothing."""
  require_masking(config, num_clients)
  return masks(
    config.secure.bits,
    num_clients,
    cohort=expected_clients(config, num_clients),
    executed=config.secure.masks == "executed",
    lossy=config.secure.dropout > 0 or DEADLINE.holds(config),
  )


def least_messages(config: Config, num_clients: int) -> int:
  """Messages without which a round changes nothing; 0 if one is enough, or none can be missing."""
  masked = config.secure.protocol == "masking" and may_miss(config)
  return fewest_answers(config, num_clients) if masked else 0


def _ckks_sum(config: Config, modelled: Aggregator, equal: bool) -> Aggregator:
  """The sum of ciphertexts, or the sum that it equals where encryption is modelled."""
  secure = config.secure
  if secure.he == "model":
    return modelled
  preset = PRESETS[secure.he_preset]
  return encrypted_sum(preset, secure.bits, every=secure.encrypt_every, equal=equal)


def exchange_numbers(config: Config) -> dict[str, float]:
  """Numbers of the exchange that a program takes as data, by name: ``Hyper.exchange``."""
  return {"strength": attack_strength(config)} if forges_updates(config) else {}


def _require_attack(config: Config) -> None:
  """Raises UserError where hostile hospitals do not go with another part."""
  attack = f"attack.kind='{config.attack.kind}'"
  private, protocol = config.client_privacy.mechanism != "none", config.secure.protocol
  require(
    not (private and forges_updates(config)),
    f"{attack} with client_privacy.mechanism='dp_fedavg': an update that is forged after the clip"
    " is longer than the sensitivity that ε is computed from",
    "use attack.kind=label_flip, which trains and clips honestly, or client_privacy.mechanism=none",
  )
  require(
    protocol == "none" or not forges_updates(config),
    f"{attack} with secure.protocol='{protocol}': what is forged are updates, and whole numbers"
    " travel",
    "use attack.kind=label_flip, or secure.protocol=none",
  )
  require(
    not config.eval.local_baselines,
    f"{attack} with eval.local_baselines: hospitals by themselves have no attackers among them, and"
    " scores of the federation are of the honest ones",
    "run the baselines with attack.kind=none",
  )


def shared_exchange(config: Config) -> Exchange:
  """Updates to which hospitals add noise themselves, and their sum; of any number of hospitals.

  As in ``private_exchange`` the clip comes after every transform of the run.
  """
  parts = [TRANSFORMS[name]() for name in transform_names(config)]
  parts += compression_parts(config.compression, counted=False)
  covered = [_not_larger(_without_side_channels(part)) for part in parts]
  noise = distributed_noise(config.client_privacy.clip_norm, config.secure.bits)
  return Exchange(
    transform=chain(*covered, noise),
    aggregator=modular_sum(config.secure.bits, equal=True),
    download=download_of(config.compression),
  )


def _under_masks(exchange: Exchange, config: Config, num_clients: int) -> Exchange:
  """The exchange of whole numbers whose single updates masks hide."""
  return exchange._replace(transform=chain(exchange.transform, _masks(config, num_clients)))


def _require_private(config: Config) -> None:
  """Raises UserError where a part does not go with DP-FedAvg."""
  require(
    config.server.aggregator == "mean",
    f"server.aggregator='{config.server.aggregator}' with client_privacy.mechanism='dp_fedavg':"
    " its sensitivity to one hospital's update is not known",
    "use server.aggregator=mean",
  )
  require(
    config.robust.pre == "none",
    f"robust.pre='{config.robust.pre}' with client_privacy.mechanism='dp_fedavg': the sensitivity"
    " of what it makes of one hospital's update is not known, and updates are clipped already",
    "use robust.pre=none and client_privacy.clip_norm",
  )
  open_ones = [name for name in transform_names(config) if not TRANSFORMS[name]().clients]
  require(
    not open_ones,
    f"server.transforms='{config.server.transforms}': {', '.join(open_ones)} is not declared"
    " private for hospitals: what it counts at the server may be read off single updates, without"
    " noise",
    "leave it out, or use client_privacy.mechanism=none",
  )


def _require_sums(config: Config) -> None:
  """Raises UserError where updates are to be whole numbers, whose sum is not what is asked for."""
  require(
    config.server.aggregator == "mean",
    f"server.aggregator='{config.server.aggregator}' with"
    f" secure.protocol='{config.secure.protocol}': a rule that looks at single updates needs what"
    " the protocol hides",
    "use server.aggregator=mean, or secure.protocol=none",
  )
  require(
    config.robust.pre == "none",
    f"robust.pre='{config.robust.pre}' with secure.protocol='{config.secure.protocol}': a step that"
    " looks at single updates needs what the protocol hides",
    "use robust.pre=none, or secure.protocol=none",
  )


def plain_exchange() -> Exchange:
  """Updates as they are, averaged with the clients' weights."""
  return Exchange(transform=chain(), aggregator=mean())


def private_exchange(clip_norm: float, *transforms: Transform) -> Exchange:
  """Updates that are transformed, clipped, summed and noised (DP-FedAvg).

  The clip comes last at a client, so that the sensitivity of the sum is C whatever a transform did.
  """
  covered = [_without_side_channels(transform) for transform in transforms]
  return Exchange(transform=chain(*covered, clip_and_noise(clip_norm)), aggregator=equal_sum())


def _not_larger(transform: Transform) -> Transform:
  """The transform, whose message must not have more numbers than rounding is counted for.

  Tracing ``encode`` raises UserError where it has.
  """

  def encode(message, kept, state, sender):
    size = message.params.size
    message, kept, tally = transform.encode(message, kept, state, sender)
    require(
      message.params.size <= size,
      f"client_privacy.noise='distributed' with a transform that makes {message.params.size}"
      f" numbers of {size}: rounding is counted for so many",
      "leave it out of server.transforms, or use client_privacy.noise=server",
    )
    return message, kept, tally

  return transform._replace(encode=encode)


def _without_side_channels(transform: Transform) -> Transform:
  """The transform, to whose server nothing comes but the noised sum.

  Tracing ``encode`` raises UserError if the transform has a tally.
  """

  def encode(message, kept, state, sender):
    message, kept, tally = transform.encode(message, kept, state, sender)
    require(
      not jax.tree.leaves(tally),
      "a transform that is declared private for hospitals (clients=True) counts something of every"
      " client at the server, which nothing would clip or noise",
      "return () as its tally, or declare clients=False",
    )
    return message, kept, tally

  def decode(aggregate, state, tally, receiver):
    level = receiver.hyper.client_level
    assert level is not None
    # Neither how many took part nor the key of the noise, which could be taken off again.
    everyone = jnp.ones_like(receiver.seated)
    blind = receiver._replace(
      weight=level.expected_cohort, run_key=receiver.key, seated=everyone, arrived=everyone
    )
    return transform.decode(aggregate, state, tally, blind)

  return transform._replace(encode=encode, decode=decode)
