"""Attacks on updates by name, and their strengths."""

from collections.abc import Callable

from fedjax_med.core.config import Config
from fedjax_med.exchange.attack import Attack
from fedjax_med.exchange.attacks.moments import (
  against_the_mean,
  alie,
  beside_the_mean,
  ipm,
  sign_flip,
  strongest,
)
from fedjax_med.exchange.attacks.simple import gaussian, mimic, not_finite

ATTACKS: dict[str, Callable[[], Attack]] = {
  "sign_flip": lambda: sign_flip,
  "ipm": lambda: ipm,
  "alie": lambda: alie,
  "optimal_ipm": lambda: strongest(against_the_mean),
  "optimal_alie": lambda: strongest(beside_the_mean),
  "gaussian": lambda: gaussian,
  "mimic": lambda: mimic,
  "nan": lambda: not_finite,
}
STRENGTHS = {"ipm": 2.0, "alie": 1.5, "gaussian": 1.0}  # of attack.strength=0, those of ByzFL


def forges_updates(config: Config) -> bool:
  """Whether hostile clients forge their messages; a flip of labels goes through honest training."""
  return config.attack.kind in ATTACKS


def attack_strength(config: Config) -> float:
  """τ of the run's attack; 1 where it has none."""
  return config.attack.strength or STRENGTHS.get(config.attack.kind, 1.0)
