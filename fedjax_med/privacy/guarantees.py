"""Guarantees of a run to one kind of unit (record, patient, client), and their gaps."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.core.errors import require
from fedjax_med.core.rounding import NORM_SLACK
from fedjax_med.privacy.accounting import discretization_interval, epsilon
from fedjax_med.privacy.discrete_gaussian import TABLE_DISTANCE
from fedjax_med.privacy.distributed import DistributedGaussian
from fedjax_med.privacy.mechanism import Mechanism

# Where a mechanism stands in privacy.json when there is none.
NO_PRIVACY: dict[str, Any] = {"mechanism": "none", "epsilon_max": None, "guarantees": []}


class Unit(NamedTuple):
  """Words that describe a unit of privacy.

  Attributes:
    protects: description of one unit.
    adjacency: the two datasets that ε compares.
    mechanism: steps that protect it.
    holds_against: readers against whom ε holds.
    not_against: readers against whom it does not hold; empty if there are none.
  """

  protects: str
  adjacency: str
  mechanism: str
  holds_against: tuple[str, ...]
  not_against: tuple[str, ...]


_DP_SGD = (
  "DP-SGD {place}: in each local step a Poisson sample of the {unit}s, cut to batch_cap;"
  " the gradient of each {unit} clipped to clip_norm; Gaussian noise of noise_multiplier *"
  " clip_norm on the sum; a fixed denominator"
)
_EVERYBODY = (
  "the server, though it reads every update of every hospital",
  "the other hospitals, though they see the global model of every round",
  "whoever gets a model of any round",
)
UNITS = {
  "record": Unit(
    protects="one training image of one hospital",
    adjacency="zero-out (one record replaced by nothing; the number of records of each hospital is"
    " public)",
    mechanism=_DP_SGD.format(place="at the hospital", unit="record"),
    holds_against=_EVERYBODY,
    not_against=(),
  ),
  "group": Unit(
    protects="all training images of one group of near-duplicates, together (patients are not"
    " known)",
    adjacency="zero-out (one group replaced by nothing; the number of groups of each hospital is"
    " public)",
    mechanism=_DP_SGD.format(place="at the hospital", unit="group"),
    holds_against=_EVERYBODY,
    not_against=(),
  ),
  "patient": Unit(
    protects="all training images of one patient, and their near-duplicates, together",
    adjacency="zero-out (one patient replaced by nothing; the number of patients of each hospital"
    " is public)",
    mechanism=_DP_SGD.format(place="at the hospital", unit="patient"),
    holds_against=_EVERYBODY,
    not_against=(),
  ),
  "client": Unit(
    protects="everything that one hospital holds",
    adjacency="zero-out (one hospital's update replaced by nothing; the number of hospitals is"
    " public)",
    mechanism="DP-FedAvg at the server: in each round a Poisson sample of the hospitals, cut to"
    " batch_cap; the update of each hospital clipped to clip_norm; Gaussian noise of"
    " noise_multiplier * clip_norm on the sum; a fixed denominator",
    holds_against=(
      "the other hospitals, though they see the global model of every round",
      "whoever gets a model of any round",
    ),
    not_against=(
      "the server, which sees what hospitals send before it adds the noise, and has to be trusted",
    ),
  ),
}
_MODEL = ("whoever gets a model of any round",)
# Who may look, and who may not, where one party trains by itself.
BASELINES = {
  "alone": (_MODEL, ("the hospital itself, which holds the images",)),
  "pooled": (_MODEL, ("whoever pools the images, and sees them all",)),
}
# Units that hold several images.
SEVERAL_IMAGES = ("group", "patient")
NOT_COVERED = (
  "Losses, accuracies and gradient norms shown or stored during training are not noised.",
  "Normalisation statistics taken over more than one image are not noised.",
  "Stopping, or choosing a round, by a validation score uses data outside the guarantee.",
  "Who was drawn is to stay secret. Checkpoints tell which hospitals took part in a round, and so"
  " does the log where no ε rests on that; running times, and losses and shares in the log, hint at"
  " how many records were drawn.",
  "Counts are told as they are: images with near-duplicates, images that stand in several classes,"
  " files left out with their class and the reason, patients named. So is the range of grey values,"
  " which follows from all images unless data.window gives it. Names of files, which may be those"
  " of patients, stand in files.json of the run's folder and in errors alone: give it to nobody.",
  "A run that stops because a loss or a prediction is not finite tells that much of the data. One"
  " that protects whole hospitals goes on and logs how many of them sent one that counted 0.",
  "Tuning: the guarantee is of one run, not of the runs tried before it.",
  "The number of hospitals and how many images of each class each one holds are public.",
  "Whoever has the secret of the run (noise.key in its folder) can compute all draws again and take"
  " off the noise. Give it to nobody, nor the digests of images in the folder of a sweep (data/).",
  "Runs of one secret, flags, data, package versions and sources have the same sample and noise."
  " What is computed again, after a kill, on another machine or in another layout, differs by"
  " rounding; that difference has no noise in it, follows from the records, and grows with the"
  " rounds. ε does not count it: give out one of them only.",
  "Simulation-grade randomness: a normal is the sum of four float32 normals over two, which stops"
  " at 10.84 standard deviations; releases are whole numbers of a grain of 2^-18 of the noise's"
  " standard deviation (more for large batches with little noise); threefry is no certified"
  " cryptographic generator. The values of ε hold for ideal randomness.",
)
# What a run with synthetic images has to say, which is one without a guarantee.
SYNTHETIC_GAP = (
  "The synthetic images were made by GANs that each hospital trained on its images, without noise:"
  " they may resemble or repeat those images, and are no safer to show than they are."
)


def statistics_gap(names: Sequence[str]) -> str:
  """A sentence on statistics of the training records that hospitals tell; empty of none.

  Args:
    names: of the statistics, as ``Dataset.released`` has them.
  """
  if not names:
    return ""
  told = " and ".join(names)
  return (
    f"{told[0].upper()}{told[1:]}: exact sums or values over the records leave every hospital, and"
    " no ε counts them: it is that of a training in which they are public. hospitals.json has what"
    " follows from them."
  )


_RECORDS_ONLY = "A patient with several records is protected as single records, not as a patient."


class Guarantee(NamedTuple):
  """The mechanisms that protect one kind of unit in a run, from which its ε follows.

  Attributes:
    unit: a name of UNITS.
    names: [P] parties: the hospitals, or the one server.
    mechanisms: [P] mechanism of one release of each.
    deltas: [P] δ of each.
    place: the training: federation, or a name of BASELINES.
  """

  unit: str
  names: tuple[str, ...]
  mechanisms: tuple[Mechanism, ...]
  deltas: tuple[float, ...]
  place: str = "federation"

  def only(self, party: int) -> "Guarantee":
    """The guarantee of one party by itself."""
    one = slice(party, party + 1)
    return self._replace(
      names=self.names[one], mechanisms=self.mechanisms[one], deltas=self.deltas[one]
    )


def spent(guarantee: Guarantee, counts: Sequence[int] | np.ndarray) -> tuple[float, ...]:
  """[P] ε of every party after ``counts`` [P] releases of each, empty batches counted.

  A unit lies at one party, so parties compose in parallel: never a sum. No credit is taken for
  client sampling at record or patient level, nor for aggregation over hospitals.

  Raises:
    UserError: lengths differ, there is no party, or a number is not valid.
  """
  parties = guarantee.names, guarantee.mechanisms, guarantee.deltas
  lengths = (*map(len, parties), len(counts))
  require(
    len(set(lengths)) == 1 and len(counts) > 0,
    f"names, mechanisms, deltas and counts have lengths {lengths}",
    "give one of each for every hospital, at least one hospital",
  )
  rows = zip(guarantee.mechanisms, counts, guarantee.deltas, strict=True)
  return tuple(epsilon(*row) for row in rows)


# What a checkpoint holds where noise is correlated.
BANDS_GAP = (
  "Checkpoints hold the noise of the last steps, which later steps take back: whoever has one, and"
  " the models before and after it, can subtract the noise. Give checkpoints to nobody; the weights"
  " alone are safe to share."
)


_COUNTED = (
  ". The clip norm is adaptive: a second release of each round, how many updates were within it,"
  " with Gaussian noise of count_noise, moves it; clip_norm is the first round's. noise_multiplier"
  " is that of both releases together"
)


def shared_noise(guarantee: Guarantee) -> DistributedGaussian | None:
  """The mechanism of hospitals that add the noise themselves; None where they do not."""
  first = guarantee.mechanisms[0] if guarantee.mechanisms else None
  return first if isinstance(first, DistributedGaussian) else None


def readers(guarantee: Guarantee) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Readers against whom ε holds, and those against whom it does not."""
  unit, shared = UNITS[guarantee.unit], shared_noise(guarantee)
  if shared is None:
    return BASELINES.get(guarantee.place, (unit.holds_against, unit.not_against))
  model, count = _MODEL[0], shared.colluders
  if count == 0:
    return (
      ("the server, which sees sums over all hospitals only", model),
      ("any other hospital, which sees the models and can take its own noise off them",),
    )
  some = f"any {count} other hospitals" if count > 1 else "any one other hospital"
  return (
    (f"the server, which sees sums over all hospitals only, together with {some}", some, model),
    (f"{count + 1} or more other hospitals that tell each other or the server their noise",),
  )


