"""The page of a trained model that shows, hospital by hospital, where it looks."""

import base64
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedjax_med.core.errors import UserError, require, require_choice
from fedjax_med.core.text import readable
from fedjax_med.data.dataset import Hospitals, client_rows
from fedjax_med.data.grey import without_channel
from fedjax_med.data.hospitals import load_hospitals
from fedjax_med.data.sources import SOURCES, shown_as
from fedjax_med.folder import writing as files
from fedjax_med.models import grad_cam
from fedjax_med.prepare.synthetic_images import reserve_synthetic
from fedjax_med.report.figure_labels import drawable, labels, stand_ins
from fedjax_med.report.run_page import environment
from fedjax_med.run.summaries import hospital_record
from fedjax_med.tasks.classification import positive_class
from fedjax_med.trained import heat_pictures
from fedjax_med.trained.loading import Trained
from fedjax_med.trained.pointing_game import score
from fedjax_med.trained.predictions import (
  Looked,
  choose_layer,
  files_in,
  make_look,
  read_pictures,
  reads_volumes,
)

MAX_HOSPITALS = 20  # rows of the page
MAX_POINTED = 512  # images of the pointing game
# Zhang et al. allow 15 pixels on the photographs of PASCAL VOC, most of them 500 wide.
TOLERANCE = 15 / 500


class Group(NamedTuple):
  """Images that stand in one row of the page.

  Attributes:
    name: name of the hospital, or a description.
    pixels: [n, H, W, C] uint8 or uint16.
    true: name of each one's class, empty where it is not known.
  """

  name: str
  pixels: np.ndarray
  true: tuple[str, ...]


def explain(
  trained: Trained,
  *,
  images: pathlib.Path | None,
  num_images: int,
  target: str,
  layer_name: str,
  data_path: str,
  show_patients: bool,
  tell: Callable[[str], None],
) -> pathlib.Path:
  """Writes WORKDIR/explain: index.html, its pictures and explain.json; returns the page.

  Files of an earlier start stay until all of them can be replaced.

  Args:
    trained: the model.
    images: a folder of pictures, or None for the test images of the run's own data.
    num_images: images of each hospital, or of the folder.
    target: 'predicted', or the class that every image is explained for.
    layer_name: layer of Grad-CAM; empty chooses one (``grad_cam.choose_layer``).
    data_path: folder of the run's data; empty if they have not moved.
    show_patients: show pictures of patients although the run is private.
    tell: is called for pictures that cannot be read.

  Raises:
    UserError: the network has no map, the data are not those of the run, pictures of patients
      would be shown that must not be, an argument is without effect, or a name is unknown.
  """
  require(num_images >= 1, f"--num_images={num_images} is under 1", "ask for at least one")
  secret = _shows_secrets(trained)
  _require_may_show(trained, images is not None, data_path, show_patients)
  number = None
  if target != "predicted":
    require_choice("--target", target, ("predicted", *trained.class_names))
    number = trained.class_names.index(target)
  layer = choose_layer(trained, layer_name)
  hospitals = None if images else _load_data(trained, data_path)
  if images:
    groups = [_folder_group(trained, images, num_images, tell)]
  else:
    assert hospitals is not None
    groups = _hospital_groups(hospitals, num_images, trained.hospital)
  look = make_look(trained, layer)
  pixels = np.concatenate([group.pixels for group in groups])
  size = min(trained.config.eval.batch_size, len(pixels))
  whole = _look_at(look, pixels, number, size)
  ends = np.cumsum([len(group.pixels) for group in groups]).tolist()
  looked = [_part(whole, end - len(g.pixels), end) for g, end in zip(groups, ends, strict=True)]
  block = _gate_shown(list(looked[0].gated), looked[0])

  hospital_names = hospitals.names if hospitals else ()
  titles = dict(zip(hospital_names, labels(hospital_names, "hospital"), strict=True))
  titles = titles or {group.name: drawable(group.name, 60) for group in groups}
  asked = hospitals.names if hospitals and not trained.hospital else groups
  record = {
    "run_id": trained.run_id,
    "rounds": trained.rounds,
    "hospital": trained.hospital,
    "target": target,
    "layer": layer.name,
    "map": list(layer.shape[:2]),
    "gate": block,
    "shown": _kind_of(trained, images is not None),
    "patients_of_private_run": secret and images is None,
    "hospitals_left_out": len(asked) - len(groups),
    "pointing": None if hospitals is None else _point(trained, hospitals, look, size),
  }
  view = {
    **record,
    "positive": positive_class(trained.class_names),
    "stand_ins": [
      *stand_ins(trained.class_names, "class"),
      *stand_ins(hospital_names, "hospital"),
    ],
    "model": trained.config.model.name,
    "size": trained.config.data.image_size,
    "private": trained.private,
  }
  return _publish(trained, groups, looked, block, titles, record, view)


