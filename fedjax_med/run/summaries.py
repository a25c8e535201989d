"""Records of a run for its folder: its configuration, its hospitals, its results."""

import importlib.metadata
import pathlib
import platform
from typing import Any

import jax
import numpy as np

from fedjax_med import __version__
from fedjax_med.core.conditions import COUNTS_HOSTILE
from fedjax_med.core.config import Config, to_dict
from fedjax_med.data.dataset import Hospitals, array_leaves, client_rows
from fedjax_med.data.poisoning import hostile_hospitals
from fedjax_med.data.recordings import Series, overlapping
from fedjax_med.data.table_manifest import Table, manifest_record
from fedjax_med.exchange.attacks.registry import STRENGTHS, attack_strength
from fedjax_med.exchange.ckks import PRESETS
from fedjax_med.exchange.compression.registry import compression_notes, compression_words
from fedjax_med.exchange.masks import fewest_answers
from fedjax_med.exchange.registry import make_exchange, transform_names
from fedjax_med.exchange.robust.rules import is_robust
from fedjax_med.folder import writing as files
from fedjax_med.folder.secret import is_private
from fedjax_med.models.registry import network_record
from fedjax_med.prepare.deployment import deployment_record
from fedjax_med.prepare.experiment import Experiment
from fedjax_med.prepare.program import Parts
from fedjax_med.prepare.synthetic_images import digest as synthetic_digest
from fedjax_med.prepare.synthetic_images import left_out
from fedjax_med.privacy.guarantees import shared_noise
from fedjax_med.run.backdoor import backdoor_record
from fedjax_med.run.checkpoints import digest
from fedjax_med.run.drive import Outcome
from fedjax_med.run.measure import evaluated, evaluation_rows, honest_examples
from fedjax_med.simulation.evaluation import EvaluatedModel
from fedjax_med.tasks.registry import task_named
from fedjax_med.tasks.task import Targets

# Names of files of a private run: left out, or with a twin in another class.
FILES = "files.json"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "dp-accounting", "numpy")


def num_parameters(experiment: Experiment) -> int:
  """Trained weights of the model."""
  return experiment.program.parts.spec.params.size


def weights_digest(parts: Parts, weights: EvaluatedModel) -> str:
  """SHA-256 of the arrays that predict, by their names in the network.

  Where hospitals predict with models of their own, the persistent state of each is part of it.
  """
  params, state = parts.spec.trees(weights.params, weights.state)
  return digest(weights._replace(params=params, state=state) if parts.personal else params)


