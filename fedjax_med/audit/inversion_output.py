"""Results of the inversion attack: a table, inversion.json, and a figure of the pictures."""

import pathlib
from typing import Any

import numpy as np

from fedjax_med.audit.inversion import PICTURED, Inversion
from fedjax_med.core.config import Config
from fedjax_med.core.errors import require
from fedjax_med.core.text import visible
from fedjax_med.data.dataset import Hospitals
from fedjax_med.data.sources import shown_as
from fedjax_med.folder.writing import write_json

TABLE_WIDTH = 96  # columns of a terminal, at least: a number must not be cut
NOT_DRAWN = (
  "No figure was drawn, for it would show records of patients: add --show_patients=true for"
  " pictures that stay where the images are, or use data.source=phantoms."
)


def may_show(config: Config, hospitals: Hospitals, show_patients: bool) -> bool:
  """Whether the figure is drawn; raises UserError where --show_patients changes nothing."""
  pictures = hospitals.dataset.modality == "pictures"
  nobody = shown_as(config.data.source).synthetic_people
  require(
    not show_patients or (pictures and not nobody),
    "--show_patients is read where reconstructed pictures show patients only, and these are"
    f" {config.data.source}",
    "leave it out",
  )
  return pictures and (nobody or show_patients)


def write(folder: pathlib.Path, found: Inversion, shown: bool) -> None:
  """Writes inversion.json and, if it may be ``shown``, inversion.png; an older picture goes."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "inversion.png").unlink(missing_ok=True)
  write_json(folder / "inversion.json", found.result)
  if shown:
    draw(folder / "inversion.png", found)


def show(result: dict[str, Any]) -> None:
  """Prints the table of a result, and what was left out."""
  from rich import box
  from rich.console import Console
  from rich.table import Table

  console = Console()
  console.width = max(console.width, TABLE_WIDTH)
  title = (
    f"First update of {visible(result['hospital'])}, {result['training_records']} training records,"
    f" {visible(result['network'])}"
  )
  table = Table(title=title, title_justify="left", padding=(0, 0), box=box.SIMPLE)
  columns = ("update", "attack", "n", "correl.", "PSNR", "SSIM", "named", "chance")
  for place, name in enumerate(columns):
    table.add_column(name, justify="right" if place > 1 else "left", no_wrap=True)
  for way in result["ways"]:
    table.add_row(
      visible(way["name"]),
      way["attack"],
      str(way["records"]),
      _number(way["correlation"], 2),
      _number(way["psnr"], 1),
      _number(way["ssim"], 2),
      _number(way["identified"], 2),
      f"{way['chance']:.3f}",
    )
  console.print(table)
  for name, reason in result["left_out"].items():
    print(visible(f"Left out: {name}: {reason}"))
  print("n is records; named is the share that the attacker tells by the most similar record.")
  print(
    "± is the standard error over batches; an attack that fails is no proof that none succeeds."
  )


def _number(summary: dict[str, float | None], digits: int) -> str:
  mean, error = summary["mean"], summary["standard_error"]
  if mean is None:
    return "–"
  return f"{mean:.{digits}f}" + ("" if error is None else f"±{error:.{digits}f}")


def draw(path: pathlib.Path, found: Inversion) -> None:
  """Draws records and the reconstructions nearest to them: a column a record, a row a way."""
  from fedjax_med.report.figures import new_figure

  originals = found.originals[:PICTURED]
  rows = {"record": originals} | {name: made[:PICTURED] for name, made in found.pictures.items()}
  title = "Records made again from one update"
  size = 2.2 + 1.15 * len(originals), 0.6 + 1.15 * len(rows)
  with new_figure(path, size, title) as figure:
    grid = figure.subplots(len(rows), len(originals), squeeze=False)
    for axes, (name, made) in zip(grid, rows.items(), strict=True):
      for column, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        if column < len(made):
          axis.imshow(_grey(made[column], originals[column]), cmap="gray", vmin=0, vmax=1)
      axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5)


def _grey(made: np.ndarray, record: np.ndarray) -> np.ndarray:
  """[H, W] or [H, W, 3] in 0 .. 1, from the darkest to the brightest value of the record."""
  low, high = float(record.min()), float(record.max())
  scaled = np.clip((made - low) / max(high - low, 1e-12), 0, 1)
  return scaled[..., 0] if scaled.shape[-1] == 1 else scaled
