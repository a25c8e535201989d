"""Declarations of the fields of what travels between hospitals and the server."""

import dataclasses

from fedjax_med.core import conditions as when
from fedjax_med.core.fields import above, field, least


@dataclasses.dataclass
class SecureConfig:
  """How updates are added so that nobody sees a single one."""

  protocol: str = field(
    "none",
    doc=(
      "none, or updates as whole numbers on a grid: grid (as they are, to compare with), masking"
      " (secure aggregation: masks that cancel in the sum)."
    ),
    choices=("none", "grid"),
  )
  range: float = field(
    4.0,
    doc="largest absolute value of a number of an update; larger ones are cut and counted.",
    bounds=above(0, 1e6, remedy="use 1 to 8"),
    read=(when.ON_GRID, when.OWN_RANGE),
  )
  extra_range: float = field(
    1024.0,
    doc="the same for what an algorithm sends besides (control variates, numbers of steps).",
    bounds=above(0, 1e6, remedy="use the most local steps a round"),
    read=(when.ON_GRID, when.SENDS_MORE, when.OWN_RANGE),
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