def _publish(
  trained: Trained,
  groups: Sequence[Group],
  looked: Sequence[Looked],
  block: str,
  titles: dict[str, str],
  record: dict[str, Any],
  view: dict[str, Any],
) -> pathlib.Path:
  """Draws the pictures, and writes page and record once all of them are there."""
  folder = trained.folder / "explain"
  with tempfile.TemporaryDirectory(prefix=".explain.", dir=trained.folder) as place:
    drawn = pathlib.Path(place)
    figures = _draw(drawn, trained, groups, looked, block, titles)
    page = (
      environment()
      .get_template("explain.html")
      .render(
        **view, images=[{**figure, "data": _base64(drawn / figure["file"])} for figure in figures]
      )
    )
    folder.mkdir(exist_ok=True)
    (folder / "explain.json").unlink(missing_ok=True)  # pictures never stand under others' captions
    for old in folder.glob("*.png"):
      old.unlink()
    for figure in figures:
      (drawn / figure["file"]).replace(folder / figure["file"])
  files.write_json(folder / "explain.json", {**record, "figures": figures})
  files.write_text(folder / "index.html", page)
  return folder / "index.html"


def _kind_of(trained: Trained, given: bool) -> str:
  if given:
    return "given pictures"
  source = trained.config.data.source
  return source if shown_as(source).synthetic_people else "test images"


def _shows_secrets(trained: Trained) -> bool:
  """Whether the run's own images are pictures of patients whom it protects."""
  return trained.private and not shown_as(trained.config.data.source).synthetic_people


def _require_may_show(trained: Trained, given: bool, data_path: str, show_patients: bool) -> None:
  """Raises UserError for flags without effect, and where patients of a private run would be shown.

  ``given`` says whether pictures were named.
  """
  name = trained.config.data.source
  source = shown_as(name)
  secret = _shows_secrets(trained)
  reason = f"do not: they are {name}" if source.synthetic_people else "may do: it is not private"
  require(
    secret or not show_patients,
    "--show_patients is read where a private run's own test images show patients only, which those"
    f" of this run {reason}",
    "leave it out",
  )
  require(
    source.facts.reads_files or not data_path,
    f"--data_path={data_path} is read for runs on files only, and this one made {name}",
    "leave it out",
  )
  require(
    not secret or given or show_patients,
    "this run is private and its test images are pictures of patients, which no ε covers",
    "give --images=FOLDER with pictures that you may show, or --show_patients=true for a page that"
    " stays where the images are",
  )


def _base64(path: pathlib.Path) -> str:
  return base64.b64encode(path.read_bytes()).decode("ascii")


def _draw(
  folder: pathlib.Path,
  trained: Trained,
  groups: Sequence[Group],
  looked: Sequence[Looked],
  block: str,
  titles: dict[str, str],
) -> list[dict[str, str]]:
  """Draws a picture for each group and one of the gates; returns their files and captions.

  Args:
    folder: folder of the pictures.
    trained: the model.
    groups: images.
    looked: predictions and explanations of each group.
    block: block whose gated map is shown; empty for none.
    titles: title of each group in a picture, by its name.
  """
  figures = []
  shown = {
    "": "",
    **dict(zip(trained.class_names, labels(trained.class_names, "class"), strict=True)),
  }
  for index, (group, made) in enumerate(zip(groups, looked, strict=True), 1):
    name = f"group-{index}.png"
    seen = [_seen(trained, group, made, row, block) for row in range(len(group.pixels))]
    caption = f"{group.name}: {'; '.join(map(_caption, seen))}."
    seen = [
      example._replace(predicted=shown[example.predicted], true=shown[example.true])
      for example in seen
    ]
    heat_pictures.draw_grid(folder / name, titles[group.name], seen, block)
    figures.append({"file": name, "caption": caption})
  gates = list(looked[0].gated)
  if gates:
    rows = [
      (titles[group.name], [made.gated[name].gates for name in gates])
      for group, made in zip(groups, looked, strict=True)
    ]
    heat_pictures.draw_gates(folder / "gates.png", gates, rows)
    caption = (
      "Factors by which each squeeze-and-excitation block scales its channels, over the images"
      " above."
    )
    figures.append({"file": "gates.png", "caption": caption})
  return figures


def _load_data(trained: Trained, data_path: str) -> Hospitals:
  """The run's hospitals; UserError if the data cannot be read or are not those of the run."""
  config = trained.config
  require(
    config.data.source in SOURCES,
    f"the run's data.source='{config.data.source}' is not part of this package",
    "give --network=FILE.py, the file that registers it (usually the --config of the run), or"
    " --images=FOLDER",
  )
  if data_path:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data_path))
  try:
    hospitals = reserve_synthetic(config, load_hospitals(config))
  except UserError as error:
    raise UserError(
      f"the data of the run cannot be read ({str(error).partition(';')[0]}); say where they lie"
      " with --data_path=DIR, or give --images=FOLDER"
    ) from error
  held = json.loads((trained.folder / "hospitals.json").read_text(encoding="utf-8"))
  now = hospital_record(hospitals)
  require(
    _equal(now, held),
    f"the data in '{config.data.path}' are not those of the run: hospitals.json counts others",
    "say where those lie with --data_path=DIR, or give --images=FOLDER",
  )
  return hospitals


