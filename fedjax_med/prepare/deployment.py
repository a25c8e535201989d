"""What a synchronous round would cost hospitals with computers and links of their own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.errors import UserError, require


class Links(NamedTuple):
  """Links and computers of K hospitals.

  Attributes:
    up: [K] bits a second to the server.
    down: [K] bits a second from the server.
    latency: seconds that a message is under way, whatever its size.
    speed: [K] speed of the computers; 1 needs ``step_seconds`` for a local step.
    deadline: seconds after which a round goes on without those who are late; 0 without one.
  """

  up: np.ndarray
  down: np.ndarray
  latency: float
  speed: np.ndarray
  deadline: float


def links_of(config: Config, num_clients: int) -> Links | None:
  """The links of a run; None where none are given.

  Raises:
    UserError: a number is not above 0, a list has another length than there are hospitals, or a
      deadline is to follow the speed of this machine.
  """
  cost = config.cost
  if not cost.uplink_mbps:
    return None
  require(
    cost.deadline_s == 0 or cost.step_seconds > 0,
    f"cost.deadline_s={cost.deadline_s:g} with cost.step_seconds=0: who is late would follow from"
    " this machine's speed, and the training could not be repeated",
    "give cost.step_seconds, or use cost.deadline_s=0",
  )
  up = _numbers("cost.uplink_mbps", cost.uplink_mbps, num_clients)
  down = up
  if cost.downlink_mbps:
    down = _numbers("cost.downlink_mbps", cost.downlink_mbps, num_clients)
  return Links(
    up=1e6 * up,
    down=1e6 * down,
    latency=cost.latency_ms / 1e3,
    speed=_numbers("cost.client_speed", cost.client_speed, num_clients),
    deadline=cost.deadline_s,
  )


def _numbers(path: str, text: str, num_clients: int) -> np.ndarray:
  try:
    values = np.array([float(part) for part in text.split(",")])
  except ValueError:
    raise UserError(
      f"{path}='{text}' is no number and no list of numbers; use 50, or 50,20,100 for three"
      " hospitals"
    ) from None
  require(
    len(values) in (1, num_clients),
    f"{path}='{text}' has {len(values)} numbers for {num_clients} hospitals",
    "give one number for all, or one for each",
  )
  require(
    bool(np.isfinite(values).all() and (values > 0).all()),
    f"{path}='{text}' has a number that is not above 0 and finite",
    "give numbers above 0",
  )
  return np.broadcast_to(values, (num_clients,)).astype(float)


def client_seconds(
  links: Links, message: tuple[int, int], steps: np.ndarray, step_seconds: float, more: float = 0.0
) -> np.ndarray:
  """[K] seconds of each hospital in a round: model down, local steps, update up.

  Args:
    links: links and computers.
    message: bytes that a hospital gets, and those that it sends.
    steps: [K] local steps a round.
    step_seconds: of a local step at speed 1.
    more: seconds of other work on an update at speed 1, such as encryption.
  """
  down, up = message
  travel = 8 * down / links.down + 8 * up / links.up + 2 * links.latency
  return travel + (steps * step_seconds + more) / links.speed


def late(
  config: Config, names: Sequence[str], message: tuple[int, int], steps: np.ndarray
) -> np.ndarray | None:
  """[K] bool, hospitals whose updates come after the deadline; None without one.

  Raises:
    UserError: all of them are late.
  """
  links = links_of(config, len(names))
  if links is None or not links.deadline:
    return None
  seconds = client_seconds(links, message, steps, config.cost.step_seconds)
  fastest = int(seconds.argmin())
  require(
    bool(seconds[fastest] <= links.deadline),
    f"cost.deadline_s={links.deadline:g}: every hospital is late, the fastest, '{names[fastest]}',"
    f" takes {seconds[fastest]:.3g} s",
    f"use at least {seconds[fastest]:.3g}, or 0 to wait for all",
  )
  return seconds > links.deadline


def deployment_record(
  config: Config,
  names: Sequence[str],
  message: tuple[int, int],
  steps: np.ndarray,
  rounds: int,
  step_seconds: float,
  sent: float,
  more: float = 0.0,
) -> dict[str, Any] | None:
  """deployment.json: seconds, gigabytes and money of ``rounds`` rounds; None without links.

  A round waits for the slowest of all hospitals, also where cohorts are drawn.

  Args:
    config: with the links.
    names: of the K hospitals.
    message: bytes that a hospital gets in a round, and those that it sends.
    steps: [K] local steps a round.
    rounds: finished rounds.
    step_seconds: of a local step, as measured; one that the config gives goes before it.
    sent: bytes that all hospitals and the server have sent.
    more: as in ``client_seconds``.
  """
  links = links_of(config, len(names))
  if links is None:
    return None
  given = config.cost.step_seconds
  seconds = client_seconds(links, message, steps, given or step_seconds, more)
  behind = seconds > links.deadline if links.deadline else np.zeros(len(names), bool)
  slowest = links.deadline if behind.any() else float(seconds.max())
  down, up = message
  gigabytes = sent / 1e9
  return {
    "rounds": rounds,
    "step_seconds": given or step_seconds,
    "step_seconds_from": "the config" if given else "this machine, evaluation included",
    "bytes_down": down,
    "bytes_up": up,
    "round_seconds": slowest,
    "waits_for": names[int(np.where(behind, -1, seconds).argmax())],
    "hours": rounds * slowest / 3600,
    "gigabytes": gigabytes,
    "price": gigabytes * config.cost.price_gb,
    "hospitals": [
      {"name": name, "seconds": float(value), "late": bool(is_late)}
      for name, value, is_late in zip(names, seconds, behind, strict=True)
    ],
  }