def config_record(experiment: Experiment, command: str) -> dict[str, Any]:
  """config.json: configuration, command, versions, and notes that belong to every result."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  versions |= {"fedjax_med": __version__, "python": platform.python_version()}
  dataset = experiment.hospitals.dataset
  num_columns = task_named(dataset.task).columns(dataset)
  notes = list(dataset.notes)
  if experiment.program.origin:
    notes.append(
      f"Training starts from {experiment.program.origin}: what those weights were trained on is"
      " outside the privacy statement."
    )
  notes += compression_notes(experiment.config.compression)
  notes += _attack_notes(experiment.config)
  return {
    "run_id": experiment.run_id,
    "command": command,
    "task": dataset.task,
    "modality": dataset.modality,
    "num_columns": num_columns,
    "input_shape": list(array_leaves(dataset.inputs)[0].shape[1:]),
    "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
    "versions": versions,
    "notes": notes,
    "network": network_record(experiment.config.model, num_columns),
    "exchange": exchange_record(experiment),
    "config": to_dict(experiment.config),
  }


def _attack_notes(config: Config) -> list[str]:
  """Sentences on an attack that every result of the run stands under."""
  kind = config.attack.kind
  if kind == "none":
    return []
  notes = [f"Hostile hospitals are simulated (attack.kind={kind}): scores are of the others."]
  if COUNTS_HOSTILE.holds(config) and config.robust.assumed_byzantine == 0:
    notes.append(
      "The rule that joins updates is made for no hostile hospital"
      " (robust.assumed_byzantine=0): it withstands none."
    )
  return notes


def exchange_record(experiment: Experiment) -> dict[str, Any]:
  """Transforms and aggregator of updates, and the messages that the server sees."""
  config = experiment.config
  exchange = make_exchange(config, len(experiment.names))
  summed = config.client_privacy.mechanism != "none"
  return {
    "transforms": transform_names(config),
    "aggregator": "a sum in which each counts 1" if summed else config.server.aggregator,
    "server_sees": exchange.transform.trust,
    "protocol": config.secure.protocol,
    **_secure_record(experiment),
    "compression": compression_words(config.compression),
    **_encryption(config),
    **({"pre": config.robust.pre} if config.robust.pre != "none" else {}),
    **({"weights_ignored": True} if is_robust(config) else {}),
    **({"attack": _attack_record(experiment)} if config.attack.kind != "none" else {}),
  }


def _attack_record(experiment: Experiment) -> dict[str, Any]:
  """Kind and strength of the attack, and the hostile hospitals."""
  config, names = experiment.config, experiment.hospitals.names
  hostile = hostile_hospitals(config, names)
  strength = {"strength": attack_strength(config)} if config.attack.kind in STRENGTHS else {}
  return {
    "kind": config.attack.kind,
    **strength,
    "hospitals": [name for name, bad in zip(names, hostile, strict=True) if bad],
  }


def _encryption(config: Config) -> dict[str, Any]:
  """What the statement says of CKKS; {} without it."""
  if config.secure.protocol != "ckks":
    return {}
  preset = PRESETS[config.secure.he_preset]
  drawn = config.server.participation == "poisson"
  return {
    "ckks": {
      "degree": preset.degree,
      "primes": list(preset.primes),
      "executed": config.secure.he == "run",
      "may_be_one": drawn,
      "noise": config.client_privacy.mechanism != "none",
    }
  }


def _secure_record(experiment: Experiment) -> dict[str, Any]:
  """The grid of whole numbers, and how their masks work, where there are any."""
  config, grid = experiment.config, experiment.grid
  if grid is None:
    return {}
  record: dict[str, Any] = {
    "grid": {**grid._asdict(), "rounding_error_bound": grid.rounding_error_bound}
  }
  central = experiment.central
  record["counted"] = central is None  # under DP-FedAvg nothing is counted of a hospital
  shared = central and shared_noise(central)
  if shared:
    record["shared_noise"] = {"colluders": shared.colluders}
  if config.secure.protocol == "masking":
    record |= {
      "masks": config.secure.masks,
      "dropout": config.secure.dropout,
      "fewest": fewest_answers(config, len(experiment.names)),
    }
  return record


def write_hospitals(folder: pathlib.Path, experiment: Experiment) -> None:
  """Writes hospitals.json; names of files go into files.json, for the owner, in private runs."""
  hospitals, private = experiment.hospitals, is_private(experiment.config)
  files.write_json(folder / "hospitals.json", hospital_record(hospitals, names=not private))
  if private:
    full = hospital_record(hospitals)
    named = {"skipped": full["skipped"], "contradictions": full["contradictions"]["pairs"]}
    files.write_private_json(folder / FILES, named)


def hospital_record(hospitals: Hospitals, names: bool = True) -> dict[str, Any]:
  """hospitals.json: examples of each class at each hospital, and facts about the split.

  ``train`` counts real images; ``synthetic``, where there are any, stands beside it. Without
  ``names`` no file is named: the name of a left-out one is "", its reason is without the words of
  the decoder, and pictures that contradict each other are only counted.
  """
  dataset, split = hospitals.dataset, hospitals.split
  classes, strata = len(dataset.class_names), task_named(dataset.task).strata(dataset)

  def per_class(rows: np.ndarray) -> list[int]:
    return np.bincount(strata[rows], minlength=classes).tolist()

  def holds(k: int, name: str) -> dict[str, Any]:
    real, made = np.split(client_rows(hospitals.train)[k], [hospitals.real_counts[k]])
    test = client_rows(hospitals.test)[k]
    counts = {"name": name, "train": per_class(real), "test": per_class(test)}
    return {**counts, "synthetic": per_class(made)} if dataset.num_synthetic else counts

  skipped = [list(item) for item in dataset.skipped]
  if not names:  # a decoder's words may hold the name as well
    skipped = sorted(["", _without_detail(reason), *rest] for _, reason, *rest in skipped)
  record: dict[str, Any] = {
    "class_names": list(dataset.class_names),
    "split": {
      "scheme": split.scheme,
      "num_train": len(split.train),
      "num_test": len(split.test),
      "num_duplicate_groups": split.num_duplicate_groups,
      "num_in_duplicate_groups": split.num_in_duplicate_groups,
      "num_test_with_duplicate_in_train": split.num_test_with_duplicate_in_train,
      "num_test_of_train_patients": split.num_test_of_train_patients,
    },
    "num_moved": hospitals.num_moved,
    "num_elsewhere": hospitals.num_elsewhere,
    "sites": {"count": len(dataset.site_names), "are_hospitals": hospitals.by_site},
    "mixture_shifts": hospitals.mixture_shifts,
    "contradictions": {
      **split.contradictions._asdict(),
      "pairs": [list(pair) for pair in split.contradictions.pairs if names],
    },
    "patients": dataset.patient_counts and dataset.patient_counts._asdict(),
    **({"visiting": hospitals.visiting} if hospitals.visiting else {}),
    **({"poisoned": hospitals.poisoned} if hospitals.poisoned else {}),
    **({} if dataset.table or dataset.series else {"grey": dataset.grey.record}),
    "skipped": skipped,
    "hospitals": [holds(k, name) for k, name in enumerate(hospitals.names)],
  }
  if dataset.table:
    record |= {"modality": dataset.modality, "table": _table_record(hospitals, dataset.table)}
  if dataset.targets is not None:
    record["targets"] = _targets_record(hospitals, dataset.targets)
  if dataset.released:
    record["released"] = list(dataset.released)
  if dataset.series:
    record |= {"modality": dataset.modality, "series": _series_record(hospitals, dataset.series)}
  if dataset.num_synthetic:
    left = [list(each) for each in left_out(hospitals)]
    record["synthetic"] = {"sha256": synthetic_digest(hospitals), "left_out": left}
  return record


def _targets_record(hospitals: Hospitals, targets: Targets) -> dict[str, Any]:
  """What predictions need of the targets, and how many values are known; see ``read_targets``."""
  known = ~np.isnan(targets.values)
  rows = zip(client_rows(hospitals.train), client_rows(hospitals.test), strict=True)
  shares = [known[np.concatenate(own)].mean() for own in rows]
  return {
    "names": list(targets.names),
    "unit": targets.unit,
    "fitted": {name: values.tolist() for name, values in targets.fitted.items()},
    "left_out": [list(pair) for pair in targets.left_out],
    "known": int(known.sum()),
    "missing": {
      name: round(1 - float(share), 4) for name, share in zip(hospitals.names, shares, strict=True)
    },
  }


def _table_record(hospitals: Hospitals, table: Table) -> dict[str, Any]:
  """What predictions on another table need, and counts of what its preparation met."""
  # Of required columns no value is missing.
  names = [(k, c.name) for k, c in enumerate(table.manifest.inputs) if not c.required]
  rows = zip(client_rows(hospitals.train), client_rows(hospitals.test), strict=True)
  shares = [table.missing[np.concatenate(own)].mean(axis=0) for own in rows]
  return {
    "manifest": manifest_record(table.manifest),
    "scaling": table.scaling,
    "shift": list(table.shift),
    "scale": list(table.scale),
    "outside": table.outside,
    "unknown": table.unknown,
    "absent": {name: list(columns) for name, columns in table.absent.items()},
    "unlisted": list(table.unlisted),
    **({} if table.survival is None else {"survival": table.survival._asdict()}),
    "missing": {
      name: {column: round(float(own[k]), 4) for k, column in names}
      for name, own in zip(hospitals.names, shares, strict=True)
    },
  }


def _series_record(hospitals: Hospitals, series: Series) -> dict[str, Any]:
  """What predictions on other recordings need, and counts of what cutting met."""
  test = hospitals.split.test
  arrays = ("recordings", "recording_names", "starts")
  record = {name: value for name, value in series._asdict().items() if name not in arrays}
  return {
    **record,
    "channels": list(series.channels),
    "test_persons": list(series.test_persons),
    "seconds": round(series.seconds, 3),
    "left_over": round(series.left_over, 3),
    "recordings": len(series.recording_names),
    "test_recordings": len(np.unique(series.recordings[test])),
    "test_overlapping": int(overlapping(series, hospitals.split.train, test).sum()),
  }


def _without_detail(reason: str) -> str:
  unreadable = "cannot be read"
  return unreadable if reason.startswith(f"{unreadable} (") else reason


def _sent(experiment: Experiment, outcome: Outcome) -> int:
  """Bytes that all hospitals and the server have sent; messages that were lost do not count."""
  visits = int((np.asarray(outcome.state.steps) // experiment.steps).sum())
  down, up = experiment.program.parts.message
  return visits * (down + up) - int(np.asarray(outcome.state.traffic.lost).sum()) * up


def _cost(experiment: Experiment, outcome: Outcome) -> dict[str, Any]:
  """Local steps of all hospitals, bytes of packed messages, and what became of messages."""
  traffic = jax.device_get(outcome.state.traffic)
  down, up = experiment.program.parts.message
  exchange = make_exchange(experiment.config, len(experiment.names))
  facts = exchange.transform.facts(jax.device_get(outcome.state.exchange))
  if experiment.config.secure.protocol != "none":
    facts = {"protocol": experiment.config.secure.protocol, **facts}
  if exchange.may_lose:
    names = zip(experiment.names, traffic.lost.tolist(), strict=True)
    facts |= {"lost": {name: count for name, count in names if count}}
  if exchange.least:
    facts |= {"failed_rounds": int(traffic.failed)}
  if exchange.goes_on:
    names = zip(experiment.names, traffic.refused.tolist(), strict=True)
    facts["left_out"] = {name: count for name, count in names if count}
  return {
    "steps": int(np.asarray(outcome.state.steps).sum()),
    "megabytes": round(_sent(experiment, outcome) / 1e6, 6),
    "bytes_up": up,
    "bytes_down": down,
    **({"exchange": facts} if facts else {}),
  }


def deployment_of(
  experiment: Experiment, outcome: Outcome, encryption: dict[str, Any] | None = None
) -> dict[str, Any] | None:
  """deployment.json of a run that has ended; None without links between hospitals and server.

  Args:
    experiment: the run.
    outcome: its end.
    encryption: seconds of encryption that are part of the training's, as timing.json has them.
  """
  done, spent = int(np.asarray(outcome.state.steps).sum()), encryption or {}
  at_hospitals = sum(spent.get(name, 0.0) for name in ("encrypt", "serialise"))
  at_server = sum(spent.get(name, 0.0) for name in ("add", "decrypt"))
  return deployment_record(
    experiment.config,
    experiment.names,
    experiment.program.parts.message,
    experiment.steps,
    outcome.last.rounds,
    max(outcome.seconds["train"] - at_hospitals - at_server, 0.0) / max(done, 1),
    _sent(experiment, outcome),
    more=at_hospitals / max(spent.get("messages", 0), 1),
  )


def summary_record(experiment: Experiment, outcome: Outcome, name: str) -> dict[str, Any]:
  """Results only, no times: an interrupted and an unbroken run write the same bytes."""
  hospitals = experiment.hospitals
  task = task_named(hospitals.dataset.task)
  shown = honest_examples(experiment)
  rows = evaluation_rows(experiment)[shown]
  targets = jax.tree.map(lambda leaf: leaf[rows], task.targets(hospitals.dataset))
  plan = experiment.program.plan
  weights = evaluated(experiment.program.parts, outcome.state)
  images = {}
  if hospitals.dataset.num_synthetic:
    real = hospitals.real_counts
    images = {"real": real.tolist(), "synthetic": (hospitals.train.counts - real).tolist()}
  return {
    "run_id": experiment.run_id,
    "config_name": name,
    "rounds": outcome.last.rounds,
    "stopped": outcome.stopped,
    "predicts": "own models" if experiment.program.parts.personal else "global model",
    "epsilon_max": max(outcome.last.epsilons, default=outcome.last.client_epsilon),
    "client_epsilon": outcome.last.client_epsilon,
    "test": outcome.last.test,
    **({} if outcome.last.recordings is None else {"recordings": outcome.last.recordings}),
    "clients": outcome.last.clients,
    **task.details(outcome.last.probabilities[shown], targets),
    "num_parameters": num_parameters(experiment),
    **_cost(experiment, outcome),
    **backdoor_record(experiment, weights),
    "split": hospitals.split.scheme,
    **({"train_images": images} if images else {}),
    "plan": {**plan._asdict(), "reasons": list(plan.reasons)},
    "weights_sha256": weights_digest(experiment.program.parts, weights),
  }