_SHARED = (
  "DP-FedAvg with noise of the hospitals' own, under secure aggregation: in each round the update"
  " of every hospital, clipped to clip_norm, times scale, rounded by chance to whole numbers; to"
  " them each hospital adds discrete Gaussian noise of noise_multiplier * clip_norm * scale /"
  " sqrt({honest}), so that the noise of {honest} of the {hospitals} hospitals, which ε counts, is"
  " noise_multiplier * clip_norm; the sum modulo a power of two; a fixed denominator"
)
# What ε against the server rests on.
SHARED_ADJACENCY = (
  "zero-out (one hospital's update replaced by 0, to which it adds its noise all the same; the"
  " number of hospitals is public, and staying away is not covered)"
)
SHARED_GAP = (
  "The noise of hospitals hides an update in the sum alone: ε against the server rests on a secure"
  " aggregation that shows it nothing else, which this simulator computes the result and the bytes"
  " of, and on hospitals that add their noise, all of them in every round. Losses, scores and the"
  " count of hospitals whose update was not finite must not reach the server either. In this"
  " simulator all noise follows from one secret (noise.key), which neither the server nor a"
  " hospital may hold; in a deployment each hospital draws from its own. The whole numbers of"
  f" noise are drawn from tables whose total variation distance from the discrete Gaussian is up to"
  f" {TABLE_DISTANCE:.1e} a draw; ε counts none of it."
)


