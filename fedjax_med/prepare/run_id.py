"""Identity of a run: its id, and the words that its random draws follow from."""

import dataclasses
import functools
import hashlib
import hmac
import importlib.metadata
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_med import __version__
from fedjax_med.core.config import Config, declared, fingerprint, flat, init_seed, nested, to_dict
from fedjax_med.data.dataset import Hospitals, array_leaves
from fedjax_med.exchange.registry import exchange_code
from fedjax_med.federated.registry import algorithm_code
from fedjax_med.models.networks.pretrained import load_safetensors
from fedjax_med.models.registry import code_of
from fedjax_med.privacy.guarantees import Guarantee
from fedjax_med.tasks.registry import task_code, task_named

# Packages whose version may move a mechanism, a draw or a rounding.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "dp-accounting")


class Identity(NamedTuple):
  """Identity of a run.

  Attributes:
    run_id: 12 hexadecimal digits; equal ones mean equal weights after equal rounds. To rounding;
      bit for bit with the same layout, package versions and machine. That of a private run follows
      from its secret: without that it tells nothing of data or configuration.
    words: [4] 32-bit numbers for the keys of a private run, as secret as its secret; () without.
  """

  run_id: str
  words: tuple[int, ...]


def identify(
  config: Config,
  hospitals: Hospitals,
  names: tuple[str, ...],
  table: Sequence[np.ndarray],
  guarantees: Sequence[Guarantee],
  secret: bytes,
) -> Identity:
  """The identity of a run.

  Args:
    config: validated config.
    hospitals: the data.
    names: of the training clients.
    table: arrays of the rows of each client.
    guarantees: the mechanisms that protect units; () of a run without privacy.
    secret: of a private run, and of its baselines; b"" without one.
  """
  content = {
    "config": _shaping(config, hospitals.dataset.task),
    "data": _data_digest(hospitals, table),
    "names": names,
  }
  if not secret:
    return Identity(fingerprint(content), ())
  # Two runs that share a secret must share no noise, unless they release the same: not where a
  # mechanism, a package or a line of code differs.
  content["mechanisms"] = [
    [dataclasses.asdict(mechanism), delta]
    for guarantee in guarantees
    for mechanism, delta in zip(guarantee.mechanisms, guarantee.deltas, strict=True)
  ]
  content["versions"] = [importlib.metadata.version(name) for name in PACKAGES]
  content["sources"] = sources_digest()
  text = json.dumps(content, sort_keys=True).encode()

  def keyed(use: bytes) -> bytes:
    return hmac.new(secret, use + text, hashlib.sha256).digest()

  words = np.frombuffer(keyed(b"random keys\0")[:16], np.uint32)
  return Identity(keyed(b"run id\0").hex()[:12], tuple(words.tolist()))


@functools.cache
def sources_digest() -> str:
  """SHA-256 of the sources of this package: other code is another training."""
  root = pathlib.Path(__file__).resolve().parents[1]
  sha = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    sha.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
  return sha.hexdigest()


def _shaping(config: Config, task: str) -> dict[str, Any]:
  """The part of a config that shapes the trajectory: ``Field.shapes_run`` says of which fields."""
  fields = declared()
  shaping = {p: v for p, v in flat(to_dict(config)).items() if fields[p].shapes_run(config)}
  shaping["model.init_seed"] = init_seed(config)
  if config.model.pretrained:  # the content counts, not the name of the file
    shaping["model.pretrained_sha256"] = load_safetensors(config.model.pretrained).sha256
  # Other code is another training, and must have other noise.
  codes = [code_of(config.model.name), algorithm_code(config.server.algorithm)]
  codes += [code for code in (*exchange_code(config), task_code(task)) if code]
  shaping["code"] = [__version__, codes[0], *filter(None, codes[1:])]
  return nested(shaping)


def _data_digest(hospitals: Hospitals, table: Sequence[np.ndarray]) -> str:
  sha = hashlib.sha256()
  # Synthetic images follow from the rest, and the id is known before they are made.
  dataset = hospitals.dataset
  inputs = [leaf[: dataset.num_real] for leaf in array_leaves(dataset.inputs)]
  targets = array_leaves(task_named(dataset.task).targets(dataset))
  for array in (*inputs, *targets, *table):
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()
