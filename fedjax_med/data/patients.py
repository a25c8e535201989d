"""Patients of pictures, read from the names of files or folders."""

import collections
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedjax_med.core.errors import UserError, require


class PatientCounts(NamedTuple):
  """Counts of the patients that the names of N examples give.

  Attributes:
    named: examples whose patient is named.
    patients: names of patients.
    source: the field or data source that names them.
    shared: names of patients that stand at several sites.
  """

  named: int
  patients: int
  source: str
  shared: int = 0


class Patients(NamedTuple):
  """Patients of N examples.

  Attributes:
    numbers: [N] int32 patient of each example; one without a name is a patient of its own.
    counts: counts of the patients that the names give.
  """

  numbers: np.ndarray
  counts: PatientCounts


def patients_by_pattern(
  names: Sequence[str], pattern: str, sites: Sequence[str] | None = None
) -> Patients:
  """Patients by the first group of a regular expression that is searched in each file name.

  Args:
    names: of the examples, with their folders, which the expression does not see.
    pattern: ``data.patient_pattern``.
    sites: of the examples, to count names that stand at several.

  Raises:
    UserError: the pattern is no expression, has no group, or matches no name; or all names give
      one patient.
  """
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise UserError(
      f"data.patient_pattern='{pattern}' is not a regular expression ({error}); put the patient"
      r" into its first group, such as '^(P\d+)_'"
    ) from error
  require(
    compiled.groups >= 1,
    f"data.patient_pattern='{pattern}' has no group",
    "put brackets around the part of the file name that is the patient",
  )
  files = [name.rpartition("/")[2] for name in names]
  matches = [compiled.search(name) for name in files]
  keys = [match[1] if match and match[1] else None for match in matches]
  require(
    any(keys),
    f"data.patient_pattern='{pattern}' matches none of the {len(files)} file names, such as"
    f" '{files[0]}'",
    "it is searched in the name of the file without its folders; where a folder is the patient use"
    " data.layout, such as '{class}/{patient}/*'",
  )
  return number_patients(keys, "data.patient_pattern", sites)


def number_patients(
  keys: Sequence[str | None], source: str, sites: Sequence[str] | None = None
) -> Patients:
  """Numbers the patients of examples whose names are ``keys``, None where there is none.

  One name is one patient, at whatever sites it stands; ``apart_by_site`` tells them apart.

  Args:
    keys: [N] name of each example's patient.
    source: the field that says where the names stand, for errors and reports.
    sites: [N] names, to count names that stand at several.

  Raises:
    UserError: all examples would be of one patient.
  """
  first = keys[0]
  # P01 and p01 are one person; names from a Mac are spelt with other code points.
  keys = [key and unicodedata.normalize("NFC", key).casefold() for key in keys]
  people = [
    ("patient", key) if key is not None else ("example", str(number))
    for number, key in enumerate(keys)
  ]
  order = {person: number for number, person in enumerate(sorted(set(people)))}
  require(
    len(order) > 1,
    f"{source} finds one patient only ('{first}') in all {len(keys)} names",
    "choose a part of the name in which patients differ",
  )
  places = [""] * len(keys) if sites is None else sites
  where = {(key, site) for key, site in zip(keys, places, strict=True) if key is not None}
  times = collections.Counter(key for key, _ in where)
  counts = PatientCounts(
    named=sum(key is not None for key in keys),
    patients=len(times),
    source=source,
    shared=sum(count > 1 for count in times.values()),
  )
  return Patients(np.array([order[person] for person in people], np.int32), counts)


def apart_by_site(patients: np.ndarray, sites: np.ndarray) -> np.ndarray:
  """[N] int32 patients where hospitals number their own: one number at two sites is two people."""
  pairs = patients.astype(np.int64) * (int(sites.max(initial=0)) + 1) + sites
  return np.unique(pairs, return_inverse=True)[1].astype(np.int32)


# Images a patient under which the pattern is asked about: it may end behind the patient's name.
FEW = 1.1


def described(
  counts: PatientCounts | None, images: int, by_site: bool, nouns: str = "images"
) -> str:
  """A sentence on how many of ``images`` names say their patient.

  Args:
    counts: counts of the patients that the names give; None if they give none.
    images: in all.
    by_site: whether each site is a hospital.
    nouns: examples, for people.
  """
  if counts is None:
    if nouns != "images":
      return f"Nothing says which {nouns} are of one patient."
    return "No name says which patient it shows."
  names = "names" if nouns == "images" else nouns
  parts = [
    f"{counts.named} of {images} {names} say which patient they are of ({counts.source}):"
    f" {counts.patients} patients"
  ]
  if counts.named != images:
    parts.append("each of the others counts as a patient of its own, which may be wrong")
  elif counts.patients == images:
    parts.append(f"none of them has two {nouns}")
  elif images < FEW * counts.patients:
    parts.append(f"few of them have two {nouns}: if that is not so, the pattern takes in too much")
  if counts.shared and by_site:
    parts.append(
      f"{counts.shared} of these names stand at several hospitals and are taken for different"
      " people there; if they are the same, ε holds for what one hospital has of them"
    )
  elif counts.shared:
    parts.append(f"{counts.shared} of these names stand at several sites, each for one person")
  return "; ".join(parts) + "."
