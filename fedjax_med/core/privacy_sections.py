"""Declarations of the fields of differential privacy, of records and of whole hospitals."""

import dataclasses

from fedjax_med.core import conditions as when
from fedjax_med.core.fields import above, field, least
from fedjax_med.core.rounding import MIN_CLIP_NORM


@dataclasses.dataclass
class PrivacyConfig:
  """Differential privacy of each hospital's records or patients (DP-SGD in its local steps)."""

  mechanism: str = field("none", doc="none or dp_sgd.", choices=("none", "dp_sgd"))
  unit: str = field(
    "record",
    doc=(
      "record (one image), patient (all images of a patient; every name has to say whose it"
      " is) or group (all near-duplicates of an image, where patients are not known)."
      " data.split=grouped keeps both in one hospital; whole hospitals: client_privacy."
    ),
    choices=("record", "group", "patient"),
    traced=True,
    read=(when.DP_SGD,),
  )
  rows_per_unit: int = field(
    0,
    doc="images of a patient or group that a step looks at, at most; 0 means 8.",
    bounds=least(0, 100_000, remedy="use 0 to let it be chosen"),
    traced=True,
    read=(when.DP_SGD, when.PATIENTS),
  )
  augmentation_multiplicity: int = field(
    1,
    doc=(
      "random changes of each image in a step, whose mean gradient is clipped once; needs"
      " client.augmentation."
    ),
    bounds=least(1, 1000, remedy="use 1, or 4 to 16"),
    read=(when.DP_SGD,),
  )
  noise_multiplier: float = field(
    0.0,
    doc="σ; noise standard deviation over clip norm. 0 with a target ε: calibrated.",
    bounds=least(0, 1e6, remedy="use 1"),
    traced=True,
    read=(when.DP_SGD,),
  )
  target_epsilon: float = field(
    0.0,
    doc=(
      "with noise_multiplier=0 the ε that σ is calibrated to, per hospital; with a"
      " noise_multiplier the budget before which the run stops. 0 means none."
    ),
    bounds=least(0, 1e6, remedy="use 8, or 0 for none"),
    traced=True,
    read=(when.DP_SGD,),
    shapes_run=when.RECORDS_CALIBRATED,
  )
  solve_for: str = field(
    "noise",
    doc=(
      "what target_epsilon decides: noise (or the budget, see above), rounds, batch_size"
      " (each the most that the target allows at the given noise_multiplier) or clip_norm (the"
      " largest that the given noise_stddev allows)."
    ),
    choices=("noise", "rounds", "batch_size", "clip_norm"),
    traced=True,
    read=(when.DP_SGD,),
  )
  same_noise: bool = field(
    False,
    doc="calibrate one σ for all hospitals, the largest that any of them needs.",
    traced=True,
    read=(when.DP_SGD, when.CALIBRATED, when.FINDS_NOISE),
  )
  noise_stddev: float = field(
    0.0,
    doc="standard deviation of the noise on the sum, σ·C, for solve_for=clip_norm.",
    bounds=least(0, 1e6, remedy="use 0 unless solve_for=clip_norm"),
    traced=True,
    read=(when.DP_SGD, when.FINDS_CLIP_NORM),
  )
  clip_norm: float = field(
    1.0,
    doc="C, largest l2 norm of one example's gradient.",
    bounds=least(MIN_CLIP_NORM, 1e6, remedy="use 1"),
    traced=True,
    read=(when.DP_SGD, when.GIVEN_CLIP_NORM),
  )
  delta: float = field(
    0.0,
    doc="δ; 0 means 1 / (10 n) at each hospital. It must be under 1/n.",
    bounds=least(0, 1, remedy="use 0 for 1/(10 n)"),
    traced=True,
    read=(when.DP_SGD,),
  )
  batch_cap: int = field(
    0,
    doc=(
      "examples a truncated Poisson batch holds at most; 0 means 5 standard deviations above"
      " the expected size."
    ),
    bounds=least(0, 1_000_000, remedy="use 0 to let it be chosen"),
    read=(when.DP_SGD,),
  )
  bands: int = field(
    1,
    doc=(
      "local steps that noise is correlated over (banded matrix factorisation): each takes"
      " back part of the noise of those before. 1 is independent noise. 4 or 8 help where ε is"
      " large and batches are a small share of a hospital, more do harm; docs/privacy.md has"
      " numbers."
    ),
    bounds=least(1, 1000, remedy="use 1 for independent noise"),
    read=(when.DP_SGD,),
  )
  clipping: str = field(
    "auto",
    doc=(
      "auto, book_keeping (one backward pass), reference (a gradient per example, any model)"
      " or two_pass (two backward passes, least memory; its rounding has no bound, so auto"
      " never takes it)."
    ),
    choices=("auto", "book_keeping", "two_pass", "reference"),
    read=(when.DP_SGD,),
  )
  adjacency: str = field(
    "zero_out",
    doc="zero_out (a unit replaced by nothing; the number of units is public).",
    choices=("zero_out",),
    read=(when.DP_SGD,),
  )
  sampling: str = field(
    "poisson",
    doc="poisson (each unit by itself, with one probability).",
    choices=("poisson",),
    read=(when.DP_SGD,),
  )


