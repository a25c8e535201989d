"""Digests of a sweep's sets of images, kept in its folder so that no two data sets mix."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedjax_med.core.config import fingerprint
from fedjax_med.core.errors import UserError, require
from fedjax_med.data.dataset import Dataset, array_leaves
from fedjax_med.data.poisoning import POISONS
from fedjax_med.folder import writing as files
from fedjax_med.sweep.points import Planned, image_fields
from fedjax_med.tasks.registry import task_named

FOLDER = "data"
# Where images lie, and what is done about damaged ones, is not which images there are.
PLACES = ("path", "cache_dir", "strict")


def digest(dataset: Dataset) -> str:
  """SHA-256 of the images of a dataset, their targets, names, classes, sites and patients.

  Synthetic images, which follow from the others, are not in it.
  """
  sha, real = hashlib.sha256(), dataset.num_real
  words = [dataset.names[:real], dataset.class_names, dataset.site_names]
  if dataset.targets is not None:
    words += [dataset.task, dataset.targets.names]
    words += [dataset.table.manifest.horizon] if dataset.table else []
  sha.update(json.dumps(words).encode())
  known = dataset.sites, dataset.patients, dataset.in_test
  # What scales inputs and targets follows from the split; the set is the same under all of them.
  raw = dataset.targets
  targets = [task_named(dataset.task).targets(dataset)] if raw is None else [raw.values]
  targets = [leaf for tree in targets for leaf in array_leaves(tree)]
  inputs = dataset.inputs if dataset.unscaled is None else dataset.unscaled
  examples = [leaf[:real] for leaf in (*array_leaves(inputs), *targets)]
  for array in (*examples, *known):
    if array is not None:
      sha.update(f"{array.dtype} {array.shape}".encode())
      sha.update(np.ascontiguousarray(array).tobytes())
    sha.update(b";")
  if dataset.kept_together is not None:
    sha.update(dataset.kept_together.tobytes())
  return sha.hexdigest()


def bind(workdir: pathlib.Path, planned: Sequence[Planned]) -> None:
  """Writes digests of the images of the runs, or checks that they are those of the first start.

  Args:
    workdir: of the sweep.
    planned: every run that this process sees to, those that are done as well.

  Raises:
    UserError: the sweep began with other images; nothing is written then.
  """
  present: dict[str, dict[str, Any]] = {}
  for run in planned:
    key = _key(run)
    if key not in present:
      data, dataset = run.case.config.data, run.case.hospitals.dataset
      present[key] = {
        "source": data.source,
        "path": data.path,
        "num_images": dataset.num_real,
        "sha256": digest(dataset),
      }
  folder = workdir / FOLDER
  folder.mkdir(exist_ok=True)
  known = records(workdir)
  for key, record in present.items():
    _require_same(workdir, known.get(key, record), record)
  for key, record in present.items():
    path = folder / f"{key}.json"
    files.create_whole(path, files.as_json(record))
    path.chmod(0o600)  # whoever sees it can confirm a guess of all images
    _require_same(workdir, _read(path), record)  # another shard may have been faster


def records(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Records of the sets of images of a sweep, by the fields that make a set.

  Raises:
    UserError: a record cannot be read.
  """
  return {path.stem: _read(path) for path in sorted((workdir / FOLDER).glob("*.json"))}


def join(folders: Sequence[pathlib.Path]) -> dict[str, dict[str, Any]]:
  """The records of several folders of one sweep.

  Raises:
    UserError: two folders are of different images; both are named.
  """
  known: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}
  for folder in folders:
    for key, record in records(folder).items():
      first, other = known.setdefault(key, (folder, record))
      require(
        other["sha256"] == record["sha256"],
        f"{first} is of the images of {_described(other)}, {folder} of others, of"
        f" {_described(record)}",
        "merge folders of the same images: run the points of one of the two again, on the data of"
        " the other, in a new --workdir",
      )
  return {key: record for key, (_, record) in known.items()}


def _key(run: Planned) -> str:
  """Names a set of images by the fields that make it. A place is one if it is an axis."""
  config = run.case.config
  fields = image_fields(config.data)
  fields = {k: v for k, v in fields.items() if k not in PLACES or f"data.{k}" in run.point}
  if config.attack.kind in POISONS:  # who holds what decides which targets are wrong
    fields["poisoned"] = [dataclasses.asdict(part) for part in (config.attack, config.partition)]
    split = dataclasses.asdict(config.data)
    fields["split"] = {k: v for k, v in split.items() if k not in PLACES}
  return fingerprint(fields)


def _require_same(workdir: pathlib.Path, known: dict[str, Any], record: dict[str, Any]) -> None:
  require(
    known["sha256"] == record["sha256"],
    f"--workdir={workdir} began with the images of {_described(known)}, and {_described(record)}"
    " holds others now, with which its points cannot be compared",
    "give the data of the first start, or use another --workdir",
  )


def _described(record: dict[str, Any]) -> str:
  place = f"data.path={record['path']}" if record["path"] else f"data.source={record['source']}"
  return f"{place} ({record['num_images']} images, digest {record['sha256'][:12]})"


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    record = json.loads(path.read_text(encoding="utf-8"))
    return {name: record[name] for name in ("source", "path", "num_images", "sha256")}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} cannot be read ({error!r}); restore it") from error
