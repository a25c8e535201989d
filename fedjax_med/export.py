"""Writes the model of a run as a file for other programs.

--format=jax is a compiled program: images [b, size, size, 1] to class probabilities, with
weights and normalisation inside, for CPU, CUDA and TPU. It loads without this package:
  jax.export.deserialize(bytearray(open(FILE, "rb").read())).call(images)
FILE.json beside it names classes, size and privacy.

--format=safetensors holds the weights as PyTorch lays them out: convolutions OIHW, matrices
[out, in]. An SE-ResNeXt has the names of pretrainedmodels or timm, whichever its stem's pool
belongs to, ResNet-50 and ResNeXt-50 those of timm and torchvision, any other network its path in
Flax with dots (conv1.weight). se_resnext50_32x4d of full width with norm=frozen_batch can be read
again by model.pretrained. Classes, size, normalisation, ε and run id are in the file's metadata.

Examples:
  python -m fedjax_med.export --workdir=runs/quickstart --format=jax
  python -m fedjax_med.export --workdir=runs/quickstart --format=safetensors --output=FILE
"""

import pathlib
import urllib.parse

from absl import flags

from fedjax_med.core.errors import require, require_choice
from fedjax_med.core.text import encodable, visible
from fedjax_med.flags import define_network, run_main

_ENDINGS = {"jax": ".jax", "safetensors": ".safetensors"}

flags.DEFINE_string("workdir", "", "Folder of the run; it may be unfinished.")
flags.DEFINE_string("format", "", "jax (a program) or safetensors (weights).")
flags.DEFINE_string(
  "output", "", "File to write; empty is model.FORMAT or model-HOSPITAL.FORMAT in WORKDIR/export."
)
flags.DEFINE_string(
  "hospital",
  "",
  "Hospital whose own model is meant (fedbn, fedper, finetune, ditto); empty is the"
  " global model, which fedbn and fedper have not.",
)
define_network()


def main(argv: list[str]) -> None:
  values = flags.FLAGS
  require(len(argv) == 1, f"'{' '.join(argv[1:])}' is not a flag", "give --format=jax")
  require(bool(values.workdir), "--workdir is missing", "give the folder of a run")
  require(bool(values.format), "--format is missing", "use --format=jax or --format=safetensors")
  require_choice("--format", values.format, _ENDINGS)
  folder = pathlib.Path(values.workdir).expanduser()
  hospital = encodable(values.hospital)
  whose = f"-{urllib.parse.quote(hospital, safe=' ')}" if hospital else ""
  output = folder / "export" / f"model{whose}{_ENDINGS[values.format]}"
  if values.output:
    output = pathlib.Path(values.output).expanduser()
  require(not output.is_dir(), f"--output={output} is a folder", "name a file")
  from fedjax_med.trained import (
    exporting,
    loading,  # after the flags: jax takes a while
  )

  # Native convolutions: what runs it later is not known, and every platform has them.
  model = loading.load(folder, values.network, hospital, lowering="native")
  print(f"{visible(str(output))}: {exporting.export_model(model, values.format, output)}")


if __name__ == "__main__":
  run_main(main)