@dataclasses.dataclass
class ClientPrivacyConfig:
  """Differential privacy of whole hospitals (DP-FedAvg)."""

  mechanism: str = field(
    "none",
    doc=(
      "none or dp_fedavg; runs together with privacy.mechanism=dp_sgd, and both ε are reported."
    ),
    choices=("none", "dp_fedavg"),
  )
  noise: str = field(
    "server",
    doc=(
      "who adds the noise: server (which has to be trusted) or distributed (each hospital a share"
      " of it, so that ε holds against the server too; needs secure aggregation)."
    ),
    choices=("server", "distributed"),
    read=(when.DP_FEDAVG,),
  )
  colluders: int = field(
    1,
    doc=(
      "hospitals that may tell the server, or each other, their share of the noise: ε holds against"
      " it and any so many. With 0 it holds against no other hospital."
    ),
    bounds=least(0, 100_000, remedy="use 1"),
    read=(when.DP_FEDAVG, when.SHARED_NOISE),
  )
  noise_multiplier: float = field(
    0.0,
    doc=(
      "σ; noise standard deviation on the sum of updates over clip norm. 0 with a target ε:"
      " calibrated."
    ),
    bounds=least(0, 1e6, remedy="use 1"),
    traced=True,
    read=(when.DP_FEDAVG,),
  )
  target_epsilon: float = field(
    0.0,
    doc=(
      "with noise_multiplier=0 what σ is calibrated to; with a noise_multiplier the budget"
      " before which the run stops. 0 means none."
    ),
    bounds=least(0, 1e6, remedy="use 8, or 0 for none"),
    traced=True,
    read=(when.DP_FEDAVG,),
    shapes_run=when.CLIENTS_CALIBRATED,
  )
  clip_norm: float = field(
    1.0,
    doc="largest l2 norm of one hospital's update; with clipping=adaptive of the first round.",
    bounds=least(MIN_CLIP_NORM, 1e6, remedy="use 1"),
    read=(when.DP_FEDAVG,),
  )
  delta: float = field(
    0.0,
    doc="δ; 0 means 1 / (10 K). It must be under 1/K, K being the number of hospitals.",
    bounds=least(0, 1, remedy="use 0 for 1/(10 K)"),
    traced=True,
    read=(when.DP_FEDAVG,),
  )
  clipping: str = field(
    "fixed",
    doc="fixed, or adaptive (the clip norm follows a quantile of the updates' norms, noised).",
    choices=("fixed", "adaptive"),
    traced=True,
    read=(when.DP_FEDAVG,),
  )
  quantile: float = field(
    0.5,
    doc="share of updates that an adaptive clip norm lets pass unclipped.",
    bounds=above(0, 1, remedy="use 0.5"),
    traced=True,
    read=(when.DP_FEDAVG, when.ADAPTIVE),
  )
  clip_learning_rate: float = field(
    0.2,
    doc="geometric step of an adaptive clip norm.",
    bounds=least(0, 10, remedy="use 0.2"),
    traced=True,
    read=(when.DP_FEDAVG, when.ADAPTIVE),
  )
  count_noise: float = field(
    0.0,
    doc=(
      "noise on the count of unclipped updates; 0 means a twentieth of the expected cohort,"
      " and at least the noise multiplier. Its cost is inside σ."
    ),
    bounds=least(0, 1e6, remedy="use 0 to let it be chosen"),
    traced=True,
    read=(when.DP_FEDAVG, when.ADAPTIVE),
  )
