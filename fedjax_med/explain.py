"""Shows where the model of a run looks, hospital by hospital, on a page of pictures.

For some test images of each hospital, or of --hospital: the image, Grad-CAM over it (what speaks
for the predicted class, or for the --target), and for networks with squeeze-and-excitation what its
last block lets through. Writes WORKDIR/explain/index.html, which needs no other file, and redoes
the report.

Test images of a private run show patients, and no ε covers a picture: for such a run give --images
with pictures that you may show, or say --show_patients. Phantoms show nobody. A map is no proof
that the network is right, and not for diagnosis.

Examples:
  python -m fedjax_med.explain --workdir=runs/quickstart
  python -m fedjax_med.explain --workdir=runs/mine --images=scans --target=tumour
"""

import pathlib
import sys

from absl import flags

from fedjax_med.core.errors import require
from fedjax_med.core.text import encodable, visible
from fedjax_med.flags import define_network, run_main

flags.DEFINE_string("workdir", "", "Folder of the run; the page goes to its folder 'explain'.")
flags.DEFINE_string(
  "images",
  "",
  "Folder of pictures to explain; empty takes test images of every hospital (or --hospital).",
)
flags.DEFINE_integer("num_images", 8, "Images of each hospital, or of --images.")
flags.DEFINE_string(
  "target",
  "predicted",
  "Class that the heat speaks for: its name, or 'predicted' for each image's.",
)
flags.DEFINE_string(
  "layer", "", "Layer whose map is shown; empty is the last with a map of at least 4 x 4 positions."
)
flags.DEFINE_string("data_path", "", "Where the run's data lie now, if they have moved.")
flags.DEFINE_bool(
  "show_patients", False, "Show test images of a private run; the page is then not for release."
)
flags.DEFINE_string(
  "hospital",
  "",
  "Hospital whose own model is shown on its own test images (fedbn, fedper, finetune, ditto); empty"
  " is the global model, which fedbn and fedper have not.",
)
define_network()


def main(argv: list[str]) -> None:
  values = flags.FLAGS
  require(len(argv) == 1, f"'{' '.join(argv[1:])}' is not a flag", "give --workdir=DIR")
  require(bool(values.workdir), "--workdir is missing", "give the folder of a run")
  for name in ("data_path", "show_patients"):
    require(
      not values.images or not values[name].present,
      f"--{name} with --images={values.images}, which is shown instead of the run's test images",
      "leave out one of them",
    )
  folder = pathlib.Path(values.workdir).expanduser()
  images = pathlib.Path(values.images).expanduser() if values.images else None
  from fedjax_med.report import run_page
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.trained import (
    heat_page,
    loading,  # after the flags: jax takes a while
  )

  model = loading.load(folder, values.network, encodable(values.hospital))
  use_compilation_cache(model.config.execution.compilation_cache)
  page = heat_page.explain(
    model,
    images=images,
    num_images=values.num_images,
    target=encodable(values.target),
    layer_name=values.layer,
    data_path=values.data_path,
    show_patients=values.show_patients,
    tell=lambda text: print(text, file=sys.stderr, flush=True),
  )
  print(visible(str(page)))
  if (folder / "summary.json").exists():  # an unfinished run has no report yet
    print(visible(str(run_page.write_report(folder))))


if __name__ == "__main__":
  run_main(main)
