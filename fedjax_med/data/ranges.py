"""Declared ranges: of the channels of a series (``data.ranges``), and what is outside of any."""

import math
from collections.abc import Mapping

from fedjax_med.core.errors import UserError, require

MOST_OUTSIDE = 0.05  # share of values outside a range from which a strict run stops


def require_inside(outside: Mapping[str, int], total: int, strict: bool, where: str) -> None:
  """Raises UserError where a strict run has more values outside a range than a few.

  Args:
    outside: values outside, by column or channel.
    total: values of each.
    strict: ``data.strict``.
    where: what declares the ranges, for the remedy.
  """
  for name, count in outside.items():
    require(
      not strict or count <= MOST_OUTSIDE * total,
      f"data.strict: {count} of {total} values of '{name}' are outside its range",
      f"correct {where}, or set data.strict=False to cut and count them",
    )


def parse_ranges(text: str, channels: int) -> tuple[tuple[float, float], ...]:
  """(low, high) of each channel; one pair holds for all.

  >>> parse_ranges("-3,3", 2)
  ((-3.0, 3.0), (-3.0, 3.0))
  >>> parse_ranges("-3,3;0,10", 2)
  ((-3.0, 3.0), (0.0, 10.0))

  Raises:
    UserError: it is no list of pairs, of one or as many as there are channels, or low is not under
      high.
  """
  pairs = []
  for part in text.split(";"):
    try:
      low, high = (float(end) for end in part.split(","))
    except ValueError as error:
      raise UserError(
        f"data.ranges='{text}': '{part}' is no pair of numbers; write LOW,HIGH for all channels, or"
        " one pair for each with semicolons between them"
      ) from error
    require(
      math.isfinite(low) and math.isfinite(high) and low < high,
      f"data.ranges='{text}': {low:g} is not under {high:g}",
      "give a range of finite numbers",
    )
    pairs.append((low, high))
  require(
    len(pairs) in (1, channels),
    f"data.ranges='{text}' has {len(pairs)} pairs for {channels} channels",
    "give one pair for all of them, or one for each",
  )
  return tuple(pairs) * (channels if len(pairs) == 1 else 1)
