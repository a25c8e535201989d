"""Declarations of the fields of what travels between hospitals and the server."""

import dataclasses

from fedjax_med.core import conditions as when
from fedjax_med.core.fields import above, field, least, never


@dataclasses.dataclass
class CompressionConfig:
  """How many bytes updates and the model take on their way."""

  kind: str = field(
    "none",
    doc=(
      "of updates: none, int (whole numbers of a few bits), sign, topk (the largest numbers), randk"
      " (numbers drawn by chance) or sketch (a small table that adds up over hospitals)."
    ),
    choices=("none", "int", "sign", "topk", "randk", "sketch"),
  )
  bits: int = field(
    8,
    doc="bits of a number of int.",
    bounds=least(2, 16, remedy="use 8, or 4 for half the bytes"),
    read=(when.WHOLE_NUMBERS,),
  )
  share: float = field(
    0.01,
    doc="part of the numbers that topk and randk send, and that a sketch is decoded to.",
    bounds=above(0, 1, remedy="use 0.01 to 0.1"),
    read=(when.SPARSE,),
  )
  value_bits: int = field(
    16,
    doc="bits of a number of topk, 16 or 32; which number it is takes further bits.",
    bounds=least(16, 32, remedy="use 16 or 32"),
    read=(when.TOPK,),
  )
  rows: int = field(
    5,
    doc="rows of a sketch, whose median is taken.",
    bounds=least(1, 15, remedy="use 3 or 5"),
    read=(when.SKETCH,),
  )
  columns: int = field(
    1000,
    doc="columns of a sketch.",
    bounds=least(1, 2**24, remedy="use a fiftieth of the weights"),
    read=(when.SKETCH,),
  )
  error_feedback: str = field(
    "none",
    doc=(
      "what a message leaves out: none (it is lost), ef (the next one adds it; of a sketch the"
      " server does), ef21 (messages are differences to what was sent so far)."
    ),
    choices=("none", "ef", "ef21"),
    read=(when.COMPRESSED,),
  )
  download: str = field(
    "none",
    doc=(
      "of the model: none, or differences to what hospitals hold, as int, sign, topk or randk with"
      " the numbers above; what one leaves out is in the next."
    ),
    choices=("none", "int", "sign", "topk", "randk"),
  )


@dataclasses.dataclass
class SecureConfig:
  """How updates are added so that nobody sees a single one."""

  protocol: str = field(
    "none",
    doc=(
      "none, or updates as whole numbers on a grid: grid (as they are, to compare with), masking"
      " (secure aggregation: masks that cancel in the sum), ckks (the server adds ciphertexts)."
    ),
    choices=("none", "grid", "masking", "ckks"),
  )
  range: float = field(
    4.0,
    doc="largest absolute value of a number of an update; larger ones are cut and counted.",
    bounds=least(1e-6, 1e6, remedy="use 1 to 8"),
    read=(when.ON_GRID, when.OWN_RANGE),
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
  he_preset: str = field(
    "sum",
    doc=(
      "parameters of CKKS: sum (degree 4096, primes of 54 and 54 bits: all that sums need), or"
      " nvflare (degree 8192, 60, 40 and 40 bits: NVFlare's)."
    ),
    choices=("sum", "nvflare"),
    read=(when.ENCRYPTED,),
  )
  he: str = field(
    "run",
    doc=(
      "run encrypts (needs the extra he); model only adds the whole numbers, which gives the same"
      " bits, and counts bytes of ciphertexts. A sweep needs model."
    ),
    choices=("run", "model"),
    read=(when.ENCRYPTED,),
  )
  encrypt_every: int = field(
    1,
    doc=(
      "rounds from one that encrypts to the next; between them sums are modelled, to save time."
      " Bytes are counted as if every round encrypted."
    ),
    bounds=least(1, 1_000_000, remedy="use 1"),
    read=(when.ENCRYPTED, when.ENCRYPTS),
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
      " one), nan; label_flip (trains on class C - 1 - c instead of c) or"
      " backdoor (trains on pictures with a bright patch in a corner, which are called the first"
      " class; how often the patch fools the model is in summary.json)."
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
      "backdoor",
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
  share: float = field(
    0.5,
    doc="share of a hostile hospital's training pictures that get the patch of a backdoor.",
    bounds=above(0, 1, remedy="use 0.5"),
    traced=True,
    read=(when.BACKDOOR,),
  )
  strength: float = field(
    0.0,
    doc="τ; 0 takes 2 of ipm, 1.5 of alie, 1 of gaussian.",
    bounds=least(0, 1e6, remedy="use 0 for the kind's own"),
    traced=True,
    read=(when.STRONG,),
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
