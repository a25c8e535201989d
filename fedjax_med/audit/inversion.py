"""Inversion: records of a hospital made again from its first update, under each protection.

The attacker is the server. It knows the network, its initial weights, the learning rate and how
many records a step has, and gets the first update of a hospital, or the sum of all. The learned
attack also has the records of the other hospitals, as one has who colludes with them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_med.audit import compressed, first_updates
from fedjax_med.audit.first_updates import Federation, Observed
from fedjax_med.audit.gradient_inversion import (
  Search,
  exact_inputs,
  labels_of,
  make_matching,
  within,
)
from fedjax_med.audit.learned_inversion import features_of, fit
from fedjax_med.audit.likeness import correlations, named, psnr, ssim
from fedjax_med.core.config import Config, PrivacyConfig
from fedjax_med.core.errors import UserError, require
from fedjax_med.core.keys import base_key
from fedjax_med.core.validation import validate
from fedjax_med.data.dataset import ClientTable, Hospitals
from fedjax_med.federated.vector import unravel
from fedjax_med.models.registry import ROWS
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.prepare.protection import protect
from fedjax_med.privacy.mechanism import PoissonGaussian

EPSILONS = (8.0, 1.0)
LEAST_HOSPITALS = 3  # that a sum hides one of
MOST_SOUGHT = 8  # images that a search makes at once
MOST_LEARNED = 2000  # records of other hospitals that an attack is learned from
NO_FACTS: Mapping[str, float] = MappingProxyType({})
PICTURED = 6  # records of the figure


class Settings(NamedTuple):
  """Settings of the attack.

  Attributes:
    records: training records of the hospital that are attacked.
    batches: sizes of the batches without protection.
    search: settings of the search, which linear networks do not need.
    seed: of the attack's draws.
  """

  records: int = 8
  batches: tuple[int, ...] = (1, 2, 4, 8)
  search: Search = Search()
  seed: int = 0


class Way(NamedTuple):
  """A way of an update to the server.

  Attributes:
    name: for people.
    observed: (rows, key) -> gradient that the server reads off.
    batch: records of the hospital in its update.
    hospitals: hospitals whose sum the server sees.
    facts: what else a table says, such as ε.
  """

  name: str
  observed: Observed
  batch: int = 1
  hospitals: int = 1
  facts: Mapping[str, float] = NO_FACTS


class Attacked(NamedTuple):
  """Reconstructions of one way.

  Attributes:
    entry: scores, for inversion.json.
    pictures: [records, ...] the reconstruction nearest to each record attacked.
  """

  entry: dict[str, Any]
  pictures: np.ndarray


class Inversion(NamedTuple):
  """Result of the attack.

  Attributes:
    result: content of inversion.json.
    originals: [records, ...] inputs of the network.
    pictures: reconstructions nearest to them, by the name of the way.
  """

  result: dict[str, Any]
  originals: np.ndarray
  pictures: dict[str, np.ndarray]


def require_attackable(config: Config, hospitals: Hospitals, settings: Settings) -> None:
  """Raises UserError where the attack is not defined for the network, the data or the settings."""
  dataset, exact = hospitals.dataset, config.model.name in ROWS
  held = int(hospitals.train.counts[0])
  require(
    dataset.task == "classification",
    f"--attack=inversion reads classes off the gradient of a cross-entropy, and the task is"
    f" '{dataset.task}'",
    "give a config whose task is classification",
  )
  require(
    exact or dataset.modality == "pictures",
    f"--attack=inversion with model.name='{config.model.name}' searches for pictures, and these are"
    f" of the modality '{dataset.modality}'",
    "use --config.model.name=linear or mlp, whose inputs follow exactly",
  )
  require(
    1 <= settings.records <= held,
    f"--records={settings.records} of hospital '{hospitals.names[0]}', which has {held} training"
    " records",
    f"use 1 to {held}",
  )
  wrong = [size for size in settings.batches if not 1 <= size <= settings.records]
  require(
    bool(settings.batches) and not wrong,
    f"--batch_sizes={','.join(map(str, settings.batches))} must be from 1 to"
    f" --records={settings.records}",
    "use --batch_sizes=1, or more records",
  )
  require(
    exact or settings.search.steps > 0 or (settings.batches == (1,) and len(hospitals.names) > 1),
    "--steps=0 leaves the attack that is learned from other hospitals' single records",
    "use --batch_sizes=1 and several hospitals, or search with --steps=1500",
  )


def invert(experiment: Experiment, settings: Settings, tell: Callable[[str], None]) -> Inversion:
  """Attacks first updates of the run's first hospital in every way.

  Raises:
    UserError: the attack is not defined for the run; see ``require_attackable``.
  """
  require_attackable(experiment.config, experiment.hospitals, settings)
  federation = first_updates.federation_of(experiment, base_key(settings.seed))
  params, _ = federation.spec.trees(federation.params, federation.state)
  require(
    "bias" in params.get("head", {}),
    f"model.name='{experiment.config.model.name}' has no layer 'head' with a bias, off which the"
    " attack reads the classes",
    "name its last dense layer head, or use another network",
  )
  random = np.random.default_rng(settings.seed)
  chosen = random.permutation(federation.rows[0])[: settings.records]
  ways, left_out = _ways(experiment, federation, settings)
  exact = experiment.config.model.name in ROWS
  attack = _attack_of(federation, settings)
  plain = first_updates.unprotected(federation)
  entries, pictures = [], {}
  for way in ways:
    seen = _observe(federation, way, chosen, random)
    attacks: dict[str, Attack] = {}
    if exact or settings.search.steps:
      attacks["first layer" if exact else "search"] = attack
    if not exact and way.batch == 1 and len(federation.rows) > 1:
      attacks["learned"] = _learned(federation, way, plain, settings.seed)
    for name, one in attacks.items():
      found = _scored(federation, seen, name, one)
      entries.append(found.entry)
      pictures[way.name if exact else f"{way.name}: {name}"] = found.pictures
      tell(_line(found.entry))
  for name, reason in left_out.items():
    tell(f"{name}: left out, {reason}")
  result = {
    "attack": "inversion",
    "run_id": experiment.run_id,
    "hospital": experiment.names[0],
    "training_records": len(federation.rows[0]),
    "network": experiment.config.model.name,
    "input_shape": list(np.shape(federation.inputs(chosen[:1]))[1:]),
    "seed": settings.seed,
    **({} if exact else {"steps": settings.search.steps, "restarts": settings.search.restarts}),
    "ways": entries,
    "left_out": left_out,
  }
  return Inversion(
    result=result, originals=np.asarray(federation.inputs(chosen)), pictures=pictures
  )


def _line(entry: dict[str, Any]) -> str:
  identified, chance = entry["identified"]["mean"], entry["chance"]
  scores = f"{100 * identified:.0f}% identified (chance: {100 * chance:.1f}%)"
  return f"{entry['name']} ({entry['attack']}): {scores}"


def _ways(
  experiment: Experiment, federation: Federation, settings: Settings
) -> tuple[list[Way], dict[str, str]]:
  """The ways of an update, and those that the run cannot take, with the reason."""
  plain, left_out = first_updates.unprotected(federation), {}
  ways = [Way(name=f"none, b = {size}", observed=plain, batch=size) for size in settings.batches]
  for name, compress in (("int8", compressed.int8), ("top-k, 1%", compressed.top_k)):
    ways.append(Way(name=name, observed=first_updates.compressed(federation, compress)))
  hospitals = len(federation.rows)
  name = f"sum of {hospitals} hospitals"
  if hospitals >= LEAST_HOSPITALS:
    observed = first_updates.summed(federation, hospitals)
    ways.append(Way(name=name, observed=observed, hospitals=hospitals))
  else:
    left_out[name] = f"a sum hides an update from {LEAST_HOSPITALS} hospitals on"
  for epsilon in EPSILONS:
    name = f"DP-SGD, ε = {epsilon:g}"
    try:
      mechanism = _mechanism(experiment, epsilon)
    except UserError as error:
      left_out[name] = str(error)
      continue
    facts = {
      "epsilon": epsilon,
      "noise_multiplier": mechanism.noise_multiplier,
      "clip_norm": mechanism.clip_norm,
    }
    observed = first_updates.private(federation, mechanism)
    ways.append(Way(name=name, observed=observed, facts=facts))
  return ways, left_out


def _mechanism(experiment: Experiment, epsilon: float) -> PoissonGaussian:
  """The mechanism of the first hospital that gives the run this ε for records."""
  config, hospitals = experiment.config, experiment.hospitals
  privacy = PrivacyConfig(
    mechanism="dp_sgd",
    target_epsilon=epsilon,
    clip_norm=config.privacy.clip_norm,
    delta=config.privacy.delta,
  )
  config = dataclasses.replace(config, privacy=privacy)
  validate(config)
  first = ClientTable(hospitals.train.indices[:1], hospitals.train.counts[:1])
  local = protect(config, hospitals.names[:1], first, hospitals.split.units).local
  assert local is not None
  (mechanism,) = local.mechanisms
  assert isinstance(mechanism, PoissonGaussian)
  return mechanism


# (observed gradient [P], records of the batch, key) -> reconstructed inputs [R, ...].
Attack = Callable[[np.ndarray, int, jax.Array], np.ndarray]


def _attack_of(federation: Federation, settings: Settings) -> Attack:
  """The attack that fits the network."""
  params, state = federation.spec.trees(federation.params, federation.state)
  shape = jax.tree.leaves(federation.pool.inputs)[0].shape[1:]
  if federation.config.model.name in ROWS:
    first = "hidden1" if "hidden1" in params else "head"

    def exact(gradient: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
      layer = unravel(jnp.asarray(gradient), federation.spec.params)[first]
      made = exact_inputs(np.asarray(layer["kernel"]), np.asarray(layer["bias"]), count)
      return made.reshape(-1, *shape)

    return exact
  blind = within(jax.random.normal(federation.key, (64, *shape)), federation.scaling)
  outputs, _ = federation.model.apply(params, state, blind)
  probabilities = np.asarray(jax.nn.softmax(outputs).mean(0))
  gradient_of = first_updates.attacker_gradient(federation)

  @functools.cache  # one program for each number of images
  def search(count: int) -> Callable[..., Any]:
    run = make_matching(gradient_of, (count, *shape), federation.scaling, settings.search)
    return jax.jit(lambda vector, *rest: run(unravel(vector, federation.spec.params), *rest))

  def matching(gradient: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
    count = min(count, MOST_SOUGHT)
    bias = unravel(jnp.asarray(gradient), federation.spec.params)["head"]["bias"]
    labels = labels_of(np.asarray(bias), probabilities, count)
    images, _ = search(count)(jnp.asarray(gradient), jnp.asarray(labels), key)
    return np.asarray(images)

  return matching


class Observation(NamedTuple):
  """What the server got in one way.

  Attributes:
    way: the way.
    batches: [M, b] rows of the pool of the first hospital's batches.
    sought: records in an update, or in a sum of them.
    gradients: [M, P] what it read off.
    keys: [M] keys of the attack's draws.
  """

  way: Way
  batches: np.ndarray
  sought: int
  gradients: np.ndarray
  keys: jax.Array


def _observe(
  federation: Federation, way: Way, chosen: np.ndarray, random: np.random.Generator
) -> Observation:
  """Sends the records ``chosen`` (rows of the pool), batch by batch."""
  number = len(chosen) // way.batch
  batches = chosen[: number * way.batch].reshape(number, way.batch)
  rows = batches
  if way.hospitals > 1:
    others = [random.choice(held, batches.shape) for held in federation.rows[1:]]
    rows = np.concatenate([batches, *others], axis=1)
  keys = jax.random.split(federation.key, number)
  return Observation(
    way=way,
    batches=batches,
    sought=rows.shape[1],
    gradients=_gradients(way.observed, rows, keys),
    keys=keys,
  )


def _gradients(observed: Observed, rows: np.ndarray, keys: jax.Array) -> np.ndarray:
  """[M, P] gradients read off the updates of ``rows`` [M, b]."""
  many = jax.jit(lambda each: jax.lax.map(lambda one: observed(*one), each))
  return np.asarray(many((jnp.asarray(rows, jnp.int32), keys)))


def _learned(federation: Federation, way: Way, plain: Observed, seed: int) -> Attack:
  """The attack learned from records of the other hospitals, which went the same way.

  From sums nothing is learned; what was learned from single updates is tried on them.
  """
  random = np.random.default_rng([seed, 1])
  rows = random.permutation(np.concatenate(federation.rows[1:]))[:MOST_LEARNED]
  keys = jax.random.split(jax.random.fold_in(federation.key, 3), len(rows))
  observed = way.observed if way.hospitals == 1 else plain
  spec = federation.spec.params
  start = sum(spec.sizes[: spec.names.index("head/bias")])
  bias = slice(start, start + spec.sizes[spec.names.index("head/bias")])
  inputs = np.asarray(federation.inputs(rows), np.float64)
  features = features_of(_gradients(observed, rows[:, None], keys), bias, spec.sizes)
  learned = fit(features, inputs.reshape(len(rows), -1))

  def attack(gradient: np.ndarray, count: int, key: jax.Array) -> np.ndarray:
    features = features_of(gradient[None], bias, spec.sizes)
    return learned.inputs(features).reshape(-1, *inputs.shape[1:])

  return attack


def _scored(federation: Federation, seen: Observation, name: str, attack: Attack) -> Attacked:
  """Attacks each batch, and compares what comes out with the records."""
  own, way = federation.rows[0], seen.way
  held = np.asarray(federation.inputs(own))
  scores: dict[str, list[float]] = {"correlation": [], "psnr": [], "ssim": [], "identified": []}
  pictures = []
  for batch, gradient, key in zip(seen.batches, seen.gradients, seen.keys, strict=True):
    made = attack(gradient, seen.sought, jax.random.fold_in(key, 2))
    right = np.flatnonzero(np.isin(own, batch))
    guesses = named(correlations(made, held), way.batch)
    scores["identified"].append(float(np.isin(guesses, right).mean()))
    originals = np.asarray(federation.inputs(batch))
    likeness = correlations(made, originals)
    nearest = made[likeness.argmax(0)]
    pictures.extend(nearest)
    scores["correlation"].append(float(likeness.max(0).mean()))
    if federation.modality.name == "pictures":
      pairs = list(zip(nearest, originals, strict=True))
      scores["psnr"].append(float(np.mean([psnr(*pair) for pair in pairs])))
      scores["ssim"].append(float(np.mean([ssim(*pair) for pair in pairs])))
  entry = {
    "name": way.name,
    "attack": name,
    "batch": way.batch,
    "hospitals": way.hospitals,
    **way.facts,
    "records": int(seen.batches.size),
    "chance": way.batch / len(own),
    **{score: _summary(values) for score, values in scores.items()},
  }
  return Attacked(entry=entry, pictures=np.stack(pictures))


def _summary(values: list[float]) -> dict[str, float | None]:
  """Mean over batches and its standard error; None where it is not defined."""
  mean = float(np.mean(values)) if values else None
  error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
  return {"mean": mean, "standard_error": error}
