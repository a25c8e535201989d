"""One rule that turns the grey values of all pictures of a data set into stored pixels.

Pictures of 8 bits are stored as they are. Deeper ones are stored with 16 bits, from a window that
is chosen for the whole data set, so that equal values are equal pixels in every file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedjax_med.core.errors import UserError, require

DEPTHS = (8, 10, 12, 14, 16)  # bits
FEW_LEVELS = 32
SMALL = 0.25  # fractions up to here use a part of 0 to 1
SLACK = 0.01  # by which fractions may leave 0 to 1: a resized picture overshoots a little


class Values(NamedTuple):
  """The grey values of a picture before the data set's rule is applied.

  Attributes:
    pixels: [H, W] uint8 of an 8-bit picture, else float32 in the units of the file; [H, W, 3] where
      colours were asked for and the picture has some.
    deep: whether the file has more than 8 bits.
    inverted: whether the file says that its lowest value is white.
    low: lowest value in the file.
    high: highest value in the file.
    levels: different values in the file.
    whole: whether the values are whole numbers.
    frames: pictures in the file, of which this is the first.
  """

  pixels: np.ndarray
  deep: bool
  inverted: bool
  low: float
  high: float
  levels: int
  whole: bool
  frames: int


class Grey(NamedTuple):
  """The rule of a data set: values from ``low`` (black) to ``high`` (white).

  Attributes:
    low: value that becomes black.
    high: value that becomes white.
    deep: whether pixels are stored with 16 bits and not 8.
    rule: reason for these values, for people.
    levels: median over the pictures of the number of different values that are kept; 0 until
      ``stored_levels`` counts them.
    outside: share of all pixels below ``low`` or above ``high``.
    blank: pictures of one value.
    channels: 1, or 3 for red, green and blue.
  """

  low: float
  high: float
  deep: bool
  rule: str
  levels: int = 0
  outside: float = 0.0
  blank: int = 0
  channels: int = 1

  @property
  def dtype(self) -> Any:
    """uint8 or uint16, whose whole range is from black to white."""
    return np.uint16 if self.deep else np.uint8

  @property
  def described(self) -> str:
    """The rule in a sentence."""
    lost = f"; {100 * self.outside:.0f}% of all pixels lie outside" if self.outside >= 0.005 else ""
    kind = "Grey values" if self.channels == 1 else "Red, green and blue values"
    return f"{kind} {self.low:g} (black) to {self.high:g} (white): {self.rule}{lost}."

  @property
  def record(self) -> dict[str, Any]:
    """The fields as hospitals.json has them: channels only where there are three."""
    values = self._asdict()
    return values if self.channels != 1 else {k: v for k, v in values.items() if k != "channels"}


EIGHT_BITS = Grey(low=0, high=255, deep=False, rule="pictures of 8 bits", levels=256)


def parse_window(text: str) -> tuple[float, float] | None:
  """The two numbers of ``data.window``, None if it is empty; UserError unless they rise."""
  if not text:
    return None
  try:
    low, high = (float(part) for part in text.split(","))
  except ValueError:
    low, high = 0.0, 0.0
  require(
    -1e9 < low < high < 1e9,
    f"data.window='{text}' is not LOW,HIGH with LOW < HIGH",
    "give the values that become black and white, such as -150,250",
  )
  return low, high


def choose_grey(pictures: Sequence[Values], window: str) -> Grey:
  """The rule of a data set.

  Without a window pictures of 8 bits stay as they are; of deeper ones the number of bits (8, 10,
  12, 14 or 16) follows from the largest value of all files, and with negative values the black end
  is the power of two below the smallest.

  Raises:
    UserError: files of 8 bits and deeper ones are mixed, or values need more than 16 bits, and
      there is no window.
  """
  ends = parse_window(window)
  if ends is not None:
    low, high = ends
    return Grey(low=low, high=high, deep=True, rule=f"data.window={window}")
  num_deep = sum(picture.deep for picture in pictures)
  if num_deep == 0:
    return EIGHT_BITS
  low, high = min(p.low for p in pictures), max(p.high for p in pictures)
  require(
    num_deep == len(pictures),
    f"{len(pictures) - num_deep} pictures of 8 bits and {num_deep} deeper ones (values {low:g} to"
    f" {high:g}) are mixed, and no rule makes their greys alike",
    "export them alike, or give data.window=LOW,HIGH, which is applied to the values of all files",
  )
  fractions = not all(picture.whole for picture in pictures)
  if fractions and low >= -1 - SLACK and high <= 1 + SLACK:
    bottom, top = (-1.0 if low < -SLACK else 0.0), 1.0
    if 0 < high < SMALL and bottom == 0:  # an ADC map in mm²/s: the next power of two is white
      top = float(2.0 ** np.ceil(np.log2(high)))
    return Grey(
      low=bottom, high=top, deep=True, rule=f"numbers with a fraction, from {low:g} to {high:g}"
    )
  bits = next((bits for bits in DEPTHS if high < 2**bits), 0)
  if not bits or low < -(2**15):
    raise UserError(
      f"grey values go from {low:g} to {high:g}, beyond 16 bits; give data.window=LOW,HIGH, the"
      " values that become black and white"
    )
  bottom = 0.0 if low >= 0 else -float(2 ** int(np.ceil(np.log2(max(1.0, -low)))))
  rule = f"{bits} bits by the largest value, {high:g}; the smallest is {low:g}"
  return Grey(low=bottom, high=float(2**bits - 1), deep=True, rule=rule)


def to_pixels(picture: Values, grey: Grey) -> np.ndarray:
  """[H, W] or [H, W, 3] uint8 or uint16 pixels of a picture by the rule of its data set."""
  if not grey.deep:
    return picture.pixels
  share = (picture.pixels.astype(np.float32) - grey.low) / (grey.high - grey.low)
  share = 1 - share if picture.inverted else share
  return np.round(np.clip(share, 0, 1) * np.iinfo(np.uint16).max).astype(np.uint16)


def in_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
  """[H, W, channels] of [H, W] or [H, W, channels] pixels; grey ones are repeated."""
  return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], channels, axis=2)


def without_channel(pixels: np.ndarray) -> np.ndarray:
  """[H, W] of [H, W, 1] pixels; colours [H, W, 3] stay as they are."""
  return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def has_colour(pixels: np.ndarray) -> bool:
  """Whether 1% of [H, W, 3] uint8 pixels or more are coloured: channels differ by over 16.

  A grey picture that JPEG stores in three channels has none, nor has one with a coloured mark.
  """
  # By slices, which is several times as fast as reducing over an axis of three.
  red, green, blue = (pixels[..., k] for k in range(3))
  most = np.maximum(np.maximum(red, green), blue)
  return bool((most - np.minimum(np.minimum(red, green), blue) > 16).mean() >= 0.01)


def stored_levels(
  pictures: Sequence[Values], stored: Sequence[np.ndarray], grey: Grey
) -> dict[str, Any]:
  """Counts the different values that are kept, and the pixels outside: fields of ``Grey``.

  Args:
    pictures: values as they were read.
    stored: pixels of the same pictures; a change of size makes new values, which do not count.
    grey: the rule.
  """
  levels = [
    min(picture.levels, int(np.count_nonzero(np.bincount(pixels.ravel()))))
    for picture, pixels in zip(pictures, stored, strict=True)
  ]
  outside = 0.0
  if grey.deep:
    shares = [((p.pixels < grey.low) | (p.pixels > grey.high)).mean() for p in pictures]
    outside = round(float(np.mean(shares)), 4)
  require(
    outside < 0.99,
    f"{100 * outside:.0f}% of all pixels lie outside the grey values {grey.low:g} to {grey.high:g}"
    f" ({grey.rule})",
    "give data.window=LOW,HIGH with the values that the pictures have",
  )
  return {"levels": int(np.median(levels)), "outside": outside, "blank": levels.count(1)}


def to_eight_bits(pixels: np.ndarray) -> np.ndarray:
  """Converts uint8 or uint16 pixels to uint8 for display."""
  return pixels if pixels.dtype == np.uint8 else np.round(pixels / 257).astype(np.uint8)


def as_grey(images: np.ndarray) -> np.ndarray:
  """[N, H, W] of images [N, H, W], [N, H, W, 1] or [N, H, W, 3], ITU-R 601 as Pillow has it."""
  if images.ndim == 3 or images.shape[3] == 1:
    return images.reshape(images.shape[:3])
  parts = [np.zeros((0, *images.shape[1:3]), images.dtype)]
  for start in range(0, len(images), 256):  # a few at a time: sums take four times the memory
    red, green, blue = (images[start : start + 256, ..., k].astype(np.uint32) for k in range(3))
    parts.append(((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).astype(images.dtype))
  return np.concatenate(parts)


def stretched(images: np.ndarray) -> np.ndarray:
  """Stretches deep images to uint8, each from its darkest to its brightest pixel: [N, H, W].

  Contrast is lost. Pictures of 8 bits are returned as they are.
  """
  if images.dtype == np.uint8:
    return images
  low = images.min((1, 2), keepdims=True).astype(np.float32)
  span = np.maximum(images.max((1, 2), keepdims=True) - low, 1)
  return np.round((images - low) / span * 255).astype(np.uint8)