def mechanism_of(guarantee: Guarantee) -> str:
  """A sentence or two on the protection of a unit."""
  shared = shared_noise(guarantee)
  if shared is not None:
    return _SHARED.format(honest=shared.honest, hospitals=shared.num_units)
  bands, unit = max(mechanism.bands for mechanism in guarantee.mechanisms), guarantee.unit
  counted = any(mechanism.count_noise for mechanism in guarantee.mechanisms)
  place = "where the images are pooled" if guarantee.place == "pooled" else "at the hospital"
  if unit == "client":
    if not counted:
      return UNITS[unit].mechanism
    return (
      UNITS[unit].mechanism.replace("of noise_multiplier", "of sum_noise_multiplier") + _COUNTED
    )
  if bands == 1:
    return _DP_SGD.format(place=place, unit=unit)
  return (
    f"DP-SGD {place} with correlated noise (banded matrix factorisation): in each local step"
    f" a Poisson sample of one of {bands} fixed subsets of the {unit}s, which take turns, cut to"
    f" batch_cap; the gradient of each {unit} clipped to clip_norm; on the sum Gaussian noise of"
    " noise_multiplier * clip_norm, multiplied by the inverse of a banded matrix whose columns have"
    f" norm 1; a fixed denominator. T steps count as T / {bands} releases, rounded up, and the"
    " sampling probability is that within a subset"
  )


def _noises(mechanism: Mechanism) -> dict[str, float]:
  return {
    "sum_noise_multiplier": mechanism.sum_noise_multiplier,
    "count_noise": mechanism.count_noise,
  }


def shares_of(mechanism: DistributedGaussian) -> dict[str, float]:
  """Numbers that ε of hospitals' own noise is computed from, beside σ, C and K."""
  return {
    "colluders": mechanism.colluders,
    "scale": mechanism.scale,
    "num_parameters": mechanism.num_parameters,
    "sensitivity": mechanism.sensitivity,
    "rho": mechanism.rho,
    "xi": mechanism.xi,
    "share": mechanism.share,
  }


def accountant_version() -> str:
  """Version of the installed library that the accountant is from."""
  return importlib.metadata.version("dp-accounting")


