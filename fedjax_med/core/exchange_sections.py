"""Declarations of the fields of what travels between hospitals and the server."""

import dataclasses

from fedjax_med.core import conditions as when
from fedjax_med.core.fields import field, least, never


@dataclasses.dataclass
class SecureConfig:
  """How updates are added so that nobody sees a single one."""

  protocol: str = field(
    "none",
    doc=(
      "none, or updates as whole numbers on a grid: grid (as they are, to compare with), masking"
      " (secure aggregation: masks that cancel in the sum)."
    ),
    choices=("none", "grid", "masking"),
  )
  range: float = field(
    4.0,
    doc="largest absolute value of a number of an update; larger ones are cut and counted.",
    bounds=least(1e-6, 1e6, remedy="use 1 to 8"),
    read=(when.ON_GRID,),
  )
  extra_range: float = field(
    1024.0,
    doc="the same for what an algorithm sends besides (control variates, numbers of steps).",
    bounds=least(1e-6, 1e6, remedy="use the most local steps a round"),
    read=(when.ON_GRID, when.SENDS_MORE),
  )
  scale: float = field(
    0.0,
    doc="whole numbers to 1; 0 takes the largest power of two at which no sum can wrap.",
    bounds=least(0, 2**31, remedy="use 0 to let it be chosen"),
    read=(when.ON_GRID,),
  )
  bits: int = field(
    32,
    doc="bits of a number as it travels; sums are taken modulo 2^bits.",
    bounds=least(8, 32, remedy="use 32, or 16 for half the bytes"),
    read=(when.ON_GRID,),
  )
  masks: str = field(
    "elided",
    doc=(
      "elided (masks cancel exactly in the sum, so that they are left out: same results at no"
      " cost), or executed (drawn, added and taken off again)."
    ),
    choices=("elided", "executed"),
    read=(when.MASKING,),
    shapes_run=never,  # results are equal bit for bit
  )
  dropout: float = field(
    0.0,
    doc="probability that a hospital's masked update is lost; the sum of the others is recovered.",
    bounds=least(0, 0.9, remedy="use 0.1"),
    read=(when.MASKING,),
  )
  threshold: int = field(
    0,
    doc="fewest answers of a round that counts; 0 is more than half of the expected hospitals.",
    bounds=least(0, 1e6, remedy="use 0 to let it be chosen"),
    read=(when.MASKING, when.MAY_MISS),
  )


@dataclasses.dataclass
class CostConfig:
  """What the rounds would cost hospitals that are not in one computer: time, bytes and money."""

  uplink_mbps: str = field(
    "",
    doc=(
      "megabits a second from a hospital to the server: a number, or one for each hospital with"
      " commas between. With it, deployment.json and the report say hours and gigabytes. Empty is"
      " off."
    ),
    traced=True,
    shapes_run=when.DEADLINE.holds,
  )
  downlink_mbps: str = field(
    "",
    doc="the same from the server to a hospital; empty is uplink_mbps.",
    traced=True,
    read=(when.LINKS,),
    shapes_run=when.DEADLINE.holds,
  )
  latency_ms: float = field(
    50.0,
    doc="milliseconds that a message is under way, whatever its size.",
    bounds=least(0, 1e6, remedy="use 20 to 100"),
    traced=True,
    read=(when.LINKS,),
    shapes_run=when.DEADLINE.holds,
  )
  client_speed: str = field(
    "1",
    doc=(
      "speed of a hospital's computer, 1 being that of step_seconds: a number, or one for each"
      " hospital with commas between."
    ),
    traced=True,
    read=(when.LINKS,),
    shapes_run=when.DEADLINE.holds,
  )
  step_seconds: float = field(
    0.0,
    doc="seconds of a local step; 0 takes the mean of this training on this machine.",
    bounds=least(0, 1e6, remedy="use 0 to have it measured"),
    traced=True,
    read=(when.LINKS,),
    shapes_run=when.DEADLINE.holds,
  )
  price_gb: float = field(
    0.0,
    doc="price of a gigabyte that is sent either way, in any currency.",
    bounds=least(0, 1e6, remedy="use 0 for none"),
    traced=True,
    read=(when.LINKS,),
    shapes_run=never,
  )
  deadline_s: float = field(
    0.0,
    doc=(
      "seconds of a round after which the server goes on without the hospitals that are late; 0"
      " waits for all. Needs step_seconds, since a training that followed this machine's speed"
      " could not be repeated."
    ),
    bounds=least(0, 1e9, remedy="use 0 to wait for all"),
    read=(when.LINKS,),
  )
