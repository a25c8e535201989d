"""Hostile hospitals: which they are, and what they do to the labels that they train on."""

import dataclasses

import numpy as np

from fedjax_med.core.config import Config
from fedjax_med.core.errors import nearest, require
from fedjax_med.data.dataset import Hospitals, client_rows
from fedjax_med.tasks.registry import task_named

POISONS = ("label_flip",)  # kinds of attack that change training data


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
  """The hospitals, of which hostile ones train on the class C − 1 − c in place of c.

  Test examples keep their class. Without such an attack the hospitals are returned as they are.

  Raises:
    UserError: the task has no classes, or a hospital is unknown.
  """
  if config.attack.kind not in POISONS:
    return hospitals
  dataset = hospitals.dataset
  require(
    task_named(dataset.task).has_classes and dataset.targets is None,
    f"attack.kind='{config.attack.kind}' changes classes, and the task is '{dataset.task}'",
    "use an attack on updates, such as attack.kind=ipm",
  )
  hostile = hostile_hospitals(config, hospitals.names)
  labels, counts = dataset.labels.copy(), {}
  for name, rows, bad in zip(hospitals.names, client_rows(hospitals.train), hostile, strict=True):
    if bad:
      labels[rows] = len(dataset.class_names) - 1 - labels[rows]
      counts[name] = len(rows)
  dataset = dataclasses.replace(dataset, labels=labels)
  return dataclasses.replace(hospitals, dataset=dataset, poisoned=counts)