def describe(
  guarantee: Guarantee,
  counts: Sequence[int] | np.ndarray,
  epsilons: Sequence[float] | None = None,
  version: str = "",
) -> dict[str, Any]:
  """One guarantee as privacy.json holds it, after ``counts`` [P] releases; see ``spent``.

  If not given, their ε are computed here, by the installed version of the library.
  """
  epsilons = spent(guarantee, counts) if epsilons is None else epsilons
  unit = UNITS[guarantee.unit]
  holds_against, not_against = readers(guarantee)
  intervals = [discretization_interval(m) for m in guarantee.mechanisms if m.noise_multiplier > 0]
  return {
    "unit": guarantee.unit,
    "protects": unit.protects,
    "adjacency": SHARED_ADJACENCY if shared_noise(guarantee) else unit.adjacency,
    "mechanism": mechanism_of(guarantee),
    "holds_against": list(holds_against),
    "not_against": list(not_against),
    "accountant": {
      "name": "PLD",
      "library": "dp-accounting",
      "version": version or accountant_version(),
      "value_discretization_interval": max(intervals, default=0.0),
      "sensitivity_slack": NORM_SLACK,
    },
    "epsilon_max": max(epsilons),
    "parties": [
      {
        "name": name,
        "n": mechanism.num_units,
        "sampling_probability": mechanism.sampling_probability,
        "batch_cap": mechanism.batch_cap,
        "noise_multiplier": mechanism.noise_multiplier,
        "coefficients": list(mechanism.coefficients),
        **(_noises(mechanism) if mechanism.count_noise else {}),
        **(shares_of(mechanism) if isinstance(mechanism, DistributedGaussian) else {}),
        "clip_norm": mechanism.clip_norm,
        "steps": int(count),
        "delta": float(delta),
        "epsilon": value,
      }
      for name, mechanism, count, delta, value in zip(
        guarantee.names, guarantee.mechanisms, counts, guarantee.deltas, epsilons, strict=True
      )
    ],
  }


def baseline_gaps(guarantees: Sequence[Guarantee]) -> list[str]:
  """Gaps of a run with baselines (hospitals alone, pooled data)."""
  units = {guarantee.unit for guarantee in guarantees}
  local, gaps = units - {"client"}, []
  if local:
    gaps.append(
      "The baselines are further trainings on the same records, each with noise of its own"
      " (baselines_epsilon says their ε where they have ended): a hospital that releases the"
      " federation's model, its own and the pooled one spends at most the sum of their ε and of"
      " their δ. Whoever pools the images for the pooled one sees them all."
    )
  if "client" in units:
    others = "" if local else ", and no other: they are trained WITHOUT NOISE"
    gaps.append(
      "The baselines (each hospital's own model, and the one of pooled data) have no guarantee for"
      f" whole hospitals{others}."
    )
  return gaps


def privacy_record(
  guarantees: Sequence[Guarantee],
  counts: Sequence[Sequence[int] | np.ndarray],
  gaps: Sequence[str] = (),
  epsilons: Sequence[Sequence[float]] | None = None,
  version: str = "",
) -> dict[str, Any]:
  """Claims of a run after ``counts`` releases of each party of each guarantee.

  Args:
    guarantees: guarantee of each kind of unit.
    counts: releases.
    gaps: further sentences on risks that are not covered.
    epsilons: ε of each party of each guarantee; None computes them.
    version: of the library that computed them; empty is the installed one.

  Returns:
    Plain dictionary; ``epsilon_max`` is of the first guarantee (ε of different units are never
    added), and infinite where a party trained without noise.
  """
  if not guarantees:
    return NO_PRIVACY
  known = epsilons or [None] * len(guarantees)
  described = [describe(*each, version) for each in zip(guarantees, counts, known, strict=True)]
  if any(mechanism.bands > 1 for guarantee in guarantees for mechanism in guarantee.mechanisms):
    gaps = [BANDS_GAP, *gaps]
  if any(map(shared_noise, guarantees)):
    gaps = [SHARED_GAP, *gaps]
  units = {guarantee.unit for guarantee in guarantees}
  return {
    "mechanism": "; ".join(map(mechanism_of, guarantees)),
    "epsilon_max": described[0]["epsilon_max"],
    "guarantees": described,
    "not_covered": [*NOT_COVERED, *([_RECORDS_ONLY] if "record" in units else []), *gaps],
  }
