"""Pictures of Grad-CAM: heat over an image, hospitals as grids, gates as a chart."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from fedjax_med.data.grey import to_eight_bits
from fedjax_med.report.figure_labels import inches
from fedjax_med.report.figures import CLASS_COLOURS, GLOBAL, QUIET, WIDTH, add_legend, new_figure

COLOURS = "inferno"  # perceptually uniform, and readable without telling red from green
OPACITY = 0.65  # of the hottest place: the image stays visible below
LEAST_SIDE = 256  # of an overlay file, pixels: a 32-pixel image is a stamp


class Seen(NamedTuple):
  """An image with its prediction and its heat map.

  Attributes:
    pixels: [H, W] or [H, W, 3] uint8 or uint16.
    heat: [H', W'] Grad-CAM.
    gated: [H', W'] activation behind a squeeze-and-excitation block, None without one.
    predicted: name of the most probable class.
    probability: probability of that class.
    true: name of the true class, empty where it is not known.
  """

  pixels: np.ndarray
  heat: np.ndarray
  gated: np.ndarray | None
  predicted: str
  probability: float
  true: str


def enlarge(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
  """[H', W'] -> [*size] float32, bilinear; values stay between the map's own."""
  height, width = size
  picture = Image.fromarray(np.asarray(values, np.float32))
  return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def overlay(pixels: np.ndarray, values: np.ndarray) -> Image.Image:
  """Heat over an image, as opaque as it is hot; sides of at least ``LEAST_SIDE`` pixels.

  Args:
    pixels: [H, W] or [H, W, 3] uint8 or uint16.
    values: [H', W'], at least 0; it is scaled to its own largest value.
  """
  import matplotlib

  picture = Image.fromarray(to_eight_bits(pixels)).convert("RGB")
  if min(picture.size) < LEAST_SIDE:
    factor = LEAST_SIDE / min(picture.size)
    size = round(picture.width * factor), round(picture.height * factor)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
  heat = enlarge(values, (picture.height, picture.width)).astype(np.float64)
  heat = heat / heat.max() if heat.max() > 0 else heat
  colours = matplotlib.colormaps[COLOURS](heat)[..., :3] * 255
  opacity = OPACITY * heat[..., None]
  mixed = np.asarray(picture, np.float64) * (1 - opacity) + colours * opacity
  return Image.fromarray(mixed.round().astype(np.uint8))


def draw_grid(path: pathlib.Path, title: str, seen: Sequence[Seen], block: str) -> None:
  """A column for each image: it, Grad-CAM over it and, if any, the map behind ``block`` over it.

  Title and class names are drawn as they are: see ``labels``.
  """
  rows = ["image", "Grad-CAM", *([f"gated map\n{block}"] if seen[0].gated is not None else [])]
  captions = [
    f"{example.predicted} {example.probability:.2f}"
    + (f"\ntrue: {example.true}" if example.true else "")
    for example in seen
  ]
  width = 1.0 + max(1.2, inches(captions, 8.5)) * len(seen)
  size = max(width, 3 + 0.075 * len(title)), 0.75 + 1.2 * len(rows)
  with new_figure(path, size, title) as figure:
    grid = figure.subplots(len(rows), len(seen), squeeze=False)
    for axis in grid.ravel():
      axis.set(xticks=[], yticks=[])
      axis.grid(visible=False)
      axis.spines[:].set_visible(False)
    for row, label in enumerate(rows):
      grid[row][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8.5)
    for column, example in enumerate(seen):
      pictures = [to_eight_bits(example.pixels), overlay(example.pixels, example.heat)]
      if example.gated is not None:
        pictures.append(overlay(example.pixels, example.gated))
      for axis, picture in zip(grid[:, column], pictures, strict=True):
        axis.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255)
      if not example.heat.max() > 0:
        grid[1][column].set_xlabel("0 everywhere", fontsize=8, color=QUIET)
      wrong = example.true not in ("", example.predicted)
      colour = "#B03A00" if wrong else "#222222"
      weight = "bold" if wrong else "normal"  # not by colour alone
      grid[0][column].set_title(
        captions[column], loc="center", fontsize=8.5, color=colour, weight=weight
      )


def draw_gates(
  path: pathlib.Path,
  names: Sequence[str],  # of the blocks, in order
  groups: Sequence[tuple[str, Sequence[np.ndarray]]],  # hospital, [images, channels] a block
) -> None:
  """Gates of every block: the middle 80% of all channels and images, and a line a hospital."""
  pooled = [
    np.concatenate([gates[block] for _, gates in groups]).ravel() for block in range(len(names))
  ]
  low, middle, high = np.array([np.nanquantile(values, [0.1, 0.5, 0.9]) for values in pooled]).T
  places = np.arange(len(names))
  with new_figure(path, (WIDTH, 3.4), "Gates of the squeeze-and-excitation blocks") as figure:
    axis = figure.subplots()
    axis.errorbar(
      places, middle, [middle - low, high - middle], fmt="o", color=GLOBAL, elinewidth=6,
      alpha=0.35, label="middle 80% of channels and images, median",
    )  # fmt: skip
    if len(groups) > 1:
      for number, (name, gates) in enumerate(groups[: len(CLASS_COLOURS)]):
        means = [float(np.nanmean(values)) for values in gates]
        axis.plot(places, means, color=CLASS_COLOURS[number], marker=".", label=f"mean, {name}")
    axis.set(ylabel="gate", ylim=(0, 1))
    axis.set_xticks(places, names, rotation=0 if len(names) < 7 else 60, fontsize=8.5)
    add_legend(figure, axis)
