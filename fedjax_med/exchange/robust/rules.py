"""Robust rules and steps before them by name, and the aggregators that they make."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.core.exchange_sections import RobustConfig
from fedjax_med.exchange.aggregator import Aggregator
from fedjax_med.exchange.robust.centered_clipping import centered_clipping
from fedjax_med.exchange.robust.clipping import adaptive_clipping, clipping
from fedjax_med.exchange.robust.coordinates import meamed, median, trimmed_mean
from fedjax_med.exchange.robust.geometric_median import geometric_median
from fedjax_med.exchange.robust.krum import krum, multi_krum
from fedjax_med.exchange.robust.mixing import bucketing, nearest_neighbours
from fedjax_med.exchange.robust.rule import Before, Rule, mean_of
from fedjax_med.federated.algorithm import ClientDelta

RULES: dict[str, Callable[[RobustConfig], Rule]] = {
  "median": lambda robust: median(),
  "trimmed_mean": lambda robust: trimmed_mean(),
  "geometric_median": lambda robust: geometric_median(
    robust.smoothing, robust.weiszfeld_steps, robust.weiszfeld
  ),
  "krum": lambda robust: krum(),
  "multi_krum": lambda robust: multi_krum(),
  "centered_clipping": lambda robust: centered_clipping(robust.radius),
  "meamed": lambda robust: meamed(),
}
BEFORE: dict[str, Callable[[RobustConfig], Before]] = {
  "nnm": lambda robust: nearest_neighbours(),
  "bucketing": lambda robust: bucketing(robust.bucket_size),
  "clipping": lambda robust: clipping(robust.max_norm),
  "arc": lambda robust: adaptive_clipping(),
}


def is_robust(config: Config) -> bool:
  """Whether updates are joined by a robust rule, or by the mean after a step of ``robust.pre``."""
  return config.server.aggregator in RULES or config.robust.pre != "none"


def plain_mean() -> Rule:
  """The mean of all vectors, each counting the same."""
  return Rule(combine=lambda vectors, present, f, memory: mean_of(vectors, present))


def robust_aggregator(config: Config) -> Aggregator:
  """The aggregator of a config for which ``is_robust`` holds."""
  rule = RULES.get(config.server.aggregator, lambda robust: plain_mean())(config.robust)
  before = BEFORE[config.robust.pre](config.robust) if config.robust.pre != "none" else None
  return joined_by(rule, before, config.robust.assumed_byzantine)


def joined_by(rule: Rule, before: Before | None, f: int) -> Aggregator:
  """The aggregator of a rule: each message is one vector [D] of all that it holds.

  A message that is not finite counts as absent. Clients' weights only say who is present.
  """

  def combine(messages, weights, joint):
    first = jax.tree.map(lambda leaf: leaf[0], messages)
    _, unravel = ravel_pytree(first)
    vectors = jnp.concatenate(
      [leaf.reshape(len(weights), -1) for leaf in jax.tree.leaves(messages)], axis=1
    )
    present = (weights > 0) & jnp.isfinite(vectors).all(1)
    vectors = jnp.where(present[:, None], vectors, 0)
    if before is not None:
      vectors, present = before(vectors, present, f, joint.key)
    return unravel(rule.combine(vectors, present, f, joint.last))

  return Aggregator(
    weigh=lambda weights: weights,
    combine=combine,
    finish=lambda partial, weight: partial,
    share=lambda weight, num_clients: weight,
    linear=False,
    tolerant=True,
    init=(lambda message: jnp.zeros_like(ravel_pytree(message)[0])) if rule.remembers else _nothing,
    remember=(lambda aggregate, last: ravel_pytree(aggregate)[0]) if rule.remembers else _keep,
  )


def _nothing(message: ClientDelta) -> tuple[()]:
  return ()


def _keep(aggregate: ClientDelta, last: tuple[()]) -> tuple[()]:
  return last


def require_robust(config: Config, num_clients: int) -> None:
  """Raises UserError where a rule cannot work with so many hospitals."""
  robust, named = config.robust, f"server.aggregator='{config.server.aggregator}'"
  f = robust.assumed_byzantine
  require(
    2 * f < num_clients,
    f"robust.assumed_byzantine={f} of {num_clients} hospitals: no rule can tell which half of them"
    " is honest",
    f"use at most {(num_clients - 1) // 2}",
  )
  require(
    config.server.aggregator == "mean" or num_clients >= 3,
    f"{named} with {num_clients} hospitals: a majority against one takes 3",
    "use server.aggregator=mean, or more hospitals",
  )
  require(
    robust.pre != "bucketing" or robust.bucket_size <= num_clients,
    f"robust.bucket_size={robust.bucket_size} with {num_clients} hospitals puts all into one"
    " bucket, whose mean is no robust one",
    f"use at most {num_clients}",
  )
