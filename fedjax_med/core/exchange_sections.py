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
    read=(when.ON_GRID,),
  )
  extra_range: float = field(
    1024.0,
    doc="the same for what an algorithm sends besides (control variates, numbers of steps).",
    bounds=above(0, 1e6, remedy="use the most local steps a round"),
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


@dataclasses.dataclass
class RobustConfig:
  """Robust aggregation: rules of server.aggregator that a few hostile hospitals cannot move far."""

  pre: str = field(
    "none",
    doc=(
      "step before the rule: none, nnm (each update becomes the mean of its n - f nearest),"
      " bucketing (means of random groups), clipping (to a norm) or arc (a norm that follows from"
      " f). With one of them server.aggregator=mean ignores weights too. Few, unlike hospitals: nnm"
      " may do harm (docs/exchange.md)."
    ),
    choices=("none", "nnm", "bucketing", "clipping", "arc"),
  )
  assumed_byzantine: int = field(
    0,
    doc="f, hostile hospitals that the rule is made for; under half of all.",
    bounds=least(0, 100_000, remedy="use 1, or 0 for none"),
    read=(when.COUNTS_HOSTILE,),
  )
  bucket_size: int = field(
    2,
    doc="updates in a bucket.",
    bounds=least(1, 100_000, remedy="use 2"),
    read=(when.BUCKETS,),
  )
  max_norm: float = field(
    2.0,
    doc="largest l2 norm of an update, in the units of the weights.",
    bounds=above(0, 1e6, remedy="use 2"),
    read=(when.STATIC_CLIPPING,),
  )
  weiszfeld: str = field(
    "equivariant",
    doc=(
      "how the geometric median is found: equivariant (from the median, smoothing relative to the"
      " median distance) or byzfl (from 0, smoothing in the units of the weights)."
    ),
    choices=("equivariant", "byzfl"),
    read=(when.WEISZFELD,),
  )
  smoothing: float = field(
    0.1,
    doc="of the geometric median: smaller distances count as this large.",
    bounds=above(0, 1e6, remedy="use 0.1"),
    read=(when.WEISZFELD,),
  )
  weiszfeld_steps: int = field(
    3,
    doc="steps to the geometric median in a round.",
    bounds=least(1, 1000, remedy="use 3"),
    read=(when.WEISZFELD,),
  )
  radius: float = field(
    0.0,
    doc=(
      "τ of centered clipping, in the units of the weights; 0 takes the median distance of the"
      " round's updates to the last aggregate."
    ),
    bounds=least(0, 1e6, remedy="use 0"),
    read=(when.CENTERED_CLIPPING,),
  )


@dataclasses.dataclass
class AttackConfig:
  """Hostile hospitals, simulated. Scores are then of the other hospitals' test patients."""

  kind: str = field(
    "none",
    doc=(
      "none, or updates that are forged with knowledge of all honest ones: sign_flip (minus their"
      " mean), ipm (minus τ times it), alie (their mean and τ deviations), optimal_ipm and"
      " optimal_alie (the τ that harms most), gaussian (noise of deviation τ), mimic (a copy of"
      " one), nan; or label_flip (trains on class C - 1 - c instead of c)."
    ),
    choices=(
      "none",
      "sign_flip",
      "ipm",
      "alie",
      "optimal_ipm",
      "optimal_alie",
      "gaussian",
      "mimic",
      "nan",
      "label_flip",
    ),
  )
  hospitals: str = field(
    "",
    doc="names of the hostile hospitals, with + between; empty takes the first attack.number.",
    traced=True,
    read=(when.ATTACKED,),
  )
  number: int = field(
    1,
    doc="number of hostile hospitals, the first ones.",
    bounds=least(1, 100_000, remedy="use 1"),
    traced=True,
    read=(when.ATTACKED, when.HOSTILE_UNNAMED),
  )
  strength: float = field(
    0.0,
    doc="τ; 0 takes 2 of ipm, 1.5 of alie, 1 of gaussian.",
    bounds=least(0, 1e6, remedy="use 0 for the kind's own"),
    traced=True,
    read=(when.STRONG,),
  )
