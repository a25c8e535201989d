"""Kinds of examples: raw values are read, compared, varied and made into network inputs.

A dataset names its modality. Code that meets examples calls the functions of that record, and
knows nothing of pixels itself. jax is imported inside of functions: hospitals are read while a
program that trains still imports it.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedjax_med.core.config import DataConfig
from fedjax_med.core.errors import require_choice
from fedjax_med.core.source_facts import AUGMENTATIONS, DEFAULT
from fedjax_med.data.dataset import Hospitals
from fedjax_med.data.duplicates import near_duplicate_groups, similar_pairs
from fedjax_med.data.grey import Grey
from fedjax_med.data.images import read_pixels
from fedjax_med.data.tables import equal_rows, fit_scaling, no_pairs

if TYPE_CHECKING:
  import jax


class Variation(NamedTuple):
  """Random changes of training examples, on the device.

  Attributes:
    draw: (key, leading shape, kind) -> changes in that shape; ``kind`` is client.augmentation.
    apply: (raw examples, changes) -> raw examples.
    kinds: values of client.augmentation that it knows.
  """

  draw: Callable[["jax.Array", tuple[int, ...], str], Any]
  apply: Callable[[Any, Any], Any]
  kinds: tuple[str, ...] = AUGMENTATIONS[DEFAULT]


class Modality(NamedTuple):
  """A kind of example. Raw examples are arrays, or trees of arrays, with a leading axis.

  Attributes:
    name: its key in ``MODALITIES``, which config.json of a run names.
    prepare: (raw examples, value of ``scaled_by``) -> float32 network inputs, on the device.
    vary: changes that client.augmentation asks for; None where there are none.
    copies: raw examples -> [N] int32 groups of examples that are copies of one another.
    similar: raw examples -> [2, pairs] numbers of examples that are copies by themselves.
    read: (path, least side, side or 0 for the file's own, scale, windowed) -> one raw example as
      a run read its own, or a text that says why it cannot be read; see ``images.read_pixels``.
    explain: whether Grad-CAM can be drawn over an example.
    noun: one example, for people.
    nouns: several of them.
    keeps_copies: whether copies stay on one side of the split, and at one hospital. Equal records
      of a table may be of different people, and are only counted.
    fit: scales a dataset by statistics of its training examples, once it is dealt; None for none.
    scaled_by: field of ``DataConfig`` that says how ``prepare`` scales.
  """

  name: str
  prepare: Callable[[Any, str], "jax.Array"]
  vary: Variation | None
  copies: Callable[[Any], np.ndarray]
  similar: Callable[[Any], Iterator[np.ndarray]]
  read: Callable[[pathlib.Path, int, int, Grey, bool], np.ndarray | str]
  explain: bool
  noun: str = "image"
  nouns: str = "images"
  keeps_copies: bool = True
  fit: Callable[[Hospitals], Hospitals] | None = None
  scaled_by: str = "normalisation"


def modality_named(name: str) -> Modality:
  """The modality of that name; raises UserError where there is none."""
  require_choice("modality", name, MODALITIES)
  return MODALITIES[name]


def modality_of(record: dict[str, Any]) -> Modality:
  """The modality of a run by its config.json, which names none in folders of older versions."""
  return modality_named(record.get("modality", DEFAULT))


def worded(text: str, modality: Modality) -> str:
  """The text with the modality's own words for image and images; HTML and paths stay.

  >>> worded("Images: one image of 5 images, data:image/png", TABLE)
  'Records: one record of 5 records, data:image/png'
  """
  words = {"image": modality.noun, "images": modality.nouns}
  words |= {name.capitalize(): word.capitalize() for name, word in words.items()}
  return re.sub(r"(?<![:/\w.-])[Ii]mages?(?![\w/-])", lambda found: words[found[0]], text)


def preparation(modality: Modality, data: DataConfig) -> Callable[[Any], "jax.Array"]:
  """Returns ``prepare(raw examples) -> network inputs`` as the configuration of a run says."""
  prepare: Any = modality.prepare
  return functools.partial(prepare, how=scaling_of(modality, data))


def scaling_of(modality: Modality, data: DataConfig) -> str:
  """The setting that ``prepare`` of a modality takes."""
  return getattr(data, modality.scaled_by)


def _normalise(images: "jax.Array", how: str) -> "jax.Array":
  from fedjax_med.data.normalisation import normalise

  return normalise(images, how)


def _draw_changes(key: "jax.Array", shape: tuple[int, ...], kind: str) -> Any:
  from fedjax_med.data.augmentation import draw_changes

  return draw_changes(key, shape, kind)


def _change(images: "jax.Array", changes: Any) -> "jax.Array":
  from fedjax_med.data.augmentation import change

  return change(images, changes)


def _scale_windows(windows: "jax.Array", how: str) -> "jax.Array":
  from fedjax_med.data.series_inputs import normalise

  return normalise(windows, how)


def _draw_window_changes(key: "jax.Array", shape: tuple[int, ...], kind: str) -> Any:
  from fedjax_med.data.series_inputs import draw_changes

  return draw_changes(key, shape, kind)


def _change_windows(windows: "jax.Array", changes: Any) -> "jax.Array":
  from fedjax_med.data.series_inputs import change

  return change(windows, changes)


def _as_they_are(inputs: "jax.Array", how: str) -> "jax.Array":
  del how  # rows of a table are inputs already
  return inputs


def _no_picture(path: pathlib.Path, *rule: Any) -> str:
  del rule
  return f"{path.name} is no record of a table: use --table"


def _no_window(path: pathlib.Path, *rule: Any) -> str:
  del rule
  return f"{path.name} is a recording: use --series"


PICTURES = Modality(
  name="pictures",
  prepare=_normalise,
  vary=Variation(draw=_draw_changes, apply=_change),
  copies=near_duplicate_groups,
  similar=similar_pairs,
  read=read_pixels,
  explain=True,
)
TABLE = Modality(
  name="table",
  prepare=_as_they_are,
  vary=None,
  copies=equal_rows,
  similar=no_pairs,
  read=_no_picture,
  explain=False,
  noun="record",
  nouns="records",
  keeps_copies=False,
  fit=fit_scaling,
)
SERIES = Modality(
  name="series",
  prepare=_scale_windows,
  vary=Variation(draw=_draw_window_changes, apply=_change_windows, kinds=AUGMENTATIONS["series"]),
  copies=equal_rows,
  similar=no_pairs,
  read=_no_window,
  explain=False,
  noun="window",
  nouns="windows",
  keeps_copies=False,
  scaled_by="ranges",
)
MODALITIES: dict[str, Modality] = {
  "pictures": PICTURES,
  "table": TABLE,
  "series": SERIES,
}