def _equal(now: dict[str, Any], held: dict[str, Any]) -> bool:
  """Whether two hospitals.json describe the same data; missing old fields are ignored."""
  split = {key: value for key, value in now["split"].items() if key in held["split"]}
  return (
    all(now[key] == held[key] for key in ("class_names", "hospitals"))
    and split == held["split"]
    and now["grey"] == held.get("grey", now["grey"])
  )


def _folder_group(
  trained: Trained, images: pathlib.Path, num_images: int, tell: Callable[[str], None]
) -> Group:
  """The first readable pictures of a folder."""
  pixels = []
  for picture in read_pictures(trained, files_in(images, reads_volumes(trained))):
    if picture.pixels is None:
      tell(f"{picture.name}: {picture.error}")
    else:
      pixels.append(picture.pixels)
    if len(pixels) == num_images:
      break
  require(bool(pixels), f"--images={images} holds no readable picture", "mend or replace the files")
  return Group(
    name=f"Pictures of {readable(images.name)}", pixels=np.stack(pixels), true=("",) * len(pixels)
  )


def _hospital_groups(hospitals: Hospitals, num_images: int, only: str) -> list[Group]:
  """Test images of every hospital that has any, its classes by turns, in the order of the test.

  With ``only`` those of that hospital.
  """
  dataset, groups = hospitals.dataset, []
  for name, rows in zip(hospitals.names, client_rows(hospitals.test), strict=True):
    if only not in ("", name):
      continue
    labels = dataset.labels[rows]
    # The how-manieth of its class each one is: the firsts of all classes come first.
    turn = np.zeros(len(rows), np.int64)
    for label in np.unique(labels):
      turn[labels == label] = np.arange((labels == label).sum())
    chosen = rows[np.lexsort((labels, turn))][:num_images]
    if len(chosen):
      true = tuple(dataset.class_names[label] for label in dataset.labels[chosen])
      groups.append(Group(name=name, pixels=dataset.inputs[chosen], true=true))
  whose = f"--hospital={only}" if only else "the run"
  require(bool(groups), f"{whose} has no test images", "give --images=FOLDER")
  return groups[:MAX_HOSPITALS]


def _look_at(look: Any, pixels: np.ndarray, target: int | None, size: int) -> Looked:
  """``look`` at images in batches of ``size``, the last one padded: one shape, one program."""
  parts = []
  for start in range(0, len(pixels), size):
    part = pixels[start : start + size]
    padded = np.zeros((size, *pixels.shape[1:]), pixels.dtype)
    padded[: len(part)] = part
    parts.append(_part(look(padded, target), 0, len(part)))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _part(looked: Looked, start: int, end: int) -> Looked:
  return jax.tree.map(lambda leaf: leaf[start:end], looked)


def _gate_shown(names: Sequence[str], looked: Looked) -> str:
  """The block whose gated map is drawn: the last with places to tell apart; empty if none."""
  sides = {name: min(looked.gated[name].activation.shape[1:]) for name in names}
  large = [name for name in names if sides[name] >= grad_cam.LEAST_SIDE]
  maps = large or [name for name in names if sides[name] > 1]
  return maps[-1] if maps else ""


def _seen(
  trained: Trained, group: Group, looked: Looked, row: int, block: str
) -> heat_pictures.Seen:
  probabilities = looked.probabilities[row]
  best = int(probabilities.argmax())
  return heat_pictures.Seen(
    pixels=without_channel(group.pixels[row]),
    heat=looked.maps[row],
    gated=np.asarray(looked.gated[block].activation[row]) if block else None,
    predicted=trained.class_names[best],
    probability=float(probabilities[best]),
    true=group.true[row],
  )


def _caption(seen: heat_pictures.Seen) -> str:
  true = f", true class {seen.true}" if seen.true else ""
  return f"predicted {seen.predicted} with {seen.probability:.2f}{true}"


def _point(trained: Trained, hospitals: Hospitals, look: Any, size: int) -> dict[str, Any] | None:
  """The pointing game on test images whose tumour is known (phantoms); None where none is."""
  dataset = hospitals.dataset
  if dataset.tumour_masks is None:
    return None
  tests = zip(hospitals.names, client_rows(hospitals.test), strict=True)
  rows = np.concatenate([rows for name, rows in tests if trained.hospital in ("", name)])
  rows = rows[dataset.tumour_masks[rows].any((1, 2))][:MAX_POINTED]
  if not len(rows):
    return None
  maps = _look_at(look, dataset.inputs[rows], 1, size).maps  # 1 is the class with a tumour
  side = trained.config.data.image_size
  hits, chance = score(maps, dataset.tumour_masks[rows], max(1, round(TOLERANCE * side)))
  return {"images": len(rows), "hits": hits, "chance": chance}
