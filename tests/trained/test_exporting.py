"""Exported models: a program that runs without this package, weights that say what they are."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open

from fedjax_med.privacy import ledger
from fedjax_med.run.checkpoints import Restored
from fedjax_med.trained import loading
from fedjax_med.trained.exporting import export_model
from fedjax_med.trained.predictions import make_probabilities
from tests.command import start

# -I and no PYTHONPATH: nothing of this repository can be imported.
PROGRAM = """
import sys
import jax
import numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
images = np.load(sys.argv[2])
results = [np.asarray(program.call(images[:n])) for n in (1, len(images))]
assert not any(name.startswith(("fedjax_med", "flax")) for name in sys.modules)
np.save(sys.argv[3], np.concatenate(results))
"""


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).integers(0, 256, (5, 24, 24, 1)).astype(np.uint8)


@pytest.mark.slow
def test_the_program_runs_elsewhere_without_this_package(learned, images, tmp_path):
  said = export_model(loading.load(learned, lowering="native"), "jax", tmp_path / "model.jax")
  assert "[b, 24, 24, 1]" in said
  np.save(tmp_path / "images.npy", images)
  result = subprocess.run(
    [sys.executable, "-c", PROGRAM, "model.jax", "images.npy", "found.npy"],
    cwd=tmp_path,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  expected = make_probabilities(loading.load(learned))(images)
  found = np.load(tmp_path / "found.npy")
  np.testing.assert_allclose(found, np.concatenate([expected[:1], expected]), atol=1e-6)
  about = json.loads((tmp_path / "model.jax.json").read_text())
  assert about["classes"] == ["healthy", "tumour"]
  assert about["privacy"] == "none"


@pytest.mark.parametrize(
  ("name", "naming", "stem"),
  [
    ("se_resnext_tiny", "pretrainedmodels", "layer0.conv1.weight"),
    ("resnet50", "timm", "conv1.weight"),
    ("resnext50_32x4d", "timm", "conv1.weight"),
    ("cnn_small", "flax", "conv1.weight"),
  ],
)
def test_weights_are_named_after_the_family_of_the_runs_network(
  name, naming, stem, finished, tmp_path, monkeypatch
):
  folder = shutil.copytree(finished, tmp_path / "run")
  record = json.loads((folder / "config.json").read_text())
  record["config"]["model"]["name"] = name
  (folder / "config.json").write_text(json.dumps(record))

  def zeros(folder, run_id, like, like_client, client):
    params, state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    return Restored(params, state, like_client, 1, ledger.read(folder).head)

  monkeypatch.setattr(loading, "restore_model", zeros)
  export_model(loading.load(folder), "safetensors", tmp_path / "it.safetensors")
  with safe_open(tmp_path / "it.safetensors", "numpy") as file:
    assert file.metadata()["naming"] == naming
    assert stem in file.keys()  # noqa: SIM118


@pytest.mark.slow
def test_the_command_writes_a_hospitals_own_model_under_its_name(gated, tmp_path):
  gated = shutil.copytree(gated, tmp_path / "run")
  options = f"--workdir={gated}", "--format=safetensors", "--hospital=hospital 2"
  result = start("export", *options)
  assert result.returncode == 0, result.stderr
  file = gated / "export" / "model-hospital 2.safetensors"
  assert result.stdout.startswith(f"{file}: ")
  assert "named as in pretrainedmodels" in result.stdout
  own = loading.load(gated, hospital="hospital 2").params
  with safe_open(file, "numpy") as arrays:
    assert arrays.metadata()["hospital"] == "hospital 2"
    stem = arrays.get_tensor("layer0.conv1.weight")
    np.testing.assert_array_equal(stem, own["stem"]["kernel"].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(arrays.get_tensor("layer0.bn1.bias"), own["stem_norm"]["bias"])


def test_weights_carry_what_their_user_must_know(finished, tmp_path):
  export_model(loading.load(finished), "safetensors", tmp_path / "new" / "model.safetensors")
  with safe_open(tmp_path / "new" / "model.safetensors", "numpy") as file:
    about = file.metadata()
    matrix = file.get_tensor("head.weight")
  assert matrix.shape == (2, 256)
  assert json.loads(about["classes"]) == ["healthy", "tumour"]
  assert about["image_size"] == "16"
  assert about["normalisation"].startswith("image: each image minus its mean")
  assert about["naming"] == "flax"
  assert about["run_id"] == json.loads((finished / "config.json").read_text())["run_id"]
  assert about["norm_epsilon"] == "1e-05"
  (guarantee,) = json.loads(about["privacy"])
  expected = json.loads((finished / "privacy.json").read_text())["epsilon_max"]
  assert guarantee["epsilon"] == expected
  assert guarantee["unit"] == "record"
