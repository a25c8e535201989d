"""Makes runs of the points of a sweep, and groups of runs that share a program."""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from fedjax_med.core.config import (
  ClientPrivacyConfig,
  Config,
  DataConfig,
  PrivacyConfig,
  declared,
  flat,
  get_field,
  set_field,
  to_dict,
)
from fedjax_med.core.errors import UserError, require, require_choice
from fedjax_med.core.source_facts import DRAWN_SPLITS
from fedjax_med.core.unread import changed, default_of, drop_unread, state, unmet
from fedjax_med.core.unread import shown as shown_value
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import Dataset, Hospitals, array_leaves, input_bytes
from fedjax_med.data.hospitals import build_hospitals
from fedjax_med.data.poisoning import POISONS, poisoned
from fedjax_med.data.sources import load_dataset, source_named
from fedjax_med.exchange.ckks import require_modelled
from fedjax_med.exchange.registry import require_parts
from fedjax_med.federated.registry import require_rules
from fedjax_med.models import registry
from fedjax_med.prepare.case import Case, baselines, federation
from fedjax_med.prepare.protection import cohort_cap
from fedjax_med.prepare.synthetic_images import image_key, reserve_synthetic
from fedjax_med.sweep.grid import Point
from fedjax_med.tasks.registry import task_named

SEED_AXES = ("partition", "init", "sampling")


class Key(NamedTuple):
  """Names a run of a sweep.

  Attributes:
    number: place of its point in the sweep, from 0.
    baseline: which of the point's baselines it is; empty for the federation itself.
  """

  number: int
  baseline: str = ""


class Planned(NamedTuple):
  """One run, ready to start.

  Attributes:
    key: its name.
    point: values of the axes.
    case: the run.
  """

  key: Key
  point: Point
  case: Case


def configure(base: Config, point: Point, seed_axes: Sequence[str]) -> Config:
  """The configuration of a point, validated.

  ``target_epsilon=inf`` is training without that kind of privacy. ``seed`` goes where
  ``seed_axes`` say: partition (data.seed: split and partition, and the images of phantoms), init
  (initial weights), sampling (sampling, noise, participation). A setting of ``base`` that this
  point does not read is at its default: other points may read it (``require_read``).

  Raises:
    UserError: a value breaks its rule, or an axis has a value that the point does not read; the
      sentence names the point.
  """
  config = copy.deepcopy(base)
  values = _with_seeds(base, point, seed_axes)
  for name, value in values.items():
    set_field(config, name, type(get_field(config, name))(value))
  if math.isinf(config.privacy.target_epsilon):
    config.privacy = PrivacyConfig()
  if math.isinf(config.client_privacy.target_epsilon):
    config.client_privacy = ClientPrivacyConfig()
  others = declared().keys() - values.keys()
  drop_unread(config, others)
  try:
    for name in others & {f"model.{setting}" for setting in registry.unread(config.model)}:
      set_field(config, name, default_of(name))
    validate(config)
    require_rules(config)
    require_parts(config)
    require_modelled(config)
    registry.require_read(config.model)
  except UserError as error:
    raise UserError(f"point {shown(point)}: {error}") from error
  return config


def require_read(
  base: Config,
  points: Sequence[Point],
  configs: Sequence[Config],
  seed_axes: Sequence[str],
  excused: Collection[str] = (),
) -> None:
  """Raises UserError for an axis, or a setting of the base, that no point of the sweep reads.

  Args:
    base: configuration that the points change.
    points: of the sweep.
    configs: of each point, from ``configure``.
    seed_axes: the seeds that an axis named seed moves.
    excused: settings of the base that may be without effect.
  """
  axes = list(points[0])
  require(
    "seed" not in axes or bool(seed_axes),
    "axis seed is read at no point, because --seed_axes is empty",
    "name what it moves, such as --seed_axes=init,sampling",
  )
  settings = [path for path in changed(base) if path not in {*axes, *excused}]
  for path in [*axes, *settings]:
    if any(map(functools.partial(_reads, base, path), points, configs)):
      continue
    what = f"axis {path}" if path in axes else f"{path}={shown_value(get_field(base, path))}"
    default = shown_value(default_of(path))
    remedy = "leave the axis out" if path in axes else f"leave it at {default}"
    rule, config = unmet(configs[0], path), configs[0]
    reason, first = f"model.name='{config.model.name}' has no such setting", "use another network"
    if rule is not None:
      reason = f"it is read with {rule.wording} only, and {state(config, rule)}"
      first = rule.remedy
    raise UserError(f"{what} is read at no point of the sweep: {reason}; {first}, or {remedy}")


def _reads(base: Config, path: str, point: Point, config: Config) -> bool:
  """Whether a point of a sweep looks at a field."""
  section, _, name = path.rpartition(".")
  if name == "target_epsilon" and math.isinf(point.get(path, get_field(base, path))):
    mechanism = f"{section}.mechanism"  # that an infinite target switches off
    return point.get(mechanism, get_field(base, mechanism)) != "none"
  lacks = section == "model" and name in registry.unread(config.model)
  return unmet(config, path) is None and not lacks


def _with_seeds(base: Config, point: Point, seed_axes: Sequence[str]) -> Point:
  values = dict(point)
  if "seed" not in values:
    return values
  seed = values.pop("seed")
  places = {"partition": "data.seed", "init": "model.init_seed", "sampling": "seed"}
  for axis in seed_axes:
    require_choice("--seed_axes", axis, SEED_AXES)
    require(
      places[axis] not in values,
      f"{places[axis]} has an axis, and seed moves it too",
      f"leave {axis} out of --seed_axes",
    )
    values[places[axis]] = seed
  if "sampling" in seed_axes and base.model.init_seed < 0:
    if "init" in seed_axes:
      del values["model.init_seed"]  # it follows the seed
    else:
      values["model.init_seed"] = base.seed
  return values


