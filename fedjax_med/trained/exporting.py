"""A trained model as a file that others can load: a compiled program, or weights by name."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fedjax_med.core.errors import require
from fedjax_med.core.text import encodable
from fedjax_med.data.modality import preparation
from fedjax_med.data.table_manifest import parse_manifest
from fedjax_med.data.tables import features_of
from fedjax_med.folder.writing import write_text, write_whole
from fedjax_med.models.networks.norms import EPSILON
from fedjax_med.models.networks.pretrained import to_state_dict
from fedjax_med.privacy import claims
from fedjax_med.simulation.evaluation import make_classify
from fedjax_med.trained.loading import Trained

PLATFORMS = ("cpu", "cuda", "tpu")


def export_program(trained: Trained) -> bytes:
  """A serialised program of images [b, H, W, C] -> float32 probabilities [b, classes].

  Images are uint8, or uint16 for a run on pictures of more than 8 bits; windows [b, T, 1, C] of a
  series are float32, nan where there is no value. Records [b, inputs] of a table are float32, as
  the description says of their columns.

  Weights and normalisation are inside, b is any number, and it runs on each of ``PLATFORMS``:
  ``jax.export.deserialize(data).call(images)`` needs jax and nothing of this package. ``trained``
  should be lowered natively, which every platform knows best.
  """
  classify = make_classify(
    trained.model, preparation(trained.modality, trained.config.data), trained.task.predict
  )
  params, state = jax.tree.map(jnp.asarray, (trained.params, trained.state))
  (batch,) = export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((batch, *trained.image_shape), input_dtype(trained))
  program = jax.jit(lambda images: classify(params, state, images))
  return bytes(export.export(program, platforms=PLATFORMS)(images).serialize())


def input_dtype(trained: Trained) -> np.dtype:
  """Type of the numbers that the exported program takes."""
  numbers = trained.series or trained.table is not None
  return np.dtype(np.float32 if numbers else trained.grey.dtype)


def describe(trained: Trained, privacy: dict[str, Any]) -> dict[str, Any]:
  """Facts that a user of the exported model needs."""
  guarantees = [
    {
      "unit": guarantee["unit"],
      "epsilon": guarantee["epsilon_max"],
      "delta": max((party["delta"] for party in guarantee["parties"]), default=None),
    }
    for guarantee in privacy.get("guarantees", [])
  ]
  positive = trained.task.positive(trained.class_names)
  return {
    "run_id": trained.run_id,
    "rounds": trained.rounds,
    **({"hospital": encodable(trained.hospital)} if trained.hospital else {}),
    "network": trained.config.model.name,
    "norm": trained.config.model.norm,
    **_outputs(trained),
    **({"positive_class": encodable(positive)} if positive else {}),
    **_inputs(trained),
    "norm_epsilon": EPSILON,
    "privacy": guarantees or "none",
  }


def _outputs(trained: Trained) -> dict[str, Any]:
  """Facts on the outputs in their order: classes, or what a task without classes predicts."""
  if trained.predicts_classes or trained.targets is None:
    return {"classes": [encodable(name) for name in trained.class_names]}
  targets = trained.targets
  return {
    "task": trained.task.name,
    "targets": [encodable(name) for name in targets.names],
    **({"unit": encodable(targets.unit)} if targets.unit else {}),
    # Such as the means and spreads that outputs in standard units are turned back with.
    **{name: values.tolist() for name, values in targets.fitted.items()},
  }


def _inputs(trained: Trained) -> dict[str, Any]:
  """Facts on what the model takes."""
  if trained.table is not None:
    return _columns(trained.table)
  return _windows(trained) if trained.series else _pictures(trained)


def _columns(table: dict[str, Any]) -> dict[str, Any]:
  """Facts on the columns of a table that a run was trained on, and on how they are encoded."""
  federated = table["scaling"] == "federated"
  return {
    "inputs": list(features_of(parse_manifest(table["manifest"], "the manifest of the run"))),
    "columns": table["manifest"],
    "scaling": table["scaling"],
    **({"shift": table["shift"], "scale": table["scale"]} if federated else {}),
    "normalisation": "before the program: "
    + ("a number minus shift over scale" if federated else "low to high of a number become -1 to 1")
    + ", 0 where it is missing; 1 in the input of a category, and in that of a missing value",
  }


def _pictures(trained: Trained) -> dict[str, Any]:
  """Facts on the pictures that a run was trained on."""
  data, grey = trained.config.data, trained.grey
  top = np.iinfo(grey.dtype).max
  channels = "one grey channel" if grey.channels == 1 else "red, green and blue"
  how = {
    "image": "each image minus its mean, divided by its standard deviation or by 1 if that is less",
    "fixed": f"pixel / {top / 2:g} - 1",
  }
  return {
    "image_size": data.image_size,
    "channels": trained.image_shape[2],
    "pixels": f"{np.dtype(grey.dtype)}, {channels}, resized to a square with bicubic"
    f" antialiasing; 0 is the value {grey.low:g} of the files and {top} the value {grey.high:g}",
    "normalisation": f"{data.normalisation}: {how.get(data.normalisation, '')}",
  }


def _windows(trained: Trained) -> dict[str, Any]:
  """Facts on the windows that a run on a series was trained on."""
  data, series = trained.config.data, trained.series
  assert series is not None
  scaled = f"ranges {data.ranges} become -1 to 1, values outside are cut"
  alone = "each channel of each window minus its mean, divided by its standard deviation"
  return {
    "window": f"float32 [b, {series['length']}, 1, {len(series['channels'])}] in the units of the"
    " recordings, nan where there is no value",
    "rate": series["rate"],
    "channels": [encodable(name) for name in series["channels"]],
    "normalisation": f"{scaled if data.ranges else alone}, in the program",
  }


def export_model(trained: Trained, how: str, output: pathlib.Path) -> str:
  """Writes ``output``, a program (jax) or weights (safetensors); returns a description of it.

  A .safetensors file has the description in its metadata, a program beside it as OUTPUT.json.

  Raises:
    UserError: privacy.json does not follow from the ledger.
  """
  require(
    trained.table is None or trained.table["scaling"] != "hospital",
    f"run {trained.run_id} scaled numbers by statistics of each hospital (data.scaling=hospital),"
    " which stay there",
    "train with data.scaling=ranges or federated",
  )
  about = describe(trained, claims.read(trained.folder))
  output.parent.mkdir(parents=True, exist_ok=True)
  if how == "jax":
    program = export_program(trained)
    write_whole(output, lambda place: place.write_bytes(program))
    beside = output.with_name(f"{output.name}.json")
    text = json.dumps({**about, "platforms": list(PLATFORMS)}, indent=2, ensure_ascii=False)
    write_text(beside, f"{text}\n")
    shape = ", ".join(map(str, trained.image_shape))
    made = f"probabilities [b, {len(trained.class_names)}]"
    if not trained.predicts_classes:
      made = f"predictions of the task '{trained.task.name}'"
    return (
      f"a program of {input_dtype(trained)} {trained.modality.nouns} [b, {shape}] to"
      f" {made} for {', '.join(PLATFORMS)}; {beside.name} describes it"
    )
  from safetensors.numpy import save_file

  arrays, naming = to_state_dict(trained.params, trained.state, trained.stem_pool_padding)
  metadata = {"format": "pt", "naming": naming}
  for name, value in about.items():
    metadata[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  write_whole(output, lambda place: save_file(arrays, place, metadata))
  count = sum(int(np.prod(array.shape)) for array in arrays.values())
  known = {"flax": "named by their place in Flax"}.get(naming, f"named as in {naming}")
  return f"{len(arrays)} arrays with {count:,} numbers in PyTorch's layout, {known}"
