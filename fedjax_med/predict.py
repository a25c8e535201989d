"""Predicts the class of pictures with the model that a run has trained, and writes a table.

Pictures are read as the training read them: any size and mode (grey, colour, palette, transparent)
becomes the channels of the run (grey, or three) at its resolution; a run on pictures of more than 8
bits wants such, with its own window of values. The training data are not needed. The table has a
row a file: file, predicted class, probability of every class, its map with --maps, error. Files
that are not read are named with the reason and do not stop the others; the exit code is 2 if none
can be.

The model of a run on a table reads --table, a CSV or Parquet file with the columns of the run (the
target may be left out); predictions have the file and the line of each record.

That of a run on a series reads --series, recordings in CSV, text or .npy files: --output has the
recordings, and OUTPUT_windows.csv beside it the windows whose mean they are.

Probabilities are the network's own and not calibrated on your pictures. Not for diagnosis.

Examples:
  python -m fedjax_med.predict --workdir=runs/quickstart --images=scans
  python -m fedjax_med.predict --workdir=runs/quickstart --images=scan.png --output=one.csv --maps
  python -m fedjax_med.predict --workdir=runs/heart_disease --table=patients.csv
  python -m fedjax_med.predict --workdir=runs/smartwatch --series=recordings
"""

import pathlib
import sys
from typing import Any

from absl import flags

from fedjax_med.core.errors import require
from fedjax_med.core.text import encodable, visible
from fedjax_med.flags import define_network, require_company, run_main

flags.DEFINE_string("workdir", "", "Folder of the run whose model predicts; it may be unfinished.")
flags.DEFINE_string("images", "", "Folder of pictures, searched with all below it, or one picture.")
flags.DEFINE_string("table", "", "Table of records, or a folder of tables, for a run on a table.")
flags.DEFINE_string("series", "", "Folder of recordings, or one of them, for a run on a series.")
flags.DEFINE_string("output", "predictions.csv", "The table to write (CSV).")
flags.DEFINE_bool(
  "maps", False, "Also write each picture with Grad-CAM of its predicted class, beside the table."
)
flags.DEFINE_string("layer", "", "Where --maps looks; empty is the last layer with a map.")
flags.DEFINE_string(
  "hospital",
  "",
  "Hospital whose own model is meant (fedbn, fedper, finetune, ditto); empty is the"
  " global model, which fedbn and fedper have not.",
)
define_network()

SHOWN = 20  # unreadable files that are named on the terminal; the table has them all


def main(argv: list[str]) -> None:
  values = flags.FLAGS
  require(len(argv) == 1, f"'{' '.join(argv[1:])}' is not a flag", "give --images=FOLDER")
  given = [f"--{n}={values[n].value}" for n in ("images", "table", "series") if values[n].value]
  require(
    len(given) < 2,
    " with ".join(given),
    "give one of them: tables for a run on a table, recordings for one on a series, pictures for"
    " one on pictures",
  )
  require(bool(values.workdir), "--workdir is missing", "give the folder of a run")
  require(
    bool(given),
    "--images is missing",
    "give a folder of pictures or a picture, --table=FILE for a run on a table, or --series=FOLDER"
    " for one on a series",
  )
  require_company("layer", values.maps, "--maps")
  images = pathlib.Path(values.images).expanduser()
  output = pathlib.Path(values.output).expanduser()
  require(not output.is_dir(), f"--output={output} is a folder", "name a file such as table.csv")
  from fedjax_med.run.compilation_cache import use_compilation_cache
  from fedjax_med.trained import (
    loading,  # after the flags: jax takes a while
    predictions,
  )

  if values.images:
    predictions.files_in(images)  # a typo need not wait for the model
  folder = pathlib.Path(values.workdir).expanduser()
  model = loading.load(folder, values.network, encodable(values.hospital))
  use_compilation_cache(model.config.execution.compilation_cache)
  flag = {"table": "table", "series": "series"}.get(model.modality.name, "images")
  require(
    bool(values[flag].value),
    f"run {model.run_id} was trained on {model.modality.nouns}",
    f"give --{flag}={'FILE' if flag == 'table' else 'FOLDER'}",
  )
  if values.series:
    _predict_series(model, pathlib.Path(values.series).expanduser(), output)
    return
  if values.table:
    _predict_table(model, pathlib.Path(values.table).expanduser(), output)
    return
  layer = predictions.choose_layer(model, values.layer) if values.maps else None
  counts = predictions.predict_files(model, images, output, layer, _tell)
  for name, error in counts.errors[:SHOWN]:
    _tell(f"{name}: {error}")
  if len(counts.errors) > SHOWN:
    _tell(f"... and {len(counts.errors) - SHOWN} more, see the column 'error'")
  shown = visible(str(output))
  print(f"{shown}: {counts.read} predicted, {len(counts.errors)} not ({model.described})")
  if positive := model.task.positive(model.class_names):
    print(f"positive class: '{positive}'")
  if layer is not None and counts.read:
    maps = visible(str(output.with_name(output.stem + "_maps")))
    print(f"{maps}: Grad-CAM at layer {layer.name}")
  require(
    counts.read > 0,
    f"none of the {len(counts.errors)} files of --images={images} can be read",
    f"see the column 'error' of {output}",
  )


def _predict_table(model: Any, place: pathlib.Path, output: pathlib.Path) -> None:
  """Predicts the records of a table, and says how many."""
  from fedjax_med.trained.table_predictions import predict_table

  require(
    not flags.FLAGS.maps, "--maps is read for pictures only", "leave it out: records have no map"
  )
  number, met = predict_table(model, place, output)
  if met:
    _tell(met)
  print(f"{visible(str(output))}: {number} records predicted ({model.described})")
  if positive := model.task.positive(model.class_names):
    print(f"positive class: '{positive}'")


def _predict_series(model: Any, place: pathlib.Path, output: pathlib.Path) -> None:
  """Predicts recordings and their windows, and says how many."""
  from fedjax_med.trained.series_predictions import predict_series, windows_output

  require(
    not flags.FLAGS.maps, "--maps is read for pictures only", "leave it out: windows have no map"
  )
  counts = predict_series(model, place, output)
  for name, error in counts.errors[:SHOWN]:
    _tell(f"{name}: {error}")
  if len(counts.errors) > SHOWN:
    _tell(f"... and {len(counts.errors) - SHOWN} more, see the column 'error'")
  print(
    f"{visible(str(output))}: {counts.recordings} recordings predicted, {len(counts.errors)} not;"
    f" {visible(str(windows_output(output)))}: {counts.windows} windows ({model.described})"
  )
  if positive := model.task.positive(model.class_names):
    print(f"positive class: '{positive}'")
  require(
    counts.recordings > 0,
    f"none of the {len(counts.errors)} files of --series={place} can be read",
    f"see the column 'error' of {output}",
  )


def _tell(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  run_main(main)