def shown(point: Point) -> str:
  """The values of a point, as text for people."""
  return ", ".join(f"{name}={_short(value)}" for name, value in point.items())


def _short(value: Any) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)


def image_fields(data: DataConfig) -> dict[str, Any]:
  """The fields that the examples follow from, without those of their split."""
  source = source_named(data.source)
  seed = [] if source.seeded else ["seed"]
  # Published splits may leave out examples.
  split = [] if source.facts.own_split else ["split"]
  drawn = set(DRAWN_SPLITS).issuperset(source.facts.splits)  # and not by the source itself
  others = (*split, "test_fraction", "fold", *seed) if drawn else ()
  return {k: v for k, v in dataclasses.asdict(data).items() if k not in others}


def hospital_loader() -> Callable[[Config], Hospitals]:
  """``load_hospitals`` that keeps what it read and dealt, with places for synthetic images."""
  datasets: dict[str, Dataset] = {}
  dealt: dict[str, Hospitals] = {}

  def load(config: Config) -> Hospitals:
    key = _text([dataclasses.asdict(config.data), dataclasses.asdict(config.partition)])
    if key not in dealt:
      images = _text(image_fields(config.data))
      if images not in datasets:
        datasets[images] = load_dataset(config.data)
      dealt[key] = build_hospitals(datasets[images], config.data, config.partition)
    if config.attack.kind in POISONS:
      harmed = key + _text(dataclasses.asdict(config.attack))
      if harmed not in dealt:
        dealt[harmed] = poisoned(config, dealt[key])
      key = harmed
    if config.client.synthetic == "none":
      return dealt[key]
    more = key + _text([config.client.synthetic, config.client.synthetic_share])
    if more not in dealt:
      dealt[more] = reserve_synthetic(config, dealt[key])
    return dealt[more]

  return load


def plan_points(
  points: Sequence[Point],
  configs: Sequence[Config],
  numbers: Sequence[int],
  secret_of: Callable[[int], bytes | None] = lambda number: None,
) -> list[Planned]:
  """The runs of these points, each with its data and mechanisms; baselines too if asked for.

  Args:
    points: all of the sweep.
    configs: of each point, from ``configure``.
    numbers: points to plan.
    secret_of: the secret of a private point; None draws one.

  Raises:
    UserError: a point's ε cannot be reached, or its data do not fit; nothing is compiled before.
  """
  hospitals, found = hospital_loader(), []
  for number in numbers:
    config = configs[number]
    try:
      case = federation(config, hospitals(config), secret_of(number))
    except UserError as error:
      raise UserError(f"point {shown(points[number])}: {error}") from error
    cases = {"": case, **(baselines(case) if config.eval.local_baselines else {})}
    found += [
      Planned(key=Key(number=number, baseline=name), point=points[number], case=case)
      for name, case in cases.items()
    ]
  return found


def static_key(case: Case) -> str:
  """Key of all that a program is made from; runs of one key share a program."""
  config, protection = case.config, case.protection
  # What is taken for not traced compiles anew: such a mistake costs time and nothing else.
  fields = declared()
  values = {path: value for path, value in flat(to_dict(config)).items() if not fields[path].traced}
  if config.client.schedule == "constant":
    del values["server.num_rounds"]
  steps = protection.steps
  dataset = case.hospitals.dataset
  task = task_named(dataset.task)
  values["shapes"] = [
    dataset.task,
    [(str(leaf.dtype), list(leaf.shape[1:])) for leaf in array_leaves(task.targets(dataset))],
    len(case.names),
    # Without the number of examples: pools are filled up to the largest.
    [(str(leaf.dtype), list(leaf.shape[1:])) for leaf in array_leaves(dataset.inputs)],
    len(dataset.class_names),
    task.columns(dataset),
    protection.rows_per_unit,
    protection.units is not None,
    cohort_cap(config, len(case.names)),
    config.server.ema_decay > 0,
    int(steps[0]) if (steps == steps[0]).all() else None,
  ]
  return _text(values)


def groups(planned: Sequence[Planned]) -> list[list[Planned]]:
  """Runs that share a program, in the order of their first points."""
  found: dict[str, list[Planned]] = {}
  for each in planned:
    found.setdefault(static_key(each.case), []).append(each)
  return list(found.values())


def chunks(
  group: Sequence[Planned], size: int, fill: int = 1, limit: float = math.inf
) -> list[list[Planned]]:
  """Divides a group into parts of at most ``size`` runs; within a set of images long runs join.

  A part of fewer than ``fill`` runs takes those of another set of images (GANs, phantoms of several
  seeds) too, as long as the sets take at most ``limit`` bytes.
  """
  by_images: dict[tuple[Any, ...], list[Planned]] = {}
  for each in group:
    by_images.setdefault(images_of(each), []).append(each)
  parts: list[list[Planned]] = [[]]
  taken = 0
  for runs in by_images.values():
    images = input_bytes(runs[0].case.hospitals.dataset)
    if len(parts[-1]) >= fill or taken + images > limit:
      parts, taken = [*parts, []], 0
    taken += images
    for each in sorted(runs, key=lambda each: -each.case.config.server.num_rounds):
      if len(parts[-1]) == size:
        parts, taken = [*parts, []], images
      parts[-1].append(each)
  return [part for part in parts if part]


def images_of(each: Planned) -> tuple[Any, ...]:
  """Key of the set of images of a run."""
  return image_key(each.case.config, each.case.hospitals)


def _text(values: Any) -> str:
  return json.dumps(values, sort_keys=True)
