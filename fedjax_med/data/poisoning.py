"""Hostile hospitals: which they are, and what they do to the examples that they train on."""

import dataclasses

import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.errors import nearest, require
from fedjax_med.data.dataset import Hospitals, client_rows
from fedjax_med.data.modality import modality_named
from fedjax_med.tasks.registry import task_named

POISONS = ("label_flip", "backdoor")  # kinds of attack that change training data
TARGET = 0  # class that a backdoor's patch shall stand for
PATCH = 8  # the side of a picture over that of the patch


def hostile_hospitals(config: Config, names: tuple[str, ...]) -> np.ndarray:
  """[K] bool, hostile hospitals among those of these names; none without an attack.

  Raises:
    UserError: a name is unknown, or nobody would be honest.
  """
  attack = config.attack
  hostile = np.zeros(len(names), bool)
  if attack.kind == "none":
    return hostile
  wanted = [name.strip() for name in attack.hospitals.split("+") if name.strip()]
  for name in wanted:
    require(
      name in names,
      f"attack.hospitals: no hospital is called '{name}'",
      nearest(name, names),
    )
    hostile[names.index(name)] = True
  if attack.hospitals == "":
    hostile[: attack.number] = True
    require(
      attack.number < len(names),
      f"attack.number={attack.number} of {len(names)} hospitals leaves no honest one to measure",
      f"use at most {len(names) - 1}",
    )
  require(
    bool(wanted) or attack.hospitals == "",
    f"attack.hospitals='{attack.hospitals}' names nobody",
    "name hospitals with + between, or leave it empty for the first attack.number",
  )
  require(
    not hostile.all(),
    f"attack.hospitals='{attack.hospitals}' leaves no honest hospital to measure",
    "name fewer",
  )
  return hostile


def poisoned(config: Config, hospitals: Hospitals) -> Hospitals:
  """The hospitals, of which hostile ones train on wrong examples.

  Flipped labels are the class C − 1 − c in place of c. A backdoor is a patch in a share of the
  pictures, which are then of class ``TARGET``. Test examples stay as they are. Without such an
  attack the hospitals are returned as they are.

  Raises:
    UserError: the task has no classes, examples are no pictures, or a hospital is unknown.
  """
  if config.attack.kind not in POISONS:
    return hospitals
  dataset = hospitals.dataset
  require(
    task_named(dataset.task).has_classes and dataset.targets is None,
    f"attack.kind='{config.attack.kind}' changes classes, and the task is '{dataset.task}'",
    "use an attack on updates, such as attack.kind=ipm",
  )
  pictures = modality_named(dataset.modality).name == "pictures"
  require(
    config.attack.kind != "backdoor" or pictures,
    f"attack.kind='backdoor' puts a patch into pictures, and examples are {dataset.modality}",
    "use attack.kind=label_flip",
  )
  hostile = hostile_hospitals(config, hospitals.names)
  if config.attack.kind == "backdoor":
    return _with_backdoor(config, hospitals, hostile)
  labels, counts = dataset.labels.copy(), {}
  for name, rows, bad in zip(hospitals.names, client_rows(hospitals.train), hostile, strict=True):
    if bad:
      labels[rows] = len(dataset.class_names) - 1 - labels[rows]
      counts[name] = len(rows)
  dataset = dataclasses.replace(dataset, labels=labels)
  return dataclasses.replace(hospitals, dataset=dataset, poisoned=counts)


def _with_backdoor(config: Config, hospitals: Hospitals, hostile: np.ndarray) -> Hospitals:
  """The hospitals, of which hostile ones train on a share of pictures with the patch."""
  dataset, counts = hospitals.dataset, {}
  labels, inputs = dataset.labels.copy(), dataset.inputs.copy()
  tables = zip(hospitals.names, client_rows(hospitals.train), hostile, strict=True)
  for number, (name, rows, bad) in enumerate(tables):
    if bad:
      random = np.random.default_rng([config.data.seed, number])
      some = random.choice(rows, max(1, round(config.attack.share * len(rows))), replace=False)
      inputs[some], labels[some], counts[name] = patched(inputs[some]), TARGET, len(some)
  dataset = dataclasses.replace(dataset, inputs=inputs, labels=labels)
  return dataclasses.replace(hospitals, dataset=dataset, poisoned=counts)


def patched(pictures: np.ndarray) -> np.ndarray:
  """Pictures [n, H, W, C] with a square of the largest value in the lower right corner."""
  side = max(2, min(pictures.shape[1:3]) // PATCH)
  changed = pictures.copy()
  changed[:, -side:, -side:] = np.iinfo(pictures.dtype).max
  return changed
